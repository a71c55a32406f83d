"""Lower the programs of a run from shapes, for devices that this machine lacks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.config import Config
from gptoss_jax.model import MakeModel, Transformer, host_embedding, pack_experts
from gptoss_jax.ops import moe
from gptoss_jax.parallel import sharding
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.planning.shapes import gradient_bytes, shapes
from gptoss_jax.sampler import decode as compiled
from gptoss_jax.sampler import sampler
from gptoss_jax.sampler.rules import Rules
from gptoss_jax.types import MXFP4, Params

PROGRAMS = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Sampling:
    """The sizes of sampling."""

    batch: int  # rows that are sampled at the same time
    context: int  # tokens a row, with its prompt
    prompt: int  # tokens of the context that prefill reads
    piece: int | None = None  # tokens that prefill reads at a time; None: the sampler's on the chip


@dataclass(frozen=True)
class Lowered:
    """A program before it is compiled, and the bytes of its arguments on each device."""

    name: str
    compile: Callable[[], Any]
    parts: dict[str, int]  # the arguments' bytes by kind
    gradients: int  # bytes; the compiler counts them as temporaries
    seconds: float  # the time of tracing
    host: int = 0  # bytes of the state that stay in the host's memory


def train(config: Config, mesh: jax.sharding.Mesh, make_model: MakeModel = Transformer) -> Lowered:
    """Lower the step that `gptoss_jax.train` runs, with its state and batch sharded over the mesh.

    Raises:
        UserError: training would refuse the config too.
    """
    start = time.perf_counter()
    rows = config.data.batch_size // config.optimizer.accumulate
    sharding.check_batch(rows, config.data.sequence_length, mesh)
    run = shapes(config, make_model)
    state = run.state
    batch = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        run.batch,
        sharding.batch_shardings(run.batch, mesh),
    )
    factors = flatten(run.factors)
    exact = config.optimizer.accumulate > 1
    each = {
        path: math.prod(leaf.sharding.shard_shape(leaf.shape))
        * (4 if exact else leaf.dtype.itemsize)
        for path, leaf in flatten(state.params).items()
        if np.any(factors[path]) and hasattr(leaf, "dtype")
    }
    gradients = gradient_bytes(config, each)
    # A sharding on absent devices does not know its kind of memory.
    host = local_bytes(state.params[host_embedding.KEY]) if config.model.embedding_on_host else 0
    parts = {
        "parameters": local_bytes(state.params) - host,
        "optimizer state": local_bytes(state.opt_state),
        "averaged parameters": local_bytes(state.ema),
        "batch": local_bytes(batch),
    }
    step: Any = run.step
    lowered = step.lower(state, batch)
    seconds = time.perf_counter() - start
    return Lowered("train", lowered.compile, parts, gradients, seconds, host)


def prefill(
    config: Config,
    mesh: jax.sharding.Mesh,
    sampling: Sampling,
    make_model: MakeModel = Transformer,
) -> Lowered:
    """Lower the sampler's pass over the prompt, or over a piece of it."""
    start = time.perf_counter()
    model, params = _sampled(config, mesh, make_model)
    prompts = _rows((sampling.batch, sampling.prompt), jnp.int32, mesh)
    lowered: Any = compiled.prefill.lower(
        model,
        params,
        prompts,
        options=_options(config, sampling, mesh),
        cache_length=sampling.context,
        out_length=sampling.context,
        mode="greedy",
        piece=sampling.piece or sampler.prefill_piece(),
    )
    parts = {"parameters": local_bytes(params)}
    return Lowered("prefill", lowered.compile, parts, 0, time.perf_counter() - start)


def decode(
    config: Config,
    mesh: jax.sharding.Mesh,
    sampling: Sampling,
    make_model: MakeModel = Transformer,
) -> Lowered:
    """Lower the loop that samples tokens."""
    start = time.perf_counter()
    model, params = _sampled(config, mesh, make_model)
    cache = jax.eval_shape(lambda: model.init_cache(sampling.batch, sampling.context))
    cache = jax.tree.map(
        lambda x: _placed(x, mesh, sharding.cache_spec(x, mesh)), cache.replace(empty=False)
    )
    size = (sampling.batch, sampling.context)
    state = compiled.State(
        tokens=_rows(size, jnp.int32, mesh),
        logprobs=_rows(size, jnp.float32, mesh),
        done=_rows(size[:1], jnp.bool_, mesh),
        counts=_rows(size[:1], jnp.int32, mesh),
        steps=_placed(jax.ShapeDtypeStruct((), jnp.int32), mesh, PartitionSpec()),
    )
    lowered: Any = compiled.decode.lower(
        model,
        params,
        cache,
        state=state,
        options=_options(config, sampling, mesh),
        until=state.steps,
        mode="greedy",
    )
    parts = {"parameters": local_bytes(params), "cache": local_bytes(cache)}
    return Lowered("decode", lowered.compile, parts, 0, time.perf_counter() - start)


def local_bytes(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of sharded shapes."""
    total = 0
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            continue
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        total += math.prod(shape) * max(1, jnp.dtype(x.dtype).itemsize)
    return total


def _sampled(
    config: Config, mesh: jax.sharding.Mesh, make_model: MakeModel
) -> tuple[Transformer, Params]:
    """Return the model and its parameters as the sampler holds them: packed experts relaid."""
    model = make_model(sharding.padded(config.model)).dropless()
    params = model.abstract_params()
    if model.config.qat:
        params = jax.eval_shape(lambda params: pack_experts.pack(model.config, params)[1], params)
        model = model.with_config(pack_experts.packed(model.config))
    if sampler._can_relay(model):
        layout: Any = moe.layout_for_chip()
        experts = {
            name: jax.eval_shape(functools.partial(moe.relay, name, layout=layout), leaf)
            if isinstance(leaf, MXFP4)
            else leaf
            for name, leaf in params["layers"]["experts"].items()
        }
        params = {**params, "layers": {**params["layers"], "experts": experts}}
    return model, sharding.place(params, mesh)


def _options(config: Config, sampling: Sampling, mesh: jax.sharding.Mesh) -> compiled.Options:
    rules = jax.eval_shape(lambda: Rules().values(config.model.vocab_size))
    return compiled.Options(
        rules=jax.tree.map(lambda x: _placed(x, mesh, PartitionSpec()), rules),
        seeds=_rows((sampling.batch, 2), jnp.uint32, mesh),
        stop_ids=_placed(jax.ShapeDtypeStruct((8,), jnp.int32), mesh, PartitionSpec()),
        lengths=_rows((sampling.batch,), jnp.int32, mesh),
    )


def _rows(shape: tuple[int, ...], dtype: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the shape of an array whose first axis is a batch's rows."""
    spec = PartitionSpec(sharding.ROWS, *(None,) * (len(shape) - 1))
    return _placed(jax.ShapeDtypeStruct(shape, dtype), mesh, spec)


def _placed(x: Any, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
