"""Tuned models on their way out: merged, encoded, measured, read again, refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors.numpy import load_file

import gptoss_jax
from gptoss_jax import convert, loading, weights
from gptoss_jax.config import LoRAConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.weights import safetensors_io, sources

EVERY = ("attention", "experts", "router", "embedding", "unembedding")
EXPERTS = ("layers/experts/gate_up_weight", "layers/experts/down_weight")
TOKENS = np.random.default_rng(0).integers(0, tiny.V, (2, 3 * tiny.W))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# W[...] += A B, spelled out for each weight.
EINSUM = {
    "layers/attention/q_weight": "LDr,LrNH->LNHD",
    "layers/attention/k_weight": "LDr,LrNH->LNHD",
    "layers/attention/v_weight": "LDr,LrNH->LNHD",
    "layers/attention/o_weight": "LNHr,LrD->LDNH",
    "layers/router/weight": "LDr,LrE->LED",
    "layers/experts/gate_up_weight": "LEDr,LErCF->LECFD",
    "layers/experts/down_weight": "LEFr,LErD->LEDF",
    "embedding/weight": "Vr,rD->VD",
    "unembedding/weight": "Dr,rV->VD",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "c"
    tiny.write(folder, tiny.make_tree(packed=True), "hf")
    return folder


def tuned(base: Path, *targets: str, dtype="bfloat16", std=0.3, experts=None, **fields):
    """Load the base with adapters as if they had been trained."""
    model, params = loading.load(base, dtype=dtype, experts=experts)
    own = LoRAConfig(targets=targets, rank=3, alpha=4.5)
    model = Transformer(dataclasses.replace(model.config, lora=own, **fields))
    rng = np.random.default_rng(1)
    tree = {}
    for path, shape in adapters.shapes(model.config).items():
        tree[f"{path}/a"] = rng.standard_normal(shape.a).astype(np.float32)
        tree[f"{path}/b"] = (std * 0.1 * rng.standard_normal(shape.b)).astype(np.float32)
    params["lora"] = jax.tree.map(jnp.asarray, nest(tree))
    return model, params


def updates(params) -> dict[str, np.ndarray]:
    """Return what each adapter adds, [L, ...], in float64: 1.5 A B."""
    own = flatten(params["lora"])
    return {
        path: 1.5 * np.einsum(how, *(np.asarray(own[f"{path}/{x}"], np.float64) for x in "ab"))
        for path, how in EINSUM.items()
        if f"{path}/a" in own
    }


def by_name(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def dense(folder: Path) -> dict[str, np.ndarray]:
    """Return path -> leaf of a folder, float32, in memory's order."""
    _, params = loading.load(folder, dtype="float32", experts="dense")
    return {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}


def nearest_mxfp4(x: np.ndarray) -> np.ndarray:
    """Return the least squared error of each block of 32 over all scales in reach."""
    blocks = x.astype(np.float64).reshape(-1, 32)
    top = np.floor(np.log2(np.abs(blocks).max(1, keepdims=True)))
    best = np.full(len(blocks), np.inf)
    for shift in (-4, -3, -2, -1, 0):
        unit = np.exp2(top + shift)
        values = E2M1 * unit
        error = np.min((np.abs(blocks)[:, :, None] - values[:, None, :]) ** 2, axis=-1).sum(1)
        best = np.minimum(best, error)
    return best


@functools.lru_cache
def _apply(config):
    return jax.jit(lambda params: Transformer(config).apply({"params": params}, TOKENS))


def logits(model, params) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(_apply(model.config)(params))


