"""The functions of `blocks` for ring attention on TPU, by JAX's splash attention.

A shard's own chunks are a row in causal order. The keys of another shard all come before the
queries that attend to them. So both masks are known without positions, and the kernel reads only
the segments.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

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
from jaxtyping import Array, Float

from gptoss_jax import chips
from gptoss_jax.ops.attention import pallas_tpu
from gptoss_jax.parallel.blocks import Places

# A logsumexp at or below this means that all keys of the row were masked.
BLIND = -1e30


def refuse(q: Array, k: Array, v: Array, *, window: int | None) -> str | None:
    """Return why splash attention can't compute these arguments of the ring here, or None."""
    if window is not None:
        return "a band wider than a shard's chunks is decided by positions, which it does not read"
    where: Any = {"segment_ids": None, "positions": None}
    return pallas_tpu.refuse(q, k, v, None, window=window, **where)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    window: int | None,
    queries: Places,
    keys: Places,
    own: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend without sinks; see `blocks.forward`. The output was rounded to the inputs' dtype.

    `own`: queries and keys are the same tokens, in causal order; otherwise all keys come before all
    queries.
    """
    del window
    plan = _plan(q)
    infos = _infos(plan, q.shape[2], own)

    def one(q, k, v, q_ids, k_ids):
        ids = splash.SegmentIds(q_ids, k_ids)
        return splash._splash_attention_forward(
            infos[0], q, k, v, ids, None, save_residuals=True, **pallas_tpu._common(plan)
        )

    with pallas_tpu._precision(q.dtype):
        out, (lse,) = pallas_tpu._over_batch(plan, one, *_operands(plan, q, k, v, queries, keys))
    out, lse = (jnp.moveaxis(x, 1, 2)[:, : q.shape[1]] for x in (out, lse))
    blind = (lse <= BLIND) | (queries.segment_ids == 0)[:, :, None]
    out = jnp.where(blind[..., None], 0, out).astype(jnp.float32)
    return out, jnp.where(blind, -jnp.inf, lse)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    d_out: Float[Array, "B T N H"],
    *,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    window: int | None,
    queries: Places,
    keys: Places,
    own: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Return what these queries and keys add to dq, dk and dv; see `blocks.backward`."""
    del window
    plan, T = _plan(q), q.shape[1]
    infos = _infos(plan, q.shape[2], own)

    def one(q, k, v, q_ids, k_ids, out, lse, d_out):
        ids = splash.SegmentIds(q_ids, k_ids)
        residuals = (q, k, v, ids, None, out, lse, *infos)
        gradients = splash._splash_attention_bwd(
            save_residuals=False, res=residuals, do=d_out, **pallas_tpu._common(plan)
        )
        return gradients[3:6]

    rows = (_heads_first(plan, x) for x in (out, lse, d_out))
    with pallas_tpu._precision(q.dtype):
        gradients = pallas_tpu._over_batch(
            plan, one, *_operands(plan, q, k, v, queries, keys), *rows
        )
    dq, dk, dv = (jnp.moveaxis(x, 1, 2)[:, :T].astype(jnp.float32) for x in gradients)
    return dq * q.shape[-1] ** -0.5, dk, dv


@dataclasses.dataclass(frozen=True)
class Before(masks.Mask):
    """A mask in which every query sees every key: query indices begin where key indices end."""

    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers of queries and keys."""
        return (self.length, self.length)

    @property
    def q_sequence(self) -> np.ndarray:
        """Index of each query."""
        return np.arange(self.length, 2 * self.length, dtype=np.int32)

    @property
    def mask_function(self) -> pallas_tpu.Sees:
        """The function that the kernels would use for the mask, if any block needed one."""
        return pallas_tpu.Sees(None)

    def __getitem__(self, block: Any) -> np.ndarray:
        """Return one entry with the any() and all() of the block that two slices select."""
        return np.array([[True]])


@functools.lru_cache(maxsize=64)
def _infos(plan: pallas_tpu.Plan, N: int, own: bool) -> tuple[Any, Any]:
    """Return splash's tables for the forward pass and dq, and those for dk and dv."""
    if own:
        return pallas_tpu._infos(plan.length, None, plan.blocks, N)
    mask = masks.MultiHeadMask([Before(plan.length)] * N)
    shape = (plan.blocks.q, plan.blocks.kv)
    return mask_info.process_mask(mask, shape)[0], mask_info.process_mask_dkv(mask, shape)[0]


def _plan(q: Float[Array, "B T N H"]) -> pallas_tpu.Plan:
    blocks, length = pallas_tpu.fit(q.shape[1], None, q.dtype)
    return pallas_tpu.Plan(length, None, blocks, chips.tpu_interpreter())


def _operands(
    plan: pallas_tpu.Plan, q: Any, k: Any, v: Any, queries: Places, keys: Places
) -> list[Any]:
    """Return the operands in splash's layout, with q scaled; padding of rows has segment 0."""
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    ids = [_padded(plan, x.segment_ids) for x in (queries, keys)]
    return [_heads_first(plan, x) for x in (scaled, k, v)] + ids


def _padded(plan: pallas_tpu.Plan, x: Array) -> Array:
    return jnp.pad(x, [(0, 0), (0, plan.length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _heads_first(plan: pallas_tpu.Plan, x: Array) -> Array:
    return jnp.moveaxis(_padded(plan, x), 2, 1)
