"""The experts spread over 8 devices against the reference on one: values and every gradient."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import MeshConfig
from gptoss_jax.errors import UserError
from gptoss_jax.ops import moe, mxfp4
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.parallel import exchange as exchange_module
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel.experts import experts
from gptoss_jax.parallel.mesh import ROWS
from gptoss_jax.parameters import table
from gptoss_jax.types import MXFP4, LayerOf

B, T, A, E, D, F, LIMIT = 8, 12, 3, 16, 96, 128, 1.5  # a limit that many activations meet
MATRICES = ("gate_up_weight", "down_weight")
encode = jax.jit(mxfp4.encode)
SHAPES = {
    "gate_up_weight": (E, 2, F, D),
    "gate_up_bias": (E, 2, F),
    "down_weight": (E, D, F),
    "down_bias": (E, D),
}


def inputs(routing: str = "even", *, num_experts: int = E) -> tuple:
    """Return (x, ids, shares, weights, mask); `routing` is even, skewed, one, few or dropped."""
    rng = np.random.default_rng(len(routing))
    logits = rng.normal(size=(B, T, num_experts))
    if routing == "skewed":  # most rows to expert 1, none to the upper half
        logits[..., 1] += 6
        logits[..., num_experts // 2 :] = -np.inf
    ids = np.argsort(-logits, axis=-1)[..., :A].astype(np.int32)
    shares = np.exp(np.take_along_axis(logits, ids, axis=-1))
    shares /= shares.sum(axis=-1, keepdims=True)
    if routing == "one":
        ids = np.full_like(ids, num_experts - 1)
    mask = np.ones((B, T), bool)
    x = rng.normal(size=(B, T, D))
    if routing == "dropped":
        gone = rng.random(ids.shape) < 0.4
        gone[2, 5] = True
        ids = np.where(gone, num_experts, ids).astype(np.int32)
    if routing == "masked":
        mask = rng.random(mask.shape) < 0.6
        mask[3] = False
    weights = {
        name: jnp.asarray(rng.normal(size=(num_experts, *shape[1:])) * 0.2, jnp.float32)
        for name, shape in SHAPES.items()
    }
    x, shares = (jnp.asarray(a, jnp.float32) for a in (x, shares))
    return x, jnp.asarray(ids), shares, weights, jnp.asarray(mask)


def make(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """Make a mesh; what is left of 8 devices goes to "data", which B allows."""
    return meshes.make(MeshConfig(**{"data": -1, **sizes}))


def place(mesh: Any, args: tuple, row_axes: tuple = (ROWS, "context")) -> tuple:
    """Spread the inputs as a training step has them."""
    x, ids, shares, weights, mask = args

    def put(a: Any, spec: P) -> Any:
        return jax.device_put(a, NamedSharding(mesh, spec))

    rows = P(*row_axes)
    weights = {
        k: w if k == "adapters" else put(w, P(*table.row(f"layers/experts/{k}").mesh_axes))
        for k, w in weights.items()
    }
    return *(put(a, rows) for a in (x, ids, shares)), weights, put(mask, rows)


def everything(run: Any, args: tuple) -> dict[str, Any]:
    """Return the output, and the gradients of a weighted sum of it by name."""
    x, ids, shares, weights, mask = args
    packed = {k: w for k, w in weights.items() if isinstance(w, MXFP4 | LayerOf)}
    free = {k: w for k, w in weights.items() if k not in packed}

    @jax.jit
    def both(x: Any, shares: Any, free: Any, packed: Any, ids: Any, mask: Any) -> dict:
        def loss(x: Any, shares: Any, free: Any) -> Any:
            out = run(x, ids, shares, weights={**free, **packed}, mask=mask)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        (_, out), (d_x, d_shares, d_free) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
            x, shares, free
        )
        gradients = jax.tree_util.tree_leaves_with_path(d_free)
        named = {jax.tree_util.keystr(path): d for path, d in gradients}
        return {"out": out, "x": d_x, "shares": d_shares, **named}

    return both(x, shares, free, packed, ids, mask)


def reference(x: Any, ids: Any, shares: Any, *, weights: Any, mask: Any) -> Any:
    rows = (a.reshape(-1, a.shape[-1]) for a in (x, ids, shares))
    out = moe.experts(
        *rows, **weights, limit=LIMIT, mask=mask.reshape(-1), implementation="reference"
    )
    return out.reshape(x.shape)


def check(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, a in got.items():
        b = np.asarray(want[name])
        assert a.dtype == b.dtype and a.shape == b.shape, name
        size = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, atol=1e-5 * size, rtol=0, err_msg=name)


def compare(sizes: dict, args: tuple, *, want: tuple | None = None, **options: Any) -> dict:
    """Hold the spread experts to the reference, on the same inputs or on those of `want`."""
    mesh = make(sizes)
    row_axes = options.get("row_axes") or (ROWS, "context")

    def run(*rows: Any, **rest: Any) -> Any:
        return experts(*rows, **rest, limit=LIMIT, **options)

    with jax.set_mesh(mesh):
        got = everything(run, place(mesh, args, row_axes))
    check(got, everything(reference, want or args))
    return got


def pack(args: tuple) -> tuple:
    x, ids, shares, weights, mask = args
    weights = {k: encode(w) if k in MATRICES else w for k, w in weights.items()}
    return x, ids, shares, weights, mask


FAST = [
    ({"expert": 8}, "all_to_all", "even", False, None),
    ({"expert": 4, "tensor": 2}, "all_to_all", "masked", True, 13),
    ({"expert": 2, "fsdp": 2, "context": 2}, "all_gather", "dropped", False, 13),
]
ROUTES = [("even", True, 7), ("one", False, 13), ("skewed", True, None), ("masked", False, None)]
# Each exchange with each of the routes, on a mesh of its own.
SLOW = [
    (sizes, ("all_gather", "all_to_all")[i % 2], *ROUTES[(i + i // 4) % 4])
    for i, sizes in enumerate(
        (
            {"expert": 8},
            {"expert": 4},
            {"expert": 2, "tensor": 2},
            {"expert": 2},
            {"expert": 2, "tensor": 4},
            {"expert": 4, "fsdp": 2},
            {"expert": 2, "context": 4},
            {"expert": 2, "tensor": 2, "context": 2},
        )
    )
] + [
    ({"tensor": 4, "fsdp": 2}, "all_gather", "skewed", True, None),
    ({"expert": 4, "context": 2}, "all_to_all", "one", False, None),
    ({"tensor": 2}, "all_gather", "masked", False, 5),
    ({"tensor": 4, "context": 2}, "all_gather", "even", False, None),
    ({"fsdp": 8}, "all_gather", "even", False, None),
    ({"context": 4, "fsdp": 2}, "all_gather", "even", True, None),
]


@pytest.mark.parametrize(
    ("sizes", "exchange", "routing", "packed", "chunk"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_values_and_gradients(
    sizes: dict,
    exchange: str,
    routing: str,
    packed: bool,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange_module, "EMPTY", jnp.nan)  # what no row was received in
    x, *rest, mask = inputs(routing)
    args = x, *rest, mask
    if packed:
        args = pack(args)
    poisoned = jnp.where(mask[..., None], x, jnp.nan), *args[1:]
    got = compare(sizes, poisoned, want=args, exchange=exchange, chunk=chunk)
    for name in ("out", "x", "shares"):
        np.testing.assert_array_equal(got[name][~mask], 0, err_msg=name)


def send_by_the_book(
    operand: Any, output: Any, input_offsets: Any, send_sizes: Any, output_offsets: Any,
    recv_sizes: Any, *, axis_name: str,
) -> Any:  # fmt: skip
    """Do as the documentation of `jax.lax.ragged_all_to_all` says, which no CPU can."""
    me = jax.lax.axis_index(axis_name)
    rows, starts, sizes, places = (
        jax.lax.all_gather(a, axis_name)
        for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    result = output
    for source in range(rows.shape[0]):
        at = jnp.arange(output.shape[0]) - places[source, me]
        here = (at >= 0) & (at < sizes[source, me])
        result = jnp.where(here[:, None], rows[source][starts[source, me] + at], result)
    return jnp.where(jnp.all(recv_sizes == sizes[:, me]), result, jnp.nan)


@pytest.mark.parametrize(
    ("sizes", "routing", "chunk"),
    [
        ({"expert": 4, "tensor": 2}, "masked", 50),
        pytest.param({"expert": 8}, "skewed", None, marks=pytest.mark.slow),
        pytest.param({"expert": 2, "fsdp": 2}, "one", 7, marks=pytest.mark.slow),
    ],
)
def test_ragged_exchange(
    sizes: dict, routing: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "EMPTY", jnp.nan)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", send_by_the_book)
    compare(sizes, inputs(routing), exchange="all_to_all", chunk=chunk, ragged=True)


@pytest.mark.parametrize(
    ("sizes", "layout", "exchange"),
    [
        ({"expert": 4}, "planes", "all_to_all"),
        pytest.param({"expert": 2, "fsdp": 2}, None, "all_gather", marks=pytest.mark.slow),
        pytest.param({"expert": 2}, None, "all_to_all", marks=pytest.mark.slow),
        pytest.param({"expert": 8}, "planes", "all_gather", marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "context": 2}, None, "all_gather", marks=pytest.mark.slow),
    ],
)
def test_layers_of_stacks(sizes: dict, layout: str | None, exchange: str) -> None:
    args = pack(inputs())
    weights = args[3]
    mesh = make(sizes)

    def layer(name: str) -> Any:
        weight = weights[name]
        axes: tuple = (None, *table.row(f"layers/experts/{name}").mesh_axes)
        if layout:
            weight = moe.relay(name, weight, layout=layout)
            axes = axes[:2]
        stack = jax.tree.map(lambda a: jnp.stack([a * 0, a, a // 2]), weight)
        return LayerOf(jax.device_put(stack, NamedSharding(mesh, P(*axes))), jnp.int32(1))

    stacks = {name: layer(name) for name in MATRICES}
    with jax.set_mesh(mesh):
        *rows, free, mask = place(mesh, args)
        run = partial(experts, limit=LIMIT, chunk=13, exchange=exchange)
        got = everything(run, (*rows, {**free, **stacks}, mask))
    check(got, everything(reference, args))


@pytest.mark.parametrize(
    ("sizes", "exchange", "chunk"),
    [
        ({"expert": 2, "tensor": 2}, "all_to_all", 31),
        pytest.param({"expert": 4, "fsdp": 2}, "all_gather", None, marks=pytest.mark.slow),
        ({"fsdp": 2, "context": 2, "tensor": 2}, "all_gather", None),
        pytest.param({"tensor": 4}, "all_gather", 13, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("both", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters(sizes: dict, exchange: str, chunk: int | None, both: bool) -> None:
    rank = 5
    shapes = ((E, D, rank), (E, rank, 2, F), (E, F, rank), (E, rank, D))
    rng = np.random.default_rng(3)
    a, b, c, d = (jnp.asarray(rng.normal(size=shape) * 0.1, jnp.float32) for shape in shapes)
    adapters = Adapters(LowRank(a, b) if both else None, LowRank(c, d))
    *rows, weights, mask = pack(inputs("masked"))
    args = (*rows, {**weights, "adapters": adapters}, mask)
    got = compare(sizes, args, exchange=exchange, chunk=chunk)
    assert len(got) == 3 + 2 + (4 if both else 2)


@pytest.mark.parametrize(
    "exchange", ["all_to_all", pytest.param("all_gather", marks=pytest.mark.slow)]
)
def test_decoding_has_its_rows_on_all_shards_of_context(exchange: str) -> None:
    x, ids, shares, weights, mask = inputs()
    args = x[:, :1], ids[:, :1], shares[:, :1], weights, mask[:, :1]
    sizes = {"expert": 2, "context": 2, "tensor": 2}
    compare(sizes, args, exchange=exchange, row_axes=(ROWS, None))


def test_one_device_is_the_op() -> None:
    x, ids, shares, weights, mask = inputs("masked")
    run = partial(experts, weights=weights, mask=mask, limit=LIMIT, chunk=29)
    want = reference(x, ids, shares, weights=weights, mask=mask)
    check({"out": jax.jit(run)(x, ids, shares)}, {"out": want})


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_no_weights_travel_over_the_experts_axis(exchange: str) -> None:
    mesh = make({"expert": 4, "fsdp": 2})
    args = inputs()

    def loss(x: Any, ids: Any, shares: Any, weights: Any, mask: Any) -> Any:
        out = experts(x, ids, shares, weights=weights, mask=mask, limit=LIMIT, exchange=exchange)
        return jnp.sum(out**2)

    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(loss, (0, 2, 3)))
        hlo = grad.lower(*place(mesh, args)).compile().as_text()

    def sizes(op: str) -> list[int]:
        made = re.findall(rf" = (.*) {op}(?:-start)?\(", hlo)  # an array, or a tuple of them
        found = [dims for shapes in made for dims in re.findall(r"\w+\[([\d,]+)\]", shapes)]
        return sorted((math.prod(map(int, dims.split(","))) for dims in found), reverse=True)

    local = E // 4 * D * F  # of one shard of experts: what FSDP gathers
    assert sizes("all-gather")[:2] == [2 * local, local]
    assert all(size < local for size in sizes("all-gather")[2:])
    assert all(size < local for size in sizes("all-to-all"))
    assert not [size for size in sizes("all-reduce") if size >= 2 * local]
    assert bool(sizes("all-to-all")) == (exchange == "all_to_all")


def test_what_the_mesh_cannot_split_is_refused() -> None:
    def refuse(error: type, match: str, sizes: dict, args: tuple) -> None:
        x, ids, shares, weights, mask = args
        with jax.set_mesh(make(sizes)), pytest.raises(error, match=match):
            experts(x, ids, shares, weights=weights, mask=mask, limit=LIMIT)

    def shapes(num_experts: int = E) -> tuple:
        return jax.eval_shape(lambda: pack(inputs(num_experts=num_experts)))

    refuse(UserError, "12 experts can't be split over expert 8", {"expert": 8}, shapes(12))
    refuse(UserError, "pad it to a multiple of 32 x 8", {"tensor": 8}, shapes())
    *rows, weights, mask = shapes()
    relaid = {
        k: jax.eval_shape(partial(moe.relay, k, layout="planes"), weights[k]) for k in MATRICES
    }
    for sizes in ({"tensor": 2}, {"fsdp": 2}, {"context": 2}):
        refuse(ValueError, "'planes'", sizes, (*rows, {**weights, **relaid}, mask))
    with pytest.raises(ValueError, match="exchange="):
        experts(*rows, weights=weights, mask=mask, limit=LIMIT, exchange="ring")
