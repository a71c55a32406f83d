"""Adapters of experts against PEFT's on transformers, both ways: pip install -e '.[parity]'."""

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
theirs = pytest.importorskip("peft")

from gptoss_jax import loading, weights  # noqa: E402
from gptoss_jax.config import LoRAConfig, ModelConfig  # noqa: E402
from gptoss_jax.lora import adapters  # noqa: E402
from gptoss_jax.model import Transformer  # noqa: E402
from gptoss_jax.parameters.tree import nest  # noqa: E402
from gptoss_jax.weights import peft  # noqa: E402

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    # PEFT 0.21 looks for patterns of ranks among modules alone, and warns of those for parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]
TOKENS = np.random.default_rng(0).integers(0, tiny.V, (2, 3 * tiny.W))
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LAYERS_OF_BOTH = ("layers[1,3]/experts/gate_up_weight", "layers[2-]/experts/down_weight")
OURS = {
    "gate_up": {"targets": ("gate_up",), "rank": 3},
    "down": {"targets": ("down",), "rank": 4, "rslora": True},
    "both": {"targets": ("experts",), "rank": 2},
    "beside": {"targets": ("attention", "router", "experts"), "rank": 5},
    "some layers": {"targets": ("layers[2]/attention/o_weight", *LAYERS_OF_BOTH), "rank": 3},
}
THEIRS = {
    "gate_up": {"target_parameters": [GATE_UP]},
    "down": {"target_parameters": [DOWN], "use_rslora": True},
    "ranks": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.router.weight", DOWN, GATE_UP],
        "rank_pattern": {DOWN: 2, f"layers.3.{GATE_UP}": 3, "o_proj": 1},
        "alpha_pattern": {f"layers.1.{DOWN}": 11, "mlp.router.weight": 7, "q_proj": 3},
    },
    "some layers": {
        "target_parameters": [f"1.{GATE_UP}", f"3.{GATE_UP}", f"3.{DOWN}", f"2.{DOWN}"],
    },
    "mirrored": {"target_parameters": [GATE_UP, DOWN], "rank_pattern": {DOWN: 3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    tiny.write(folder, tiny.make_tree(packed=False, dtype="float32"), "hf")
    return folder


def load_theirs(folder: Path):
    return transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


def our_logits(config: ModelConfig, params) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        apply = jax.jit(Transformer(config).apply)
        return np.asarray(apply({"params": params}, jnp.asarray(TOKENS)))


def check(found: np.ndarray, want: np.ndarray, plain: np.ndarray) -> None:
    largest = np.abs(want).max()
    assert np.abs(want - plain).max() > 0.1 * largest
    assert np.abs(found - want).max() <= 1e-6 * max(1, largest)


@pytest.mark.parametrize("name", OURS)
def test_peft_loads_what_we_wrote(tmp_path: Path, base: Path, name: str) -> None:
    model, params = loading.load(base, dtype="float32")
    config = dataclasses.replace(model.config, lora=LoRAConfig(alpha=7.0, **OURS[name]))
    chosen, rng, flat = adapters.selected(config), np.random.default_rng(3), {}
    for path, shape in adapters.shapes(config).items():
        layers = chosen[path].any(tuple(range(1, chosen[path].ndim)))
        flat[f"{path}/a"] = rng.standard_normal(shape.a).astype(np.float32)
        b = 0.1 * rng.standard_normal(shape.b).astype(np.float32)
        flat[f"{path}/b"] = b * layers.reshape(-1, *(1,) * (b.ndim - 1))
    tuned = {**params, "lora": jax.tree.map(jnp.asarray, nest(flat))}
    weights.save(tmp_path / "ours", Transformer(config), tuned, to="peft")
    plain = load_theirs(base)
    before = their_logits(plain)
    wrapped = theirs.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    check(our_logits(config, tuned), their_logits(wrapped), before)


@pytest.mark.parametrize("name", THEIRS)
def test_we_load_what_peft_wrote(tmp_path: Path, base: Path, name: str) -> None:
    options = {"target_modules": [], "r": 4, "lora_alpha": 6, **THEIRS[name]}
    plain = load_theirs(base)
    before = their_logits(plain)
    experts = [layer.mlp.experts for layer in plain.model.layers]
    for module in experts:  # transformers 4 does not say it
        module.is_transposed = name != "mirrored"
    wrapped = theirs.get_peft_model(plain, theirs.LoraConfig(task_type="CAUSAL_LM", **options))
    for module in experts:
        module.is_transposed = True
    torch.manual_seed(1)
    with torch.no_grad():
        for key, x in wrapped.named_parameters():
            if "lora_" in key:
                x.copy_(torch.randn_like(x) * 0.2)
    wrapped.eval().save_pretrained(tmp_path / "theirs")
    model, params = loading.load(base, dtype="float32")
    lora, tree = peft.read(tmp_path / "theirs", model.config)
    config = dataclasses.replace(model.config, lora=lora)
    tuned = {**params, "lora": jax.tree.map(jnp.asarray, tree)}
    check(our_logits(config, tuned), their_logits(wrapped), before)
