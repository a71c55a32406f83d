"""Questions, sampled answers, rewards and the batches made of them; the training command on top."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_training import TINY

from gptoss_jax import train
from gptoss_jax.config import command_line
from gptoss_jax.config.objective import GRPOConfig
from gptoss_jax.data.questions import Asked, Questions, Round
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.objectives import make_objective
from gptoss_jax.objectives.reinforcement import rollouts
from gptoss_jax.runs import metrics

ROOT = Path(__file__).parents[2]
SUMS = ROOT / "configs" / "rewards" / "sums.py"

# 2 questions a step, 3 answers each; a prompt has some 190 tokens of this vocabulary.
GRPO = str.split(
    "--config configs/tiny_grpo.py --init random --objective.name grpo --data.batch_size 6 "
    "--objective.grpo.group_size 3 --objective.grpo.max_tokens 5 --objective.grpo.temperature 0.8 "
    "--train.eval_every 100 --train.eval_questions 0"
)
MODEL = TINY[2:]


def config(*args, **more):
    argv = [*MODEL, *GRPO, "--objective.grpo.reward", str(SUMS), *map(str, args)]
    return dataclasses.replace(command_line.load(argv), **more)


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def chat(i: int, **more) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"count to {i}"},
            {"role": "assistant", "content": f"{i}!", "thinking": "so many"},
        ],
        **more,
    }


def reward_file(folder: Path, body: str) -> str:
    file = folder / "judge.py"
    file.write_text(body)
    os.utime(file, ns=(1, hash(body) % 10**9))  # a file is run again when its time changes
    return str(file)


LORA = ["--model.lora.targets", "attention", "--model.lora.rank", "2"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--objective.grpo.kl", "0.1"], "model.lora.targets names none"),
        (["--objective.grpo.kl", "1", *LORA, "--optimizer.only", "*norm*"], "optimizer.only"),
        (["--train.on_spike", "rewind"], "train.on_spike is rewind"),
    ],
)
def test_what_grpo_cannot_do_is_refused(args, message):
    with pytest.raises(UserError, match=message):
        rollouts.open_questions(config(*args))


# --- Batches ----------------------------------------------------------------------------------


def test_advantages_by_hand():
    given = np.array([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3], [2.0, -4.0, 5.0, 5.0]])
    third = np.array([0.0, -6.0, 3.0, 3.0])
    want = [[1, -1, -1, 1], [0] * 4, third / math.sqrt(54 / 4)]
    np.testing.assert_allclose(rollouts.advantages(given, grpo=GRPOConfig()), want, atol=1e-12)
    want = [[0.5, -0.5, -0.5, 0.5], [0] * 4, third]
    plain = GRPOConfig(scale_by_std=False)
    np.testing.assert_allclose(rollouts.advantages(given, grpo=plain), want, atol=1e-12)
    # Rounding is no difference: 0.1 + 0.2 is not 0.3 in floating point.
    alike = np.array([[0.1 + 0.2, 0.3, 0.3]])
    for std in ("population", "sample"):
        assert not rollouts.advantages(alike, grpo=GRPOConfig(std=std)).any()


def test_the_sample_deviation_is_over_one_answer_less():
    given = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, -4.0, 5.0, 5.0]])
    over = given - given.mean(1, keepdims=True)
    want = over / given.std(1, ddof=1, keepdims=True)  # torch.std, which TRL and verl take
    got = rollouts.advantages(given, grpo=GRPOConfig(std="sample"))
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_reward_function_sees_calls_of_the_questions_tools(tmp_path):
    body = "def reward(answer, record): return answer.messages[0]['tool_calls'][0]['name'] == 'a.b'"
    c = config("--objective.grpo.reward", reward_file(tmp_path, body))
    encoding = tokenizer.get_tokenizer(c.model.vocab_size)
    text = "<|channel|>commentary to=functions.a.b <|constrain|>json<|message|>{}<|call|>"
    ids = encoding.encode(text, allowed_special="all")
    records = [chat(i, tools=[{"name": "a.b"}]) for i in range(2)]
    file = write(tmp_path / "a.jsonl", records)
    data = dataclasses.replace(c.data, train=(file,), sequence_length=512)
    asked = next(Questions(dataclasses.replace(c, data=data)))
    judge = rollouts.Rollouts(c, Transformer(c.model))._judge
    assert judge(asked, [ids] * c.data.batch_size) == [1.0] * c.data.batch_size


def answered(lengths: list[int], rewards_: list[float], *, prompt: int = 3) -> Round:
    """A round of two questions with made-up ids, each of which says where it is from."""
    questions = [Asked([10 + k] * prompt, "", {}, "") for k in range(2)]
    tokens = [[100 * (i + 1) + k for k in range(n)] for i, n in enumerate(lengths)]
    logprobs = [[-(i + 1) - k / 16 for k in range(n)] for i, n in enumerate(lengths)]
    return Round(0, questions, {"tokens": tokens, "logprobs": logprobs, "rewards": rewards_})


def test_a_batch_has_each_answer_where_its_tokens_are_predicted():
    c = config("--data.sequence_length", 11, "--objective.grpo.max_tokens", 4)
    asked = answered([4, 2, 1, 3, 3, 2], [1, 0, 2, 5, 5, 5])
    batch = rollouts.make_batch(asked, c, fresh=True)
    assert batch.tokens.shape == (3, 11) and batch.per_token and batch.shared  # two a row
    assert batch.shared["fresh"] == 1 and batch.weights.sum() == 15
    found = {}
    for b, t in np.argwhere(batch.weights > 0):
        target = int(batch.targets[b, t])
        assert batch.tokens[b, t + 1] == target
        assert batch.segment_ids[b, t] == batch.segment_ids[b, t + 1] > 0
        assert batch.positions[b, t] == 2 + target % 100  # after a prompt of 3
        found[target] = tuple(float(batch.per_token[k][b, t]) for k in batch.per_token)
    over = [0, -math.sqrt(1.5), math.sqrt(1.5), 0, 0, 0]
    for i, ids in enumerate(asked.answers["tokens"]):
        for k, token in enumerate(ids):
            want = over[i], asked.answers["logprobs"][i][k]
            np.testing.assert_allclose(found.pop(token), want, rtol=1e-6)
    assert not found
    for value in batch.per_token.values():
        assert not value[batch.weights == 0].any()


def test_short_answers_share_rows_of_few_counts():
    lengths, given = [2, 1, 1, 2, 1, 2], [1, 0, 2, 5, 5, 5]
    asked = answered(lengths, given)
    sizes = {}
    for length, accumulate in ((29, 1), (11, 1), (29, 2), (7, 1)):
        c = config("--data.sequence_length", length, "--objective.grpo.max_tokens", 3)
        c = dataclasses.replace(
            c, optimizer=dataclasses.replace(c.optimizer, accumulate=accumulate)
        )
        batch = rollouts.make_batch(asked, c, fresh=False)
        assert batch.weights.sum() == sum(lengths)
        sizes[length, accumulate] = len(batch.tokens)
    # 28 tokens fit one row of 29, and 6 rows halve once; with microbatches of a row not at all.
    assert sizes == {(29, 1): 3, (11, 1): 3, (29, 2): 6, (7, 1): 6}
    assert not batch.shared["fresh"]


def test_questions_alone_tell_the_load_of_experts(tmp_path):
    """They have no token that is trained; each round counts once, whatever is done with it."""
    asked = [{"messages": chat(i)["messages"][:1]} for i in range(5)]
    file = write(tmp_path / "a.jsonl", asked)
    c = config("--data.train", file, "--objective.grpo.updates", "2")
    batches = make_objective(c).first_batches(3)
    questions = rollouts.open_questions(config("--data.train", file))
    rounds = [next(questions) for _ in range(3)]
    for batch, each in zip(batches, rounds, strict=True):
        tokens = sum(3 * len(q.prompt) for q in each.questions)
        assert (batch.segment_ids != 0).sum() == tokens and not batch.weights.any()


def test_the_log_of_a_round():
    asked = answered([5, 2, 1, 5, 5, 3], [1, 0, 2, 4, 4, 4])
    found = rollouts.describe(asked.answers, config().objective.grpo)
    want = {"reward": 2.5, "reward_std": math.sqrt(2.5833333), "groups_alike": 0.5}
    want |= {"answer_tokens": 3.5, "cut_off": 0.5}
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


# --- The training command ---------------------------------------------------------------------

RUN = [*MODEL, *GRPO, "--objective.grpo.updates", "2", "--train.checkpoint_every", "100"]
RUN += ["--optimizer.learning_rate", "1e-2", "--data.batch_size", "16"]
RUN += ["--objective.grpo.group_size", "8", "--optimizer.schedule", "constant"]
STEPS, LONG, SHORT = 6, 36, ["--train.steps", "5"]
# The share of even ids: about a half at first, and soon learnt.
EVEN = """
def reward(answer, record):
    assert record["key"] in range(7)
    return sum(i % 2 == 0 for i in answer.tokens) / len(answer.tokens)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    asked = [{"messages": chat(i)["messages"][:1], "key": i} for i in range(7)]  # no answers
    file = write(folder / "a.jsonl", asked)
    return [*RUN, "--data.train", file, "--objective.grpo.reward", reward_file(folder, EVEN)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    """A workdir of a run from beginning to end."""
    workdir = tmp_path_factory.mktemp("whole")
    os.chdir(ROOT)
    train.main([*arguments, "--train.steps", str(STEPS), "--workdir", str(workdir)])
    return workdir


def log(workdir: Path) -> list[dict]:
    clock = ("tokens_per_second", "flops_per_second", "mfu", "step_seconds")
    records = metrics.read(workdir)
    return [{k: v for k, v in r.items() if k not in clock} for r in records if "reward" in r]


def test_a_run_logs_its_rewards_and_the_sampler_s_gap(whole):
    assert [r["step"] for r in log(whole)] == list(range(1, STEPS + 1))
    records = log(whole)[:5]
    # Two updates on each round's answers: the sampler is compared at the first of them.
    assert ["sampler_gap" in r for r in records] == [True, False, True, False, True]
    for first, again in (records[:2], records[2:4]):
        assert first["reward"] == again["reward"] and first["answer_tokens"] <= 5
        assert 0 <= first["sampler_gap"] <= first["sampler_gap_max"] < 1e-4
        assert 0 <= first["sampler_kl"] < 1e-8 and first["clipped"] == 0
        assert first["reward_std"] > 0 and first["groups_alike"] in (0, 0.5)
        assert first["trained_tokens"] == 16 * first["answer_tokens"]
    assert records[0]["reward"] != records[2]["reward"]
    answers = metrics.read(whole, metrics.ANSWERS)
    assert {a["step"] for a in answers} == set(range(1, STEPS, 2))
    assert answers[0]["question"].startswith("count to")
    assert answers[0]["reward"] > answers[1]["reward"]


@pytest.mark.slow
def test_the_reward_rises(arguments, tmp_path):
    """From chance, a half, by at least 0.3; clipping has something to do at second updates."""
    train.main([*arguments, "--train.steps", str(LONG), "--workdir", str(tmp_path)])
    rewards_ = [r["reward"] for r in log(tmp_path)]
    assert np.mean(rewards_[:4]) < 0.65
    assert np.mean(rewards_[-6:]) > np.mean(rewards_[:4]) + 0.3
    assert any(r["clipped"] for r in log(tmp_path)[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3])
def test_stopped_and_started_again_asks_and_samples_the_same(
    whole, arguments, tmp_path, monkeypatch, step
):
    """Between rounds and in the middle of one, whose answers are kept in the checkpoint."""
    args = [*arguments, *SHORT, "--workdir", str(tmp_path)]
    real = rollouts.make_batch

    def stop(asked, config, *, fresh):
        made.append(1)
        if len(made) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(asked, config, fresh=fresh)

    made: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "make_batch", stop)
        train.main(args)
    assert log(tmp_path) == log(whole)[:step]
    train.main(args)
    assert log(tmp_path) == log(whole)[:5]
    one, two = (metrics.read(folder, metrics.ANSWERS) for folder in (whole, tmp_path))
    assert [a for a in one if a["step"] <= 5] == two


