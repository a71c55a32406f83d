"""The table of parameters: what follows from tricky rows, and that no row is missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from gptoss_jax.config import LoRAConfig, ModelConfig
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.parameters import table
from gptoss_jax.parameters.table import EXPERT
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.weights.names import tensors

# Every size differs.
MODEL = ModelConfig(
    vocab_size=71, num_layers=3, d_model=64, num_heads=10, num_kv_heads=5, head_dim=4,
    num_experts=7, d_expert=96, expert_padding=32,
)  # fmt: skip
FSDP, ALL = ("fsdp", "context"), ("fsdp", "expert", "context")


def test_stacks_rows_and_columns():
    groups = {row.path: row.groups for row in table.rows()}
    assert groups["layers/experts/gate_up_weight"] == ("LEC", "F", "D")
    assert groups["layers/experts/gate_up_bias"] == ("LEC", "F", "")
    assert groups["layers/attention/o_weight"] == ("L", "D", "NH")
    assert groups["layers/router/bias"] == ("L", "E", "")
    assert groups["unembedding/weight"] == ("", "V", "D")
    assert groups["final_norm/scale"] == ("", "D", "")


def test_shapes_and_mesh_axes():
    row = table.row("layers/experts/gate_up_weight")
    assert row.shape(MODEL) == (7, 2, 128, 64)
    assert row.mesh_axes == ("expert", None, ("tensor", *FSDP), None)
    row = table.row("layers/attention/o_weight")
    assert row.shape(MODEL) == (64, 10, 4) and row.mesh_axes == (ALL, "tensor", None)


@pytest.mark.parametrize(
    ("path", "a", "b"),
    [
        ("layers/attention/k_weight", ("LDr", (None,) * 3), ("LrKH", (None,) * 4)),
        ("layers/attention/o_weight", ("LNHr", (None, "tensor", None, None)),
         ("LrD", (None,) * 3)),
        ("layers/experts/gate_up_weight", ("LEDr", (None, "expert", EXPERT, None)),
         ("LErCF", (None, "expert", None, None, ("tensor", *EXPERT)))),
        ("layers/experts/down_weight", ("LEFr", (None, "expert", ("tensor", *EXPERT), None)),
         ("LErD", (None, "expert", None, EXPERT))),
        ("layers/router/weight", ("LDr", (None,) * 3), ("LrE", (None,) * 3)),
        ("embedding/weight", ("Vr", (None,) * 2), ("rD", (None,) * 2)),
        ("unembedding/weight", ("Dr", (None,) * 2), ("rV", (None,) * 2)),
    ],
)  # fmt: skip
def test_axes_of_adapters(path: str, a: tuple, b: tuple):
    assert (table.row(path).adapter("a"), table.row(path).adapter("b")) == (a, b)


def test_adapters_are_drawn_in_the_order_that_they_always_were():
    names = ["q", "k", "v", "o", "router", "gate_up", "down", "embedding", "unembedding"]
    assert [table.row(path).target for path in adapters.adaptable()] == names


def test_places():
    place = table.place("opt_state/inner/mu/lora/layers/experts/down_weight/a/v_row")
    assert place == (table.row("layers/experts/down_weight"), "a", "v_row")
    assert table.place("params/layers/experts/down_weight/3/blocks").rest == "3/blocks"
    assert table.place("unembedding/weight").row.path == "unembedding/weight"
    for path in ("lora/layers/attention/q_weight/c", "lora/layers/attention/q_weight", "weight"):
        with pytest.raises(ValueError, match=f"has no {path}"):
            table.place(path)
    assert table.place_in_state("opt_state/count", 0) is None
    with pytest.raises(ValueError, match="has no opt_state/count"):
        table.place_in_state("opt_state/count", 2)


def test_files():
    config = dataclasses.replace(MODEL, expert_padding=0)
    hf = {x.name: x for x in tensors(config, "hf", "dense")}
    openai = {x.name: x for x in tensors(config, "openai", "mxfp4")}
    assert hf["model.layers.2.mlp.experts.gate_up_proj"].shape == (7, 64, 192)
    assert hf["model.layers.2.self_attn.o_proj.weight"].shape == (64, 40)
    assert openai["block.1.attn.qkv.bias"].shape == (40 + 20 + 20,)
    assert openai["block.1.mlp.mlp1_weight.blocks"].shape == (7, 192, 2, 16)
    assert openai["block.1.mlp.mlp2_weight.scales"].shape == (7, 64, 3)
    names = list(hf)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"qk_norm": True, "sinks": "off"}, {"sinks": "zero", "experts": "mxfp4"},
     {"lora": LoRAConfig(("attention", "experts", "router"), rank=2)}],
)  # fmt: skip
def test_a_model_has_what_its_rows_say(fields: dict):
    config = dataclasses.replace(MODEL, **fields)
    params = Transformer(config).abstract_params()
    lora = flatten(params.pop("lora", {}))
    leaves = flatten(params)
    assert set(leaves) == {row.path for row in table.rows(config)}
    for path, leaf in leaves.items():
        row = table.row(path)
        assert leaf.shape == ((3,) * row.in_layers + row.shape(config)), path
    wanted = adapters.shapes(config)
    assert set(lora) == {f"{path}/{part}" for path in wanted for part in "ab"}
    assert all(lora[f"{path}/a"].shape == shapes.a for path, shapes in wanted.items())


def test_random_parameters_begin_as_their_rows_say():
    """Norms at one and biases at zero, so that a new layer changes little; the rest is drawn."""
    config = dataclasses.replace(MODEL, qk_norm=True, init_std=0.5)
    params = flatten(init_params(Transformer(config), seed=3))
    for path, leaf in params.items():
        name, leaf = path.split("/")[-1], np.asarray(leaf, np.float32)
        if "norm" in path:
            np.testing.assert_array_equal(leaf, 1, err_msg=path)
        elif name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0, err_msg=path)
        elif name != "sinks":
            assert 0.3 < leaf.std() < 0.7 and abs(leaf.mean()) < 0.2, path
