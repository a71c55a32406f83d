"""Adapters in PEFT's layout, there and back; and against PEFT itself, where it is installed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import D, E, H, K, L, N, V

from gptoss_jax import loading, weights
from gptoss_jax.config import Config, DataConfig, LoRAConfig, ModelConfig, command_line
from gptoss_jax.convert import main
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.loading import start_adapters
from gptoss_jax.loading.convert import _base_name, convert
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.runs import records
from gptoss_jax.runs.frozen_base import Base
from gptoss_jax.weights import peft

SIZES = ModelConfig(
    vocab_size=V, num_layers=L, d_model=D, num_heads=N, num_kv_heads=K, head_dim=H,
    num_experts=E, active_experts=tiny.A, d_expert=tiny.F, window=tiny.W,
)  # fmt: skip
ROOT = Path(__file__).parents[2]
HELD = ("attention", "router", "unembedding")
TOKENS = np.random.default_rng(0).integers(0, V, (2, 3 * tiny.W))
# What PEFT calls a weight's module, and the sides of it.
SIDES = {
    "self_attn.q_proj": (D, N * H),
    "self_attn.k_proj": (D, K * H),
    "self_attn.v_proj": (D, K * H),
    "self_attn.o_proj": (N * H, D),
    "mlp.router": (D, E),
}


def adapted(*targets: str, model: ModelConfig = SIZES, rank: int = 3, **options):
    """Return a config with adapters and a tree of them, numpy arrays."""
    config = dataclasses.replace(
        model, lora=LoRAConfig(targets=targets, rank=rank, alpha=7.0, **options)
    )
    rng, tree = np.random.default_rng(3), {}
    for path, shape in adapters.shapes(config).items():
        tree[f"{path}/a"] = rng.standard_normal(shape.a).astype(np.float32)
        tree[f"{path}/b"] = 0.1 * rng.standard_normal(shape.b).astype(np.float32)
    return config, nest(tree)


def write(folder: Path, config: ModelConfig, tree) -> dict[str, np.ndarray]:
    folder.mkdir()
    (folder / peft.CONFIG).write_text(json.dumps(peft.config_of(config)))
    tensors = peft.tensors_of(config, tree)
    save_file(tensors, folder / peft.WEIGHTS)
    return tensors


def edit(folder: Path, **fields) -> None:
    file = folder / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_names_shapes_and_values(tmp_path: Path) -> None:
    config, tree = adapted(*HELD)
    found = write(tmp_path / "c", config, tree)
    want = {"base_model.model.lm_head": (D, V)}
    for n in range(L):
        for module, sides in SIDES.items():
            want[f"base_model.model.model.layers.{n}.{module}"] = sides
    assert len(found) == 2 * len(want)
    for name, (inputs, outputs) in want.items():
        assert found[f"{name}.lora_A.weight"].shape == (3, inputs)
        assert found[f"{name}.lora_B.weight"].shape == (outputs, 3)
    own = tree["layers"]["attention"]["o_weight"]
    name = "base_model.model.model.layers.2.self_attn.o_proj"
    for head in range(N):
        for i in range(H):
            column = found[f"{name}.lora_A.weight"][:, head * H + i]
            assert np.array_equal(column, own["a"][2, head, i])
    q = tree["layers"]["attention"]["q_weight"]["b"]
    row = found["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][5 * H + 7]
    assert np.array_equal(row, q[1, :, 5, 7])
    raw = peft.config_of(config, base="openai/gpt-oss-20b")
    assert raw["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    assert raw["target_parameters"] == ["mlp.router.weight"]
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (3, 7.0, False)
    assert raw["base_model_name_or_path"] == "openai/gpt-oss-20b"


def record_of(init: str, *, folder: Path | None) -> records.Record:
    """Return the record of a run whose --init was `init`, found at `folder`."""
    base = Base(init, folder=None if folder is None else str(folder))
    return records.Record(1, Config(init=init), {}, {}, base=base)


@pytest.mark.parametrize("init", ["base", "./base", "../run/base", ".", "base/../base"])
def test_the_base_of_written_adapters_is_found_from_elsewhere(tmp_path, monkeypatch, init) -> None:
    """A relative --init is relative to where the run began, which no other program knows."""
    folder = tmp_path / "run" / "base"
    folder.mkdir(parents=True)
    record = record_of(init, folder=(folder if init == "." else tmp_path / "run") / init)
    for cwd in (tmp_path / "run", tmp_path):
        monkeypatch.chdir(cwd)
        assert _base_name(record, None, whose=tmp_path) == str(folder)
    moved = folder.rename(tmp_path / "moved")
    assert _base_name(record, "moved", whose=tmp_path) == str(moved)
    monkeypatch.setenv("GPTOSS_JAX_BASE", str(moved))
    assert _base_name(record, None, whose=tmp_path) == str(moved)


def test_the_base_of_written_adapters_keeps_its_name_on_the_hub(tmp_path, monkeypatch) -> None:
    name = "openai/gpt-oss-20b"
    cached = tmp_path / "models--openai--gpt-oss-20b" / "snapshots" / "6cee5e81"
    record = record_of(name, folder=cached)
    assert _base_name(record, None, whose=tmp_path) == name
    assert _base_name(record, "openai/gpt-oss-120b", whose=tmp_path) == "openai/gpt-oss-120b"
    assert _base_name(record_of("random", folder=None), None, whose=tmp_path) == ""


@pytest.mark.parametrize("rslora", [False, True])
def test_there_and_back(tmp_path: Path, rslora) -> None:
    config, tree = adapted(*HELD, rslora=rslora)
    write(tmp_path / "c", config, tree)
    own, back = peft.read(tmp_path / "c", SIZES)
    targets = ("q", "k", "v", "o", "router", "unembedding")
    assert own == dataclasses.replace(config.lora, targets=targets)
    assert flatten(back).keys() == flatten(tree).keys()
    for path, leaf in flatten(tree).items():
        assert np.array_equal(flatten(back)[path], leaf), path


def test_a_rank_must_fit_only_what_it_adapts(tmp_path: Path) -> None:
    """20b's router has a side of 32, and attention may have a rank of 64."""
    config, tree = adapted("q", "o", rank=E + 2)
    write(tmp_path / "c", config, tree)
    own, back = peft.read(tmp_path / "c", SIZES)
    assert own == config.lora
    for path, leaf in flatten(tree).items():
        assert np.array_equal(flatten(back)[path], leaf), path
    with pytest.raises(UserError, match=f"has a side of {E}"):
        adapted("router", rank=E + 2)


