"""Self-attention on TPU: JAX's splash attention, with sinks and a float32 gradient for them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as mask_info,
)
from jaxtyping import Array, Float, Int

from gptoss_jax import chips

LANES = 128  # every block is a multiple of this


class Blocks(NamedTuple):
    """Queries and keys per block in each of the three kernels, for bfloat16; half for float32."""

    q: int
    kv: int
    kv_at_once: int  # how many of the `kv` keys in fast memory have their logits formed at once


# In a banded layer large blocks waste work outside the band; in a full layer small blocks waste
# time per step. Ranked by the number of instructions in libtpu's final code for v5e, all three
# kernels of one head at T=4096. Banded: 88 thousand in 32 steps per kernel with blocks of 256, and
# 102 thousand in 16 steps with 512. Full, per thousand logits: 24.3 with 512 x 512, 21.3 with
# 512 x 1024, 19.8 with 1024 x 1024. Not timed on any device.
BLOCKS = {
    "v5e": {"banded": Blocks(256, 256, 256), "full": Blocks(1024, 1024, 512)},
    "v5p": {"banded": Blocks(256, 256, 256), "full": Blocks(1024, 1024, 512)},
    "v6e": {"banded": Blocks(256, 256, 256), "full": Blocks(1024, 1024, 512)},
    "tpu7x": {"banded": Blocks(256, 256, 256), "full": Blocks(1024, 1024, 512)},
}
# Blocks are halved while they pad the row by more than this share of its length.
MAX_PADDING = 1 / 8


def refuse(q, k, v, sinks, *, window, segment_ids, positions) -> str | None:
    """Return why the kernel can't run with these arguments here, or None."""
    del sinks, window, segment_ids, positions
    chip = chips.refuse_tpu_kernel()
    if chip is not None:
        return chip
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return (
            "q, k and v are to be float32 or bfloat16, all three the same, not "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    return None


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attend over rows whose index order is their causal order; see `attention`.

    Positions rise by one within a segment, so the window applies to indices. Memory is linear in T.
    """
    del positions
    T, H = q.shape[1], q.shape[-1]
    blocks, length = fit(T, window, q.dtype)
    extra = length - T

    def rows(x):
        return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

    scaled = q * jnp.asarray(H**-0.5, q.dtype)
    heads_first = (jnp.moveaxis(rows(x), 2, 1) for x in (scaled, k, v))
    plan = Plan(length, window, blocks, chips.tpu_interpreter())
    out: Any = _attend(plan, *heads_first, sinks, rows(segment_ids))
    out = jnp.moveaxis(out, 1, 2)[:, :T]
    # A select, so that any cotangent of a padding row (also NaN) becomes zero.
    return jnp.where((segment_ids != 0)[:, :, None, None], out, 0)


def fit(length: int, window: int | None, dtype: Any) -> tuple[Blocks, int]:
    """Return the blocks for rows of `length`, and the padded length, which they divide."""
    chip = BLOCKS[chips.current().kind]
    blocks = chip["full" if window is None or 2 * window >= length else "banded"]
    if dtype == jnp.float32:
        blocks = Blocks(*(max(size // 2, LANES) for size in blocks))
    least = _up(length, LANES)
    while max(blocks) > LANES:
        padded = _up(length, max(blocks))
        if padded - least <= MAX_PADDING * least:
            return blocks, padded
        blocks = Blocks(*(max(size // 2, LANES) for size in blocks))
    return blocks, least


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Plan(NamedTuple):
    """The static parameters of the kernels; `length` is padded."""

    length: int
    window: int | None
    blocks: Blocks
    interpret: Any


@dataclasses.dataclass(frozen=True)
class Sees:
    """A function of query and key indices that says which query sees which key, for the kernels."""

    window: int | None

    def __call__(self, q: Any, k: Any) -> Any:
        """Compare indices that broadcast with each other."""
        causal = q >= k
        return causal if self.window is None else causal & (q - k < self.window)


@dataclasses.dataclass(frozen=True)
class Band(masks.Mask):
    """A causal band of `window` keys that describes a block without computing its pairs.

    Splash needs to know of each block whether any pair is visible and whether all are. Its own
    masks compute all pairs of the block for this: 17 billion at 131,072 tokens, three times.
    """

    length: int
    window: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers of queries and keys."""
        return (self.length, self.length)

    @property
    def q_sequence(self) -> np.ndarray:
        """Index of each query."""
        return np.arange(self.length, dtype=np.int32)

    @property
    def mask_function(self) -> Sees:
        """The function by which the kernels compute the mask."""
        return Sees(self.window)

    def __getitem__(self, block: Any) -> np.ndarray:
        """Return two entries with the any() and all() of the block that two slices select."""
        q, k = block
        least, most = q.start - (k.stop - 1), (q.stop - 1) - k.start
        end = self.length if self.window is None else self.window
        some = most >= 0 and least < end
        return np.array([[some, least >= 0 and most < end]])


@functools.lru_cache(maxsize=64)
def _infos(length: int, window: int | None, blocks: Blocks, N: int) -> tuple[Any, Any]:
    """Return splash's tables for the forward pass and dq, and those for dk and dv."""
    mask = masks.MultiHeadMask([Band(length, window)] * N)
    shape = (blocks.q, blocks.kv)
    forward, _ = mask_info.process_mask(mask, shape)
    backward, _ = mask_info.process_mask_dkv(mask, shape)
    return forward, backward


def _common(plan: Plan) -> dict[str, Any]:
    """Return the arguments that splash's forward and backward passes share.

    The backward pass uses two kernels: the fused one keeps a dq for every block of keys, which
    takes memory of order T^2.
    """
    q, kv, at_once = plan.blocks
    return {
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "block_sizes": splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=at_once,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=at_once,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        "residual_checkpoint_name": None,
        "mask_function": Sees(plan.window),
        "attn_logits_soft_cap": None,
        "interpret": plan.interpret,
    }


@contextlib.contextmanager
def _precision(dtype: Any) -> Iterator[None]:
    """Multiply float32 operands in float32; splash sets no precision for its products."""
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        yield


def _over_batch(plan: Plan, one: Any, *args: Array) -> Any:
    """Map over the first axis: splash takes one row of tokens at a time.

    The interpreter can't use `vmap`: in jax 0.10 to 0.12 it fails on a kernel that has a mapped
    axis and "parallel" axes.
    """
    if isinstance(plan.interpret, bool):
        return jax.vmap(one)(*args)
    return jax.lax.map(lambda row: one(*row), args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q: Array, k: Array, v: Array, sinks: Any, segments: Array) -> Array:
    """Attend with q [B, N, T, H] (scaled), k and v [B, K, T, H]; T is a multiple of the blocks."""
    return _attend_fwd(plan, q, k, v, sinks, segments)[0]


def _attend_fwd(plan: Plan, q: Array, k: Array, v: Array, sinks: Any, segments: Array) -> Any:
    info, _ = _infos(plan.length, plan.window, plan.blocks, q.shape[1])

    def one(q, k, v, segments):
        ids = splash.SegmentIds(segments, segments)
        return splash._splash_attention_forward(
            info, q, k, v, ids, sinks, save_residuals=True, **_common(plan)
        )

    with _precision(q.dtype):
        out, (logsumexp,) = _over_batch(plan, one, q, k, v, segments)
    return out, (q, k, v, sinks, segments, out, logsumexp)


def _attend_bwd(plan: Plan, saved: Any, d_out: Array) -> tuple[Any, ...]:
    """Differentiate; the sinks' gradient is formed here, as splash's is not in float32.

    A sink has dlogit = -p_sink * rowsum(do * o), summed over the rows of its head in float32;
    splash's own is a product in the output's dtype. The other gradients of splash need only a
    `logsumexp` that includes the sinks.
    """
    q, k, v, sinks, segments, out, logsumexp = saved
    forward, backward = _infos(plan.length, plan.window, plan.blocks, q.shape[1])

    def one(q, k, v, segments, out, logsumexp, d_out):
        ids = splash.SegmentIds(segments, segments)
        residuals = (q, k, v, ids, None, out, logsumexp, forward, backward)
        gradients = splash._splash_attention_bwd(
            save_residuals=False, res=residuals, do=d_out, **_common(plan)
        )
        return gradients[3:6]

    with _precision(q.dtype):
        dq, dk, dv = _over_batch(plan, one, q, k, v, segments, out, logsumexp, d_out)
    d_sinks = None
    if sinks is not None:
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
        share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - logsumexp)
        d_sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, d_sinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)
