"""Distillation: loss and gradients against NumPy; in chunks, on a mesh, from a checkpoint."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax
from gptoss_jax import train
from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
)
from gptoss_jax.config.objective import DistillConfig
from gptoss_jax.data.packing import Segment, fill
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.objectives import distill, make_objective
from gptoss_jax.ops import divergence as op
from gptoss_jax.ops.divergence import Mix, divergence
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import vocabulary
from gptoss_jax.runs import metrics

M, V, D, C = 144, 64, 12, 20
MIXES = [Mix(1.0, 1.0, 0.0), Mix(2.5, 0.6, 0.4), Mix(0.7, 0.0, 1.0)]


def make_rows(seed=0):
    """Rows of both sides, tables, targets, and weights of which a stretch is 0."""
    rng = np.random.default_rng(seed)
    hidden, table = rng.normal(size=(M, D)), rng.normal(size=(V, D))
    taught, taught_table = rng.normal(size=(M, C)), rng.normal(size=(V, C))
    weights = rng.choice([0.0, 0.3, 1.0], M)
    weights[40:110] = 0
    targets = rng.integers(0, V, M).astype(np.int32)
    floats = [x.astype(np.float32) for x in (hidden, table, taught, taught_table)]
    return *floats, targets, weights.astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def by_hand(logits, other, targets, weights, *, mix):
    """Sums over rows, and the derivative by the logits, in float64."""
    logits, other, weights = (np.asarray(x, np.float64) for x in (logits, other, weights))
    T, hit = mix.temperature, np.eye(logits.shape[-1])[targets]
    p, q, q1 = softmax(other / T), softmax(logits / T), softmax(logits)
    kl = T**2 * np.sum(weights * np.sum(p * np.log(p / q), axis=-1))
    nll = -np.sum(weights * np.log(np.sum(q1 * hit, axis=-1)))
    slopes = weights[..., None] * (mix.kl * T * (q - p) + mix.nll * (q1 - hit))
    return (mix.kl * kl + mix.nll * nll, kl, nll), slopes


def of_rows(hidden, table, taught, taught_table, *rest, mix):
    """Return what `divergence` and its gradients in hidden and table should be."""
    wide = [np.asarray(x, np.float64) for x in (hidden, table, taught, taught_table)]
    sums, slopes = by_hand(wide[0] @ wide[1].T, wide[2] @ wide[3].T, *rest, mix=mix)
    return sums, (slopes @ wide[1], slopes.T @ wide[0])


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("mix", "rows"), [(0, 1), (1, 40), (2, 1000), (1, 1000)])
def test_sums_and_gradients_are_those_by_hand(mix, rows, monkeypatch):
    mix = MIXES[mix]
    monkeypatch.setattr(op, "chunk_rows", lambda M, V: min(M, rows))
    args = make_rows()
    (want, *others), grads = of_rows(*args, mix=mix)

    def run(hidden, table):
        total, *rest = divergence(hidden, table, *args[2:], mix=mix)
        return total, rest

    (total, rest), got = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(*args[:2])
    np.testing.assert_allclose([total, *rest], [want, *others], rtol=1e-5)
    for a, b in zip(got, grads, strict=True):
        assert_close(a, b)
    # A frozen table gets no gradient, and hidden states the same one.
    alone = jax.grad(lambda h: run(h, args[1])[0])(args[0])
    assert_close(alone, grads[0])


def test_logits_of_all_rows_never_exist():
    rows, vocabulary = 4096, 50_000
    shapes = [(rows, D), (vocabulary, D), (rows, C), (vocabulary, C)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    args += [jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)]
    run = jax.grad(lambda *a: divergence(*a, mix=MIXES[1])[0], argnums=(0, 1))
    memory = jax.jit(run).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * op.LOGITS_BYTES < 4 * rows * vocabulary


def test_a_spread_vocabulary_gives_the_same(monkeypatch):
    monkeypatch.setattr(vocabulary, "chunk_rows", lambda rows, V: 16)
    over = meshes.make(MeshConfig(data=2, fsdp=2, tensor=2))
    mix, args = MIXES[1], make_rows()
    (want, *others), grads = of_rows(*args, mix=mix)
    rows = [x.reshape(8, M // 8, *x.shape[1:]) if len(x) == M else x for x in args]

    def run(hidden, table):
        total, *rest = vocabulary.divergence(hidden, table, *rows[2:], mix=mix)
        return total, rest

    with jax.set_mesh(over):
        one = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
        (total, rest), got = one(*rows[:2])
    np.testing.assert_allclose([total, *rest], [want, *others], rtol=1e-5)
    assert_close(got[0].reshape(M, D), grads[0])
    assert_close(got[1], grads[1])


T = 24
STUDENT = ModelConfig(
    vocab_size=V, num_layers=1, d_model=32, num_heads=6, num_kv_heads=3, head_dim=8,
    num_experts=4, active_experts=2, d_expert=64, window=8, context=T, rope_factor=1.0,
    initial_context=T, dtype="float32", param_dtype="float32",
    lora=LoRAConfig(targets=("o", "unembedding"), rank=3, alpha=6.0),
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, d_model=64, num_experts=5, lora=LoRAConfig(), window=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a wider teacher, packed."""
    folder = tmp_path_factory.mktemp("teacher") / "hf"
    model = Transformer(TEACHER)
    params = init_params(model, seed=5)
    gptoss_jax.save(folder, model, params, to="hf", experts="mxfp4", force=True)
    return folder


