"""Experts over the mesh: expert parallelism, with tensor parallelism and FSDP.

Each of the X shards of the axis `expert` holds E / X whole experts. Rows are sent to the experts;
weights are not sent along this axis. Along `tensor` an expert's hidden dimension is split, and the
partial outputs are summed. Over `fsdp` and `context` matrices are split only for storage: they are
gathered where they are used, packed ones in packed form, and their gradients are summed and
scattered again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.errors import UserError
from gptoss_jax.ops import moe
from gptoss_jax.ops.grouped_matmul.weights import is_packed, layer_of
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.parallel.collectives import sum_once
from gptoss_jax.parallel.exchange import (
    Exchange,
    Way,
    combine,
    gather,
    receive_rows,
    route,
    scatter,
    send,
    spread,
)
from gptoss_jax.parallel.mesh import ROWS, current
from gptoss_jax.parameters import table
from gptoss_jax.parameters.table import EXPERT, Axis
from gptoss_jax.types import MXFP4, MXFP4_BLOCK, LayerOf, Relaid


def _stored(axes: Sequence[Axis]) -> int:
    """Return which axis is split over EXPERT for storage."""
    return next(
        i
        for i, axis in enumerate(axes)
        if isinstance(axis, tuple) and axis[-len(EXPERT) :] == EXPERT
    )


_ROWS = {name: table.row(f"layers/experts/{name}_weight") for name in ("gate_up", "down")}
# The axis of a layer's matrix that is split over EXPERT for storage: F, and D.
STORED = {row.name: _stored(row.mesh_axes) for row in _ROWS.values()}
# The name of gathered weights, for a `jax.checkpoint` policy that need not keep them.
GATHERED = "gathered_experts"


def experts(
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T A"],
    shares: Float[Array, "B T A"],
    *,
    weights: dict[str, Any],
    mask: Bool[Array, "B T"],
    limit: float,
    chunk: int | None = None,
    exchange: Exchange = "all_gather",
    row_axes: tuple[Any, Any] | None = None,
    ragged: bool | None = None,
    quantised: bool = False,
) -> Float[Array, "B T D"]:
    """Return `ops.moe.experts` of global arrays that are sharded over the current mesh.

    `weights` are the four weights of that op, in any of its forms, and may include its `adapters`.
    They are sharded as the table of parameters says. A stack has the axis of layers in front, not
    split. `Relaid` weights can only be split by expert. `row_axes` are the mesh axes of B and T, by
    default `ROWS` and "context"; along the other axes rows are the same on all devices.

    `exchange` says how rows reach their experts:
    - "all_gather" brings all rows of the axis to each of its shards, and sums their results in
      float32.
    - "all_to_all" sends a row once to each shard that has any of its experts, and sums the results
      that come back in float32.

    Both are exact for any routing. In both, a shard needs memory for all rows of the axis, and
    takes `chunk` of these at a time. `ragged` says whether only real rows are sent, without
    padding, which a CPU can't do; None means where the backend can. `quantised` computes with
    `ops.moe.quantised` of the weights.

    Without a mesh this is the op itself.

    Raises:
        UserError: The mesh does not divide a size.
        ValueError: `Relaid` weights are split over an axis other than `expert`, or the exchange is
            not known.
    """
    if exchange not in ("all_gather", "all_to_all"):
        raise ValueError(f"exchange={exchange!r}: use 'all_gather' or 'all_to_all'")
    mesh = current()
    if mesh is None:
        rows = (a.reshape(-1, a.shape[-1]) for a in (x, ids, shares))
        weights = moe.quantised(weights, x.dtype) if quantised else weights
        out = moe.experts(*rows, **weights, limit=limit, mask=mask.reshape(-1), chunk=chunk)
        return out.reshape(x.shape)
    check(weights, mesh, quantised=quantised)
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    if ragged is None:
        ragged = chips.current().platform != "cpu"
    where = P(*(row_axes or (ROWS, "context")))
    rows = P(*where, None)
    options = {"limit": limit, "chunk": chunk, "exchange": exchange, "ragged": ragged}
    return jax.shard_map(
        partial(_on_one_device, **options, quantised=quantised),
        in_specs=(rows, rows, rows, where, _specs(weights)),
        out_specs=rows,
        check_vma=False,
    )(x, ids, shares, mask, weights)


def _on_one_device(
    x: Float[Array, "B T D"],
    ids: Int[Array, "B T A"],
    shares: Float[Array, "B T A"],
    mask: Bool[Array, "B T"],
    weights: dict[str, Any],
    *,
    limit: float,
    chunk: int | None,
    exchange: Exchange,
    ragged: bool,
    quantised: bool,
) -> Float[Array, "B T D"]:
    """Run one device's part inside `shard_map`, on its rows and its part of the weights."""
    shape, shards = x.shape, lax.axis_size("expert")
    num_experts = weights["gate_up_bias"].shape[0] * shards
    x, ids, shares = (a.reshape(-1, a.shape[-1]) for a in (x, ids, shares))
    ids = jnp.where(mask.reshape(-1, 1), ids, num_experts)
    held = _local_weights(weights, x.dtype if quantised else None)
    run = partial(_run, limit=limit)
    if shards == 1:
        out: Any = run(x, ids, shares, held, chunk=chunk)
    elif exchange == "all_gather":
        out = scatter(run(*_gather_rows(x, ids, shares), held, chunk=chunk), "expert")
    else:
        options = {"num_experts": num_experts, "chunk": chunk, "ragged": ragged}
        out = _by_all_to_all(run, x, ids, shares, weights=held, **options)
    if lax.axis_size("tensor") > 1:
        out = sum_once(out.astype(jnp.float32), "tensor")
    return out.astype(x.dtype).reshape(shape)


