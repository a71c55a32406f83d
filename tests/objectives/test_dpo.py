"""DPO: loss, rewards and every gradient against NumPy on each token's log-probability."""

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import write_chats

from gptoss_jax import train
from gptoss_jax.config import LoRAConfig, MeshConfig, ModelConfig, command_line
from gptoss_jax.config.objective import DPOConfig
from gptoss_jax.data.packing import Segment, fill
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.objectives import dpo, make_objective
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.runs import metrics
from gptoss_jax.training.step import init_state, make_train_step

V, T = 40, 36
MODEL = ModelConfig(
    vocab_size=V, num_layers=1, d_model=32, num_heads=6, num_kv_heads=3, head_dim=8,
    num_experts=4, active_experts=2, d_expert=64, window=8, context=T, rope_factor=1.0,
    initial_context=T, dtype="float32", param_dtype="float32",
    lora=LoRAConfig(targets=("attention", "unembedding"), rank=3, alpha=6.0),
)  # fmt: skip
CASES = {
    "plain": DPOConfig(beta=0.4),
    "smoothed, with sft": DPOConfig(beta=0.7, label_smoothing=0.1, sft_weight=0.6),
}


@pytest.fixture(scope="module")
def model():
    return Transformer(MODEL)


@pytest.fixture(scope="module")
def params(model):
    params = init_params(model)
    leaves, tree = jax.tree.flatten(params["lora"])
    rng = np.random.default_rng(1)
    return {**params, "lora": tree.unflatten([0.3 * rng.normal(size=x.shape) for x in leaves])}


