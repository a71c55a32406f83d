"""The two compiled functions of sampling: the prompt's pass, and the loop that grows the answer.

Both are jitted here, once a process, with the model as a static argument: another `Sampler` of an
equal model compiles nothing. Parameters are arguments, never constants of the program.
"""

from __future__ import annotations

from functools import partial

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
    stop_ids: Int[Array, " stops"]  # filled up with -1, which no token is
    lengths: Int[Array, " B"]  # of the prompts


@struct.dataclass
class State:
    """What decoding changes, the cache aside."""

    tokens: Int[Array, "B out"]  # sampled so far; of a row that is done, the rest means nothing
    logprobs: Float[Array, "B out"]
    done: Bool[Array, " B"]  # has sampled a stop token
    counts: Int[Array, " B"]  # tokens sampled in a row, its stop token included
    steps: Int[Array, ""]  # columns of `tokens` that are written


def _record(
    state: State, logits: Float[Array, "B V"], options: Options, *, mode: Mode
) -> tuple[State, Int[Array, " B"]]:
    """Choose the next token of each row, write it down, and return it."""

    def row_key(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), seed[1]), position)

    logits = sharding.rows(sharding.replicate(logits))  # gathered; then each device has its rows
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


@partial(jax.jit, static_argnames=("model", "cache_length", "out_length", "mode"))
def prefill(
    model: Transformer,
    params: Params,
    prompts: Int[Array, "B T"],
    *,
    options: Options,
    cache_length: int,
    out_length: int,
    mode: Mode,
) -> tuple[KVCache, State]:
    """Read the prompts, padded on the right, and sample the first token of each.

    The last position of each prompt alone meets the unembedding.
    """
    batch, length = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), prompts.shape)
    out = model.forward(
        params,
        prompts,
        segment_ids=(positions < options.lengths[:, None]).astype(jnp.int32),
        positions=positions,
        cache=model.init_cache(batch, cache_length),
    )
    assert out.cache is not None
    last = jnp.take_along_axis(out.hidden, options.lengths[:, None, None] - 1, axis=1)
    state = State(
        tokens=jnp.zeros((batch, out_length), jnp.int32),
        logprobs=jnp.zeros((batch, out_length), jnp.float32),
        done=jnp.zeros((batch,), bool),
        counts=jnp.zeros((batch,), jnp.int32),
        steps=jnp.int32(0),
    )
    state, _ = _record(state, model.unembed(params, last)[:, 0], options, mode=mode)
    return sharding.constrain_cache(out.cache), state


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
    """Sample on, until `until` tokens a row are there or every row is done.

    A row that is done is padding from then on: it writes nothing to its cache and costs no expert.
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