def _run(
    x: Float[Array, "M D"],
    ids: Int[Array, "M A"],
    shares: Float[Array, "M A"],
    weights: dict[str, Any],
    *,
    limit: float,
    chunk: int | None = None,
) -> Float[Array, "M D"]:
    """Run this shard's experts on rows; pairs of other shards' experts are skipped."""
    num_local = weights["gate_up_bias"].shape[0]
    mine = ids - lax.axis_index("expert") * num_local
    mine = jnp.where((mine >= 0) & (mine < num_local), mine, num_local)
    needed = jnp.any(mine < num_local, axis=1)
    return moe.experts(x, mine, shares, **weights, limit=limit, mask=needed, chunk=chunk)


def check(weights: dict[str, Any], mesh: Any, *, quantised: bool = False) -> None:
    """Refuse weights that the mesh can't split; see `experts`."""
    num_experts, _, hidden = weights["gate_up_bias"].shape
    expert, tensor = mesh.shape["expert"], mesh.shape["tensor"]
    stored = mesh.shape["fsdp"] * mesh.shape["context"]
    if num_experts % expert:
        raise UserError(
            f"mesh: {num_experts} experts can't be split over expert {expert}: choose a size of "
            f"that axis that divides {num_experts}"
        )
    for name in STORED:
        held = _held(weights[name])
        if isinstance(held, Relaid) and tensor * stored > 1:
            raise ValueError(
                f"{name} is in layout {held.layout!r} for a kernel, which can be split over the "
                "axis expert alone, not over tensor, fsdp or context: load it without a layout"
            )
    packed = quantised or isinstance(_held(weights["down_weight"]), MXFP4)
    if hidden % tensor or (packed and hidden // MXFP4_BLOCK % tensor):
        unit = f" of {MXFP4_BLOCK} x {tensor}, since it is packed in blocks" if packed else ""
        raise UserError(
            f"mesh: the experts' hidden dimension {hidden} can't be split over tensor {tensor}: "
            f"pad it to a multiple{unit or f' of {tensor}'}"
        )
    for axis, parts in ((hidden, tensor * stored), (weights["down_weight"].shape[1], stored)):
        if axis % parts:
            raise UserError(
                f"mesh: an axis of {axis} of the experts' matrices can't be split over "
                f"{parts} devices (fsdp x context, and tensor for the hidden dimension): choose "
                f"sizes whose product divides {axis}"
            )


def _held(weight: Any) -> Any:
    return weight.stack if isinstance(weight, LayerOf) else weight


def _specs(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the shardings of the weights, and of the adapters among them."""
    specs = {name: _spec(name, w) for name, w in weights.items() if name != "adapters"}
    if weights.get("adapters") is None:
        return specs
    found: dict[str, Any] = {}
    for name, own in weights["adapters"]._asdict().items():
        axes = (_ROWS[name].adapter(part)[1] for part in "ab")
        found[name] = own and LowRank(*(P(*each[1:]) for each in axes))  # pyright: ignore[reportArgumentType]
    return {**specs, "adapters": moe.Adapters(**found)}


def _spec(name: str, weight: Any) -> Any:
    """Return a weight's sharding; for a packed weight, that of its arrays' first axes."""
    axes = table.row(f"layers/experts/{name}").mesh_axes
    if isinstance(_held(weight), Relaid):
        axes = axes[:1]
    if isinstance(weight, LayerOf):
        spec: Any = P(None, *axes)
        return LayerOf(spec, P())  # type: ignore[arg-type]
    return P(*axes)


def _local_weights(weights: dict[str, Any], quantised_to: Any = None) -> dict[str, Any]:
    """Gather weights that are split for storage; only one shard of `tensor` keeps the last bias.

    If `quantised_to` is a dtype, the weights go through `ops.moe.quantised`. This is done here,
    where a device has whole blocks: before gathering, unless an adapter has to be folded in.
    """
    weights = dict(weights)
    adapted = weights.get("adapters") is not None
    if quantised_to is not None and not adapted:
        weights = moe.quantised(weights, quantised_to)
    if lax.axis_size(EXPERT) > 1:
        for name, axis in STORED.items():
            weights[name] = _gathered(layer_of(weights[name]), axis)
        if adapted:
            weights["adapters"] = _gathered_adapters(weights["adapters"])
    if quantised_to is not None and adapted:
        weights = moe.quantised(weights, quantised_to)
    if lax.axis_size("tensor") > 1:
        bias: Any = layer_of(weights["down_bias"])
        weights["down_bias"] = jnp.where(lax.axis_index("tensor") == 0, bias, 0)
    return weights


def _gathered(weight: Any, axis: int) -> Any:
    """Gather the arrays of a weight that are split for storage along an axis."""
    return jax.tree.map(
        lambda w: checkpoint_name(lax.all_gather(w, EXPERT, axis=axis, tiled=True), GATHERED),
        weight,
    )


def _gathered_adapters(adapters: moe.Adapters) -> moe.Adapters:
    """Gather A and B of a layer's experts; they are split for storage as the table says."""
    found: dict[str, Any] = {}
    for name, own in adapters._asdict().items():
        axes = (_stored(_ROWS[name].adapter(part)[1][1:]) for part in "ab")
        found[name] = own and LowRank(*map(_gathered, own, axes))
    return moe.Adapters(**found)


def _gather_rows(x: Array, ids: Array, shares: Array) -> tuple[Array, Array, Array]:
    """Gather the rows of all shards, with their ids and shares, on each shard."""
    rows: Any = gather(x, "expert")
    tags: Any = gather(_tags(ids, shares), "expert")
    return rows, *_untag(tags)


def _by_all_to_all(
    run: Callable[..., Array],
    x: Float[Array, "M D"],
    ids: Int[Array, "M A"],
    shares: Float[Array, "M A"],
    *,
    weights: dict[str, Any],
    num_experts: int,
    chunk: int | None,
    ragged: bool,
) -> Float[Array, "M D"]:
    """Run `run(x, ids, shares, weights)` on other shards, and sum the results in float32."""
    plan = route(ids, num_experts=num_experts, axis="expert")
    size = receive_rows(x.shape[0], lax.axis_size("expert"))
    chunk = min(chunk or size, size)
    there = Way("expert", -(-size // chunk) * chunk, x.shape[0], ragged)
    back = there._replace(size=plan.rows.shape[0])
    rows = send(spread(x, plan), plan.counts, there)
    tags: Any = send(spread(_tags(ids, shares), plan), plan.counts, there)
    count = jnp.sum(plan.counts[:, lax.axis_index("expert")])
    real = (jnp.arange(there.size) < count)[:, None]
    ids, shares = _untag(jnp.where(real, tags, num_experts))
    if chunk < size:
        out: Any = _in_chunks(run, chunk, (rows, ids, shares), count, weights)
    else:
        out = run(rows, ids, shares, weights)
    summed: Any = combine(send(jnp.where(real, out, 0), plan.counts.T, back), plan)
    return summed


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    run: Callable[..., Array],
    chunk: int,
    rows: tuple[Array, Array, Array],
    count: Int[Array, ""],
    weights: dict[str, Any],
) -> Float[Array, "R D"]:
    """Run on the first `count` rows, `chunk` at a time, so the cost follows the real rows.

    The size of the buffer of rows is a multiple of `chunk`. Rows in no chunk give zeros. The
    backward pass keeps only the arguments, and gradients of weights add up in the weights' dtype.
    """

    def step(i: Array, out: Array) -> Array:
        return _put(out, i * chunk, run(*_take(rows, i * chunk, chunk), weights))

    return lax.fori_loop(0, -(-count // chunk), step, jnp.zeros_like(rows[0]))


def _in_chunks_fwd(run, chunk: int, rows, count, weights) -> tuple[Array, Any]:
    return _in_chunks(run, chunk, rows, count, weights), (rows, count, weights)


def _in_chunks_bwd(run, chunk: int, saved: Any, d_out: Array) -> tuple[Any, None, Any]:
    (x, ids, shares), count, weights = saved
    leaves, tree = jax.tree.flatten(weights, is_leaf=is_packed)
    free = [i for i, leaf in enumerate(leaves) if not is_packed(leaf)]

    def again(x: Array, ids: Array, shares: Array, values: list[Array]) -> Array:
        everything = list(leaves)
        for i, value in zip(free, values, strict=True):
            everything[i] = value
        return run(x, ids, shares, jax.tree.unflatten(tree, everything))

    def step(i: Array, d: tuple[Array, Array, list[Array]]) -> tuple[Array, Array, list[Array]]:
        at = i * chunk
        x_i, ids_i, shares_i, d_out_i = _take((x, ids, shares, d_out), at, chunk)
        values = [leaves[i] for i in free]
        _, pull = jax.vjp(lambda x, s, v: again(x, ids_i, s, v), x_i, shares_i, values)
        d_x, d_shares, d_values = pull(d_out_i)
        added = [a + b for a, b in zip(d[2], d_values, strict=True)]
        return _put(d[0], at, d_x), _put(d[1], at, d_shares), added

    start = (jnp.zeros_like(x), jnp.zeros_like(shares), [jnp.zeros_like(leaves[i]) for i in free])
    d_x, d_shares, d_values = lax.fori_loop(0, -(-count // chunk), step, start)
    by_leaf = dict(zip(free, d_values, strict=True))
    d_weights = [by_leaf.get(i) for i in range(len(leaves))]
    return (d_x, None, d_shares), None, jax.tree.unflatten(tree, d_weights)


_in_chunks.defvjp(_in_chunks_fwd, _in_chunks_bwd)


def _take(arrays: tuple[Array, ...], at: Array, size: int) -> list[Array]:
    return [lax.dynamic_slice_in_dim(a, at, size) for a in arrays]


def _put(array: Array, at: Array, part: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(array, part, at, 0)


def _tags(ids: Int[Array, "M A"], shares: Float[Array, "M A"]) -> Float[Array, "M 2*A"]:
    """Put ids and shares into one array; float32 holds every integer up to 2**24."""
    return jnp.concatenate([ids.astype(jnp.float32), shares.astype(jnp.float32)], axis=1)


def _untag(tags: Float[Array, "M 2*A"]) -> tuple[Int[Array, "M A"], Float[Array, "M A"]]:
    ids, shares = jnp.split(tags, 2, axis=1)
    return ids.astype(jnp.int32), shares