@pytest.mark.slow
def test_nothing_compiles_anew_from_step_to_step(arguments, tmp_path):
    """Counted where JAX counts: programs compiled after the second round."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **more: compiled.append(name) if "backend_compile" in name else None
    )
    counts = []
    real = rollouts.describe

    def count(*args):
        counts.append(len(compiled))
        return real(*args)

    args = [*arguments, "--objective.grpo.updates", "1", "--train.steps", "7"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "describe", count)
        train.main([*args, "--workdir", str(tmp_path)])
    jax.monitoring.clear_event_listeners()
    assert len(counts) == 7 and counts[0] > 0
    assert counts[2] == counts[-1], counts


def test_a_reward_that_fails_stops_the_run_with_a_line(arguments, tmp_path):
    file = reward_file(tmp_path, "def reward(answer, record):\n    return record['lost']\n")
    args = [*arguments, *SHORT, "--objective.grpo.reward", file, "--workdir", str(tmp_path / "r")]
    with pytest.raises(UserError, match=r"a.jsonl:\d: the reward of an answer to 'count to \d'"):
        train.main(args)
    missing = [
        *arguments,
        *SHORT,
        "--objective.grpo.reward",
        "gone.py",
        "--workdir",
        str(tmp_path / "no"),
    ]
    with pytest.raises(UserError, match="there is no file"):
        train.main(missing)
    assert not (tmp_path / "no").exists()