def close(found: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


def test_merged_and_exported_in_float32_it_is_the_adapted_model(base, tmp_path: Path) -> None:
    """Experts decoded; what comes back has the logits of the model with its adapters."""
    model, params = tuned(base, *EVERY, dtype="float32")
    report = gptoss_jax.save(tmp_path / "c", model, params, to="hf", experts="dense")
    plain, merged = loading.load(tmp_path / "c", dtype="float32")
    assert plain.config.lora.targets == () and "lora" not in merged
    want = logits(model, params)
    close(logits(plain, merged), want)
    assert {c.path for c in report.costs} == set(EINSUM)
    assert all(c.share == pytest.approx(1, abs=1e-5) and c.error < 1e-6 for c in report.costs)
    assert len(report.costs) == 7 * tiny.L + 2


def test_pieces_of_any_size_give_the_same_bytes(base, tmp_path: Path, monkeypatch) -> None:
    model, params = tuned(base, *EVERY)
    options = {"to": "openai", "force": True}
    gptoss_jax.save(tmp_path / "one", model, params, **options)
    monkeypatch.setattr(sources, "_PIECE", 1 << 15)  # bytes: 3 experts of down, 12 rows of a table
    gptoss_jax.save(tmp_path / "two", model, params, **options)
    one, two = (by_name(tmp_path / name) for name in ("one", "two"))
    assert all(one[name].tobytes() == x.tobytes() for name, x in two.items())
    # In the middle of a stack: rows of experts, of heads, of a table, and of two layers.
    added = updates(params)
    found, was = dense(tmp_path / "two"), dense(base)
    for path in EINSUM:
        exact = was[path] + added[path]
        step = 0.3 if path in EXPERTS else 0.01  # of 4 bits, and of bfloat16
        assert np.linalg.norm(found[path] - exact) < step * np.linalg.norm(exact), path


@pytest.mark.parametrize("to", ["hf", "openai"])
def test_what_has_no_adapter_is_written_byte_for_byte(base, tmp_path: Path, to) -> None:
    model, params = tuned(base, "attention")
    gptoss_jax.save(tmp_path / "c", model, params, to=to)
    found, was = by_name(tmp_path / "c"), tiny.tensors_of(tiny.make_tree(packed=True), to)
    assert found.keys() == was.keys()

    def digest(x: np.ndarray) -> str:
        return hashlib.sha256(x.tobytes()).hexdigest()

    changed = {name for name, x in found.items() if digest(x) != digest(was[name])}
    parts = {"hf": ("q_proj", "k_proj", "v_proj", "o_proj"), "openai": ("attn.qkv", "attn.out")}
    tuned_names = {n for n in was if n.endswith("weight") and any(x in n for x in parts[to])}
    assert changed == tuned_names and len(changed) == len(parts[to]) * tiny.L


def test_experts_that_were_not_tuned_keep_blocks_and_scales(base, tmp_path: Path) -> None:
    model, params = tuned(base, "gate_up", std=3.0)
    own = params["lora"]["layers"]["experts"]["gate_up_weight"]
    trained = np.zeros((tiny.L, tiny.E, 1, 1, 1), bool)
    trained[1, 3] = trained[2, 0] = True
    own["b"] = own["b"] * trained
    report = gptoss_jax.save(tmp_path / "c", model, params)
    found, was = by_name(tmp_path / "c"), by_name(base)
    for n in range(tiny.L):
        for field in ("blocks", "scales"):
            name = f"model.layers.{n}.mlp.experts.gate_up_proj_{field}"
            same = (found[name] == was[name]).reshape(tiny.E, -1).all(1)
            assert (same == ~trained[n].ravel()).all(), name
            down = f"model.layers.{n}.mlp.experts.down_proj_{field}"
            assert found[down].tobytes() == was[down].tobytes()
    assert [c.layer for c in report.costs] == [1, 2]


@pytest.mark.parametrize("form", ["mxfp4", "dense"])
def test_error_and_share_are_those_of_their_formulas(base, tmp_path: Path, form) -> None:
    model, params = tuned(base, "experts", "o", "router", std=0.5)
    report = gptoss_jax.save(tmp_path / "c", model, params, experts=form, force=True)
    found, was, added = dense(tmp_path / "c"), dense(base), updates(params)
    assert len(report.costs) == 4 * tiny.L
    for cost in report.costs:
        q, w, u = (x[cost.path][cost.layer].astype(np.float64) for x in (found, was, added))
        assert cost.share == pytest.approx(np.vdot(q - w, u) / np.vdot(u, u), rel=1e-4)
        error = np.linalg.norm(q - w - u) / np.linalg.norm(w + u)
        assert cost.error == pytest.approx(error, rel=1e-3)
        assert cost.size == pytest.approx(np.linalg.norm(u) / np.linalg.norm(w + u), rel=1e-4)
        if form == "mxfp4" and cost.path in EXPERTS:
            assert cost.written == "MXFP4" and cost.error > 0.05
            least = nearest_mxfp4(w + u).sum()
            assert np.sum((q - w - u) ** 2) == pytest.approx(least, rel=1e-3)
        else:  # exactly the nearest bfloat16
            assert cost.written == "bfloat16"
            want = (w + u).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
            assert np.mean(q != want) < 1e-3  # where float32's own rounding decides a tie
    kept = json.loads((tmp_path / "c" / "export_report.json").read_text())
    assert [t["share"] for t in kept["tensors"]] == [c.share for c in report.costs]


def test_an_update_that_does_not_survive_is_refused_by_name(base, tmp_path: Path) -> None:
    model, params = tuned(base, "down", std=0.01)
    before = list(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        gptoss_jax.save(tmp_path / "c", model, params)
    text = str(caught.value)
    assert text.startswith("layers/experts/down_weight, layer 0: only 0.") and "\n" not in text
    for hint in ("MXFP4", "--experts bf16", "attention and router", "model.qat", "--force"):
        assert hint in text
    assert list(tmp_path.iterdir()) == before
    report = gptoss_jax.save(tmp_path / "c", model, params, force=True)
    assert max(c.share or 0 for c in report.costs) < 0.9
    # The same update lives in bfloat16, and one that is too small for that is refused there.
    report = gptoss_jax.save(tmp_path / "bf16", model, params, experts="dense")
    assert min(c.share or 0 for c in report.costs) > 0.9
    model, params = tuned(base, "v", std=1e-4)
    with pytest.raises(UserError, match=r"v_weight, layer 0: only 0\.\d+ .* as bfloat16.*to peft"):
        gptoss_jax.save(tmp_path / "v", model, params)
    assert gptoss_jax.save(tmp_path / "v", model, params, dtype="float32").costs


@pytest.mark.slow
def test_a_model_trained_for_mxfp4_is_written_as_it_computed(base, tmp_path: Path) -> None:
    """Straight-through training computes with Q(W + U): no more and no less is exported."""
    model, params = tuned(base, *EVERY, dtype="float32", std=0.02, qat=True)
    want = logits(model, params)
    unquantised = Transformer(dataclasses.replace(model.config, qat=False))
    assert np.abs(logits(unquantised, params) - want).max() > 1e-3 * np.abs(want).max()
    report = gptoss_jax.save(tmp_path / "packed", model, params)
    assert any(c.share is not None and c.share < 0.9 for c in report.costs)
    close(logits(*loading.load(tmp_path / "packed", dtype="float32", experts="dense")), want)
    gptoss_jax.save(tmp_path / "dense", model, params, to="openai", experts="dense")
    close(logits(*loading.load(tmp_path / "dense", dtype="float32")), want)
    # In full, without adapters: dense experts in bfloat16, quantised in every pass.
    model, params = loading.load(base, experts="dense")
    rng = np.random.default_rng(2)
    for name in ("gate_up_weight", "down_weight"):
        x = params["layers"]["experts"][name]
        params["layers"]["experts"][name] = x + jnp.asarray(0.03 * rng.random(x.shape), x.dtype)
    tuned_config = dataclasses.replace(model.config, qat=True)
    weights.save(tmp_path / "a", Transformer(tuned_config), params)
    weights.save(tmp_path / "b", model, params, experts="mxfp4", force=True)
    one, two = dense(tmp_path / "a"), dense(tmp_path / "b")
    assert all(np.array_equal(one[path], two[path]) for path in EXPERTS)


def test_a_damaged_file_is_found_before_it_has_its_name(base, tmp_path, monkeypatch) -> None:
    model, params = loading.load(base)
    write_all = safetensors_io._write_all

    def flips(descriptor, data) -> None:
        if isinstance(data, np.ndarray) and data.size == 2 * tiny.V * tiny.D and not flipped:
            flipped.append(1)
            data = data.copy()
            data[len(data) // 2] ^= 4
        write_all(descriptor, data)

    flipped: list[int] = []
    monkeypatch.setattr(safetensors_io, "_write_all", flips)
    with pytest.raises(UserError, match=r"'lm_head.weight' has other bytes; nothing .* is kept"):
        weights.save(tmp_path / "c", model, params)
    assert flipped and list(tmp_path.iterdir()) == []

    def loses(descriptor, data) -> None:
        lost = isinstance(data, np.ndarray) and data.size == 2 * tiny.D
        write_all(descriptor, data[:-2] if lost else data)

    monkeypatch.setattr(safetensors_io, "_write_all", loses)
    with pytest.raises(UserError, match="is not what was written when it is read again"):
        weights.save(tmp_path / "c", model, params)
    assert list(tmp_path.iterdir()) == []


def test_shards_never_part_blocks_from_their_scales(base, tmp_path: Path) -> None:
    """Read in the order of files, scales belong to the blocks before them (llama.cpp has it so)."""
    model, params = loading.load(base)
    for limit in (10_000, 33_000, 40_000, 70_000):
        weights.save(tmp_path / str(limit), model, params, shard_bytes=limit)
        for file in (tmp_path / str(limit)).glob("*.safetensors"):
            names = set(load_file(file))
            blocks = {n.removesuffix("_blocks") for n in names if n.endswith("_blocks")}
            assert blocks == {n.removesuffix("_scales") for n in names if n.endswith("_scales")}


def test_what_cannot_be_merged_is_refused(base, tmp_path: Path) -> None:
    model, params = tuned(base, "q", "router")
    without = {name: child for name, child in params.items() if name != "lora"}
    with pytest.raises(UserError, match="names adapters, and these parameters have none"):
        gptoss_jax.save(tmp_path / "c", model, without)
    plain = Transformer(dataclasses.replace(model.config, lora=LoRAConfig()))
    with pytest.raises(UserError, match="the adapters have the unknown leaf lora/layers/attention"):
        gptoss_jax.save(tmp_path / "c", plain, params)
    other = LoRAConfig(targets=("q", "router"), rank=2)
    wrong = Transformer(dataclasses.replace(model.config, lora=other))
    with pytest.raises(UserError, match=r"_weight/a has shape \[4, 64, 3\], and model.lora makes"):
        gptoss_jax.save(tmp_path / "c", wrong, params)
    with pytest.raises(UserError, match="no adapters to write"):
        gptoss_jax.save(tmp_path / "c", plain, without, to="peft")
    own = params["lora"]["layers"]["router"]["weight"]
    own["b"] = own["b"].at[2, 1, 3].set(np.nan)
    with pytest.raises(UserError, match="layers/router/weight, layer 2 has NaN or infinity"):
        gptoss_jax.save(tmp_path / "c", model, params)
    assert list(tmp_path.iterdir()) == []


def test_the_command_merges_prints_and_refuses(base, tmp_path: Path, capsys) -> None:
    model, params = tuned(base, "q", "k", std=0.2)
    gptoss_jax.save(tmp_path / "peft", model, params, to="peft")
    arguments = [str(base), str(tmp_path / "c"), "--to", "hf"]
    convert.main([*arguments, "--adapters", str(tmp_path / "peft")])
    text = capsys.readouterr().out
    assert "attention/k_weight bfloat16" in text and "least (layer)" in text and "…" not in text
    gptoss_jax.save(tmp_path / "want", model, params)
    found, want = by_name(tmp_path / "c"), by_name(tmp_path / "want")
    assert all(x.tobytes() == want[name].tobytes() for name, x in found.items())
    # config.json is the source's own, since the layout is.
    assert (tmp_path / "c" / "config.json").read_text() == (base / "config.json").read_text()
    with pytest.raises(UserError, match="is a whole model without adapters; --to peft is for LoRA"):
        convert.main([str(base), str(tmp_path / "x"), "--to", "peft"])
    with pytest.raises(UserError, match="as they are: leave out --experts"):
        convert.main([str(base), str(tmp_path / "x"), "--to", "peft", "--experts", "bf16"])
    assert not (tmp_path / "x").exists()
