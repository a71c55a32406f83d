"""Patterns of parameters: what they name, what is refused, and what is said of it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parameters import patterns
from gptoss_jax.types import MXFP4

L, E, F, D, N, H, V = 6, 5, 64, 32, 3, 4, 11


def shapes(*, packed: bool = False):
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def weight(*shape):
        if not packed:
            return leaf(*shape)
        *lead, last = shape
        blocks = jax.ShapeDtypeStruct((*lead, last // 32, 16), jnp.uint8)
        return MXFP4(blocks, jax.ShapeDtypeStruct((*lead, last // 32), jnp.uint8))  # pyright: ignore

    return {
        "embedding": {"weight": leaf(V, D)},
        "final_norm": {"scale": leaf(D)},
        "layers": {
            "attention": {"q_weight": leaf(L, N, H, D), "q_bias": leaf(L, N, H)},
            "experts": {
                "gate_up_weight": weight(L, E, 2, F, D),
                "gate_up_bias": leaf(L, E, 2, F),
                "down_weight": weight(L, E, D, F),
            },
            "router": {"weight": leaf(L, E, D), "bias": leaf(L, E)},
        },
    }


PATHS = [
    "embedding/weight", "final_norm/scale",
    "layers/attention/q_weight", "layers/attention/q_bias",
    "layers/experts/gate_up_weight", "layers/experts/gate_up_bias", "layers/experts/down_weight",
    "layers/router/weight", "layers/router/bias",
]  # fmt: skip


def factors(*, packed=False, load=None, **fields):
    tree = patterns.masks(shapes(packed=packed), OptimizerConfig(**fields), load=load)
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): factor for path, factor in flat}


def test_without_patterns_everything_is_trained_but_packed_weights():
    assert factors() == dict.fromkeys(PATHS, 1.0)
    packed = {"layers/experts/gate_up_weight", "layers/experts/down_weight"}
    assert {p for p, f in factors(packed=True).items() if f == 0.0} == packed


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("embedding/weight", {PATHS[0]}),
        ("layers/attention/*", set(PATHS[2:4])),
        ("*/q_weight", {PATHS[2]}),
        ("*bias", {PATHS[3], PATHS[5], PATHS[8]}),
        ("layers/*weight", {PATHS[2], PATHS[4], PATHS[6], PATHS[7]}),
        ("*", set(PATHS)),
    ],
)
def test_a_star_crosses_slashes(pattern, named):
    found = factors(only=(pattern,))
    assert {p for p, f in found.items() if f == 1.0} == named
    assert {p for p, f in found.items() if f == 0.0} == set(PATHS) - named


@pytest.mark.parametrize(
    ("inside", "chosen"),
    [
        ("0", [0]), ("1-3", [1, 2, 3]), ("4-", [4, 5]), ("0,3-4", [0, 3, 4]), ("2,2", [2]),
        ("0-5", range(6)), (" 1 , 5 ", [1, 5]),
    ],
)  # fmt: skip
def test_layers_by_number(inside, chosen):
    found = factors(freeze=(f"layers[{inside}]/attention/*",))
    want = np.float32([i not in chosen for i in range(L)])
    for path, ndim in (("layers/attention/q_weight", 4), ("layers/attention/q_bias", 3)):
        if want.any():
            assert found[path].dtype == np.float32
            np.testing.assert_array_equal(found[path], want.reshape(L, *(1,) * (ndim - 1)))
        else:
            assert found[path] == 0.0
    assert found["layers/router/bias"] == 1.0


def test_experts_by_number_in_some_layers():
    found = factors(only=("layers[2-3]/experts[0,4]/*", "layers/experts[1]/gate_up_bias"))
    want = np.zeros((L, E), np.float32)
    want[2:4, [0, 4]] = 1
    for path in ("layers/experts/gate_up_weight", "layers/experts/down_weight"):
        ndim = 5 if "gate" in path else 4
        np.testing.assert_array_equal(found[path], want.reshape(L, E, *(1,) * (ndim - 2)))
    want[:, 1] = 1
    np.testing.assert_array_equal(found["layers/experts/gate_up_bias"], want[:, :, None, None])
    assert found["layers/router/weight"] == found["embedding/weight"] == 0.0


def test_experts_by_their_load():
    load = np.random.default_rng(0).dirichlet(np.ones(E), size=L)
    load[1] = [0.2, 0.3, 0.2, 0.0, 0.3]  # of equals, the first
    config = OptimizerConfig(only=("layers[1-]/experts[top2]/*",))
    assert patterns.needs_load(config)
    assert not patterns.needs_load(OptimizerConfig(freeze=("layers/experts[0-2]/*",)))
    found = factors(only=config.only, load=load)["layers/experts/down_weight"]
    assert found.shape == (L, E, 1, 1)
    chosen = [set(np.flatnonzero(row)) for row in found[:, :, 0, 0]]
    assert chosen == [set(), {1, 4}] + [set(np.argsort(row)[-2:]) for row in load[2:]]
    both = factors(only=("layers/experts[top1,3]/*",), load=load)["layers/experts/down_weight"]
    assert [set(np.flatnonzero(r)) for r in both[:, :, 0, 0]] == [
        {int(row.argmax()), 3} for row in load
    ]
    with pytest.raises(ValueError, match="needs_load"):
        factors(only=config.only)


def test_the_last_learning_rate_counts_and_freezing_wins():
    rates = ("layers/*=0.5", "layers[3-]/*=2", "layers[0]/router/*=0", "embedding/weight=0.25")
    found = factors(learning_rates=rates, freeze=("layers[5]/*", "final_norm/*"))
    assert found["embedding/weight"] == 0.25 and found["final_norm/scale"] == 0.0
    want = np.float32([0.5, 0.5, 0.5, 2, 2, 0])
    np.testing.assert_array_equal(found["layers/attention/q_bias"], want[:, None, None])
    np.testing.assert_array_equal(found["layers/router/bias"], [[0], *want[1:, None]])
    only = factors(learning_rates=rates, only=("layers[2-4]/router/*",), freeze=("layers[4]/*",))
    np.testing.assert_array_equal(only["layers/router/bias"][:, 0], [0, 0, 0.5, 2, 0, 0])
    assert only["embedding/weight"] == 0.0


def test_frozen_paths_are_those_with_no_factor_left():
    fields = {"freeze": ("embedding/*", "layers[0-2]/*", "layers[3-]/router/*")}
    tree = patterns.masks(shapes(packed=True), OptimizerConfig(**fields))
    packed = {"layers/experts/gate_up_weight", "layers/experts/down_weight"}
    assert set(patterns.frozen_paths(tree)) == packed | {
        "embedding/weight", "layers/router/weight", "layers/router/bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": ("layers/atention/*",)}, "freeze .*names no .* mean layers/attention/[*][?]"),
        ({"only": ("layers/experts",)}, "optimizer.only .* mean layers/experts/[*]"),
        ({"only": ("q_weight",)}, "mean [*]/q_weight"),
        ({"freeze": ("experts[1]/*",)}, "mean .*experts"),
        ({"freeze": ("",)}, "optimizer.freeze has ''"),
        ({"freeze": ("layers[6]/*",)}, "no 6: the layers are 0 to 5"),
        ({"freeze": ("layers[2-6]/*",)}, "no 6: the layers are 0 to 5"),
        ({"freeze": ("layers[9-]/*",)}, "no 9: the layers are 0 to 5"),
        ({"freeze": ("layers/experts[5]/*",)}, "no 5: the experts are 0 to 4"),
        ({"freeze": ("layers/experts[top6]/*",)}, "top6 of 5 experts"),
        ({"freeze": ("layers/experts[top0]/*",)}, "top0"),
        ({"freeze": ("layers[top2]/*",)}, "experts by their load, not layers"),
        ({"freeze": ("embedding[0]/weight",)}, "'embedding' has no axis"),
        ({"freeze": ("layers/router[0]/*",)}, "'router' has no axis"),
        ({"freeze": ("*[0]/weight",)}, "has no axis"),
        ({"freeze": ("layers[3-1]/*",)}, "3-1 runs backwards"),
        ({"freeze": ("layers[]/*",)}, "'' in the brackets of layers"),
        ({"freeze": ("layers[-2]/*",)}, "'-2' in the brackets"),
        ({"freeze": ("layers[1.5]/*",)}, "'1.5' in the brackets"),
        ({"freeze": ("layers[0/*",)}, r"brackets of 'layers\[0' can't be read"),
        ({"freeze": ("layers0]/*",)}, "can't be read"),
        ({"freeze": ("layers[0][1]/*",)}, "can't be read"),
        ({"learning_rates": ("embedding/weight",)}, "PATTERN=FACTOR"),
        ({"learning_rates": ("embedding/weight=fast",)}, "PATTERN=FACTOR"),
        ({"learning_rates": ("embedding/weight=-1",)}, "PATTERN=FACTOR"),
        ({"learning_rates": ("embedding/weight=nan",)}, "PATTERN=FACTOR"),
        ({"learning_rates": ("nothing=1",)}, "learning_rates .*names no parameter"),
        ({"freeze": ("*",)}, "leave no parameter"),
        ({"learning_rates": ("*=0",)}, "leave no parameter"),
    ],
)
def test_refused(fields, words):
    with pytest.raises(UserError, match=words) as error:
        factors(load=np.ones((L, E)), **fields)
    assert "\n" not in str(error.value)


def test_nothing_but_packed_weights_can_not_be_trained():
    for fields in (
        {"only": ("layers/experts/*_weight",)},
        {"learning_rates": ("*/down_weight=2",)},
    ):
        factors(**fields)
        with pytest.raises(UserError, match=r"packed .* --model.experts dense"):
            factors(packed=True, **fields)
    assert factors(packed=True, only=("layers/experts/*",))["layers/experts/gate_up_bias"] == 1.0
    assert factors(packed=True, freeze=("*/down_weight",))["layers/experts/down_weight"] == 0.0


def test_describe_counts_what_is_trained():
    fields = {
        "freeze": ("layers[0-3]/attention/*", "final_norm/*"),
        "learning_rates": ("embedding/*=0.1",),
    }
    tree = patterns.masks(shapes(packed=True), OptimizerConfig(**fields))
    rows = [
        re.split(r"\s{2,}| of +", x, maxsplit=3)
        for x in patterns.describe(shapes(packed=True), tree)
    ]
    found = {row[0]: (row[1].strip(), row[2], "".join(row[3:])) for row in rows}
    q, bias = L * N * H * D, L * N * H
    assert found["layers/attention/q_weight"] == (f"{q // 3}", f"{q:,}", "layers 4-5")
    assert found["embedding/weight"] == (f"{V * D}", f"{V * D}", "learning rate x 0.1")
    assert found["final_norm/scale"] == ("0", f"{D}", "frozen")
    assert found["layers/experts/down_weight"] == (
        "0", f"{L * E * D * F:,}", "packed: never trained",
    )  # fmt: skip
    rest = V * D + L * E * 2 * F + L * E * (D + 1)
    total = rest + q + bias + D + L * E * 3 * D * F
    assert found["all"] == (f"{rest + (q + bias) // 3:,}", f"{total:,}", "")


def test_describe_names_chosen_experts():
    load = np.tile(np.arange(E), (L, 1)) / 10
    load[4] = load[4][::-1]
    config = OptimizerConfig(only=("layers[1-]/experts[top2]/*",))
    tree = patterns.masks(shapes(), config, load=load)
    lines = patterns.describe(shapes(), tree)
    assert lines[-2:] == ["experts 3-4 of layers 1-3, 5", "experts 0-1 of layer 4"]
    bias = next(line for line in lines if "gate_up_bias" in line)
    assert bias.endswith("2 of 5 experts, layers 1-5") and " 1,280 of " in bias


def test_patterns_on_a_model_s_own_tree():
    from gptoss_jax.model import Transformer

    config = ModelConfig(num_layers=3, num_experts=4, experts="mxfp4", d_model=64, d_expert=32)
    params = Transformer(config).abstract_params()
    tree = patterns.masks(params, OptimizerConfig(freeze=("layers[0]/*",)))
    paths = {"/".join(k.key for k in p) for p, f in jax.tree_util.tree_leaves_with_path(tree)}
    assert len(paths) == 20 and "layers/experts/down_weight" in paths
    np.testing.assert_array_equal(tree["layers"]["attention"]["sinks"], [[0], [1], [1]])
