"""Show the parameters, memory and arithmetic of a run without allocating anything."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.console import Console

from gptoss_jax import chips, data
from gptoss_jax.config import Config, LoRAConfig, command_line
from gptoss_jax.loading import start_adapters
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.model.flops import step_flops
from gptoss_jax.objectives import make_objective
from gptoss_jax.parameters import patterns
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.planning.shapes import (
    Shapes,
    checkpoint_bytes,
    gradient_bytes,
    shapes,
    tree_bytes,
)
from gptoss_jax.runs import records
from gptoss_jax.runs.records import Record
from gptoss_jax.runs.workdir import Hold
from gptoss_jax.training import checks, setup
from gptoss_jax.types import MXFP4, Params, Relaid


def show(
    config: Config,
    console: Console,
    *,
    mesh: jax.sharding.Mesh | None = None,
    make_model: MakeModel = Transformer,
) -> None:
    """Print parameters, FLOPs, checkpoint size and memory of a step; write and allocate nothing.

    It makes the checks that `train` makes before it prints anything. Neither data nor weights need
    be given: what training would miss, and what was not checked, is said at the end. The step is
    compiled for this device, as training does, which may take a minute.

    Args:
        config: The config of the run.
        console: Where to print.
        mesh: The mesh of the run; None: one device.
        make_model: Builds the run's model.

    Raises:
        UserError: as `train.main`: bad data, another run in the workdir, a workdir that can't be
            written or is in use, no folder or another model in --init, a base that is gone, a mesh
            that does not divide the model, patterns that match nothing, dense experts in --init
            that can't be packed (`checkpoint.check_packs`).
    """

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    Hold(config.run_folder).check()
    record = records.newest_record(config.run_folder)
    config = setup.with_steps(config, record) if config.data.train else config
    run = shapes(config, make_model)
    missing, given = _check(config, record, mesh, make_model)
    command_line.print_config(config, console)
    say("\nparameters")
    for line in parameter_table(run):
        say(line)
    total, active = run.model.num_parameters()
    say(f"model     {total / 1e6:,.2f}M parameters, {active / 1e6:,.2f}M active")
    for line in setup.describe_muon(config, run.model, run.factors):
        say(line)
    if given is not None:
        say(f"adapters  begin as {config.init_adapters}: {start_adapters.describe(given[0])}")

    if config.data.train:
        say("\n".join(["", data.describe(config), *data.describe_length(config)]))
    for line in step_lines(config):
        say(line)
    left_out = patterns.frozen_paths(run.factors) if config.model.lora.targets else ()
    each = checkpoint_bytes(run.state, left_out=left_out)
    say(f"checkpoint  {_size(each)} each, {config.train.keep} kept")

    kind = jax.devices()[0].device_kind
    say(f"\nmemory of a step, compiled for one device ({kind}) ...")
    for line in memory_table(config, run):
        say(line)
    for text in [*missing, *checks.describe_jump(config, record)]:
        say(f"\n{text}")
    say("\ndry run: nothing was written")


def _check(
    config: Config, record: Record | None, mesh: jax.sharding.Mesh | None, make_model: MakeModel
) -> tuple[list[str], tuple[LoRAConfig, Params] | None]:
    """Make the checks of a run that need no weights.

    Returns:
        What training would miss and what was not checked, and the adapters of `checks.check_new`.

    Raises:
        UserError: training would refuse what is there.
    """
    missing = []
    if mesh is not None and mesh.size > 1:
        with jax.set_mesh(mesh):
            shapes(config, make_model)
    if config.data.train:
        make_objective(config).open_batches().close()
        data.eval_batches(config)
        data.eval_questions(config, config.train.eval_questions)
    else:
        missing.append("train needs --data.train FILE")
    how: dict[str, Any] = {"make_model": make_model, "fetch": False}
    if record is not None:
        # Without data of its own, what is compared is the rest.
        same = data.fingerprint(config) if config.data.train else record.fingerprint
        return missing + checks.check_resumed(config, record, fingerprint=same, **how), None
    given = checks.check_new(config)
    if config.init is None:
        missing.append("train needs weights to start from: --init DIR, or --init random")
    return missing + checks.check_init(config, **how), given


def step_lines(config: Config) -> list[str]:
    """Return lines about the tokens and the arithmetic of a step; the first batch is read."""
    rows, length = config.data.batch_size, config.data.sequence_length
    tokens = trained = float(rows * length)
    # Questions have no answers yet, so the tokens of a batch are unknown.
    known = config.data.train and config.objective.kind.records != "questions"
    if known:
        tokens, trained = _first_batch(config)
    what = "first batch" if known else "full rows, every token trained"
    steps = config.train.steps
    whole = f"{tokens * steps:,.0f} tokens in {steps:,} steps"
    if config.train.epochs and not config.data.train:
        whole = "the steps of train.epochs are unknown without data.train"
    flops = step_flops(config.model, tokens=tokens, trained=trained, sequence_length=length)
    lines = [
        f"\na step    {rows:,} rows of {length:,}: {tokens:,.0f} tokens, {trained:,.0f} trained "
        f"({what}); {whole}",
        f"FLOPs     {flops:.4g} a step, {flops / tokens:.4g} a token: matmuls with active "
        "parameters and attention, forward and backward",
    ]
    peak = chips.peak_flops(config.train.peak_tflops)
    if peak:
        lines.append(
            f"          {flops / peak:.3g} s a step at the device's peak, if one held it all"
        )
    return lines


def parameter_table(run: Shapes) -> list[str]:
    """Return a line for each parameter: path, shape, dtype, size, trained elements, megabytes."""
    factors = flatten(run.factors)
    rows = [("path", "shape", "dtype", "parameters", "trained", "MB")]
    count = trained = 0
    for path, leaf in sorted(flatten(run.state.params).items()):
        factor: Float[Array, "..."] | Float[np.ndarray, "..."] = np.asarray(factors[path])
        size = math.prod(leaf.shape)
        moving = np.count_nonzero(factor) * (size // factor.size)
        packed = isinstance(leaf, MXFP4 | Relaid)
        how = "packed" if packed else "frozen" if not moving else f"{moving:,}"
        how = "all" if moving == size else how
        shape = " x ".join(map(str, leaf.shape))
        dtype = "mxfp4" if packed else str(leaf.dtype)
        rows.append((path, shape, dtype, f"{size:,}", how, f"{tree_bytes(leaf) / 1e6:,.1f}"))
        count, trained = count + size, trained + moving
    megabytes = f"{tree_bytes(run.state.params) / 1e6:,.1f}"
    rows.append(("all", "", "", f"{count:,}", f"{trained:,}", megabytes))
    wide = [max(len(row[i]) for row in rows) for i in range(6)]
    return [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in rows
    ]


def memory_table(config: Config, run: Shapes) -> list[str]:
    """Compile the step, and return lines about its memory, part by part, and its arithmetic."""
    state = run.state
    factors = flatten(run.factors)
    exact = config.optimizer.accumulate > 1  # accumulated gradients are float32
    each = {
        path: math.prod(leaf.shape) * 4 if exact else tree_bytes(leaf)
        for path, leaf in flatten(state.params).items()
        if np.any(factors[path])
    }
    gradients = gradient_bytes(config, each)
    parts = {
        "parameters": tree_bytes(state.params),
        "optimizer state": tree_bytes(state.opt_state),
        "averaged parameters": tree_bytes(state.ema),
        "batch": tree_bytes(run.batch),
    }
    lines = [_row(name, size) for name, size in parts.items() if size]
    step: Any = run.step
    try:
        compiled = step.lower(state, run.batch).compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip().splitlines()[0][:200]
        known = sum(parts.values()) + gradients
        lines.append(_row("gradients", gradients))
        lines.append(_row("together", known, "and activations, of which the compiler says nothing"))
        return [*lines, f"the step can't be compiled for this device: {message}"]
    memory = compiled.memory_analysis()
    peak = 0
    if memory is None:
        lines.append(_row("gradients", gradients))
        lines.append("of activations this device's compiler says nothing")
    else:
        note = f"gradients ({_size(gradients)}), activations and the like, as the compiler plans"
        lines.append(_row("temporaries", memory.temp_size_in_bytes, note))
        # The new state takes the place of the old one.
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if peak:
        there = device_bytes()
        fits = "it fits" if there and peak <= there else "it does not fit"
        note = f"of {_size(there)} that this device has: {fits}" if there else ""
        lines.append(_row("peak", peak, note))
    counted = (compiled.cost_analysis() or {}).get("flops")
    if counted:
        lines.append(
            f"\nThe compiler counts {counted:.4g} FLOPs in the program. Not to be compared with "
            "the above as it is: the body\nof a loop counts once, however often it runs (layers, "
            "expert tiles, microbatches, chunks of the loss), and what\nremat computes again counts"
            " too."
        )
    return lines


def device_bytes() -> int | None:
    """Return the bytes of the first device's memory (a CPU: the machine's); None if unknown."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    return (device.memory_stats() or {}).get("bytes_limit")


def _first_batch(config: Config) -> tuple[float, float]:
    """Return the number of tokens in the first batch, and the sum of their weights in the loss."""
    batches = data.train_batches(config)
    try:
        batch = next(batches)
    finally:
        batches.close()
    return float(np.sum(batch.segment_ids != 0)), float(np.sum(batch.weights))


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e3:,.2f} kB"


def _row(name: str, size: float, note: str = "") -> str:
    return f"  {name:<20}{_size(size):>12}  {note}".rstrip()
