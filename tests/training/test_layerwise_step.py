"""The update in the backward pass: the ordinary gradient's, clipped and updated part by part."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import make_program

from gptoss_jax import train
from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from gptoss_jax.errors import UserError
from gptoss_jax.loading import resume
from gptoss_jax.model import Transformer
from gptoss_jax.objectives.token_loss import loss_fn
from gptoss_jax.optimizer import make_optimizer, split_trainable
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parameters import patterns
from gptoss_jax.parameters.tree import flatten, nest, replace
from gptoss_jax.runs import checkpoints, metrics
from gptoss_jax.training import layerwise_step
from gptoss_jax.training.step import init_state
from gptoss_jax.types import Batch

TINY = Path(__file__).parents[2] / "configs/tiny_one_gpu.py"
# Two kinds of layers, and one that no period holds.
MODEL = ModelConfig(
    vocab_size=96, num_layers=3, d_model=48, num_heads=6, num_kv_heads=2, head_dim=10,
    num_experts=5, active_experts=2, d_expert=20, window=7, rope_factor=1.0, initial_context=64,
    context=64, dtype="float32", param_dtype="float32", remat="full",
)  # fmt: skip
LOSS = partial(loss_fn, balance_loss=0.05, z_loss=0.01)
QUICK = {"xla_backend_optimization_level": 0}  # of the compiler: half of its time


def make_batch(seed: int, *, rows: int = 3, length: int = 14) -> Batch:
    """Random tokens of two segments and padding, about half of them trained by uneven weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, MODEL.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[1, 9:], segments[-1, -4:] = 2, 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[1, 9:] -= 9
    weights = (rng.random((rows, length)) < 0.5) * rng.random((rows, length)) * (segments > 0)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.float32(weights), segments, positions)


def make_params(model: ModelConfig = MODEL):
    """Random parameters, norms near 1."""
    rng = np.random.default_rng(7)
    shapes = flatten(Transformer(model).abstract_params())

    def of(path, x):
        noise = 0.1 * rng.normal(size=x.shape)
        return jnp.asarray(noise + path.endswith("scale"), x.dtype)

    return nest({path: of(path, x) for path, x in shapes.items()})


def fused(config: OptimizerConfig, *, model: ModelConfig = MODEL, bias: float = 0.0):
    """Return the factors on learning rates, what is frozen, the first state, and the step."""
    built = Transformer(model)
    factors = patterns.masks(built.abstract_params(), config)
    frozen = patterns.frozen_paths(factors)
    optimizer = make_optimizer(config, 10, masks=factors, balance_bias=bias, seed=3)
    state = init_state(built, optimizer, make_params(model), frozen_paths=frozen)
    step = layerwise_step.make_layerwise_step(
        built, optimizer, LOSS, factors=factors, frozen_paths=frozen
    )
    return factors, frozen, state, step


def compiled(step, *args):
    return step.lower(*args).compile(compiler_options=QUICK)


@pytest.fixture(scope="module")
def gradient():
    """Loss, router's load and gradient of everything at once, as the ordinary step has them."""

    def objective(params, batch):
        sums = LOSS(Transformer(MODEL), params, batch)
        loss = sums.nll / sums.weight
        return loss + sums.penalty / sums.tokens, (loss, sums.router.load)

    one = jax.grad(objective, has_aux=True)
    return compiled(jax.jit(one), make_params(), make_batch(0))


def part_of(path: str) -> list[str]:
    """Return the parts that an array of gradients belongs to: one for each layer."""
    root = path.split("/")[0]
    if root == "layers":
        return [f"layer {i}" for i in range(MODEL.num_layers)]
    return ["head" if root in ("final_norm", "unembedding") else root]


