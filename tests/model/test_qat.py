"""Training for MXFP4: the model is the one that is exported, and its gradient is straight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax import train
from gptoss_jax.config import LoRAConfig, MeshConfig, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer, pack_experts
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.mxfp4.fake import quantise
from gptoss_jax.parallel import experts, sharding
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parameters.tree import flatten, nest, replace
from gptoss_jax.runs import metrics
from gptoss_jax.sampler import Sampler
from gptoss_jax.types import MXFP4, Params

PLAIN = ModelConfig(
    vocab_size=97, num_layers=2, d_model=32, num_heads=6, num_kv_heads=2, head_dim=10,
    num_experts=5, active_experts=3, d_expert=64, layer_pattern="banded", window=5, context=128,
    initial_context=64, dtype="float32", param_dtype="float32", init_std=0.2,
)  # fmt: skip
DENSE = dataclasses.replace(PLAIN, qat=True, remat="full")
PACKED = dataclasses.replace(PLAIN, experts="mxfp4")
ADAPTED = dataclasses.replace(
    DENSE, experts="mxfp4", lora=LoRAConfig(targets=("experts",), rank=3, alpha=5.0)
)
MATRICES = ("gate_up_weight", "down_weight")
TOKENS = np.random.default_rng(0).integers(0, PLAIN.vocab_size, (2, 24)).astype(np.int32)


def make(config: ModelConfig) -> Params:
    """Make parameters by numpy: compiling an init costs seconds."""
    random = np.random.default_rng(0)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if x.dtype == jnp.uint8:
            low, high = (118, 124) if "scales" in name else (0, 256)
            return jnp.asarray(random.integers(low, high, x.shape), jnp.uint8)
        values = 0.2 * random.normal(size=x.shape)
        return jnp.asarray(values + ("norm" in name), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, Transformer(config).abstract_params())


def objective(config: ModelConfig, trained: Params, fixed: Params) -> tuple[jax.Array, jax.Array]:
    """Return the loss of a few tokens, and their logits."""
    params = nest({**flatten(fixed), **flatten(trained)})
    logits: jax.Array = Transformer(config).apply({"params": params}, TOKENS[:, :-1])  # pyright: ignore[reportAssignmentType]
    nll = jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1)
    return -jnp.mean(nll), logits


logits = jax.jit(lambda config, params: objective(config, params, {})[1], static_argnums=0)
gradients = jax.jit(jax.value_and_grad(objective, 1, has_aux=True), static_argnums=0)


def close(got, want) -> None:
    got, want = flatten({"x": got}), flatten({"x": want})
    assert got.keys() == want.keys()
    for path, a in want.items():
        limit = 1e-5 * max(float(np.abs(a).max()), 1e-3)
        np.testing.assert_allclose(got[path], a, atol=limit, rtol=0, err_msg=path)


def experts_of(params: Params) -> Params:
    return {name: params["layers"]["experts"][name] for name in MATRICES}


def with_experts(params: Params, matrices: Params) -> Params:
    """Return parameters without adapters, with other matrices."""
    params = {name: part for name, part in params.items() if name != "lora"}
    return replace(params, {"layers": {"experts": matrices}})


@jax.jit
def quantised(matrices: Params) -> Params:
    return jax.tree.map(quantise, matrices)


def test_the_model_is_the_one_that_is_exported_and_its_gradient_straight(tmp_path: Path) -> None:
    params = make(DENSE)
    (value, got), grads = gradients(DENSE, params, {})
    gptoss_jax.save(tmp_path / "new", Transformer(DENSE), params, experts="mxfp4")
    model, written = gptoss_jax.load(tmp_path / "new", experts="mxfp4", dtype=jnp.float32)
    matrices = quantised(experts_of(params))
    for name, matrix in experts_of(written).items():
        np.testing.assert_array_equal(mxfp4.decode(matrix), matrices[name])
        assert (matrices[name] != params["layers"]["experts"][name]).mean() > 0.9
    assert model.config.architecture == PACKED.architecture
    close(got, logits(PACKED, written))
    # Through what is rounded goes the gradient of a model that holds the rounded values.
    (want, same), want_grads = gradients(PLAIN, with_experts(params, matrices), {})
    assert float(value) == pytest.approx(float(want), rel=1e-6)
    close(got, same)
    close(grads, want_grads)
    assert all(np.abs(g).max() > 1e-6 for g in experts_of(grads).values())
    (_, plain), _ = gradients(PLAIN, params, {})
    assert np.abs(plain - got).max() > 0.01 * np.abs(got).max(), "quantising changes nothing"


def test_a_run_that_starts_from_packed_experts_starts_as_they_are() -> None:
    packed = make(PACKED)
    params = with_experts(packed, {k: mxfp4.decode(w) for k, w in experts_of(packed).items()})
    (_, got), _ = gradients(DENSE, params, {})
    (_, plain), _ = gradients(PLAIN, params, {})
    np.testing.assert_array_equal(got, plain)
    close(got, logits(PACKED, packed))


def test_adapters_are_folded_in_before_quantising() -> None:
    """Against the plain model at Q(W + s A B): its weights' gradient, carried on to A and B."""
    params = make(ADAPTED)
    trained = {"lora": params["lora"]}
    (value, got), grads = gradients(ADAPTED, trained, params)
    scale, own = 5.0 / 3, params["lora"]["layers"]["experts"]
    sums = {}
    for name, letters in zip(MATRICES, ("LEDr,LErCF->LECFD", "LEFr,LErD->LEDF"), strict=True):
        # The scale goes to B before the product: a sum that rounds otherwise may fall elsewhere.
        update = jnp.einsum(letters, own[name]["a"], own[name]["b"] * scale, precision="highest")
        sums[name] = mxfp4.decode(params["layers"]["experts"][name]) + update
    matrices = quantised(sums)
    assert all((matrices[name] != sums[name]).mean() > 0.5 for name in MATRICES)
    (want, same), plain = gradients(PLAIN, with_experts(params, matrices), {})
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    close(got, same)
    up, down = (np.asarray(experts_of(plain)[name], np.float64) for name in MATRICES)
    a, b = ({name: np.asarray(own[name][x], np.float64) for name in MATRICES} for x in "ab")
    expected = {
        "gate_up_weight/a": np.einsum("LECFD,LErCF->LEDr", up, b["gate_up_weight"]),
        "gate_up_weight/b": np.einsum("LECFD,LEDr->LErCF", up, a["gate_up_weight"]),
        "down_weight/a": np.einsum("LEDF,LErD->LEFr", down, b["down_weight"]),
        "down_weight/b": np.einsum("LEDF,LEFr->LErD", down, a["down_weight"]),
    }
    expected = nest({path: scale * d for path, d in expected.items()})
    close(grads["lora"]["layers"]["experts"], expected)
    # Folded into bytes it is the same function.
    packed_as, packed = pack_experts.pack(ADAPTED, params)
    assert (packed_as.experts, packed_as.qat) == ("mxfp4", False)
    assert "experts" not in packed["lora"]["layers"]
    close(logits(PACKED, with_experts(packed, experts_of(packed))), got)
    # What has no adapter keeps its bytes, and adapters of the rest stay.
    attention = {"q_weight": {"a": jnp.ones(1)}}
    some = {"experts": {"down_weight": own["down_weight"]}, "attention": attention}
    _, again = pack_experts.pack(ADAPTED, {**params, "lora": {"layers": some}})
    assert again["lora"] == {"layers": {"attention": attention}}
    kept = params["layers"]["experts"]["gate_up_weight"]
    assert again["layers"]["experts"]["gate_up_weight"] is kept
    np.testing.assert_array_equal(
        again["layers"]["experts"]["down_weight"].blocks,
        packed["layers"]["experts"]["down_weight"].blocks,
    )


