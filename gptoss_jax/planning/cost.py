"""Estimate a program's cost on a device: memory from its compiler, times from the data sheets."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.chips.facts import GPUS, TARGETS, GiB, Target
from gptoss_jax.chips.topologies import GPUS_A_HOST
from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.model.flops import matmul_params, step_flops
from gptoss_jax.parallel.exchange import receive_rows
from gptoss_jax.parallel.mesh import ROWS
from gptoss_jax.planning import hlo, traffic
from gptoss_jax.planning.programs import Lowered, Sampling
from gptoss_jax.sampler.sampler import prefill_piece

ASSUMPTIONS = (
    "peak arithmetic, memory and link rates of the data sheets, which no program reaches: a bound",
    "from below, not a forecast. FLOPs: matmuls and attention, rows full, every token trained, all",
    "parameters trained; with remat the forward pass once more; routing even. Collectives in rings",
    "over all of a device's links (GPUs of several hosts: over one network port each). Bytes: what",
    "each instruction reads and writes, as if nothing stayed in a cache.",
)


@dataclass
class Plan:
    """The cost of a program on each device, in bytes, seconds and FLOPs."""

    name: str
    parts: dict[str, int]
    gradients: int
    capacity: int
    # From the compiler; None if it refused the program and did not say.
    arguments: int | None = None
    temporaries: int | None = None
    code: int = 0
    peak: int | None = None
    host: int = 0  # in the host's memory: state, and temporaries that are moved there in the step
    refused: str | None = None  # the compiler's message
    flops: float = 0.0
    compiler_flops: float | None = None  # the body of a loop counts once
    bytes_accessed: float = 0.0
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)
    receive_buffer: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # for compute, memory, collectives
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def spare(self) -> int | None:
        """The bytes that are left; negative: the bytes that are missing."""
        return None if self.peak is None else self.capacity - self.peak

    @property
    def fits(self) -> bool:
        """Whether the program compiles and fits into the device's memory."""
        return self.refused is None and self.spare is not None and self.spare >= 0

    def record(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return {**asdict(self), "spare": self.spare, "fits": self.fits}


def measure(
    lowered: Lowered,
    config: Config,
    mesh: jax.sharding.Mesh,
    *,
    kind: str,
    sampling: Sampling,
    keep_hlo: Callable[[str, str], None] | None = None,
) -> Plan:
    """Compile a program, and return its cost; `keep_hlo(name, text)` gets its HLO text."""
    facts = TARGETS[kind]
    plan = Plan(lowered.name, lowered.parts, lowered.gradients, facts.memory)
    plan.trace_seconds, plan.host = lowered.seconds, lowered.host
    plan.receive_buffer = receive_bytes(config, mesh, lowered.name, sampling)
    plan.flops = flops(config, lowered.name, sampling) / mesh.size
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        plan.refused = str(error).strip().splitlines()[0]
        plan.peak = wanted_bytes(plan.refused)
        plan.compile_seconds = time.perf_counter() - start
        return plan
    plan.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    arguments, allocated = memory.argument_size_in_bytes, _allocated(memory, kind)
    plan.arguments, plan.code = arguments, memory.generated_code_size_in_bytes
    plan.host += memory.host_temp_size_in_bytes
    plan.temporaries, plan.peak = allocated - arguments, allocated + plan.code
    plan.compiler_flops = (compiled.cost_analysis() or {}).get("flops")
    text = compiled.as_text()
    if keep_hlo is not None:
        keep_hlo(lowered.name, text)
    reading = hlo.read(text, num_devices=mesh.size)
    plan.unknown_loops = reading.unknown_loops
    plan.bytes_accessed = (
        decode_bytes(config.model, lowered.parts, sampling, mesh)
        if lowered.name == "decode"
        else traffic.accessed_bytes(text)
    )
    gpu = kind in GPUS
    plan.collectives = summarise(reading.collectives, facts, gpu=gpu)
    plan.seconds = {
        "compute": plan.flops / facts.flops,
        "memory": plan.bytes_accessed / facts.bandwidth,
        "collectives": sum(entry["seconds"] for entry in plan.collectives.values()),
    }
    return plan


def _allocated(memory: Any, kind: str) -> int:
    """Return the bytes that a program takes, without its code.

    A TPU's compiler reports this total itself; some buffers in its figure of temporaries also count
    as arguments. For other chips it is the sum of arguments, temporaries, and outputs that do not
    replace an argument.
    """
    whole = getattr(memory, "total_allocation_bytes", 0)
    if whole and kind not in GPUS:
        return whole
    beyond = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + beyond


def summarise(
    collectives: list[hlo.Collective], facts: Target, *, gpu: bool
) -> dict[str, dict[str, float]]:
    """Sum collectives by kind: count in a run of the program, bytes a device, least seconds."""
    found: dict[str, dict[str, float]] = {}
    for one in collectives:
        entry = found.setdefault(
            one.kind, {"count": 0, "operand_bytes": 0.0, "sent_bytes": 0.0, "seconds": 0.0}
        )
        rate = facts.network if gpu and _leaves_host(one) else facts.links
        entry["count"] += one.times
        entry["operand_bytes"] += one.times * one.operand_bytes
        entry["sent_bytes"] += one.times * one.sent_bytes
        entry["seconds"] += one.times * one.sent_bytes / rate
    return found


def _leaves_host(one: hlo.Collective) -> bool:
    host = GPUS_A_HOST
    return any(len({device // host for device in group}) > 1 for group in one.groups)


def wanted_bytes(message: str) -> int | None:
    """Read from a compiler's refusal how many bytes the program needs; None if it does not say."""
    found = re.search(
        r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])", message
    ) or re.search(r"allocat\w* ([\d.]+)\s?([KMGT])i?B", message)
    if found is None:
        return None
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]])


