"""The two compiled functions of sampling: `prefill` reads prompts, `decode` adds tokens.

Both are jitted here, once per process, with the model as a static argument: another `Sampler` of an
equal model compiles nothing. Parameters are arguments, never constants of the program.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptoss_jax.model import Transformer
from gptoss_jax.parallel import sharding
from gptoss_jax.sampler.rules import Mode, RuleValues, choose
from gptoss_jax.types import KVCache, Params


@struct.dataclass
class Options:
    """What stays the same while a batch is decoded."""

    rules: RuleValues
    seeds: UInt32[Array, "B 2"]  # a row's seed and its index under that seed
    stop_ids: Int[Array, " stops"]  # padded with -1, which is no token's id
    lengths: Int[Array, " B"]  # lengths of the prompts


@struct.dataclass
class State:
    """What decoding changes, apart from the cache."""

    tokens: Int[Array, "B out"]  # sampled so far; in a row that is done, the rest means nothing
    logprobs: Float[Array, "B out"]
    done: Bool[Array, " B"]  # has sampled a stop token
    counts: Int[Array, " B"]  # tokens sampled per row, the stop token included
    steps: Int[Array, ""]  # columns of `tokens` that are written


def _record(
    state: State, logits: Float[Array, "B V"], options: Options, *, mode: Mode
) -> tuple[State, Int[Array, " B"]]:
    """Choose the next token of each row; return the state with the tokens, and the tokens."""

    def row_key(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), position)

    logits = sharding.rows(sharding.replicate(logits))  # gather, then give each device its rows
    keys = jax.vmap(row_key)(options.seeds, options.lengths + state.steps)
    token, logprob = choose(logits, keys, options.rules, mode=mode)
    stops = jnp.any(token[:, None] == options.stop_ids, axis=-1)
    after = State(
        tokens=state.tokens.at[:, state.steps].set(token),
        logprobs=state.logprobs.at[:, state.steps].set(logprob),
        done=state.done | stops,
        counts=state.counts + ~state.done,
        steps=state.steps + 1,
    )
    return sharding.replicate(after), token


@partial(jax.jit, static_argnames=("model", "cache_length", "out_length", "mode", "piece"))
def prefill(
    model: Transformer,
    params: Params,
    prompts: Int[Array, "B T"],
    *,
    options: Options,
    cache_length: int,
    out_length: int,
    mode: Mode,
    piece: int | None = None,
) -> tuple[KVCache, State]:
    """Read the prompts, padded on the right, and sample the first token of each.

    Only the last position of each prompt is unembedded. `piece` is how many tokens are read at a
    time (None: all). Each piece attends to the cache, so a longer prompt takes no more memory than
    its cache.
    """
    batch = prompts.shape[0]
    into: dict[str, Any] = {"cache": model.init_cache(batch, cache_length), "options": options}
    if piece is None or piece >= prompts.shape[1]:
        cache, last = _read(model, params, prompts, start=jnp.int32(0), **into)
    else:
        cache, last = _read_in_pieces(model, params, prompts, piece=piece, **into)
    state = State(
        tokens=jnp.zeros((batch, out_length), jnp.int32),
        logprobs=jnp.zeros((batch, out_length), jnp.float32),
        done=jnp.zeros((batch,), bool),
        counts=jnp.zeros((batch,), jnp.int32),
        steps=jnp.int32(0),
    )
    state, _ = _record(state, model.unembed(params, last[:, None])[:, 0], options, mode=mode)
    return sharding.constrain_cache(cache), state


def _read(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    start: Int[Array, ""],
    cache: KVCache,
    options: Options,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Read the tokens from `start` on; return the cache, and the hidden state of each prompt's end.

    The hidden state of a row means nothing if its prompt does not end in these tokens.
    """
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    out = model.forward(
        params,
        tokens,
        segment_ids=(positions < options.lengths[:, None]).astype(jnp.int32),
        positions=positions,
        cache=cache,
    )
    assert out.cache is not None
    at = jnp.clip(options.lengths - 1 - start, 0, tokens.shape[1] - 1)
    return out.cache, jnp.take_along_axis(out.hidden, at[:, None, None], axis=1)[:, 0]


def _read_in_pieces(
    model: Transformer,
    params: Params,
    prompts: Int[Array, "B T"],
    *,
    piece: int,
    cache: KVCache,
    options: Options,
) -> tuple[KVCache, Float[Array, "B D"]]:
    batch, length = prompts.shape
    count = -(-length // piece)
    padded = jnp.pad(prompts, [(0, 0), (0, count * piece - length)])
    parts = jnp.moveaxis(padded.reshape(batch, count, piece), 1, 0)
    starts = jnp.arange(count, dtype=jnp.int32) * piece

    def read(carry: tuple[KVCache, Array], part: tuple[Array, Array]):
        cache, last = carry
        tokens, start = part
        cache, hidden = _read(model, params, tokens, start=start, cache=cache, options=options)
        ends = (options.lengths > start) & (options.lengths <= start + piece)
        return (cache, jnp.where(ends[:, None], hidden, last)), None

    last = jnp.zeros((batch, model.config.d_model), jnp.dtype(model.config.dtype))
    start = (cache.replace(empty=False), last)  # type: ignore[attr-defined]
    return jax.lax.scan(read, start, (parts, starts))[0]


@partial(jax.jit, static_argnames=("model", "mode"), donate_argnames=("cache",))
def decode(
    model: Transformer,
    params: Params,
    cache: KVCache,
    *,
    state: State,
    options: Options,
    until: Int[Array, ""],
    mode: Mode,
) -> tuple[KVCache, State]:
    """Sample until each row has `until` tokens or every row is done.

    A row that is done is padding from then on: it writes nothing to its cache and uses no expert.
    """

    def going(carry: tuple[KVCache, State, Array]) -> Array:
        state = carry[1]
        return (state.steps < until) & ~jnp.all(state.done)

    def step(carry: tuple[KVCache, State, Array]) -> tuple[KVCache, State, Array]:
        cache, state, token = carry
        out = model.forward(
            params,
            token[:, None],
            segment_ids=(~state.done).astype(jnp.int32)[:, None],
            positions=(options.lengths + state.steps - 1)[:, None],
            cache=cache,
        )
        assert out.cache is not None
        logits = model.unembed(params, out.hidden)[:, 0]
        return out.cache, *_record(state, logits, options, mode=mode)

    token = jnp.take(state.tokens, state.steps - 1, axis=1)
    cache, state, _ = jax.lax.while_loop(going, step, (cache, state, token))
    return sharding.constrain_cache(cache), sharding.replicate(state)