@pytest.mark.parametrize("config", [DENSE, ADAPTED])
def test_quantised_layers_are_not_kept_for_the_backward_pass(config: ModelConfig) -> None:
    """With remat, what is kept is what is kept without quantising; with none, it is more."""
    params = Transformer(config).abstract_params()
    floats = {path: x for path, x in flatten(params).items() if not isinstance(x, MXFP4)}
    packed = {
        path: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), x)
        for path, x in flatten(params).items()
        if path not in floats
    }

    def kept(**changes) -> int:
        own = dataclasses.replace(config, **changes)

        def run(floats):
            return jax.vjp(lambda x: objective(own, x, packed)[0], floats)[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(run, floats)))

    assert kept() == kept(qat=False) < kept(remat="none")


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_on_a_mesh_blocks_stay_whole(adapted: bool) -> None:
    """Against one device; F over tensor and fsdp, D over fsdp, experts over expert."""
    B, T, A, E, D, F, r = 4, 6, 3, 8, 32, 128, 2
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    free: Params = {"gate_up_weight": array(E, 2, F, D), "down_weight": array(E, D, F)}
    free |= {"gate_up_bias": array(E, 2, F), "down_bias": array(E, D)}
    packed: Params = {}
    if adapted:
        packed = {name: mxfp4.encode(free.pop(name)) for name in MATRICES}
        gate_up = LowRank(array(E, D, r), array(E, r, 2, F))
        free["adapters"] = Adapters(gate_up, LowRank(array(E, F, r), array(E, r, D)))
    x, shares, d_out = array(B, T, D), jax.nn.softmax(array(B, T, A)), array(B, T, D)
    ids = jnp.asarray(rng.integers(0, E, (B, T, A)), jnp.int32)

    @jax.jit
    def run(free: Params, x: jax.Array) -> Any:
        def loss(free: Params, x: jax.Array) -> jax.Array:
            out = experts.experts(
                x, ids, shares, weights={**free, **packed}, mask=jnp.ones((B, T), bool), limit=2.0,
                quantised=True,
            )  # fmt: skip
            return jnp.sum(out * d_out)

        return jax.value_and_grad(loss, (0, 1))(free, x)

    value, (want, d_x) = run(free, x)
    with jax.set_mesh(meshes.make(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))):
        got_value, (got, got_d_x) = run(free, x)
        with pytest.raises(UserError, match="packed in blocks"):
            experts.check(
                {"gate_up_bias": jnp.ones((E, 2, 96)), "gate_up_weight": 0, "down_weight": 0},
                jax.sharding.get_mesh(),
                quantised=True,
            )
        wide = dataclasses.replace(DENSE, d_expert=96, num_heads=8, num_kv_heads=4)
        assert sharding.padded(wide).expert_padding == 32
    assert float(got_value) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves((got, got_d_x)), jax.tree.leaves((want, d_x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_sizes_that_no_block_divides_are_refused() -> None:
    with pytest.raises(UserError, match=r"d_expert is 80: model\.qat needs a multiple of 32"):
        dataclasses.replace(DENSE, d_expert=80)


@pytest.mark.slow
def test_the_tiny_run_learns_and_is_sampled_from_as_it_was_trained(tmp_path: Path) -> None:
    sizes = ["--train.steps", "40", "--train.eval_questions", "2", "--train.eval_max_tokens", "3"]
    sizes += ["--model.num_layers", "2", "--data.sequence_length", "256", "--data.batch_size", "4"]
    options = [*sizes, "--train.eval_batches", "2", "--workdir", f"{tmp_path}/run"]
    train.main(["--config", "configs/tiny_qat.py", *options])
    losses = [r["held_out_loss"] for r in metrics.read(tmp_path / "run") if "held_out_loss" in r]
    assert losses[-1] < 0.5 * losses[0]
    # What the workdir holds are the masters: sampled from, they are quantised as in training.
    model, params = gptoss_jax.load(tmp_path / "run", dtype=jnp.float32)
    assert model.config.qat and model.config.experts == "dense"
    prompt = [5, 17, 33, 200, 81, 6]
    got = Sampler(model, params).generate([prompt], max_tokens=4, stop_ids=())
    row = jnp.asarray([prompt + got.tokens[0]])
    logits: Any = model.apply({"params": params}, row)
    want = jax.nn.log_softmax(logits)[0, 5:9]
    assert got.tokens[0] == want.argmax(-1).tolist()
    np.testing.assert_allclose(got.logprobs[0], want.max(-1), atol=1e-5)
