"""Against transformers itself, where it is installed: what we write it loads, and the reverse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from gptoss_jax import loading, weights  # noqa: E402
from gptoss_jax.config import LoRAConfig  # noqa: E402
from gptoss_jax.loading.convert import convert  # noqa: E402
from gptoss_jax.lora import adapters  # noqa: E402
from gptoss_jax.model import Transformer  # noqa: E402
from gptoss_jax.parameters.tree import nest  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]
TOKENS = np.random.default_rng(0).integers(0, tiny.V, (2, 3 * tiny.W))


def from_pretrained(folder: Path, dtype: str = "float32", **options):
    return transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", **options
    ).eval()


def state(model) -> dict[str, np.ndarray]:
    found = {name: x.float().numpy() for name, x in model.state_dict().items()}
    return {name: x for name, x in found.items() if "rotary" not in name}


def assert_same_logits(theirs, folder: Path) -> None:
    model, params = loading.load(folder, dtype=jnp.float32)
    with torch.no_grad():
        want = theirs(torch.as_tensor(TOKENS)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)))
    assert np.abs(logits - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_loads_dense_experts_that_we_wrote(tmp_path: Path, dtype) -> None:
    tree = tiny.make_tree(packed=False, dtype=dtype)
    tiny.write(tmp_path / "openai", tree, "openai")
    convert(tmp_path / "openai", tmp_path / "hf", to="hf", shard_bytes=200_000)
    theirs = from_pretrained(tmp_path / "hf")
    want = tiny.hf_tensors(tree)
    found = state(theirs)
    assert found.keys() == want.keys()
    for name, x in want.items():
        assert np.array_equal(found[name], x.astype(np.float32)), name
    assert_same_logits(theirs, tmp_path / "openai")
    model, params = loading.load(tmp_path / "openai", dtype=dtype)
    weights.save(tmp_path / "saved", model, params)
    saved = state(from_pretrained(tmp_path / "saved"))
    assert all(np.array_equal(saved[name], x) for name, x in found.items())


def test_it_loads_packed_experts_that_we_wrote(tmp_path: Path) -> None:
    """Asked to, it decodes them on a CPU: equal to the last bit."""
    tree = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "openai", tree, "openai")
    convert(tmp_path / "openai", tmp_path / "hf", to="hf")
    decode = transformers.Mxfp4Config(dequantize=True)
    theirs = from_pretrained(tmp_path / "hf", "bfloat16", quantization_config=decode)
    _, params = loading.load(tmp_path / "openai", experts="dense")
    experts = jax.tree.map(lambda x: np.asarray(x, np.float32), params["layers"]["experts"])
    for n, layer in enumerate(theirs.model.layers):
        gate_up = layer.mlp.experts.gate_up_proj.detach().float().numpy()  # [E, D, 2F]
        for i in range(2):
            want = experts["gate_up_weight"][n, :, i].swapaxes(1, 2)
            assert np.array_equal(gate_up[..., i::2], want)
        down = layer.mlp.experts.down_proj.detach().float().numpy()
        assert np.array_equal(down, experts["down_weight"][n].swapaxes(1, 2))
    convert(tmp_path / "hf", tmp_path / "dense", to="hf", experts="dense")
    assert_same_logits(theirs.float(), tmp_path / "dense")


def test_it_loads_tuned_models_that_we_merged(tmp_path: Path) -> None:
    """In float32 the adapted model itself; in bfloat16 and in MXFP4 what was written of it."""
    tiny.write(tmp_path / "base", tiny.make_tree(packed=True), "openai")
    model, params = loading.load(tmp_path / "base", dtype=jnp.float32)
    own = LoRAConfig(("attention", "experts", "router", "unembedding", "embedding"), rank=2)
    model = Transformer(dataclasses.replace(model.config, lora=own))
    rng, tree = np.random.default_rng(0), {}
    for path, shape in adapters.shapes(model.config).items():
        tree[f"{path}/a"] = jnp.asarray(rng.standard_normal(shape.a), jnp.float32)
        tree[f"{path}/b"] = jnp.asarray(0.01 * rng.standard_normal(shape.b), jnp.float32)
    params["lora"] = nest(tree)
    weights.save(tmp_path / "float32", model, params, experts="dense")
    with torch.no_grad():
        found = from_pretrained(tmp_path / "float32")(torch.as_tensor(TOKENS)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        want = np.asarray(model.apply({"params": params}, jnp.asarray(TOKENS)))
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()
    weights.save(tmp_path / "bf16", model, params, experts="dense", dtype="bfloat16")
    assert_same_logits(from_pretrained(tmp_path / "bf16"), tmp_path / "bf16")
    weights.save(tmp_path / "mxfp4", model, params, dtype="bfloat16", force=True)
    decode = transformers.Mxfp4Config(dequantize=True)
    theirs = from_pretrained(tmp_path / "mxfp4", "bfloat16", quantization_config=decode)
    assert_same_logits(theirs.float(), tmp_path / "mxfp4")


def test_layer_types_that_we_wrote_are_obeyed(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=False, dtype="float32")
    tiny.write(tmp_path / "c", tree, "hf")
    model, params = loading.load(tmp_path / "c", dtype=jnp.float32)
    model = Transformer(dataclasses.replace(model.config, layer_pattern="fbbf"))
    weights.save(tmp_path / "fbbf", model, params)
    assert_same_logits(from_pretrained(tmp_path / "fbbf"), tmp_path / "fbbf")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_we_load_what_it_wrote(tmp_path: Path, dtype) -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{name: x for name, x in tiny.HF_CONFIG.items() if not name.startswith("rope")},
        rope_parameters=tiny.ROPE | {"rope_theta": 10_000.0},
    )
    theirs = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for x in theirs.parameters():  # biases and sinks are made as zeros
            x.copy_(torch.randn_like(x) * 0.1)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "c", max_shard_size="200KB")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    assert_same_logits(theirs.float(), tmp_path / "c")
    # And back, tensor for tensor.
    convert(tmp_path / "c", tmp_path / "openai", to="openai")
    convert(tmp_path / "openai", tmp_path / "again", to="hf")
    again = state(from_pretrained(tmp_path / "again"))
    assert all(np.array_equal(again[name], x) for name, x in state(theirs).items())