def make_pairs(count, *, seed=0):
    """Pairs of segments that share a prompt; weights of 0, 1 and others."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = rng.integers(0, V, 2)
        sides = []
        for _ in range(2):
            answer = rng.integers(0, V, rng.integers(1, 5))
            weights = np.r_[0, 0, rng.choice([0.3, 1.0, 1.0], len(answer))]
            weights[-1] = 1.0
            tokens = np.r_[prompt, answer].astype(np.int32)
            sides.append(Segment(tokens, weights.astype(np.float32)))
        pairs.append(sides)
    return pairs


PAIRS = make_pairs(7)
QUICK = {"xla_backend_optimization_level": 0}  # compiled in less time
RATE = 1e3  # large beside the parameters, so that a step of descent tells the gradient
# Two ways to share rows, of them one with padding alone.
ROWS = [[0, 1], [2, 3], [4, 5], [6]], [[6, 0, 5], [1], [4, 2], [3], [], []]


def batch_of(rows, pairs=PAIRS):
    return fill([[side for i in row for side in pairs[i]] for row in rows], T)


def log_probs(model, params):
    """Log-probability of each token after the first, [pair][side][token], float32.

    Each segment is alone in its row.
    """
    sides = [side.tokens for pair in PAIRS for side in pair]
    rows = np.zeros((len(sides), 6), np.int32)
    for row, tokens in zip(rows, sides, strict=True):
        row[: len(tokens)] = tokens
    logits = jax.nn.log_softmax(model.apply({"params": params}, jnp.asarray(rows)))
    found = jnp.take_along_axis(logits[:, :-1], rows[:, 1:, None], axis=2)[..., 0]
    each = [x[: len(tokens) - 1] for x, tokens in zip(found, sides, strict=True)]
    return [each[i : i + 2] for i in range(0, len(each), 2)]


def by_hand(config, pairs, policy, reference):
    """Mean loss, and its extras, from log-probabilities [pair][side][token], all in float64."""
    losses, margins, rewards = [], [], []
    for pair, p, q in zip(pairs, policy, reference, strict=True):
        sides = []
        for segment, now, then in zip(pair, p, q, strict=True):
            w = segment.weights[1:].astype(np.float64)
            sides.append(config.beta * np.sum(w * (now - then)))
        margin = sides[0] - sides[1]
        s = config.label_smoothing
        loss = (1 - s) * np.log1p(np.exp(-margin)) + s * np.log1p(np.exp(margin))
        w = pair[0].weights[1:].astype(np.float64)
        loss += config.sft_weight * np.sum(-w * p[0]) / np.sum(w)
        losses.append(loss)
        margins.append(margin)
        rewards.append(sides)
    chosen, rejected = np.mean(rewards, axis=0)
    extra = {
        "reward_margin": np.mean(margins),
        "reward_accuracy": np.mean(np.array(margins) > 0),  # none is 0
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return np.mean(losses), extra


def slopes_by_hand(config, pairs, policy, reference):
    """Derivatives by each log-probability, by differences in float64."""
    found = []
    for i, pair in enumerate(policy):
        found.append([])
        for side, values in enumerate(pair):
            slopes = np.zeros_like(values)
            for t in range(len(values)):
                sums = []
                for step in (1e-5, -1e-5):
                    moved = [[x.copy() for x in p] for p in policy]
                    moved[i][side][t] += step
                    sums.append(by_hand(config, pairs, moved, reference)[0])
                slopes[t] = (sums[0] - sums[1]) / 2e-5
            found[-1].append(slopes)
    return found


@pytest.fixture(scope="module")
def expected(model, params):
    """Log-probabilities of all tokens, of model and base, and how to pull gradients back."""
    base = {k: v for k, v in params.items() if k != "lora"}

    policy = jax.jit(lambda lora: log_probs(model, {**base, "lora": lora}))
    values, pull = jax.vjp(policy, params["lora"])
    plain = Transformer(dataclasses.replace(MODEL, lora=LoRAConfig()))
    reference = jax.jit(partial(log_probs, plain))(base)
    to64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    return to64(values), to64(reference), pull


def run(model, params, batch, config):
    def loss(lora):
        sums = dpo.dpo_loss(model, {**params, "lora": lora}, batch, dpo=config)
        return sums.nll, sums

    lowered = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params["lora"])
    (_, sums), grads = lowered.compile(QUICK)(params["lora"])
    return sums, grads


def assert_close(got, want):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
    assert scale > 0


def check_against_hand(config, expected, *, loss, extra, grads):
    """Compare means over pairs, and the gradient of their mean loss."""
    policy, reference, pull = expected
    mean, others = by_hand(config, PAIRS, policy, reference)
    slopes = slopes_by_hand(config, PAIRS, policy, reference)
    (want,) = pull(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), slopes))
    np.testing.assert_allclose(loss, mean, rtol=1e-5)
    assert extra.keys() == others.keys()
    for name, value in others.items():
        np.testing.assert_allclose(extra[name], value, rtol=1e-5, atol=1e-5)
    jax.tree.map(assert_close, grads, want)


def test_loss_and_gradients_are_those_by_hand(model, params, expected):
    config, batch = CASES["smoothed, with sft"], batch_of(ROWS[0])
    sums, grads = run(model, params, batch, config)
    assert float(sums.weight) == float(dpo.total_pairs(batch)) == 7
    loss, extra, grads = jax.tree.map(lambda x: x / 7, (sums.nll, sums.extra, grads))
    check_against_hand(config, expected, loss=loss, extra=extra, grads=grads)
    assert float(sums.tokens) == sum(len(s.tokens) for pair in PAIRS for s in pair)


@pytest.mark.slow
def test_a_step_in_parts_is_that_of_all_pairs(model, params, expected):
    # Packed in another way; of three parts the last has no pair, the others unlike numbers.
    config, batch = CASES["plain"], batch_of(ROWS[1])
    step = make_train_step(
        model,
        optax.sgd(RATE),
        partial(dpo.dpo_loss, dpo=config),
        total=dpo.total_pairs,
        accumulate=3,
        frozen_paths=(frozen := {p for p in flatten(params) if not p.startswith("lora/")}),
    )
    state = init_state(model, optax.sgd(RATE), params, frozen_paths=frozen)
    state, batch = jax.tree.map(jnp.array, (state, batch))  # copies: a step gives its state up
    new, measured = step.lower(state, batch).compile(QUICK)(state, batch)
    grads = jax.tree.map(lambda a, b: (a - b) / RATE, params["lora"], new.params["lora"])
    check_against_hand(config, expected, loss=measured.loss, extra=measured.extra, grads=grads)


def test_without_adapters_there_is_no_reference():
    config = command_line.load(["--config", "configs/tiny_dpo.py"])
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LoRAConfig()))
    with pytest.raises(UserError, match="the model without its adapters, and there are none: give"):
        make_objective(plain)
    more = dataclasses.replace(config.optimizer, only=("final_norm/*",))
    with pytest.raises(UserError, match=r"optimizer.only \(final_norm/\*\) would train that, too"):
        make_objective(dataclasses.replace(config, optimizer=more))


def test_chats_are_no_pairs_and_the_command_says_so(tmp_path, capsys):
    chats = write_chats(tmp_path / "chats.jsonl", 3)
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["", "--config", "configs/tiny_dpo.py", "--data.train", str(chats), "--workdir",
             str(tmp_path / "run")],
        )  # fmt: skip
        run_entry(train.main)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {chats}:1: lacks chosen and rejected: objective.name dpo trai")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mesh_gives_the_same(model, params):
    # Rows over data and fsdp, the tokens of each over context: segments lie on several devices.
    batch = batch_of([[0, 1], [2], [3], [4], [5], [6], [], []])
    found = []
    for sizes in ({}, {"data": 2, "fsdp": 2, "context": 2}):
        with jax.set_mesh(meshes.make(MeshConfig(**sizes))):
            found.append(run(model, params, batch, CASES["smoothed, with sft"]))
    (sums, grads), (spread, others) = found
    np.testing.assert_allclose(spread.nll, sums.nll, rtol=1e-5)
    for name, value in sums.extra.items():
        np.testing.assert_allclose(spread.extra[name], value, rtol=1e-5, atol=1e-5)
    jax.tree.map(assert_close, others, grads)


@pytest.mark.slow
def test_the_tiny_config_comes_to_prefer_the_chosen_answers(tmp_path):
    options = "--train.steps 30 --train.eval_every 30 --train.eval_batches 8 --train.log_every 5 "
    options += "--data.sequence_length 320"  # a pair
    args = ["--config", "configs/tiny_dpo.py", "--workdir", str(tmp_path), *options.split()]
    train.main(args)
    records = metrics.read(tmp_path)
    first, last = (r for r in records if "held_out_loss" in r)
    assert first["held_out_reward_accuracy"] == 0.5 and first["held_out_reward_margin"] == 0
    assert last["held_out_reward_accuracy"] > 0.9 and last["held_out_reward_margin"] > 0.3
    assert last["held_out_loss"] < 0.6 < first["held_out_loss"]
    assert all(r["reward_accuracy"] <= 1 for r in records if "reward_accuracy" in r)