def make_config(teacher, **changes):
    return Config(
        model=STUDENT,
        data=DataConfig(train=("none.jsonl",), sequence_length=T, batch_size=3),
        objective=ObjectiveConfig(
            name="distill",
            distill=DistillConfig(
                teacher=teacher and str(teacher), temperature=2.0, nll_weight=0.25
            ),
        ),
        **changes,
    )


@pytest.mark.slow
def test_a_checkpoint_teaches_another_model(teacher):
    rng = np.random.default_rng(3)
    sizes = [(9, 5), (20,), (7, 11, 3)]
    rows = [
        [Segment(rng.integers(0, V, n), rng.choice([0, 0.3, 1], n).astype(np.float32)) for n in row]
        for row in sizes
    ]
    batch, config = fill(rows, T), make_config(teacher)
    make = distill.Teacher(config)
    assert jax.tree.map(np.shape, make.complete(batch).per_token) == {distill.HIDDEN: (3, T, 64)}
    ready, told = make(None, batch, partial(jax.tree.map, jnp.asarray))
    assert told == {}

    model, params = gptoss_jax.load(teacher, dtype=jnp.float32)
    assert model.config.experts == "mxfp4"
    where = {"segment_ids": batch.segment_ids, "positions": batch.positions}
    other = jax.jit(model.apply)({"params": params}, batch.tokens, **where)
    student = Transformer(STUDENT)
    params = init_params(student, seed=1)
    leaves, tree = jax.tree.flatten(params["lora"])
    lora = tree.unflatten([0.3 * rng.normal(size=x.shape) for x in leaves])

    def loss(lora):
        sums = distill.distill_loss(
            student, {**params, "lora": lora}, ready, distill=config.objective.distill
        )
        return sums.nll, sums

    def logits(lora):
        return student.apply({"params": {**params, "lora": lora}}, batch.tokens, **where)

    values, pull = jax.vjp(jax.jit(logits), lora)
    mix = Mix(2.0, 0.75, 0.25)
    sums, slopes = by_hand(values, other, batch.targets, batch.weights, mix=mix)
    (want,) = pull(jnp.asarray(slopes, jnp.float32))
    (total, found), got = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    extra = found.extra["teacher_kl"], found.extra["nll"]
    np.testing.assert_allclose([total, *extra], sums, rtol=1e-5)
    assert float(found.weight) == pytest.approx(batch.weights.sum())
    jax.tree.map(assert_close, got, want)


def test_a_teacher_that_cannot_teach_is_refused(teacher, tmp_path):
    def said(config):
        with pytest.raises(UserError) as error:
            make_objective(config).open_batches(rows=(0, 3))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert said(make_config(None)) == (
        "objective.name is distill, and there is no teacher: give --objective.distill.teacher DIR "
        "(a checkpoint, of any layout and size)"
    )
    assert str(tmp_path / "gone") in said(make_config(tmp_path / "gone"))
    wide = dataclasses.replace(STUDENT, vocab_size=V + 32)
    assert "has a vocabulary of 64 tokens, the model one of 96" in said(
        dataclasses.replace(make_config(teacher), model=wide)
    )


@pytest.mark.slow
def test_the_tiny_config_nears_its_teacher(tmp_path):
    small = "--model.d_model 64 --data.sequence_length 256 --data.batch_size 4 --train.log_every 5"
    small += " --train.eval_questions 0 --train.eval_batches 2"
    taught = ["--config", "configs/tiny.py", "--workdir", str(tmp_path / "teacher")]
    train.main([*taught, *small.split(), "--model.num_layers", "2", "--train.steps", "30"])
    student = ["--config", "configs/tiny_distill.py", "--workdir", str(tmp_path / "student")]
    student += ["--objective.distill.teacher", str(tmp_path / "teacher")]
    train.main([*student, *small.split(), "--train.steps", "30"])
    records = metrics.read(tmp_path / "student")
    steps = [r for r in records if "teacher_kl" in r]
    assert steps[-1]["teacher_kl"] < 0.3 * steps[0]["teacher_kl"]
    scores = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert scores[-1] < scores[0] - 1
