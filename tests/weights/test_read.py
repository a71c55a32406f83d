from __future__ import annotations

import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny

from gptoss_jax import loading, weights
from gptoss_jax.errors import UserError
from gptoss_jax.ops import mxfp4
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.types import MXFP4

CASES = [
    # layout, packed, dtype as stored, shards
    ("openai", True, "bfloat16", 1),
    ("openai", False, "float32", 3),
    ("hf", True, "bfloat16", 3),
    ("hf", False, "bfloat16", 1),
    ("hf", False, "float32", 2),
    ("hf", True, "float16", 1),
]


def assert_tree(params, tree) -> None:
    """Hold every leaf against `tree`, bit for bit."""
    leaves = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, tuple):
            leaf = jax.tree.map(lambda *xs: np.stack(xs), *leaf)
        if isinstance(leaf, MXFP4):
            leaves |= {f"{path}.blocks": leaf.blocks, f"{path}.scales": leaf.scales}
        else:
            leaves[path] = leaf
    assert leaves.keys() == tree.keys()
    for path, leaf in leaves.items():
        leaf = np.asarray(leaf)
        assert leaf.dtype == tree[path].dtype and leaf.shape == tree[path].shape, path
        assert leaf.tobytes() == tree[path].tobytes(), path


@pytest.mark.parametrize(("layout", "packed", "dtype", "shards"), CASES)
def test_every_leaf_is_bit_equal(tmp_path: Path, layout, packed, dtype, shards) -> None:
    tree = tiny.make_tree(packed=packed, dtype=dtype)
    tiny.write(tmp_path / "c", tree, layout, shards=shards)
    split = shards == 1
    model, params = loading.load(tmp_path / "c", dtype=dtype, split=split)
    assert_tree(params, tree)
    is_tuple = isinstance(params["layers"]["router"]["bias"], tuple)
    assert is_tuple == split
    c = model.config
    assert (c.experts, c.dtype, c.param_dtype) == ("mxfp4" if packed else "dense", dtype, dtype)
    assert (c.rope_theta, c.rope_factor, c.initial_context, c.context) == (10_000, 8, 512, 4096)
    assert (c.rope_beta_fast, c.rope_beta_slow, c.window, c.swiglu_limit) == (16, 2, tiny.W, 5)
    assert c.layer_windows == (tiny.W, None, tiny.W, None)
    expected = flatten(model.abstract_params())
    assert {
        p: x.shape for p, x in flatten(loading.load(tmp_path / "c", dtype=dtype)[1]).items()
    } == {p: x.shape for p, x in expected.items()}


def test_floats_are_cast_and_packed_bytes_kept(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=True, dtype="float32")
    tiny.write(tmp_path / "c", tree, "hf")
    _, params = loading.load(tmp_path / "c")
    cast = {p: x if x.dtype == np.uint8 else x.astype(ml_dtypes.bfloat16) for p, x in tree.items()}
    assert_tree(params, cast)


def test_decoded_on_load_is_what_the_bytes_stand_for(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "c", tree, "openai")
    model, params = loading.load(tmp_path / "c", dtype=jnp.float32, experts="dense")
    assert model.config.experts == "dense"
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = np.array(half + [-x for x in half], np.float32)
    for name in ("gate_up_weight", "down_weight"):
        blocks, scales = (tree[f"layers/experts/{name}.{f}"] for f in ("blocks", "scales"))
        values = table[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*blocks.shape[:-1], 32)
        want = np.ldexp(values, scales[..., None].astype(np.int32) - 127)
        want = want.reshape(*scales.shape[:-1], -1)
        assert np.array_equal(params["layers"]["experts"][name], want)


def test_encoded_on_load_stands_for_the_stored_values(tmp_path: Path) -> None:
    packed = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "packed", packed, "openai")
    _, dense = loading.load(tmp_path / "packed", dtype=jnp.float32, experts="dense")
    model, _ = loading.load(tmp_path / "packed", dtype=jnp.float32, experts="dense")
    weights.save(tmp_path / "dense", model, dense, to="hf")
    model, params = loading.load(tmp_path / "dense", dtype=jnp.float32, experts="mxfp4")
    assert model.config.experts == "mxfp4"
    weights.save(tmp_path / "again", model, params, to="hf")
    _, again = loading.load(tmp_path / "again", dtype=jnp.float32, experts="dense")
    for name in ("gate_up_weight", "down_weight"):
        want = dense["layers"]["experts"][name]
        assert np.array_equal(again["layers"]["experts"][name], want)


