"""Rollouts: sample answers, score them, and make them a batch, before each step of GRPO.

The project's own sampler answers each question `group_size` times with the parameters of the step.
Training uses its token ids as they were sampled, never decoded and encoded again. The loss compares
the trainer's log-probabilities with those that the sampler drew the tokens with.

Random numbers are a function of (seed, round, answer), and only the first host computes rewards. A
run that was stopped continues as if it had not been.
"""

from __future__ import annotations

import copy
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from gptoss_jax import data
from gptoss_jax.config import Config
from gptoss_jax.config.objective import GRPOConfig
from gptoss_jax.data.packing import Segment, fill, pack
from gptoss_jax.data.questions import Questions, Round
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.objectives.reinforcement import rewards
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs import metrics
from gptoss_jax.sampler import Sampler
from gptoss_jax.types import Batch, Params, TrainState

ADVANTAGES, SAMPLED = "advantages", "sampled_logprobs"  # keys of `Batch.per_token`
FRESH = "fresh"  # key of `Batch.shared`: 1 in the first step on a set of answers, else 0
# Rewards differ by rounding only if their standard deviation is at most this, times the largest
# absolute reward where that is over 1.
_STD_FLOOR = 1e-6


def check(config: Config) -> None:
    """Refuse a config that GRPO can't train. Raises `UserError`."""
    grpo = config.objective.grpo
    if grpo.kl and not config.model.lora.targets:
        raise UserError(
            f"objective.grpo.kl is {grpo.kl}: the divergence is from the model without its "
            "adapters, and model.lora.targets names none; make it 0, or train adapters"
        )
    if grpo.kl and any(not text.startswith("lora/") for text in config.optimizer.only):
        raise UserError(
            f"objective.grpo.kl is {grpo.kl}: the divergence is from the model without its "
            "adapters, which optimizer.only trains too; leave one of them out"
        )
    if config.train.on_spike == "rewind":
        raise UserError(
            "train.on_spike is rewind, which watches the loss, but the loss of objective.name grpo "
            "does not measure what the model learns: set train.on_spike to ignore"
        )


def open_questions(config: Config) -> Questions:
    """Load the reward function, then open data.train as questions. Raises `UserError`."""
    check(config)
    rewards.load(config.objective.grpo.reward)
    return Questions(config)


def unanswered(config: Config, count: int) -> list[Batch]:
    """Return the questions of the first `count` rounds as batches without answers."""
    questions = open_questions(config)
    updates = config.objective.grpo.updates
    rounds = [next(questions) for _ in range(count * updates)][::updates]
    for asked in rounds:
        size = len(asked.questions) * config.objective.grpo.group_size
        asked.answers = {"tokens": [[]] * size, "logprobs": [[]] * size, "rewards": [0.0] * size}
    return [make_batch(asked, config, fresh=True) for asked in rounds]


