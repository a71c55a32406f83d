from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors import safe_open
from test_read import assert_tree
from tiny_checkpoint import small_model

from gptoss_jax import loading, weights
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import get_tokenizer, stop_ids
from gptoss_jax.parameters.tree import split_layers
from gptoss_jax.weights.names import shapes, tensors


def read_all(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read a folder by the safetensors library: name -> (dtype, shape, bytes)."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as f:
            for name in f.keys():  # noqa: SIM118
                x = f.get_tensor(name)
                found[name] = (str(x.dtype), x.shape, x.tobytes())
    return found


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("packed", [True, False])
def test_both_layouts_and_back_are_byte_identical(tmp_path: Path, packed, dtype) -> None:
    """An untouched checkpoint, through memory, in its own layout and by way of the other."""
    tree = tiny.make_tree(packed=packed, dtype=dtype)
    for layout, other in (("hf", "openai"), ("openai", "hf")):
        source = tmp_path / layout
        tiny.write(source, tree, layout)
        model, params = loading.load(source, dtype=dtype)
        weights.save(tmp_path / f"{layout}-same", model, params, to=layout)
        file = "model.safetensors"
        assert (tmp_path / f"{layout}-same" / file).read_bytes() == (source / file).read_bytes()
        weights.save(tmp_path / f"{layout}-other", model, params, to=other)
        assert read_all(tmp_path / f"{layout}-other") == {
            name: (str(x.dtype), x.shape, x.tobytes())
            for name, x in tiny.tensors_of(tree, other).items()
        }
        model, params = loading.load(tmp_path / f"{layout}-other", dtype=dtype)
        assert_tree(params, tree)
        weights.save(tmp_path / f"{layout}-back", model, params, to=layout)
        assert (tmp_path / f"{layout}-back" / file).read_bytes() == (source / file).read_bytes()


def test_stacks_as_tuples_are_written_alike(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "hf")
    model, params = loading.load(tmp_path / "c")
    _, split = loading.load(tmp_path / "c", split=True)
    assert isinstance(split_layers(params["layers"], tiny.L)["router"]["bias"], tuple)
    weights.save(tmp_path / "one", model, params)
    weights.save(tmp_path / "two", model, split)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("order", ["columns", "hopper"])
def test_relaid_experts_are_written_alike(tmp_path: Path, order) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "openai")
    model, params = loading.load(tmp_path / "c", layout=order)
    weights.save(tmp_path / "again", model, params, to="openai")
    assert read_all(tmp_path / "again") == read_all(tmp_path / "c")


def test_sharded_leaves_are_written_alike(tmp_path: Path) -> None:
    """What lies on several devices is fetched a piece at a time."""
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "openai")
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    model, params = loading.load(tmp_path / "c", mesh)
    weights.save(tmp_path / "again", model, params, to="openai")
    assert read_all(tmp_path / "again") == read_all(tmp_path / "c")