def test_the_base_s_own_lm_head_beside_its_adapter_is_passed_over(tmp_path: Path) -> None:
    """PEFT saves it by default (save_embedding_layers)."""
    config, tree = adapted("q", "unembedding")
    tensors = write(tmp_path / "c", config, tree)
    tensors["base_model.model.lm_head.base_layer.weight"] = np.ones((V, D), np.float32)
    save_file(tensors, tmp_path / "c" / peft.WEIGHTS)
    own, back = peft.read(tmp_path / "c", SIZES)
    assert own == config.lora and flatten(back).keys() == flatten(tree).keys()


def test_other_ranks_scales_and_layers_become_one(tmp_path: Path) -> None:
    """Ranks of 5 and 2, an alpha of its own, and layers 1 and 3 alone."""
    rng = np.random.default_rng(0)
    tensors, raw = {}, peft.config_of(adapted("q", "v")[0])
    for n in (1, 3):
        for module, rank in (("q_proj", 5), ("v_proj", 2)):
            sides = SIDES[f"self_attn.{module}"]
            at = f"base_model.model.model.layers.{n}.self_attn.{module}.lora_"
            tensors[f"{at}A.weight"] = rng.standard_normal((rank, sides[0])).astype(np.float32)
            tensors[f"{at}B.weight"] = rng.standard_normal((sides[1], rank)).astype(np.float32)
    (tmp_path / "c").mkdir()
    raw |= {"r": 5, "rank_pattern": {"v_proj": 2}, "layers_to_transform": [1, 3]}
    raw |= {"alpha_pattern": {r"layers\.3\.self_attn\.v_proj": 12}}
    (tmp_path / "c" / peft.CONFIG).write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "c" / peft.WEIGHTS)
    own, tree = peft.read(tmp_path / "c", SIZES)
    assert (own.rank, own.alpha) == (5, 7.0)
    assert own.targets == ("layers[1,3]/attention/q_weight", "layers[1,3]/attention/v_weight")
    for name, heads, rank in (("q", N, 5), ("v", K, 2)):
        a, b = (tree["layers"]["attention"][f"{name}_weight"][part] for part in "ab")
        assert a.shape == (L, D, 5) and b.shape == (L, 5, heads, H)
        found = own.scale * np.einsum("LDr,LrKH->LKHD", a, b).reshape(L, -1, D)
        for n in range(L):
            want = np.zeros_like(found[n])
            if n in (1, 3):
                at = f"base_model.model.model.layers.{n}.self_attn.{name}_proj.lora_"
                alpha = 12 if (n, name) == (3, "v") else 7
                want = alpha / rank * tensors[f"{at}B.weight"] @ tensors[f"{at}A.weight"]
            np.testing.assert_allclose(found[n], want, atol=1e-5 * 30)


