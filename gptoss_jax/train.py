"""Train: `python -m gptoss_jax.train --config FILE [--init DIR] [--data.train FILE ...]`.

Started again on the same workdir it goes on where it was, on any mesh and number of hosts. SIGTERM
and ctrl-C save and stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from gptoss_jax import data, loading
from gptoss_jax.config import Config, command_line
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.loading import frozen_base, resume, start_adapters
from gptoss_jax.objectives import check_start, open_batches
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import sharding
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.parameters import patterns
from gptoss_jax.planning import dry_run
from gptoss_jax.runs import checkpoints, metrics, records
from gptoss_jax.runs.same_config import adapter_changes, architecture_changes, check_same_run
from gptoss_jax.runs.workdir import Hold, log_event, write_text
from gptoss_jax.training import held_out, profiling
from gptoss_jax.training.program import check_patterns, expert_load, keep_load, make_program
from gptoss_jax.training.record import StepRecorder
from gptoss_jax.training.spikes import SpikeGuard
from gptoss_jax.training.step import StepMetrics, averaged_params
from gptoss_jax.training.terminal import RunProgress, fail, give_up, print_summary
from gptoss_jax.types import Params


def main(argv: list[str]) -> None:
    """Run training from the command line's arguments to the summary.

    Raises:
        UserError: for whatever is wrong with what was given, before anything is written.
            And for a disk that gets full: what is saved by then is whole.
        SystemExit: with 1 when a loss or gradient is not finite and `train.on_nan` is "stop", or at
            a spike after `train.max_rewinds` others.
    """
    config = command_line.load(argv)
    with processes.start(config.distributed):
        console = Console(highlight=False, quiet=not processes.is_first())
        command_line.print_config(config, console)
        if config.dry_run:
            dry_run.show(config, console)
            return
        processes.same(command_line.flat(config), "the config")
        mesh = meshes.make(config.mesh)
        _check_mesh(mesh, config)
        with Hold(config.run_folder) as hold, jax.set_mesh(mesh):
            run(config, mesh, hold, console=console)


def run(config: Config, mesh: jax.sharding.Mesh, hold: Hold, *, console: Console) -> None:
    """Train, from the data to the summary: see `main`.

    Of several processes each runs this, with the same control flow: what decides it is the same on
    all. The first one alone says and writes what is no array.
    """
    workdir = Path(config.run_folder)
    steps, every = config.train.steps, config.train
    alone = processes.count() == 1

    # --- Data -------------------------------------------------------------------------------
    if not config.data.train:
        raise UserError(
            "there is no training data: give --data.train FILE (.jsonl, .parquet, .txt) or hf:NAME"
        )
    size = config.data.batch_size
    rows = data.rows_here(mesh, size)  # of a batch, what this host's devices need
    spread = partial(data.spread, mesh=mesh, rows=rows, size=size)
    batches = open_batches(config, rows=rows)
    console.print(f"\n{data.describe(config)}", soft_wrap=True)
    eval_batches = data.eval_batches(config, rows=rows)
    questions = data.eval_questions(config, config.train.eval_questions)
    if eval_batches:
        console.print(data.describe(config, held_out=True), soft_wrap=True)
    else:
        console.print("data.held_out: none, so neither held-out loss nor exact match")
    fingerprint = data.fingerprint(config)
    _check_same_data(fingerprint)
    check_patterns(config)

    # --- Model and parameters ---------------------------------------------------------------
    # They come from the first of these that there is:
    #   1. the newest checkpoint of the workdir, with optimizer, data position and random state;
    #   2. the folder of --init: parameters alone;
    #   3. the seed.
    # What a run with adapters leaves as it is, its base, comes from 2 or 3 when it goes on, too.
    record = records.newest_record(workdir)
    if record is not None:
        changes = data.differences(record.fingerprint, fingerprint)
        check_same_run(record, config, data_changes=changes, workdir=workdir)
        if record.step >= steps:
            console.print(f"\n{workdir} is complete: step {record.step} of {steps}")
            if processes.is_first():
                print_summary(console, workdir, seconds=None)
            return
    params = None
    if record is None and config.init is None:
        raise UserError(
            "no weights to start from: give --init DIR (a checkpoint), or --init random"
        )
    begun = start_adapters.read(config) if record is None else None
    base = frozen_base.begin(config) if record is None else None
    if record is None and config.init != "random":
        params = _load_init(config, mesh, step=base.step if base else None)

    # --- Optimizer and step -----------------------------------------------------------------
    load = expert_load(config, params, workdir, resuming=record is not None)
    program = make_program(config, load=load, num_sources=len(batches.source_names))
    padding = program.model.config.expert_padding
    restore = partial(resume.restore_newest, workdir, expert_padding=padding)
    if record is not None:
        restored = restore(program.abstract_state(), place=config.init)
        state, record, base = restored.state, restored.record, restored.record.base
        _tell_damaged(restored, workdir, console)
        batches.set_state(record.data_state)
        source = f"step {record.step} of {workdir}"
    else:
        # Placed as restored arrays are, so that a run and its continuation are one program.
        shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state())
        if begun is not None:
            on_mesh = dataclasses.replace(config, model=program.model.config)
            params = start_adapters.put(on_mesh, params, begun[1])
        state = jax.device_put(program.begin(params), shardings)
        source = f"random, seed {config.train.seed}" if config.init == "random" else config.init
        if base is not None:
            frozen = patterns.frozen_paths(program.factors)
            base = frozen_base.measure(
                base, state.params, frozen_paths=frozen, expert_padding=padding
            )
    del params  # the state's, and given up to the first step
    total, active = program.model.num_parameters()
    console.print(
        f"model     {total / 1e6:,.2f}M parameters, {active / 1e6:,.2f}M active; {source}"
    )
    for line in program.describe_trained():
        console.print(line, soft_wrap=True)
    if begun is not None:
        said = start_adapters.describe(begun[0])
        console.print(f"begins    as {config.init_adapters}: {said}", soft_wrap=True)
    if base is not None:
        console.print(f"base      {base.describe()}; not in the checkpoints", soft_wrap=True)
    console.print(f"mesh      {meshes.describe(mesh)}, {jax.devices()[0].device_kind}")
    console.print(f"workdir   {workdir}\n")

    # --- From here on things are written ----------------------------------------------------
    hold.take()
    write_text(workdir / "config.json", command_line.to_json(config))
    keep_load(load, workdir)
    start, fresh = int(state.step), record is None
    spikes = SpikeGuard(config.train, record.spikes if record else {}, step=start)
    open_log = partial(metrics.MetricsLog, workdir) if processes.is_first() else metrics.NoLog
    log = open_log(step=None if fresh else start)
    manager = checkpoints.open_manager(workdir, keep=config.train.keep)
    make_recorder = partial(StepRecorder, config, batches.source_names, devices=mesh.size)
    recorder = make_recorder(log=metrics.read(workdir))
    progress = RunProgress(console, start=start, steps=steps)
    to_profile = every if processes.is_first() else dataclasses.replace(every, profile_start=0)
    profile = profiling.Window(to_profile, workdir, console)

    def evaluate(step: int) -> float | None:
        if not eval_batches:
            return None
        scores, samples = held_out.evaluate(
            program.model.dropless(),
            averaged_params(state),
            [spread(batch) for batch in eval_batches],
            questions=questions,
            config=config,
        )
        log.write(step, scores)
        log.write_samples(step, samples)
        progress.say(step, scores)
        return scores["held_out_loss"]

    def save(held_out_loss: float | None) -> None:
        checkpoints.save(
            manager,
            state,
            config=config,
            data_state=batches.get_state(),
            fingerprint=fingerprint,
            spikes=spikes.state(),
            held_out_loss=held_out_loss,
            expert_padding=padding,
            base=base,
        )

    # --- Loop -------------------------------------------------------------------------------
    stopped: list[int] = []
    began = clock = time.perf_counter()
    waiting: list[StepMetrics] = []  # measured, not read yet: reading waits for the device
    told: list[dict[str, float]] = []  # by what the objective made of the batches
    with contextlib.ExitStack() as at_end:  # from the last to the first, whatever fails
        handler = _once(stopped, alone=alone)
        # Of several processes JAX takes SIGTERM, see `distributed.stop_now`.
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            at_end.callback(signal.signal, number, signal.signal(number, handler))
        at_end.callback(lambda: log.close())
        at_end.callback(lambda: manager.close())  # waits for what is being written
        at_end.callback(batches.close)
        at_end.callback(profile.close)
        at_end.callback(progress.stop)
        at_end.push(processes.unwinding)
        if fresh:
            loss = evaluate(0)
            if spikes.is_on:
                save(loss)
            clock = time.perf_counter()
        step, last, iteration = start, False, 0
        while not last:
            step, iteration = step + 1, iteration + 1
            profile.begin(step, state)
            batch, more = program.objective.prepare(state, spikes.next_batch(batches), spread)
            state, measured = program.step(state, batch)
            clock += profile.end(step, state)
            waiting.append(measured)
            told.append(more)
            if not alone and processes.stop_now(iteration):
                stopped.append(signal.SIGTERM)
            last = step == steps or bool(stopped)
            evaluating = last or step % every.eval_every == 0
            saving = last or step % every.checkpoint_every == 0
            if not (evaluating or saving or step % every.log_every == 0):
                continue

            done, said = jax.device_get(waiting), told
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            waiting, told = [], []
            spike = spikes.find(done, step=step)
            if spike:
                manager.close()
                if not spikes.may_rewind:
                    progress.stop()
                    give_up(spike, workdir, max_rewinds=every.max_rewinds)
                frozen = checkpoints.split_held(state.params, base)[1]  # the same at every step
                del state  # there is room for one
                restored = restore(program.abstract_state(), frozen=frozen)
                _tell_damaged(restored, workdir, console)
                state, start, last = restored.state, restored.record.step, False
                step = start
                batches.set_state(restored.record.data_state)
                spikes.rewind(spike, restored.record.spikes, step=step)
                log.close()
                log = open_log(step=step)
                manager = checkpoints.open_manager(workdir, keep=config.train.keep)
                recorder = make_recorder(log=metrics.read(workdir))
                text = f"step {spike.step}: {spike.why}; back to step {step}, without "
                text += f"batch {spike.batch}, rewind {spikes.rewinds} of {every.max_rewinds}"
                progress.go_back(step, text)
                log_event(workdir, "rewind", step=step, spike=dataclasses.asdict(spike))
                clock = time.perf_counter()
                continue
            bad = [step - len(done) + 1 + i for i, m in enumerate(done) if not m.finite]
            if bad and config.train.on_nan == "stop":
                progress.stop()
                manager.wait_until_finished()
                fail(bad[0], done[bad[0] - step - 1], workdir)
            compiled = step - len(done) == start  # its time says nothing about the rest
            values = recorder.record(done, said, seconds=None if compiled else seconds)
            log.write(step, values)
            progress.step(step, values)

            loss = evaluate(step) if evaluating and not stopped else None
            if saving:
                save(loss)
            clock = time.perf_counter()

    # --- Summary ----------------------------------------------------------------------------
    if not processes.is_first():
        return
    if stopped and int(state.step) < steps:
        name = signal.Signals(stopped[0]).name
        console.print(f"\nstopped by {name}: saved at step {int(state.step)} of {steps}")
        console.print("the same command goes on from there")
    print_summary(console, workdir, seconds=time.perf_counter() - began)


def _tell_damaged(restored: resume.Restored, workdir: Path, console: Console) -> None:
    step = restored.record.step
    for why in restored.damaged:
        console.print(f"{why}; set aside as .damaged, going on from step {step}", soft_wrap=True)
        log_event(workdir, "damaged", step=step, why=why)


def _check_mesh(mesh: jax.sharding.Mesh, config: Config) -> None:
    """Refuse a mesh that leaves a process out, or that the batch does not divide over."""
    there = {device.process_index for device in mesh.devices.flat}
    if len(there) < processes.count():
        raise UserError(
            f"{processes.count()} processes have {jax.device_count()} devices, the mesh is of "
            f"{mesh.size}: --mesh.fsdp -1 uses all"
        )
    rows = config.data.batch_size // config.optimizer.accumulate
    sharding.check_batch(rows, config.data.sequence_length, mesh)


def _check_same_data(fingerprint: dict[str, Any]) -> None:
    """Refuse data that differ between the hosts."""
    first = processes.from_first(lambda: fingerprint)
    differences = data.differences(first, fingerprint)

    def check() -> None:
        if differences:
            raise UserError(
                f"process {processes.index()} has other data than process 0: "
                f"{', '.join(differences[:3])}"
            )

    processes.together(check)


def _load_init(config: Config, mesh: jax.sharding.Mesh, *, step: int | None) -> Params:
    """Read the parameters of --init (a workdir's of `step`) in the form that the config asks for.

    Adapters that are there come with them.
    """
    c = config.model
    assert config.init is not None
    stored = loading.read_config(config.init)
    changes = architecture_changes(stored, c)
    if stored.lora.targets:  # adapters to go on with
        changes += adapter_changes(stored, c)
    if changes:
        raise UserError(
            f"--init {config.init} is another model than the config's: {', '.join(changes)}"
        )
    check_start(config, stored)
    dtype = jnp.dtype(c.param_dtype)
    return loading.load(config.init, dtype=dtype, experts=c.experts, mesh=mesh, step=step)[1]


def _once(stopped: list[int], *, alone: bool) -> Any:
    """Return a signal handler that asks the loop to stop; a second ctrl-C interrupts at once."""

    def handler(number: int, _: Any) -> None:
        if alone:
            stopped.append(number)
        else:
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return handler


if __name__ == "__main__":
    run_entry(main)
