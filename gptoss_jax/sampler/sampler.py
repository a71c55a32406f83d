"""The host side of sampling: check prompts, pad them to few shapes, return lists of ids."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from gptoss_jax import chips
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer, host_embedding, pack_experts
from gptoss_jax.ops import moe
from gptoss_jax.parallel import mesh
from gptoss_jax.parameters.table import EXPERT
from gptoss_jax.parameters.tree import is_weight, split_layers
from gptoss_jax.sampler.decode import Options, State, decode, prefill
from gptoss_jax.sampler.rules import Rules
from gptoss_jax.types import MXFP4, KVCache, Params

_CHUNK_SECONDS = 0.05  # streaming: decode on the device for about this long, then show the tokens
_MAX_CHUNK = 64
# Tokens of a prompt that are read at a time on small chips, which hold the weights of 20b and
# little besides. On other chips a prompt is read at once, with the kernels of training.
PIECE = 512
SMALL_CHIPS = ("v5e", "t4", "l4")

_split_layers = jax.jit(split_layers, static_argnums=1)  # one program instead of one per slice


@dataclass(frozen=True)
class Generation:
    """The sampled tokens, one list per prompt: without the prompt, with the stop token."""

    tokens: list[list[int]]
    logprobs: list[list[float]]  # log_softmax of the model's logits, or of tempered ones: `Rules`
    prefill_seconds: float  # to the first token of all prompts, with any compilation
    decode_seconds: float  # for the tokens after the first of each prompt, without compilation

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded per second over all prompts, without the first of each; 0 if none were."""
        decoded = sum(len(row) - 1 for row in self.tokens)
        return decoded / self.decode_seconds if decoded else 0.0


class Sampled(NamedTuple):
    """One token of a stream."""

    token: int
    logprob: float


@dataclass
class _Run:
    """A batch that is being decoded: the arguments of `decode`."""

    cache: KVCache
    state: State
    options: Options
    rules: Rules


