"""Pytree containers that every room of the package shares.

Dimension letters, here and everywhere: `B` batch, `T` query length, `S` key length, `V` vocabulary,
`L` layers, `D` model, `N` query heads, `K` kv heads, `G` = N/K, `H` head dim, `E` experts,
`A` active experts, `F` expert hidden, `W` window, `M` rows (B*T flattened).
"""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

MXFP4_BLOCK = 32  # values that share one scale byte (OCP Microscaling Formats v1.0, section 5.1)

# A nested dict of arrays and `MXFP4` values. The paths are the same in memory, in the table
# of parameters and in checkpoints.
Params = dict[str, Any]


@struct.dataclass
class MXFP4:
    """A weight in 4-bit microscaling form: a value that ops take where they take an array.

    Stands for an array `[..., C]` with C a multiple of 32. Byte j of a block holds elements 2j (low
    nibble) and 2j+1 (high nibble) of the block; its value is `e2m1[nibble] * 2**(scale - 127)`.
    """

    blocks: UInt8[Array, "... C/32 16"]
    scales: UInt8[Array, "... C/32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * MXFP4_BLOCK)

    @property
    def ndim(self) -> int:
        return len(self.scales.shape)

    def __getitem__(self, index: Any) -> MXFP4:
        """Index the leading axes; the last one, along which the blocks run, is not for slicing."""
        return MXFP4(self.blocks[index], self.scales[index])


@struct.dataclass
class Relaid:
    """An `MXFP4` weight in the order in which a kernel reads it: see `ops.mxfp4.layouts`.

    Stands for an array `[*lead, *rows, C]`, blocks along C. `codes` and `scales` start with the
    axes `lead`; what follows is the layout's. Lossless: `layouts.restore` gives the `MXFP4` back.
    """

    codes: Array
    scales: Array
    layout: str = struct.field(pytree_node=False)
    rows: tuple[int, ...] = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)  # C

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes before the matrix: layers, experts. Both arrays end in a matrix."""
        return self.codes.shape[:-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return (*self.lead, *self.rows, self.columns)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> Relaid:
        """Index the axes before the matrix."""
        return self.replace(codes=self.codes[index], scales=self.scales[index])  # type: ignore[attr-defined]


@struct.dataclass
class LayerOf:
    """One layer of a stacked weight `[L, ...]`, not cut out of it: a kernel takes stack and index.

    Ops take it where they take the layer's array; no gradient is formed for it.
    """

    stack: Array | MXFP4 | Relaid
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)


@struct.dataclass
class Batch:
    """Packed training rows. `targets[b, t]` is the token after `tokens[b, t]` in its segment.

    `segment_ids` are 0 for padding and 1, 2, ... for the records of a row; `positions` restart at 0
    in each segment; `weights` are 0 wherever the target does not count.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    # Which source of a mixture each row is from; None where there is no mixture.
    sources: Int[Array, " B"] | None = None
    # What an objective needs beside: for each token [B, T, ...], and the same for all rows.
    per_token: dict[str, Array] | None = None
    shared: dict[str, Array] | None = None


@struct.dataclass
class KVCache:
    """Keys (rotated) and values seen so far, a tuple entry per layer.

    A full layer has a slot per position of the context; a banded layer a ring of W slots, in which
    position p lives in slot p % W. `positions` says which position a slot holds, -1 if none.
    """

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    positions: tuple[Int[Array, "B S"], ...]
    # True while nothing is in it: prefill then attends to its own tokens alone, as training does.
    empty: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class RouterStats:
    """What the routers did, a row per layer, over the tokens that are not padding, in float32."""

    load: Float[Array, "L E"]  # share of the routed (token, expert) pairs; a row sums to 1
    balance_loss: Float[Array, " L"]  # E * sum_e load_e * mean_prob_e: 1 when balanced
    z_loss: Float[Array, " L"]  # mean of logsumexp(router logits)**2
    dropped: Float[Array, " L"]  # share of the routed pairs dropped for want of capacity


@struct.dataclass
class Output:
    """What one forward pass returns."""

    hidden: Float[Array, "B T D"]  # after the final norm: unembed to get logits
    cache: KVCache | None
    router: RouterStats
    captured: dict[str, Array]  # name -> [L, ...] for the names asked for


@struct.dataclass
class TrainState:
    """All that a training step reads and writes."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    rng: PRNGKeyArray
    ema: Params | None = None  # float32 average of the trained parameters, where asked for