@pytest.mark.parametrize(
    ("targets", "experts", "message"),
    [
        (
            ("q", "embedding"),
            E,
            r"embedding/weight \(embedding of .* no fixed place for: merge them",
        ),
        (("embedding",), E, r"--to openai\), or tune only q, k, v, o, router, gate_up, down, unem"),
        (("down",), 1, r"down_weight \(down .* or tune only q, k, v, o, router, unembedding$"),
    ],
)
def test_adapters_that_it_has_no_place_for(targets, experts, message) -> None:
    model = dataclasses.replace(SIZES, num_experts=experts, active_experts=1)
    config, tree = adapted(*targets, model=model)
    for call in (lambda: peft.config_of(config), lambda: peft.tensors_of(config, tree)):
        with pytest.raises(UserError, match=message):
            call()


EXPERTS = "base_model.model.model.layers.{}.mlp.experts"
F = tiny.F


def test_experts_in_peft_s_arrangement(tmp_path: Path) -> None:
    """ParamWrapper adds sum_r B[o, r E + e] A[e r, i] to the parameter [E, inputs, outputs]."""
    config, tree = adapted("experts")
    found = write(tmp_path / "c", config, tree)
    assert len(found) == 4 * L
    own = tree["layers"]["experts"]
    for n in range(L):
        inner, outer = EXPERTS.format(n) + ".base_layer", EXPERTS.format(n)
        for module, name, inputs, outputs in (
            (inner, "gate_up_weight", D, 2 * F),
            (outer, "down_weight", F, D),
        ):
            a, b = (found[f"{module}.lora_{letter}.weight"] for letter in "AB")
            assert a.shape == (3 * E, inputs) and b.shape == (outputs, 3 * E)
            mine = own[name]["a"][n], own[name]["b"][n]
            for e, r in np.ndindex(E, 3):
                assert np.array_equal(a[3 * e + r], mine[0][e, :, r])
                column = b[:, E * r + e]
                if name == "gate_up_weight":  # gate and up alternate
                    assert np.array_equal(column[0::2], mine[1][e, r, 0])
                    assert np.array_equal(column[1::2], mine[1][e, r, 1])
                else:
                    assert np.array_equal(column, mine[1][e, r])
    raw = peft.config_of(config)
    assert raw["target_modules"] == []
    assert raw["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


SOME = ("layers[1,3]/experts/gate_up_weight", "layers[3]/experts/down_weight")


@pytest.mark.parametrize(
    "targets",
    [("gate_up",), ("down",), ("gate_up", "down"), ("q", "router", "gate_up", "down"), SOME],
)
def test_experts_there_and_back(tmp_path: Path, targets) -> None:
    config, tree = adapted(*targets)
    found = write(tmp_path / "c", config, tree)
    own, back = peft.read(tmp_path / "c", SIZES)
    assert own == config.lora
    if targets == SOME:
        outer, inner = EXPERTS.format(1), EXPERTS.format(3) + ".base_layer"
        sides = {name: x.shape[1] for name, x in found.items() if ".lora_A" in name}
        assert sides == {
            f"{outer}.lora_A.weight": D,  # gate_up alone
            f"{inner}.lora_A.weight": D,  # gate_up inside down
            f"{EXPERTS.format(3)}.lora_A.weight": F,
        }
        assert json.loads((tmp_path / "c" / peft.CONFIG).read_text())["target_parameters"] == [
            "layers.1.mlp.experts.gate_up_proj",
            "layers.3.mlp.experts.gate_up_proj",
            "layers.3.mlp.experts.down_proj",
        ]
    layers = {"gate_up_weight": [1, 3], "down_weight": [3]} if targets == SOME else {}
    for path, leaf in flatten(tree).items():
        at = layers.get(path.split("/")[2], slice(None))
        assert np.array_equal(flatten(back)[path][at], leaf[at]), path
        rest = np.delete(flatten(back)[path], at, axis=0)
        assert not rest.any()


def transposed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the file of a PEFT that takes the parameter as [E, outputs, inputs].

    Its B [inputs, r, E] holds our A, and its A [E, r, outputs] our B.
    """
    out = {}
    for name, x in tensors.items():
        if ".lora_A" in name:  # [E r, inputs] -> [inputs, r E]
            other = x.reshape(E, -1, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1)
            out[name.replace(".lora_A", ".lora_B")] = np.ascontiguousarray(other)
        else:  # [outputs, r E] -> [E r, outputs]
            other = x.reshape(x.shape[0], -1, E).transpose(2, 1, 0).reshape(-1, x.shape[0])
            out[name.replace(".lora_B", ".lora_A")] = np.ascontiguousarray(other)
    return out


@pytest.mark.parametrize("square", [False, True])
def test_experts_of_a_peft_that_exchanges_inputs_and_outputs(tmp_path: Path, square) -> None:
    """With transformers 4. Where down is square, as in published models, gate_up tells."""
    model = dataclasses.replace(SIZES, d_expert=D) if square else SIZES
    config, tree = adapted("gate_up", "down", model=model)
    save = transposed(write(tmp_path / "c", config, tree))
    save_file(save, tmp_path / "c" / peft.WEIGHTS)
    own, back = peft.read(tmp_path / "c", model)
    assert own == config.lora
    for path, leaf in flatten(tree).items():
        assert np.array_equal(flatten(back)[path], leaf), path


def test_experts_of_another_base(tmp_path: Path) -> None:
    write(tmp_path / "c", *adapted("down"))
    message = r"shapes \[15, 96\] and \[64, 15\], .* \(64, 160\) of gate_up, \(80, 64\) of down"
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path / "c", dataclasses.replace(SIZES, d_expert=80))
    with pytest.raises(UserError, match=r"ranks for 7 experts: they are of another base"):
        peft.read(tmp_path / "c", dataclasses.replace(SIZES, num_experts=7))


def test_patterns_know_parameters_by_their_own_names(tmp_path: Path) -> None:
    """PEFT compares alpha_pattern with mlp.router.weight, not with the module mlp.router."""
    write(tmp_path / "c", *adapted("router", "down"))
    plain = flatten(peft.read(tmp_path / "c", SIZES)[1])
    patterns = {"mlp.router.weight": 14, r"1\.mlp\.experts\.down_proj": 21, "mlp.router": 100}
    edit(tmp_path / "c", alpha_pattern=patterns)
    found = flatten(peft.read(tmp_path / "c", SIZES)[1])
    router, down = "layers/router/weight/b", "layers/experts/down_weight/b"
    np.testing.assert_allclose(found[router], 2 * plain[router], rtol=1e-6)
    np.testing.assert_allclose(found[down][1], 3 * plain[down][1], rtol=1e-6)
    assert np.array_equal(found[down][2], plain[down][2])


@pytest.mark.parametrize("name", ["20b_lora", "120b_lora"])
def test_the_first_recipes_can_be_exported(name: str) -> None:
    """By --to peft, and in MXFP4, which would lose the updates of experts."""
    model = command_line.load(["--config", str(ROOT / f"configs/{name}.py")]).model
    assert peft.config_of(model)["target_parameters"] == ["mlp.router.weight"]
    assert not any(table.row(path).packable for path in adapters.adapted(model))


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA is read"),
    ({"use_dora": True}, "use_dora is true: only plain LoRA is read"),
    ({"bias": "all"}, 'bias is "all": only plain LoRA'),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*merge_and_unload"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base too"),
    ({"lora_alpha": "large"}, "lora_alpha is 'large': it must be a positive number"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_settings_beyond_plain_lora(tmp_path: Path, fields, message) -> None:
    write(tmp_path / "c", *adapted("q"))
    edit(tmp_path / "c", **fields)
    with pytest.raises(UserError, match=message):
        peft.read(tmp_path / "c", SIZES)


def test_folders_of_another_base_and_broken_ones(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with pytest.raises(UserError, match=r"no adapter_config\.json in it"):
        peft.read(tmp_path, SIZES)
    tensors = write(folder, *adapted("q", "router"))
    q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    with pytest.raises(UserError, match=r"lora_B.weight' has shape \[80, 3\].* is 60: it is of an"):
        peft.read(folder, dataclasses.replace(SIZES, num_heads=6))
    with pytest.raises(UserError, match=r"layers\.3\..* adapts nothing that is read here .*base\?"):
        peft.read(folder, dataclasses.replace(SIZES, num_layers=3))

    def broken(message: str, **changes: np.ndarray | None) -> None:
        kept = {name: x for name, x in (tensors | changes).items() if x is not None}
        save_file(kept, folder / peft.WEIGHTS)
        with pytest.raises(UserError, match=message):
            peft.read(folder, SIZES)

    broken("layers.0.self_attn.q_proj are not a pair of one rank", **{q: None})
    broken("are not a pair of one rank", **{q: np.zeros((N * H, 2), np.float32)})
    broken("q_proj.lora_B.weight' has NaN", **{q: np.full((N * H, 3), np.nan, np.float32)})
    dora = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    broken("lora_magnitude_vector' adapts nothing", **{dora: np.zeros(4, np.float32)})
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors in it"):
        peft.read(folder, SIZES)


def test_merging_into_another_base_ends_with_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    tiny.write(tmp_path / "base", tiny.make_tree(packed=True), "openai")
    write(tmp_path / "c", *adapted("q", model=dataclasses.replace(SIZES, d_model=96)))
    base, new, folder = (str(tmp_path / name) for name in ("base", "new", "c"))
    wrong = {
        "has shape [3, 96], and the model's side is 64": [base, new, "--adapters", folder],
        "no adapter_config.json in it": [base, new, "--adapters", base],
        "give their base model as SRC": [folder, new],
    }
    for message, arguments in wrong.items():
        monkeypatch.setattr("sys.argv", ["convert", *arguments, "--to", "hf"])
        with pytest.raises(SystemExit) as stop:
            run_entry(main)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and said.count("\n") == 1, said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "c"]


def load_theirs(folder: Path):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    return transformers.GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def their_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


def our_logits(config: ModelConfig, params) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(Transformer(config).apply({"params": params}, jnp.asarray(TOKENS)))


def close(found: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(found - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parity
@pytest.mark.slow
def test_peft_loads_what_we_wrote_and_we_what_it_wrote(tmp_path: Path) -> None:
    theirs = pytest.importorskip("peft")
    tiny.write(tmp_path / "base", tiny.make_tree(packed=False, dtype="float32"), "hf")
    model, params = loading.load(tmp_path / "base", dtype="float32")
    config, tree = adapted(*HELD, model=model.config)
    tuned = {**params, "lora": jax.tree.map(jnp.asarray, tree)}
    weights.save(tmp_path / "ours", Transformer(config), tuned, to="peft")
    base = load_theirs(tmp_path / "base")
    plain = their_logits(base)
    wrapped = theirs.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    found = their_logits(wrapped)
    assert np.abs(found - plain).max() > 0.1 * np.abs(plain).max()
    close(found, our_logits(config, tuned))
    # Written by PEFT, with a rank of its own for k and rsLoRA, and read back.
    import torch

    options = theirs.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"k_proj": 2}, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "o_proj"], target_parameters=["mlp.router.weight"],
    )  # fmt: skip
    wrapped = theirs.get_peft_model(load_theirs(tmp_path / "base"), options).eval()
    with torch.no_grad():
        for name, x in wrapped.named_parameters():
            if "lora_" in name:
                x.copy_(torch.randn_like(x) * 0.1)
    wrapped.save_pretrained(tmp_path / "theirs")
    names = peft.tensors_of(*adapted("q", "k", "o", "router")).keys()
    assert load_file(tmp_path / "theirs" / peft.WEIGHTS).keys() == names
    own, tree = peft.read(tmp_path / "theirs", model.config)
    assert own.targets == ("q", "k", "o", "router") and own.rslora and own.rank == 4
    want = their_logits(wrapped)
    config = dataclasses.replace(model.config, lora=own)
    close(our_logits(config, {**params, "lora": jax.tree.map(jnp.asarray, tree)}), want)
    # A run begins as it, the rest of k's rank with an A that is new, for there to be a gradient.
    run = Config(model=config, init="DIR", init_adapters=str(tmp_path / "theirs"))
    run = dataclasses.replace(run, data=DataConfig(sequence_length=TOKENS.shape[1]))
    begun = start_adapters.put(run, params, tree)
    assert begun["lora"]["layers"]["attention"]["k_weight"]["a"].all()
    assert start_adapters.read(run) is not None
    close(our_logits(config, begun), want)
    # And merged into the base on the way to another folder, which transformers loads.
    convert(tmp_path / "base", tmp_path / "new", to="hf", adapters=tmp_path / "theirs")
    close(their_logits(load_theirs(tmp_path / "new")), want)