class Sampler:
    """Sample from a model.

    All samplers of equal models share compiled code. On a CPU, stacked layers are copied into one
    array per layer, unless they are already split (`loading.load(..., split=True)`): decoding from
    a stack would copy it at every token. On an accelerator, packed experts are copied into the
    layout that its kernels read, unless they already have it (`loading.load(..., layout=)`). If the
    parameters are sharded over a mesh (`parallel.mesh`), each device samples with its shards. With
    several hosts, all of them must make the same calls, and all get the result.

    A model with `qat` quantises its experts in every pass. It is sampled as the packed model that
    computes the same function (`model.pack_experts.pack`), and `model` is that packed model.
    """

    def __init__(self, model: Transformer, params: Params, *, relay: bool = True) -> None:
        """Take a model and its parameters; apart from the copies above, these stay where they are.

        With `relay=False`, packed experts keep their layout on an accelerator too, and are read as
        in training: this is slower, but needs no copy of them beside the train state.
        """
        self._relays = relay
        self._mesh = _mesh_of(params)
        self._given = model.dropless()
        self.model = self._given
        if model.config.qat:
            self.model = self._given.with_config(pack_experts.packed(self._given.config))
        self.params = self._in_order(params)

    def renew(self, params: Params) -> None:
        """Replace the parameters by newer ones from training; this compiles nothing.

        Packed weights are assumed to be unchanged, since nothing trains them: those that were
        copied into another layout are not copied again. With `qat`, this does not hold for weights
        that have adapters, which are folded in again.
        """
        have = self.params["layers"]["experts"]
        experts = params["layers"]["experts"]
        folded = pack_experts.adapters(params) if self._given.config.qat else {}
        kept = {
            name: have[name]
            for name, stack in experts.items()
            if isinstance(stack, MXFP4) and not isinstance(have[name], MXFP4) and name not in folded
        }
        del have
        self.params = {}  # free memory for the new ones
        new = {name: stack for name, stack in experts.items() if name not in kept}
        params = self._in_order({**params, "layers": {**params["layers"], "experts": new}})
        layers = params["layers"]
        self.params = {**params, "layers": {**layers, "experts": {**layers["experts"], **kept}}}

    def _in_order(self, params: Params) -> Params:
        """Return the parameters in the form that decoding reads."""
        params = host_embedding.on_device(params)
        with self._on_mesh():
            if self._given.config.qat:  # first, so that a CPU copies no unpacked experts below
                params = pack_experts.pack(self._given.config, params)[1]
            if _on_cpu(params):
                params = _taken_apart(params, self.model.config.num_layers)
            elif self._relays and _can_relay(self.model):
                layers = params["layers"]
                params = {**params, "layers": {**layers, "experts": _relay(layers["experts"])}}
        return params

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
        tempered: bool = False,
    ) -> Generation:
        """Continue each prompt until it samples a stop token or has `max_tokens` new ones.

        `Rules` describes the rules; by default the likeliest token is taken. With one `seed`,
        prompt i draws by (seed, i). With a seed per prompt, each draws as it would alone with its
        seed. A prompt's tokens depend on nothing else in the batch. `stop_ids` are by default those
        of `<|return|>`, `<|endoftext|>` and `<|call|>`; an empty list stops at nothing.

        Raises UserError for a prompt without ids, ids outside the vocabulary, prompts that with
        `max_tokens` are longer than `model.config.context`, and invalid rules.
        """
        rules = Rules(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, tempered=tempered
        )
        if not len(prompts):
            return Generation([], [], 0.0, 0.0)
        start = time.perf_counter()
        run = self._start(prompts, max_tokens=max_tokens, rules=rules, seed=seed, stops=stop_ids)
        jax.block_until_ready(run.state)
        prefilled = time.perf_counter()
        self._decode(run, 1)  # takes no step: compiles, which the clock should not see
        compiled = time.perf_counter()
        self._decode(run, max_tokens)
        state = jax.device_get(run.state)
        return Generation(
            tokens=_lists(state.tokens, state.counts, rows=len(prompts)),
            logprobs=_lists(state.logprobs, state.counts, rows=len(prompts)),
            prefill_seconds=prefilled - start,
            decode_seconds=time.perf_counter() - compiled,
        )

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[Sampled]:
        """Yield the tokens that `generate` returns for one prompt as they come, stop token last.

        Arguments are checked before this returns. The device decodes a few tokens at a time, as
        many as it makes in about 0.05 s.
        """
        rules = Rules(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        run = self._start([prompt], max_tokens=max_tokens, rules=rules, seed=seed, stops=stop_ids)
        return self._stream(run, max_tokens)

    def _stream(self, run: _Run, max_tokens: int) -> Iterator[Sampled]:
        self._decode(run, 1)  # compile before the first token is shown: no pause after it
        shown, chunk = 0, 1
        while True:
            tokens, logprobs, done = jax.device_get(
                (run.state.tokens[0], run.state.logprobs[0], run.state.done[0])
            )
            count = int(run.state.counts[0])
            for i in range(shown, count):
                yield Sampled(int(tokens[i]), float(logprobs[i]))
            if done or count >= max_tokens:
                return
            start = time.perf_counter()
            self._decode(run, min(count + chunk, max_tokens))
            jax.block_until_ready(run.state)
            fast = time.perf_counter() - start < _CHUNK_SECONDS / 2
            chunk = min(2 * chunk, _MAX_CHUNK) if fast else max(chunk // 2, 1)
            shown = count

    def _start(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        rules: Rules,
        seed: int | Sequence[int],
        stops: Sequence[int] | None,
    ) -> _Run:
        """Check everything, read the prompts and sample their first tokens."""
        config = self.model.config
        rows = _check_prompts(prompts, config.vocab_size)
        seeds = _row_seeds(seed, len(rows))
        if self._mesh is not None:  # pad to rows that it divides; the added rows are dropped
            with self._on_mesh():
                spare = -len(rows) % mesh.size(*mesh.ROWS)
            rows += rows[:1] * spare
            seeds = np.concatenate([seeds, np.repeat(seeds[:1], spare, axis=0)])
        longest = max(map(len, rows))
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}: it is at least 1")
        if longest + max_tokens > config.context:
            raise UserError(
                f"a prompt of {longest} tokens and max_tokens ({max_tokens}) are longer than "
                f"model.context ({config.context}): shorten one of them"
            )
        if stops is None:
            stops = tokenizer.stop_ids(tokenizer.get_tokenizer(config.vocab_size))
        # Pad to lengths that recur, so that nothing compiles again.
        padded_stops = np.asarray([*stops, *[-1] * (8 - len(stops) % 8)], np.int32)
        padded = np.zeros((len(rows), min(_bucket(longest), config.context)), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        # Host arrays: equal on every host, they can go to all devices.
        arrays: Any = seeds, padded_stops, np.asarray([len(row) for row in rows], np.int32)
        options = Options(rules.values(config.vocab_size), *arrays)
        with self._on_mesh():
            cache, state = prefill(
                self.model,
                self.params,
                padded,
                options=options,
                cache_length=min(_bucket(longest + max_tokens), config.context),
                out_length=_bucket(max_tokens),
                mode=rules.mode,
                piece=prefill_piece(),
            )
        return _Run(cache, state, options, rules)

    def _decode(self, run: _Run, until: int) -> None:
        with self._on_mesh():
            run.cache, run.state = decode(
                self.model,
                self.params,
                run.cache,
                state=run.state,
                options=run.options,
                until=np.int32(until),  # pyright: ignore[reportArgumentType]
                mode=run.rules.mode,
            )


def _bucket(n: int) -> int:
    """Round up to one of 32, 48, 64, 96, 128, ...: few shapes, and at most half as much again."""
    size = 32
    while size < n:
        size *= 2
    return size * 3 // 4 if size > 32 and n <= size * 3 // 4 else size


def _lists(values: np.ndarray, counts: np.ndarray, *, rows: int) -> list[list[Any]]:
    return [row[:n].tolist() for row, n in zip(values[:rows], counts[:rows], strict=True)]


def _mesh_of(params: Params) -> jax.sharding.Mesh | None:
    """Return the mesh of `parallel.mesh` that the parameters are sharded over, if any."""
    leaf = jax.tree.leaves(params)[0]
    spread = getattr(leaf, "sharding", None)
    if isinstance(spread, jax.NamedSharding) and tuple(spread.mesh.axis_names) == mesh.AXES:
        return spread.mesh if spread.mesh.size > 1 else None  # pyright: ignore[reportReturnType]
    return None


def prefill_piece() -> int | None:
    """Return how many tokens of a prompt to read at a time; None: all, if memory is plentiful."""
    return PIECE if chips.current().kind in SMALL_CHIPS else None


def _taken_apart(params: Params, count: int) -> Params:
    """Split stacked layers, and their adapters, into one array per layer, if they are not yet."""
    own = params.get("lora", {})
    if not _is_apart(params["layers"]):
        params = {**params, "layers": _split_layers(params["layers"], count)}
    if not _is_apart(own.get("layers", {})):
        params = {**params, "lora": {**own, "layers": _split_layers(own["layers"], count)}}
    return params


def _is_apart(layers: Params) -> bool:
    stacks = jax.tree.leaves(layers, is_leaf=is_weight)
    return all(isinstance(stack, tuple) for stack in stacks)


def _can_relay(model: Transformer) -> bool:
    """Return whether the chip has a layout and the mesh splits packed experts by expert alone."""
    packed = model.config.experts == "mxfp4" and mesh.size("tensor", *EXPERT) == 1
    return packed and moe.layout_for_chip() is not None


def _relay(experts: Params) -> Params:
    """Put packed stacks into the layout that the chip's kernels read."""
    layout = moe.layout_for_chip()
    run = jax.jit(moe.relay, static_argnums=0, static_argnames="layout")
    return {
        name: run(name, stack, layout=layout) if isinstance(stack, MXFP4) else stack
        for name, stack in experts.items()
    }


def _on_cpu(params: Params) -> bool:
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array):
        return all(device.platform == "cpu" for device in leaf.devices())
    return jax.default_backend() == "cpu"


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    rows = []
    for i, prompt in enumerate(prompts):
        if np.ndim(prompt) != 1:
            raise UserError(f"prompt {i} is no list of ids: give a list of prompts, each a list")
        if not len(prompt):
            raise UserError(f"prompt {i} is empty: it needs at least one id")
        try:
            tokenizer.check_ids(prompt, vocab_size)
        except UserError as error:
            raise UserError(f"prompt {i}: {error}") from None
        rows.append([int(token) for token in prompt])
    return rows


def _row_seeds(seed: int | Sequence[int], rows: int) -> np.ndarray:
    """Return uint32 [rows, 2]: a row's seed, and its index among the rows that share the seed."""
    pairs = [(seed, i) for i in range(rows)] if isinstance(seed, int) else [(s, 0) for s in seed]
    if len(pairs) != rows:
        raise UserError(f"seed has {len(pairs)} entries for {rows} prompts: one each, or one int")
    for value, _ in pairs:
        if not 0 <= value < 2**32:
            raise UserError(f"seed is {value}: it must be in 0 to 2**32 - 1")
    return np.asarray(pairs, np.uint32)