def receive_bytes(config: Config, mesh: jax.sharding.Mesh, name: str, sampling: Sampling) -> int:
    """Return the bytes of a shard's buffer for rows from other shards, for the worst routing.

    The buffer has room for all rows of the `expert` axis, at most `model.expert_chunk` from each
    shard at a time. So any routing fits, even if all rows go to one expert.
    """
    shards, parts = mesh.shape["expert"], 1
    if shards == 1:
        return 0
    for axis in ROWS:
        parts *= mesh.shape[axis]
    if name == "train":
        rows = config.data.batch_size // config.optimizer.accumulate * config.data.sequence_length
        rows = rows // (parts * mesh.shape["context"])
    else:
        rows = -(-sampling.batch // parts) * (_piece(sampling) if name == "prefill" else 1)
    if config.model.expert_chunk:
        rows = min(rows, config.model.expert_chunk)
    width = config.model.d_model * jnp.dtype(config.model.dtype).itemsize
    return receive_rows(rows, shards) * width


def _piece(sampling: Sampling) -> int:
    return min(sampling.prompt, sampling.piece or prefill_piece() or sampling.prompt)


def flops(config: Config, name: str, sampling: Sampling) -> float:
    """Return the FLOPs of one run of the program on all devices together; see `ASSUMPTIONS`."""
    c = config.model
    if name == "train":
        tokens = config.data.batch_size * config.data.sequence_length
        length = config.data.sequence_length
        whole = step_flops(c, tokens=tokens, trained=tokens, sequence_length=length)
        layers = step_flops(c, tokens=tokens, trained=0, sequence_length=length)
        return whole + (layers / 3 if c.remat in ("full", "offload") else 0)
    if name == "prefill":
        tokens = sampling.batch * sampling.prompt
        length = sampling.prompt
        return step_flops(c, tokens=tokens, trained=sampling.batch, sequence_length=length) / 3
    layers, unembedding = matmul_params(c)
    keys = sum(min(window or sampling.context, sampling.context) for window in c.layer_windows)
    return sampling.batch * (2 * (layers + unembedding) + 4 * c.num_heads * c.head_dim * keys)


def decode_bytes(
    config: ModelConfig, parts: dict[str, int], sampling: Sampling, mesh: jax.sharding.Mesh
) -> float:
    """Return the bytes that a device reads to decode one token of each row: cache and weights.

    Only the experts that some row chooses are read; the choices count as even and independent.
    """
    c = config
    unpacked = jnp.dtype(c.param_dtype).itemsize
    per_weight = 17 / 32 if c.experts == "mxfp4" or c.qat else unpacked
    experts = c.num_layers * c.num_experts * 3 * c.d_model * c.d_expert * per_weight / mesh.size
    table = c.vocab_size * c.d_model * unpacked / mesh.size  # the embedding: only rows are read
    chosen = 1 - (1 - c.active_experts / c.num_experts) ** sampling.batch
    return parts["cache"] + parts["parameters"] - experts * (1 - chosen) - table


def lines(plan: Plan) -> list[str]:
    """Return the lines to print for a plan."""
    out = [f"{plan.name}, on each device"]
    out += [_row(name, size) for name, size in plan.parts.items() if size]
    if plan.gradients:
        out.append(_row("gradients", plan.gradients, "part of the temporaries"))
    if plan.temporaries is not None and plan.arguments is not None:
        rest = max(0, plan.temporaries - plan.gradients)
        out.append(_row("activations and other", rest, "temporaries besides gradients"))
        out.append(_row("temporaries", plan.temporaries, "as the compiler plans"))
        out.append(_row("arguments", plan.arguments, "as laid out, with padding"))
    out.append(_fit(plan))
    if plan.host:
        out.append(_row("on the host", plan.host, "pinned memory, beside the peak"))
    if plan.receive_buffer:
        out.append(
            _row("receive buffer", plan.receive_buffer, "of the exchange, for the worst routing")
        )
    out.append(f"  {'FLOPs':<24}{plan.flops:>12.4g}")
    if plan.refused is None:
        out += _work(plan)
    out.append(f"  traced in {plan.trace_seconds:.0f} s, compiled in {plan.compile_seconds:.0f} s")
    return out


def _fit(plan: Plan) -> str:
    capacity = f"of {plan.capacity / GiB:,.2f} GiB"
    if plan.peak is None:
        return f"  the compiler refused it for memory, and did not say by how much: {plan.refused}"
    assert plan.spare is not None
    if plan.spare < 0:
        word = f"it does not fit, {-plan.spare / GiB:,.2f} GiB too much"
    else:
        word = f"it fits, {plan.spare / GiB:,.2f} GiB to spare"
    if plan.refused is not None:
        word = f"{word}: the compiler refused it"
    return _row("peak", plan.peak, f"{capacity}: {word}")


def _work(plan: Plan) -> list[str]:
    out = [f"  {'bytes accessed':<24}{plan.bytes_accessed:>12.4g}"]
    if plan.compiler_flops and plan.compiler_flops > 0:
        out.append(
            f"  {'FLOPs by the compiler':<24}{plan.compiler_flops:>12.4g}  bodies of loops once, "
            "kernels as far as they tell"
        )
    for kind, entry in sorted(plan.collectives.items()):
        out.append(
            f"  {kind:<24}{entry['count']:>12,.0f}  times, {_size(entry['sent_bytes'])} sent"
        )
    if plan.unknown_loops:
        out.append(
            "  loops whose trips only a run can tell, counted once: "
            + ", ".join(plan.unknown_loops)
        )
    times = plan.seconds
    what = {"train": "a step", "prefill": "prefill", "decode": "a token of each row"}[plan.name]
    parts = ", ".join(f"{name} {_time(value)}" for name, value in times.items())
    out.append(
        f"  {what}: at least {_time(max(times.values()))} with all of it at once, "
        f"{_time(sum(times.values()))} one after the other ({parts})"
    )
    return out


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _size(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def _row(name: str, size: float, note: str = "") -> str:
    return f"  {name:<24}{_size(size):>12}  {note}".rstrip()