def clip(grads, limit: float):
    """Clip each part by its own norm; return the norms, too."""
    squares: dict[str, float] = {}
    flat = flatten(jax.device_get(grads))
    for path, g in flat.items():
        parts = part_of(path)
        for part, rows in zip(parts, g if len(parts) > 1 else [g], strict=True):
            squares[part] = squares.get(part, 0.0) + np.sum(np.float64(rows) ** 2)
    norms = {part: np.sqrt(square) for part, square in squares.items()}
    scales = {part: min(1.0, limit / norm) if limit else 1.0 for part, norm in norms.items()}
    for path, g in flat.items():
        factors = np.array([scales[part] for part in part_of(path)], np.float32)
        flat[path] = g * factors.reshape(-1, *(1,) * (g.ndim - 1))
    return nest(flat), norms


def assert_close(got, want, *, tolerance=1e-5):
    """Compare by the largest entry of each array."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.float64(a), np.float64(b)
        worst = np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30)
        assert worst < tolerance, (jax.tree_util.keystr(path), worst)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "limit", "bias"), [("adamw", 1.8, 0.0), slow("adafactor", 0.0, 0.0),
                                slow("muon", 0.0, 0.0), slow("adamw", 0.0, 0.01)],
)  # fmt: skip
def test_is_the_ordinary_update_but_for_clipping(gradient, name, limit, bias):
    """Three steps, against the gradient of the whole model and the optimizer run on all of it."""
    config = OptimizerConfig(
        name=name, clip_norm=limit, learning_rate=1e-2, warmup_steps=2, weight_decay=0.3,
        eps=1e-3,  # where a gradient is next to 0, AdamW divides its rounding by its size
        freeze=("layers[1-2]/attention/q_*", "*/sinks"),
        learning_rates=("layers[2]/experts[3]/*=0.5", "embedding/*=2"),
    )  # fmt: skip
    factors, frozen, state, step = fused(config, bias=bias)
    unclipped = dataclasses.replace(config, clip_norm=0.0)
    whole = make_optimizer(unclipped, 10, masks=factors, balance_bias=bias)
    start, step = jax.device_get(state.params), compiled(step, state, make_batch(0))
    params, opt_state, update, seen = make_params(), state.opt_state, None, []
    for i in range(3):
        grads, (loss, load) = gradient(params, make_batch(i))
        trained = split_trainable(params, frozen)[0]
        # What is frozen in part, or follows no gradient, counts in no norm.
        grads = flatten(split_trainable(grads, frozen)[0])
        for path in grads:
            if "attention/q_" in path:
                grads[path] = grads[path].at[1:].set(0)
            if bias and path == "layers/router/bias":
                grads[path] = jnp.zeros_like(grads[path])
        grads, norms = clip(nest(grads), limit)
        args = grads, jax.tree.map(jnp.copy, opt_state), trained  # the step gives its state up
        if update is None:
            update = jax.jit(lambda g, s, p, load: whole.update(g, s, p, load=load))
            update = compiled(update, *args, load)
        changes, opt_state = update(*args, load)
        params = replace(params, optax.apply_updates(trained, changes))

        state, metrics = step(state, make_batch(i))
        norm = np.sqrt(sum(x**2 for x in norms.values()))
        np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        assert_close(metrics.router.load, load)
        seen += norms.values()
    if limit:  # some were clipped, and not all
        assert min(seen) < limit < max(seen)
    assert int(state.step) == 3
    assert_close(state.params, params)
    # Of the state the norm alone is another: the one of what was clipped.
    opt_state = layerwise_step._set_norm(opt_state, jnp.float32(norm))
    assert_close(state.opt_state, opt_state)
    for path, x in flatten(start).items():
        same = np.asarray(x == flatten(state.params)[path])
        if path.endswith("sinks"):
            assert same.all()
        elif "attention/q_" in path:
            assert same[1:].all() and not same[0].all()
        else:
            assert not same.all(), path


def test_what_it_can_not_do_is_refused():
    def config(**parts):
        parts = {"model": MODEL, "optimizer": OptimizerConfig(fused=True)} | parts
        return Config(data=DataConfig(sequence_length=64), **parts)

    config()
    with pytest.raises(UserError, match=r"make train.on_nan stop"):
        config(train=TrainConfig(on_nan="skip"))
    with pytest.raises(UserError, match=r"leave out model.lora.targets, or optimizer.fused"):
        config(model=dataclasses.replace(MODEL, lora=LoRAConfig(targets=("attention",))))
    with pytest.raises(UserError, match=r"model.remat is dots, make it full"):
        config(model=dataclasses.replace(MODEL, remat="dots"))
    with pytest.raises(UserError, match=r"leave out model.embedding_on_host"):
        config(model=dataclasses.replace(MODEL, embedding_on_host=True))
    with pytest.raises(UserError, match=r"objective.name dpo .* leave out optimizer.fused"):
        config(objective=ObjectiveConfig(name="dpo"))
    for more in ({"accumulate": 2}, {"ema": 0.9}):
        with pytest.raises(
            UserError, match=r"takes neither optimizer.accumulate nor optimizer.ema"
        ):
            OptimizerConfig(fused=True, **more)
    several = meshes.make(MeshConfig(fsdp=2), jax.devices()[:2])
    with (
        jax.set_mesh(several),
        pytest.raises(UserError, match=r"optimizer.fused is for one device"),
    ):
        make_program(config())


def test_gradients_are_counted_part_by_part():
    """Of 20b in bfloat16: a layer's, 1.67 GB of 41.8; there are 24, and two tables."""
    shapes = flatten(Transformer(ModelConfig()).abstract_params())
    sizes = {path: 2 * math.prod(x.shape) for path, x in shapes.items()}
    layers = sum(size for path, size in sizes.items() if path.startswith("layers/"))
    assert sum(sizes.values()) > 41e9
    assert layerwise_step.largest_part(sizes, num_layers=24) == layers // 24 < 1.7e9
    tables = {path: size for path, size in sizes.items() if not path.startswith("layers/")}
    head = 2 * (201_088 * 2_880 + 2_880)
    assert layerwise_step.largest_part(tables, num_layers=24) == head