@pytest.mark.parametrize("layout", ["hf", "openai"])
def test_shards_and_their_index(tmp_path: Path, layout) -> None:
    tree = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "c", tree, layout)
    model, params = loading.load(tmp_path / "c")
    limit = 60_000
    weights.save(tmp_path / "s", model, params, to=layout, shard_bytes=limit)
    files = sorted(tmp_path.glob("s/*.safetensors"))
    dash = "-" if layout == "hf" else "--"
    count = len(files)
    assert count > 3
    assert [f.name for f in files] == [
        f"model{dash}{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    index = json.loads((tmp_path / "s" / "model.safetensors.index.json").read_text())
    total = 0
    for file in files:
        with safe_open(file, framework="numpy") as f:
            sizes = [f.get_tensor(name).nbytes for name in f.keys()]  # noqa: SIM118
            assert {index["weight_map"][name] for name in f.keys()} == {file.name}  # noqa: SIM118
        assert sum(sizes) <= limit or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert read_all(tmp_path / "s") == read_all(tmp_path / "c")
    assert_tree(loading.load(tmp_path / "s")[1], tree)


def test_decoded_and_encoded_on_the_way_out(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "openai")
    model, params = loading.load(tmp_path / "c")
    weights.save(tmp_path / "dense", model, params, to="hf", experts="dense")
    raw = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in raw
    _, dense = loading.load(tmp_path / "dense")
    _, want = loading.load(tmp_path / "c", experts="dense")
    np.testing.assert_array_equal(
        dense["layers"]["experts"]["gate_up_weight"], want["layers"]["experts"]["gate_up_weight"]
    )
    dense_model, dense = loading.load(tmp_path / "dense")
    weights.save(tmp_path / "packed", dense_model, dense, to="openai", experts="mxfp4")
    _, again = loading.load(tmp_path / "packed", experts="dense")
    for name in ("gate_up_weight", "down_weight"):
        np.testing.assert_array_equal(
            again["layers"]["experts"][name], want["layers"]["experts"][name]
        )


def test_floats_may_be_written_in_another_dtype(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "c", tree, "hf")
    model, params = loading.load(tmp_path / "c", dtype=jnp.float32)
    weights.save(tmp_path / "as-they-are", model, params)
    assert read_all(tmp_path / "as-they-are")["lm_head.weight"][0] == "float32"
    weights.save(tmp_path / "bf16", model, params, dtype=jnp.bfloat16)
    assert read_all(tmp_path / "bf16") == read_all(tmp_path / "c")


REFUSED = [
    ({"sinks": "off"}, "hf", "model.sinks=off"),
    ({"sinks": "off"}, "openai", "model.sinks=off"),
    ({"qk_norm": True}, "hf", "model.qk_norm=True"),
    ({"qk_norm": True}, "openai", "model.qk_norm=True"),
    ({"norm": "post"}, "hf", "model.norm=post"),
    ({"norm": "post"}, "openai", "model.norm=post"),
    ({"layer_pattern": "5:1"}, "openai", "model.layer_pattern=5:1"),
    ({"layer_pattern": "full"}, "openai", "model.layer_pattern=full"),
    ({"layer_pattern": "banded"}, "openai", "model.layer_pattern=banded"),
    ({"rms_eps": 1e-6}, "openai", "model.rms_eps=1e-06"),
]


@pytest.mark.parametrize(("fields", "layout", "expected"), REFUSED)
def test_what_a_layout_cannot_say_is_refused_by_name(
    tmp_path: Path, fields, layout, expected
) -> None:
    model, params = small_model(**fields)
    with pytest.raises(UserError, match="can't be expressed in") as caught:
        weights.save(tmp_path / "new" / "folder", model, params, to=layout)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_patterns_go_to_hugging_face_by_layer_types(tmp_path: Path) -> None:
    for pattern in ("5:1", "full", "banded", "fbb"):
        model, params = small_model(layer_pattern=pattern)
        weights.save(tmp_path / pattern, model, params)
        loaded, _ = loading.load(tmp_path / pattern)
        assert loaded.config.layer_windows == model.config.layer_windows
        assert loaded.config.architecture == model.config.architecture


def test_zero_sinks_are_written_as_zeros(tmp_path: Path) -> None:
    model, params = small_model(sinks="zero")
    assert "sinks" not in params["layers"]["attention"]
    weights.save(tmp_path / "c", model, params, to="openai")
    loaded, back = loading.load(tmp_path / "c")
    assert loaded.config.sinks == "learned"
    assert not np.any(np.asarray(back["layers"]["attention"].pop("sinks")))
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_a_config_survives_both_layouts(tmp_path: Path) -> None:
    model, params = small_model(
        rope_factor="auto",
        context=4_000,
        initial_context=500,
        swiglu_limit=3.5,
        rope_theta=9_000.0,
        rope_beta_fast=20.0,
        rope_beta_slow=3.0,
    )
    for layout in ("hf", "openai"):
        weights.save(tmp_path / layout, model, params, to=layout)
        loaded, _ = loading.load(tmp_path / layout)
        assert loaded.config == dataclasses.replace(model.config, rope_factor=8.0)
    model, params = small_model(rope_factor=1.0, rms_eps=1e-6)
    weights.save(tmp_path / "plain", model, params)
    assert loading.load(tmp_path / "plain")[0].config == model.config


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    model, params = small_model()
    bad = np.array(params["layers"]["router"]["weight"])
    bad[2, 3, 4] = np.nan
    params["layers"]["router"]["weight"] = jnp.asarray(bad)
    with pytest.raises(UserError, match="layers/router/weight, layer 2 has NaN or infinity"):
        weights.save(tmp_path / "new" / "folder", model, params)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has NaN"):
        weights.save(tmp_path / "empty", model, params)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_destinations(tmp_path: Path) -> None:
    model, params = small_model()
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(UserError, match="is there already and not empty"):
            weights.save(tmp_path / name, model, params)
    (tmp_path / "empty").mkdir()
    weights.save(tmp_path / "empty", model, params)
    names = {p.name for p in (tmp_path / "empty").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert (tmp_path / "empty").stat().st_mode & 0o777 == (tmp_path / "full").stat().st_mode & 0o777
    weights.save(tmp_path / "openai", model, params, to="openai")
    assert {p.name for p in (tmp_path / "openai").iterdir()} == {"config.json", "model.safetensors"}


def test_a_full_disk_is_known_beforehand(tmp_path: Path, monkeypatch) -> None:
    import shutil

    model, params = small_model()
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="and its disk has"):
        weights.save(tmp_path / "c", model, params)
    assert list(tmp_path.iterdir()) == []


def test_params_of_another_model_are_refused(tmp_path: Path) -> None:
    model, params = small_model()
    other, _ = small_model(d_expert=96)
    with pytest.raises(UserError, match="gate_up_weight has not the shape or form"):
        weights.save(tmp_path / "c", other, params)
    packed, _ = small_model(experts="mxfp4")
    with pytest.raises(UserError, match="_weight has not the shape or form"):
        weights.save(tmp_path / "c", packed, params)
    with pytest.raises(UserError, match="layout 'gguf': it is hf or openai"):
        weights.save(tmp_path / "c", model, params, to="gguf")  # pyright: ignore[reportArgumentType]
    del params["layers"]["router"]["bias"]
    with pytest.raises(UserError, match="lacks layers/router/bias"):
        weights.save(tmp_path / "c", model, params)
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_and_generation_config_for_a_vocabulary_with_text(tmp_path: Path) -> None:
    model, params = small_model(vocab_size=300)
    weights.save(tmp_path / "c", model, params)
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    raw = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    # <|return|>, <|endoftext|> and <|call|> are the 5th, 2nd and 15th of the last 32 ids.
    assert raw["eos_token_id"] == [272, 269, 282]
    assert tuple(raw["eos_token_id"]) == stop_ids(get_tokenizer(300))  # where our sampler stops


def test_the_table_has_every_leaf_of_the_model_once() -> None:
    model, params = small_model(experts="mxfp4")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for layout in ("hf", "openai"):
        table = tensors(model.config, layout, "mxfp4")
        size = sum(int(np.prod(tensor.shape)) for tensor in table)
        assert size == sum(leaf.size for _, leaf in leaves)
        keys = [part.key for tensor in table for part in tensor.parts]
        assert len(set(keys)) == len(keys)
    assert len(shapes(model.config)) == 20