def test_pieces_smaller_than_a_tensor_change_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gptoss_jax.weights.sources._PIECE", 12_000)
    for layout, packed in (("openai", True), ("hf", False)):
        tree = tiny.make_tree(packed=packed)
        tensors = tiny.write(tmp_path / layout, tree, layout)
        model, params = loading.load(tmp_path / layout)
        assert_tree(params, tree)
        weights.save(tmp_path / f"{layout}2", model, params, to=layout)
        _, again = loading.load(tmp_path / f"{layout}2")
        assert_tree(again, tree)
        assert len(tensors) > 20


@pytest.mark.parametrize("order", ["planes", "columns", "int8", "hopper"])
def test_packed_experts_are_relaid_while_they_are_read(tmp_path: Path, order, monkeypatch) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True, dtype="bfloat16"), "openai")
    monkeypatch.setattr("gptoss_jax.weights.sources._PIECE", 4096)  # an expert or so at a time
    model, as_stored = loading.load(tmp_path / "c")
    _, params = loading.load(tmp_path / "c", layout=order)
    for name, leaf in params["layers"]["experts"].items():
        stored = as_stored["layers"]["experts"][name]
        if not name.endswith("weight"):
            np.testing.assert_array_equal(leaf, stored)
            continue
        assert leaf.layout == order and leaf.shape == stored.shape
        back = mxfp4.restore(leaf)
        np.testing.assert_array_equal(back.blocks, stored.blocks)
        np.testing.assert_array_equal(back.scales, stored.scales)
    tokens = jnp.arange(5)[None]
    want = model.apply({"params": as_stored}, tokens)
    np.testing.assert_array_equal(model.apply({"params": params}, tokens), want)


def test_onto_a_mesh_is_replicated(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "c", tree, "hf")
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    _, params = loading.load(tmp_path / "c", mesh)
    assert_tree(params, tree)
    leaf = params["layers"]["experts"]["down_weight"].blocks
    assert len(leaf.sharding.device_set) == len(jax.devices())


def rewrite(folder: Path, change, layout: str = "hf") -> None:
    tree = tiny.make_tree(packed=True)
    tiny.write(folder, tree, layout)
    tensors = {name: np.array(x) for name, x in tiny.tensors_of(tree, layout).items()}
    change(tensors)
    tiny.write_tensors(folder, tensors)


def message_of(folder: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        loading.load(folder, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def put(name: str, at, value):
    def change(tensors) -> None:
        tensors[name][at] = value

    return change


BAD_TENSORS = [
    (lambda t: t.pop("model.layers.2.self_attn.sinks"), "layers.2.self_attn.sinks' is missing"),
    (lambda t: t.update({"model.x": np.zeros(3)[:0].astype("f4")}), "'model.x' is extra"),
    (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()}),
        "'lm_head.weight' has shape [64, 97], and config.json makes it [97, 64]",
    ),
    (put("lm_head.weight", (3, 5), np.nan), "'lm_head.weight' has NaN or infinity"),
    (
        put("model.layers.1.mlp.experts.gate_up_proj_bias", (3, 5), -np.inf),
        "'model.layers.1.mlp.experts.gate_up_proj_bias' has NaN or infinity",
    ),
    (
        put("model.layers.3.mlp.experts.down_proj_scales", (1, 2, 0), 255),
        "'model.layers.3.mlp.experts.down_proj_scales' has scale byte 255",
    ),
    (
        lambda t: t.update({"model.norm.weight": np.zeros(tiny.D, np.uint8)}),
        "'model.norm.weight' is uint8, not a float dtype",
    ),
    (
        lambda t: t.update({"model.norm.weight": np.zeros(tiny.D, np.float64)}),
        "'model.norm.weight' has dtype F64",
    ),
]


@pytest.mark.parametrize(("change", "expected"), BAD_TENSORS, ids=[case[1] for case in BAD_TENSORS])
def test_bad_tensors_are_named(tmp_path: Path, change, expected: str) -> None:
    rewrite(tmp_path / "c", change)
    text = message_of(tmp_path / "c")
    assert expected in text and str(tmp_path / "c") in text