@pytest.mark.slow
def test_a_run_that_goes_on_rounds_as_it_would_have(tmp_path):
    """Bfloat16 by chance, of some parameters, through a checkpoint; what is frozen stays."""
    config = Config(
        name="t",
        model=dataclasses.replace(MODEL, param_dtype="bfloat16"),
        data=DataConfig(sequence_length=64),
        optimizer=OptimizerConfig(
            fused=True, masters="stochastic", moment_dtype="bfloat16", learning_rate=1e-3,
            second_moment_dtype="bfloat16", freeze=("embedding/*", "layers[1]/*"),
        ),
    )  # fmt: skip
    program = make_program(config)
    start = make_params(config.model)
    state = program.begin(jax.tree.map(jnp.copy, start))
    step = compiled(program.step, state, make_batch(0))
    with checkpoints.open_manager(tmp_path) as manager:
        for i in range(3):
            if i == 2:
                checkpoints.save(manager, state, config=config, data_state={}, fingerprint={})
                manager.wait_until_finished()
            state, _ = step(state, make_batch(i))
    restored, _ = resume.restore(tmp_path, program.abstract_state())
    assert int(restored.step) == 2
    again, _ = step(jax.device_put(restored, jax.devices()[0]), make_batch(2))
    chex.assert_trees_all_equal(again.params, state.params)
    chex.assert_trees_all_equal(again.opt_state, state.opt_state)
    after = flatten(state.params)
    for path, x in flatten(start).items():
        same = np.asarray(x == after[path])
        if path.startswith("layers/"):
            assert same[1].all() and not same[[0, 2]].all(), path
        else:
            assert same.all() == path.startswith("embedding/"), path


@pytest.mark.slow
def test_the_tiny_run_learns(tmp_path):
    short = ["--train.steps", "40", "--data.sequence_length", "256", "--data.batch_size", "4"]
    short += ["--model.num_layers", "2"]
    options = [*short, "--data.held_out", "--workdir", str(tmp_path)]
    train.main(["--config", str(TINY), *options])
    losses = [r["loss"] for r in metrics.read(tmp_path) if "loss" in r]
    assert losses[0] > 6 and np.mean(losses[-5:]) < 1.5
