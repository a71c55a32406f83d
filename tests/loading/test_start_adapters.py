"""Training that goes on where PEFT's ended."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import make_program
from safetensors.numpy import load_file, save_file
from tiny_training import TINY

from gptoss_jax import data, train
from gptoss_jax.config import Config, DataConfig, LoRAConfig, ModelConfig, command_line
from gptoss_jax.data.demo import FOLDER
from gptoss_jax.errors import UserError
from gptoss_jax.loading import start_adapters
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.objectives import check_start
from gptoss_jax.objectives.token_loss import loss_fn
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.runs import metrics
from gptoss_jax.types import Batch, Params
from gptoss_jax.weights import peft

V, D, N, K, H, E = 47, 24, 6, 2, 10, 5
HELD = ("q", "k", "v", "o", "router", "unembedding")
CONFIG = Config(
    init="DIR",
    model=ModelConfig(
        vocab_size=V, num_layers=2, d_model=D, num_heads=N, num_kv_heads=K, head_dim=H,
        num_experts=E, active_experts=3, d_expert=32, window=4, context=32, dtype="float32",
        param_dtype="float32", init_std=0.3, lora=LoRAConfig(HELD, rank=4, alpha=6.0),
    ),
    data=DataConfig(sequence_length=11, batch_size=3),
)  # fmt: skip
OUTPUTS = {
    "q": (N, H), "k": (K, H), "v": (K, H), "o": (D,), "router": (E,), "unembedding": (V,),
}  # fmt: skip
INPUTS = dict.fromkeys(OUTPUTS, (D,)) | {"o": (N, H)}


def write(folder: Path, model: ModelConfig) -> Path:
    """Write random adapters as `convert --to peft` does."""
    rng = np.random.default_rng(5)
    flat: dict[str, np.ndarray] = {}
    for path, shape in adapters.shapes(model).items():
        flat[f"{path}/a"] = rng.standard_normal(shape.a).astype(np.float32)
        flat[f"{path}/b"] = 0.1 * rng.standard_normal(shape.b).astype(np.float32)
    folder.mkdir()
    (folder / peft.CONFIG).write_text(json.dumps(peft.config_of(model)))
    save_file(peft.tensors_of(model, nest(flat)), folder / peft.WEIGHTS)
    return folder


def merged(folder: Path, model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Fold a folder's adapters in by numpy: W + alpha / r B A, in PEFT's own order of axes."""
    raw, held = json.loads((folder / peft.CONFIG).read_text()), load_file(folder / peft.WEIGHTS)
    scale = raw["lora_alpha"] / raw["r"]
    flat = {k: np.array(x) for k, x in flatten(params).items() if not k.startswith("lora/")}
    modules = {"router": "mlp.router"} | {x: f"self_attn.{x}_proj" for x in "qkvo"}
    found = 0
    for name, outputs in OUTPUTS.items():
        path = adapters.names()[name]
        layered = name != "unembedding"
        for n in range(model.num_layers if layered else 1):
            module = f"model.layers.{n}.{modules[name]}" if layered else "lm_head"
            a, b = (held.get(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
            if a is not None and b is not None:
                update = scale * (b.astype(np.float64) @ a).reshape(*outputs, *INPUTS[name])
                at = flat[path][n] if layered else flat[path]
                at += update.astype(np.float32)
                found += 2
    assert found == len(held)
    plain = dataclasses.replace(model, lora=LoRAConfig())
    return plain, nest({k: jnp.asarray(x) for k, x in flat.items()})


def loss_of(model: ModelConfig, params: Params) -> float:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (3, 12)).astype(np.int32)
    ones = np.ones((3, 11), np.int32)
    at = np.tile(np.arange(11, dtype=np.int32), (3, 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, at)  # pyright: ignore[reportArgumentType]
    sums: Any = jax.jit(loss_fn, static_argnums=0)(Transformer(model), params, batch)
    return float(sums.nll / sums.weight)


def base_of(config: Config) -> Params:
    params = init_params(Transformer(config.model), seed=1)
    return {name: part for name, part in params.items() if name != "lora"}


def begun(config: Config, params: Params | None) -> Params:
    found = start_adapters.read(config)
    assert found is not None
    return start_adapters.put(config, params, found[1])


def test_a_run_begins_as_the_merged_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", CONFIG.model)
    config = dataclasses.replace(CONFIG, init_adapters=str(folder))
    base = base_of(config)
    params = make_program(config).begin(begun(config, base)).params
    plain, folded = merged(folder, config.model, base)
    want = loss_of(plain, folded)
    assert loss_of(config.model, params) == pytest.approx(want, rel=1e-5)
    assert abs(loss_of(plain, base) - want) > 0.01
    with pytest.raises(UserError, match=r"--init DIR has adapters, and --init-adapters .* others"):
        begun(config, params)


@pytest.mark.slow
def test_what_is_not_there_begins_anew(tmp_path: Path) -> None:
    """Another weight, another layer, and more of a rank: new A, for there to be a gradient."""
    folder = write(tmp_path / "theirs", CONFIG.model)
    held = load_file(folder / peft.WEIGHTS)
    name = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    kept = {k: x for k, x in held.items() if "q_proj" in k or "v_proj" in k}
    for part in "AB":
        del kept[name.format(0, "v", part)]
        at = name.format(1, "q", part)
        kept[at] = np.ascontiguousarray(kept[at][:2] if part == "A" else kept[at][:, :2])
    save_file(kept, folder / peft.WEIGHTS)
    pattern = {r"layers\.1\.self_attn\.q_proj": 3}  # alpha, of which the rank of 2 has its own
    raw = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(raw | {"alpha_pattern": pattern}))
    targets = ("q", "v", "o", "experts")
    model = dataclasses.replace(CONFIG.model, lora=LoRAConfig(targets, rank=4, alpha=6.0))
    config = dataclasses.replace(CONFIG, model=model, init_adapters=str(folder))
    params = begun(config, None)
    base = init_params(Transformer(model), seed=config.train.seed)
    want = loss_of(*merged(folder, model, base))
    assert loss_of(model, params) == pytest.approx(want, rel=1e-5)
    own = params["lora"]["layers"]
    assert own["attention"].keys() == {"q_weight", "v_weight", "o_weight"}
    q, v = own["attention"]["q_weight"], own["attention"]["v_weight"]
    np.testing.assert_array_equal(q["a"][0].T, kept[name.format(0, "q", "A")])
    np.testing.assert_array_equal(q["a"][1, :, :2].T, kept[name.format(1, "q", "A")])
    assert not v["b"][0].any() and not q["b"][1, 2:].any()
    for path, leaf in flatten(params["lora"]).items():
        if path.endswith("/a"):
            assert np.all(np.any(np.asarray(leaf) != 0, axis=-2)), path


def test_each_expert_s_ranks_begin_anew_where_it_has_none(tmp_path: Path) -> None:
    """PEFT's rank of down is 2 of the run's 4, and expert 3 has none; a mesh pads the experts."""
    lora = LoRAConfig(("q", "experts"), rank=4, alpha=6.0)
    model = dataclasses.replace(CONFIG.model, lora=lora)
    folder = write(tmp_path / "theirs", model)
    held = load_file(folder / peft.WEIGHTS)
    for n in range(model.num_layers):
        at = f"base_model.model.model.layers.{n}.mlp.experts.lora_"
        a = held[f"{at}A.weight"].reshape(E, 4, -1)[:, :2].copy()
        b = held[f"{at}B.weight"].reshape(D, 4, E)[:, :2].copy()
        a[3], b[:, :, 3] = 0, 0
        held |= {f"{at}A.weight": a.reshape(2 * E, -1), f"{at}B.weight": b.reshape(D, -1)}
    save_file(held, folder / peft.WEIGHTS)
    padded = dataclasses.replace(model, expert_padding=32)
    config = dataclasses.replace(CONFIG, model=padded, init_adapters=str(folder))
    _, given = peft.read(folder, model)
    found = start_adapters.put(config, None, given)["lora"]["layers"]["experts"]
    own, given = found["down_weight"], given["layers"]["experts"]["down_weight"]
    assert own["a"].shape[2] == 64 and not own["a"][:, :, 32:].any()
    np.testing.assert_array_equal(
        own["a"][:, [0, 1, 2, 4], :32, :2], given["a"][:, [0, 1, 2, 4], :, :2]
    )
    assert np.any(np.asarray(own["a"]) != 0, axis=2).all()
    want = np.zeros_like(own["b"])
    want[:, [0, 1, 2, 4], :2] = given["b"][:, [0, 1, 2, 4], :2]
    np.testing.assert_array_equal(own["b"], want)


@pytest.mark.parametrize(
    ("changes", "say"),
    [
        ({"rank": 3}, r"give --model\.lora\.rank 4$"),
        ({"alpha": 16.0, "rslora": True}, r"--model\.lora\.alpha 6 --model\.lora\.no-rslora$"),
        ({"targets": ("attention",)}, r"give --model\.lora\.targets q k v o router unembedding$"),
        ({"targets": ("layers[1]/*", "unembedding")}, r"give --model\.lora\.targets q k v o"),
        ({"targets": ()}, r"has adapters of q k v o router unembedding, rank 4, alpha 6, and"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(tmp_path: Path, changes, say: str) -> None:
    folder = write(tmp_path / "theirs", CONFIG.model)
    own = dataclasses.replace(CONFIG.model.lora, **changes)
    model = dataclasses.replace(CONFIG.model, lora=own)
    config = dataclasses.replace(CONFIG, model=model, init_adapters=str(folder))
    with pytest.raises(UserError, match=say) as refused:
        start_adapters.read(config)
    assert "\n" not in str(refused.value)


def test_a_reference_that_leaves_them_out_is_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", CONFIG.model)
    objective = dataclasses.replace(CONFIG.objective, name="dpo")
    config = dataclasses.replace(CONFIG, objective=objective, init_adapters=str(folder))
    with pytest.raises(UserError, match="or take the model below them as the reference"):
        check_start(config, None)
    meant = dataclasses.replace(objective, reference="base")
    check_start(dataclasses.replace(config, objective=meant), None)
    assert start_adapters.read(CONFIG) is None


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shown by a dry run; the loss before the first step is the merged model's; and goes on."""
    options = ["--init", "random", "--data.train", str(FOLDER / "train.jsonl"), "--data.held_out"]
    options += [str(FOLDER / "held_out.jsonl"), "--model.lora.targets", "q", "v", "o", "experts"]
    options += ["--model.lora.rank", "3", "--model.experts", "mxfp4", "--train.eval_questions", "0"]
    options += ["--train.eval_batches", "2", "--workdir", str(tmp_path / "run")]
    args = [*TINY, *options, "--init_adapters", str(tmp_path / "theirs")]
    config = command_line.load(args)
    held = dataclasses.replace(config.model.lora, targets=("q", "o"))
    folder = write(tmp_path / "theirs", dataclasses.replace(config.model, lora=held))
    train.main([*args, "--dry_run"])
    assert f"adapters  begin as {folder}: q o, rank 3" in capsys.readouterr().out
    train.main([*args, "--train.steps", "2"])
    assert f"begins    as {folder}: q o, rank 3" in capsys.readouterr().out
    plain, params = merged_into_random(folder, config)
    sums = [loss_fn(Transformer(plain), params, batch) for batch in data.eval_batches(config)]
    want = sum(float(s.nll) for s in sums) / sum(float(s.weight) for s in sums)
    first = next(r for r in metrics.read(tmp_path / "run") if "held_out_loss" in r)
    assert first["step"] == 0 and first["held_out_loss"] == pytest.approx(want, rel=1e-5)
    # Its checkpoints hold them: the folder is not asked for again.
    folder.rename(tmp_path / "gone")
    train.main([*args, "--train.steps", "3"])


def merged_into_random(folder: Path, config: Config) -> tuple[ModelConfig, Params]:
    """`merged`, for sizes of the run's own and packed experts."""
    model, held = config.model, load_file(folder / peft.WEIGHTS)
    params = init_params(Transformer(model), seed=config.train.seed)
    attention = dict(params["layers"]["attention"])
    sizes = {"q": (model.num_heads, model.head_dim, -1), "o": (-1, model.num_heads, model.head_dim)}
    for name, sides in sizes.items():
        stack = np.array(attention[f"{name}_weight"])
        for n in range(model.num_layers):
            at = f"base_model.model.model.layers.{n}.self_attn.{name}_proj.lora_"
            update = held[f"{at}B.weight"].astype(np.float64) @ held[f"{at}A.weight"]
            stack[n] += model.lora.scale * update.reshape(sides)
        attention[f"{name}_weight"] = jnp.asarray(stack)
    layers = {**params["layers"], "attention": attention}
    rest = {name: part for name, part in params.items() if name != "lora"}
    return dataclasses.replace(model, lora=LoRAConfig()), {**rest, "layers": layers}