class Rollouts:
    """Answer the questions of each round, score the answers, and make a batch of them.

    An instance is the `Prepare` of an objective.
    """

    def __init__(self, config: Config, model: Transformer) -> None:
        """Store the arguments; nothing is loaded or sampled yet."""
        self._config, self._model = config, model
        self._encoding = tokenizer.get_tokenizer(config.model.vocab_size)
        self._sampler: Sampler | None = None
        self._last_logged: int | None = None  # the last step whose answers this process logged

    def __call__(
        self, state: TrainState, batch: Round, spread: Any
    ) -> tuple[Batch, dict[str, float]]:
        """Return a round's batch and numbers to log; first sample its answers, if it has none.

        Raises `UserError` if the reward function fails.
        """
        del spread  # `spread` is for rows that each host reads for itself; here each has all rows
        fresh = batch.answers is None
        if batch.answers is None:
            batch.answers = self._answer(state.params, batch)
            self._write(int(state.step) + 1, batch)
        made = make_batch(batch, self._config, fresh=fresh)
        mesh = jax.sharding.get_mesh()
        if not mesh.empty:
            size = made.tokens.shape[0]
            made = data.spread(made, mesh, rows=(0, size), size=size)
        return made, describe(batch.answers, self._config.objective.grpo)

    def _answer(self, params: Params, asked: Round) -> dict[str, Any]:
        """Sample and score; return lists of ids, log-probabilities and rewards, fit for JSON."""
        grpo = self._config.objective.grpo
        if self._sampler is None:
            self._sampler = Sampler(self._model, params)
        else:
            self._sampler.renew(params)
        prompts = [q.prompt for q in asked.questions for _ in range(grpo.group_size)]
        out = self._sampler.generate(
            prompts,
            max_tokens=grpo.max_tokens,
            temperature=grpo.temperature,
            seed=_seed(self._config.train.seed, asked.number),
            tempered=True,
        )
        judged = processes.from_first(partial(self._judge, asked, out.tokens))
        return {"tokens": out.tokens, "logprobs": out.logprobs, "rewards": judged}

    def _judge(self, asked: Round, tokens: list[list[int]]) -> list[float]:
        size = self._config.objective.grpo.group_size
        reward = rewards.load(self._config.objective.grpo.reward)
        judged = []
        for i, ids in enumerate(tokens):
            q = asked.questions[i // size]
            answer = rewards.read_answer(
                ids, question=q.question, encoding=self._encoding, tools=q.tools
            )
            record = copy.deepcopy(q.record)  # a copy that the function may change
            judged.append(rewards.score(reward, answer, record, where=q.where))
        return judged

    def _write(self, step: int, asked: Round) -> None:
        """Append the best and the worst answer to the round's first question to answers.jsonl.

        The first call, and any for a step that is not after the last logged one, removes records of
        this step and later ones: they are from a run that was stopped after them.
        """
        folder = Path(self._config.run_folder)
        if not (processes.is_first() and folder.is_dir()) or asked.answers is None:
            return
        file = folder / metrics.ANSWERS
        if self._last_logged is None or step <= self._last_logged:
            kept = [r for r in metrics.read(folder, metrics.ANSWERS) if r["step"] < step]
            file.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._last_logged = step
        group = asked.answers["rewards"][: self._config.objective.grpo.group_size]
        with file.open("a") as out:
            for i in dict.fromkeys((int(np.argmax(group)), int(np.argmin(group)))):
                text = tokenizer.decode(self._encoding, asked.answers["tokens"][i])
                record = {"step": step, "question": asked.questions[0].question, "answer": text}
                out.write(json.dumps({**record, "reward": group[i]}) + "\n")


def advantages(
    given: Float[np.ndarray, "questions answers"], *, grpo: GRPOConfig
) -> Float[np.ndarray, "questions answers"]:
    """Return each answer's reward minus the mean reward of its group.

    With `grpo.scale_by_std`, it is divided by the group's standard deviation. `grpo.std` says
    whether that is over n, as in the paper's formula, or over n - 1, as in TRL and verl: all
    advantages then are sqrt((n - 1) / n) times as large. A group whose rewards are all the same, up
    to rounding, gives zeros.
    """
    over = given - given.mean(axis=1, keepdims=True)
    std = given.std(axis=1, keepdims=True)
    same = std <= _STD_FLOOR * np.maximum(1.0, np.abs(given).max(axis=1, keepdims=True))
    if grpo.std == "sample":
        std = std * np.sqrt(given.shape[1] / (given.shape[1] - 1))
    scale = np.where(same, 1.0, std) if grpo.scale_by_std else 1.0
    return np.where(same, 0.0, over / scale)


def make_batch(asked: Round, config: Config, *, fresh: bool) -> Batch:
    """Pack each question and answer, as one segment, into rows of sequence_length.

    Short answers share rows. There may then be fewer rows than batch_size: half as many, a quarter,
    and so on. There are only these sizes, so that few steps are compiled. The weights are 1 on the
    answers' tokens. The arrays are host arrays, complete on every host.
    """
    grpo = config.objective.grpo
    assert asked.answers is not None
    prompts = [q.prompt for q in asked.questions for _ in range(grpo.group_size)]
    given = np.asarray(asked.answers["rewards"], np.float64).reshape(-1, grpo.group_size)
    over = advantages(given, grpo=grpo).reshape(-1)
    segments = []
    for prompt, ids in zip(prompts, asked.answers["tokens"], strict=True):
        weights = np.array([0.0] * len(prompt) + [1.0] * len(ids), np.float32)
        segments.append(Segment(np.array(prompt + ids, np.int32), weights))
    packed = pack([len(s.tokens) for s in segments], config.data.sequence_length)
    packed += [[]] * (num_rows(len(packed), config) - len(packed))
    batch = fill([[segments[i] for i in row] for row in packed], config.data.sequence_length)
    per_token = {
        name: np.zeros(np.shape(batch.tokens), np.float32) for name in (ADVANTAGES, SAMPLED)
    }
    for b, row in enumerate(packed):
        start = 0
        for i in row:
            ids = asked.answers["tokens"][i]
            # A token's values are at the position before it, whose target it is.
            first = start + len(prompts[i]) - 1
            at = slice(first, first + len(ids))
            per_token[ADVANTAGES][b, at] = over[i]
            per_token[SAMPLED][b, at] = asked.answers["logprobs"][i]
            start += len(segments[i].tokens)
    return batch.replace(per_token=per_token, shared={FRESH: np.float32(fresh)})  # type: ignore[attr-defined]


def num_rows(least: int, config: Config) -> int:
    """Return the rows of a batch with at least `least`: batch_size, halved as often as possible."""
    size, unit = config.data.batch_size, config.optimizer.accumulate * meshes.size(*meshes.ROWS)
    while size % (2 * unit) == 0 and size // 2 >= least:
        size //= 2
    return size


def complete(batch: Batch) -> Batch:
    """Add the shapes of the arrays that `make_batch` adds to those of a batch of tokens."""
    x = batch.weights
    per_token = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name in (ADVANTAGES, SAMPLED)}
    shared = {FRESH: jax.ShapeDtypeStruct((), np.float32)}
    return batch.replace(per_token=per_token, shared=shared)  # type: ignore[attr-defined]


def describe(answers: dict[str, Any], grpo: GRPOConfig) -> dict[str, float]:
    """Return the numbers to log about a round's answers.

    `reward` and `reward_std` are mean and standard deviation over all answers. `groups_alike` is
    the share of questions whose answers all got the same reward, so that they teach nothing.
    `answer_tokens` is the mean length. `cut_off` is the share of answers that are max_tokens long.
    """
    given = np.asarray(answers["rewards"], np.float64).reshape(-1, grpo.group_size)
    lengths = np.array([len(ids) for ids in answers["tokens"]])
    return {
        "reward": float(given.mean()),
        "reward_std": float(given.std()),
        "groups_alike": float(np.mean(~advantages(given, grpo=grpo).any(axis=1))),
        "answer_tokens": float(lengths.mean()),
        "cut_off": float(np.mean(lengths >= grpo.max_tokens)),
    }


def _seed(seed: int, number: int) -> int:
    """Return the sampler's seed of a round; seeds of neighbouring rounds are unrelated."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