def test_a_file_cut_short_names_the_first_tensor_that_is_not_whole(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "openai")
    file = tmp_path / "c" / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    begin, end = header["norm.scale"]["data_offsets"]
    file.write_bytes(whole[: 8 + length + (begin + end) // 2])
    text = message_of(tmp_path / "c")
    assert f"{file}: cut short" in text and "'norm.scale'" in text
    for size, expected in ((4, "no whole safetensors header"), (80, "no whole safetensors header")):
        file.write_bytes(whole[:size])
        assert expected in message_of(tmp_path / "c")
    file.write_bytes(whole + b"\0")
    assert "its bytes and its header do not match" in message_of(tmp_path / "c")
    file.write_bytes(whole[:8] + b"x" + whole[9:])
    assert "is no JSON" in message_of(tmp_path / "c")


def test_an_index_is_held_against_its_files(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=False), "hf", shards=3)
    index = tmp_path / "c" / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.nothing"] = raw["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(raw))
    assert "'model.nothing' is in none of its files" in message_of(tmp_path / "c")
    (tmp_path / "c" / "model-00001-of-00002.safetensors").unlink()
    assert "model-00001-of-00002.safetensors: is missing" in message_of(tmp_path / "c")
    index.write_text("{}")
    assert "weight_map is missing" in message_of(tmp_path / "c")


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=False), "hf")
    file = tmp_path / "c" / "model.safetensors"
    file.with_name("other.safetensors").write_bytes(file.read_bytes())
    assert "is in model.safetensors too" in message_of(tmp_path / "c")


CONFIG_EDITS = [
    ({"hidden_size": 96}, "'model.embed_tokens.weight' has shape [97, 64]"),
    ({"num_hidden_layers": 3, "layer_types": None}, "is extra (and 18 more); config.json says 3"),
    ({"num_hidden_layers": 5, "layer_types": None}, "(and 18 more); config.json says 5 layers"),
    ({"num_local_experts": 4}, "mlp.router.weight' has shape [5, 64], and config.json makes it"),
    ({"quantization_config": None}, "has no quantization_config, but the experts' tensors are"),
]


@pytest.mark.parametrize(("edit", "expected"), CONFIG_EDITS, ids=[c[1] for c in CONFIG_EDITS])
def test_a_config_that_disagrees_with_the_tensors(tmp_path: Path, edit, expected: str) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "hf")
    file = tmp_path / "c" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    assert expected in message_of(tmp_path / "c")


def test_a_config_that_says_mxfp4_of_dense_experts(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=False)
    tiny.write(tmp_path / "c", tree, "hf")
    raw = tiny.config_of(tiny.make_tree(packed=True), "hf")
    (tmp_path / "c" / "config.json").write_text(json.dumps(raw))
    assert "says MXFP4, but the experts' tensors are stored dense" in message_of(tmp_path / "c")


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "there is no such folder" in message_of(tmp_path / "nothing")
    assert "no config.json in it" in message_of(tmp_path)
    tiny.write(tmp_path / "original", tiny.make_tree(packed=True), "openai")
    assert f"give {tmp_path / 'original'}" in message_of(tmp_path)
    (tmp_path / "original" / "model.safetensors").unlink()
    assert "no .safetensors file in it" in message_of(tmp_path / "original")


def test_arguments_that_mean_nothing(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "openai")
    assert "step=3 is for workdirs" in message_of(tmp_path / "c", step=3)
    assert "dtype is int8" in message_of(tmp_path / "c", dtype=jnp.int8)
    assert "experts is 'bf16'" in message_of(tmp_path / "c", experts="bf16")


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    rewrite(tmp_path / "c", put("lm_head.weight", (0, 0), 1e6))
    assert "'lm_head.weight' has NaN or infinity as float16" in message_of(
        tmp_path / "c", dtype=jnp.float16
    )


def test_a_width_that_mxfp4_cannot_hold(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "openai")
    file = tmp_path / "c" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 65}))
    assert "model.d_model is 65: experts=mxfp4 needs a multiple of 32" in message_of(tmp_path / "c")


def test_nan_in_experts_is_found_before_they_are_encoded(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=False)
    tree["layers/experts/down_weight"][2, 1, 5, 7] = np.nan
    tiny.write(tmp_path / "c", tree, "hf")
    for experts in (None, "mxfp4"):
        text = message_of(tmp_path / "c", experts=experts, requantise=True)
        assert "'model.layers.2.mlp.experts.down_proj' has NaN or infinity" in text
