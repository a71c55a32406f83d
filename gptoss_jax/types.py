"""Pytree containers that all parts of the package share.

Dimension letters in the whole package: `B` batch, `T` query length, `S` key length, `V` vocabulary,
`L` layers, `D` model, `N` query heads, `K` key/value heads, `G` = N/K, `H` head size, `E` experts,
`A` active experts, `F` expert hidden size, `W` window, `M` rows (B*T flattened).
"""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

MXFP4_BLOCK = 32  # values that share one scale byte (OCP Microscaling Formats v1.0, section 5.1)

# A nested dict of arrays and `MXFP4` values. A parameter has the same path in memory, in the table
# of parameters and in checkpoints.
Params = dict[str, Any]


@struct.dataclass
class MXFP4:
    """A weight in 4-bit microscaling form. Ops accept it in place of an array.

    It stands for an array `[..., C]` with C a multiple of 32. Byte j of a block holds elements 2j
    (low nibble) and 2j+1 (high nibble). An element's value is `e2m1[nibble] * 2**(scale - 127)`.
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
        """Index the leading axes. The last axis can't be sliced: the blocks run along it."""
        return MXFP4(self.blocks[index], self.scales[index])


@struct.dataclass
class Relaid:
    """An `MXFP4` weight, rearranged into the order in which a kernel reads it.

    It stands for an array `[*lead, *rows, C]`, blocks along C. `codes` and `scales` start with the
    axes `lead`; `layout` decides the other axes (see `ops.mxfp4.layouts`). No value is lost:
    `layouts.restore` gives the `MXFP4` back.
    """

    codes: Array
    scales: Array
    layout: str = struct.field(pytree_node=False)
    rows: tuple[int, ...] = struct.field(pytree_node=False)
    columns: int = struct.field(pytree_node=False)  # C

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes before the matrix: layers, experts. `codes` and `scales` end in a matrix."""
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
    """One layer of a stacked weight `[L, ...]`, given as the stack and the layer's index.

    A kernel reads the layer from the stack, so the layer is not copied. Ops accept it in place of
    the layer's array, and compute no gradient for it.
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

    `segment_ids` are 0 for padding and 1, 2, ... for the records of a row. `positions` restart at 0
    in each segment. `weights` are 0 where the target does not count in the loss.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    # The source of each row, in a mixture of sources; None without a mixture.
    sources: Int[Array, " B"] | None = None
    # Further arrays that an objective needs: `per_token` [B, T, ...], and `shared` by all rows.
    per_token: dict[str, Array] | None = None
    shared: dict[str, Array] | None = None


@struct.dataclass
class KVCache:
    """Key/value cache: keys (rotated) and values seen so far, one tuple entry per layer.

    A full layer has one slot per position of the context. A banded layer has a ring of W slots:
    position p is in slot p % W. `positions` has the position that each slot holds, -1 if none.
    """

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    positions: tuple[Int[Array, "B S"], ...]
    # True while the cache is empty: prefill then attends only to its own tokens, as training does.
    empty: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class RouterStats:
    """Router statistics, one row per layer, over the tokens that are not padding, in float32."""

    load: Float[Array, "L E"]  # share of the routed (token, expert) pairs; a row sums to 1
    balance_loss: Float[Array, " L"]  # E * sum_e load_e * mean_prob_e: 1 when balanced
    z_loss: Float[Array, " L"]  # mean of logsumexp(router logits)**2
    dropped: Float[Array, " L"]  # share of the routed pairs dropped for want of capacity


@struct.dataclass
class Output:
    """The result of one forward pass."""

    hidden: Float[Array, "B T D"]  # after the final norm; unembed it to get logits
    cache: KVCache | None
    router: RouterStats
    captured: dict[str, Array]  # name -> [L, ...], for the names that were requested


@struct.dataclass
class TrainState:
    """The state that a training step reads and writes."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    rng: PRNGKeyArray
    ema: Params | None = None  # float32 moving average of trained parameters, if requested
