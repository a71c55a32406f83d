"""Train: `python -m gptoss_jax.train --config FILE [--init DIR] [--data.train FILE ...]`.

The same command on the same workdir resumes the run from its newest checkpoint, on any mesh and
number of hosts. SIGTERM and ctrl-C save a checkpoint and stop the run.
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
from gptoss_jax.errors import run_entry
from gptoss_jax.loading import frozen_base, resume, start_adapters
from gptoss_jax.loading.checkpoint import model_of
from gptoss_jax.lora import select
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.objectives import make_objective
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import sharding
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.parameters import patterns
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.planning import dry_run
from gptoss_jax.runs import checkpoints, metrics, model_source, records, tracking
from gptoss_jax.runs.workdir import Hold, log_event, write_text
from gptoss_jax.training import checks, held_out, profiling, setup
from gptoss_jax.training.record import StepRecorder
from gptoss_jax.training.spikes import SpikeGuard
from gptoss_jax.training.step import StepMetrics, averaged_params
from gptoss_jax.training.terminal import RunProgress, fail, give_up, print_summary
from gptoss_jax.types import Params


def main(argv: list[str]) -> None:
    """Run training: from the command line's arguments to the summary.

    Raises:
        UserError: an option or input is wrong; nothing is written then. Also if the disk gets full;
            what was saved before is complete.
        SystemExit: with 1 when a loss or gradient is not finite and `train.on_nan` is "stop", or at
            a spike after `train.max_rewinds` rewinds.
    """
    config = command_line.load(argv)
    make_model: MakeModel = command_line.load_make_model(argv) or Transformer
    with processes.start(config.distributed), loading.ignoring(config.ignore_config):
        console = Console(highlight=False, quiet=not processes.is_first())
        processes.same(command_line.flat(config), "the config")
        processes.from_first(partial(tracking.check, config.train.wandb))  # it alone logs
        mesh = meshes.make(config.mesh)
        setup.check_mesh(config, mesh)
        config = setup.with_day(config)
        if config.dry_run:
            dry_run.show(config, console, mesh=mesh, make_model=make_model)
            return
        with Hold(config.run_folder) as hold, jax.set_mesh(mesh):
            run(config, mesh, hold, console=console, make_model=make_model)


def run(
    config: Config,
    mesh: jax.sharding.Mesh,
    hold: Hold,
    *,
    console: Console,
    make_model: MakeModel = Transformer,
) -> None:
    """Train, from the data to the summary: see `main`.

    Every process of a run calls this, with the same control flow: the values that decide it are the
    same on all processes. Only the first process prints, and writes files other than arrays.
    """
    workdir = Path(config.run_folder)
    alone = processes.count() == 1

    # --- Data -------------------------------------------------------------------------------
    checks.check_data_given(config)
    objective = make_objective(config)  # says what data.train holds, and what the loss is
    size = config.data.batch_size
    rows = data.rows_here(mesh, size)  # the rows of a batch that this host's devices need
    spread = partial(data.spread, mesh=mesh, rows=rows, size=size)
    batches = objective.open_batches(rows=rows)
    record = records.newest_record(workdir)
    config = setup.with_steps(config, record)
    steps, settings = config.train.steps, config.train
    eval_batches = data.eval_batches(config, rows=rows)
    questions = data.eval_questions(config, settings.eval_questions)
    described = ["", data.describe(config), *data.describe_length(config)]
    described.append(data.describe(config, held_out=True))
    fingerprint = data.fingerprint(config)
    setup.check_same_data(fingerprint)

    # --- Model and parameters ---------------------------------------------------------------
    # Parameters come from the first of these that exists:
    #   1. the newest checkpoint of the workdir, with optimizer, data position and random state;
    #   2. the folder of --init: parameters only;
    #   3. the seed.
    # A run with adapters takes its base, the frozen parameters, from 2 or 3 even when it resumes.
    source = model_source.source_of(make_model, config.model)  # None: the package's own model
    model = make_model(sharding.padded(config.model))
    setup.check_patterns(config, model)
    params = given_adapters = base = None
    if record is not None:
        checks.check_resumed(config, record, fingerprint=fingerprint, make_model=make_model)
    else:
        checks.check_init_given(config)
        given_adapters = checks.check_new(config)
        base = frozen_base.begin(config)
        checks.check_init(config, make_model=make_model)
    # Nothing is printed before the checks, so that an error stands alone.
    command_line.print_config(config, console)
    for line in described:
        console.print(line, soft_wrap=True)
    if record is not None and record.step >= steps:
        console.print(f"\n{workdir} is complete: step {record.step} of {steps}")
        if processes.is_first():
            print_summary(console, workdir, seconds=None)
        return
    if record is None and config.init != "random":
        params = _load_init(config, mesh, make_model, step=base.step if base else None)

    # --- Optimizer and step -----------------------------------------------------------------
    load = setup.load_for_patterns(
        config, model, objective, params, workdir=workdir, resuming=record is not None
    )
    # The factor on each parameter's learning rate; 0 freezes it.
    factors = select.masks(model.abstract_params(), model.config, config.optimizer, load=load)
    optimizer = setup.optimizer_of(config, factors)
    train_step = setup.make_step(config, model, optimizer, objective, factors=factors)
    prepare = objective.make_prepare(model)  # a batch of the data -> the batch of a step

    # --- State ------------------------------------------------------------------------------
    padding = model.config.expert_padding
    abstract = setup.abstract_state(config, model, optimizer, factors=factors)
    restore = partial(resume.restore_newest, workdir, expert_padding=padding, make_model=make_model)
    if record is not None:
        restored = restore(abstract, place=config.init)
        state, record, base = restored.state, restored.record, restored.record.base
        _report_damage(restored, workdir, console)
        setup.continue_data(batches, record, fingerprint)
        came_from = f"step {record.step} of {workdir}"
    else:
        came_from = f"random, seed {settings.seed}" if config.init == "random" else config.init
        from_init = set(flatten(params or {}))
        if given_adapters is not None:
            on_mesh = dataclasses.replace(config, model=model.config)
            params = start_adapters.put(on_mesh, params, given_adapters[1], make_model=make_model)
        state = setup.first_state(config, model, optimizer, params, factors=factors)
        # Place it as restored arrays are, so that new and resumed runs compile the same program.
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))
        if base is not None:
            frozen = patterns.frozen_paths(factors)
            # Checkpoints hold what a user's own model has and --init lacks: it is not in the base.
            frozen = [path for path in frozen if not from_init or path in from_init]
            base = frozen_base.measure(
                base, state.params, frozen_paths=frozen, expert_padding=padding
            )
    del params  # the state holds them, and the first step donates it
    total, active = model.num_parameters()
    console.print(
        f"model     {total / 1e6:,.2f}M parameters, {active / 1e6:,.2f}M active; {came_from}"
    )
    lines = [] if source is None else [f"          built by make_model() of {source.file}"]
    lines += setup.describe_trained(model, factors) + setup.describe_muon(config, model, factors)
    if given_adapters is not None:
        text = start_adapters.describe(given_adapters[0])
        lines.append(f"begins    as {config.init_adapters}: {text}")
    if base is not None:
        lines.append(f"base      {base.describe()}; not in the checkpoints")
    for line in [*lines, *checks.describe_jump(config, record)]:
        console.print(line, soft_wrap=True)
    console.print(f"mesh      {meshes.describe(mesh)}, {jax.devices()[0].device_kind}")
    console.print(f"workdir   {workdir}\n")

    # --- From here on files are written -----------------------------------------------------
    hold.take()
    write_text(workdir / "config.json", command_line.to_json(config))
    if processes.is_first():
        model_source.keep_copy(make_model, config.model, workdir)
    setup.keep(config, load, workdir)
    start, fresh = int(state.step), record is None
    spikes = SpikeGuard(settings, record.spikes if record else {}, step=start)
    open_log = partial(metrics.open_log, workdir, settings.wandb, command_line.flat(config))
    log = open_log(step=None if fresh else start)
    manager = checkpoints.open_manager(workdir, keep=settings.keep)
    make_recorder = partial(StepRecorder, config, batches.source_names, devices=mesh.size)
    recorder = make_recorder(log=metrics.read(workdir))
    progress = RunProgress(console, start=start, steps=steps)
    profiled = settings if processes.is_first() else dataclasses.replace(settings, profile_start=0)
    profile = profiling.Window(profiled, workdir, console)

    def evaluate(step: int) -> float | None:
        if not eval_batches:
            return None
        scores, samples = held_out.evaluate(
            model.dropless(),
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
            model_source=source,
        )

    # --- Loop -------------------------------------------------------------------------------
    signals: list[int] = []  # signals that asked the run to stop
    began = clock = time.perf_counter()
    on_device: list[StepMetrics] = []  # metrics not read yet: reading waits for the device
    batch_stats: list[dict[str, float]] = []  # what the objective reports about each batch
    with contextlib.ExitStack() as at_end:  # runs its callbacks last to first, whatever fails
        handler = _stop_handler(signals, alone=alone)
        # With several processes JAX handles SIGTERM: see `processes.stop_now`.
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            at_end.callback(signal.signal, number, signal.signal(number, handler))
        at_end.callback(lambda: log.close())
        at_end.callback(lambda: manager.close())  # waits for checkpoints being written
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
            batch, stats = prepare(state, spikes.next_batch(batches), spread)
            state, step_metrics = train_step(state, batch)
            clock += profile.end(step, state)
            on_device.append(step_metrics)
            batch_stats.append(stats)
            if not alone and processes.stop_now(iteration):
                signals.append(signal.SIGTERM)
            last = step == steps or bool(signals)
            evaluating = last or step % settings.eval_every == 0
            saving = last or step % settings.checkpoint_every == 0
            if not (evaluating or saving or step % settings.log_every == 0):
                continue

            measured, reported = jax.device_get(on_device), batch_stats  # since the last record
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            on_device, batch_stats = [], []
            spike = spikes.find(measured, step=step)
            if spike:
                manager.close()
                if not spikes.may_rewind:
                    progress.stop()
                    give_up(spike, workdir, max_rewinds=settings.max_rewinds)
                frozen = checkpoints.split_held(state.params, base)[1]  # the same at every step
                del state  # memory has room for only one state
                restored = restore(abstract, frozen=frozen)
                _report_damage(restored, workdir, console)
                state, start, last = restored.state, restored.record.step, False
                step = start
                setup.continue_data(batches, restored.record, fingerprint)
                spikes.rewind(spike, restored.record.spikes, step=step)
                log.close()
                log = open_log(step=step)
                manager = checkpoints.open_manager(workdir, keep=settings.keep)
                recorder = make_recorder(log=metrics.read(workdir))
                text = f"step {spike.step}: {spike.why}; back to step {step}, without "
                text += f"batch {spike.batch}, rewind {spikes.rewinds} of {settings.max_rewinds}"
                progress.go_back(step, text)
                log_event(workdir, "rewind", step=step, spike=dataclasses.asdict(spike))
                clock = time.perf_counter()
                continue
            first = step - len(measured) + 1
            bad = [i for i, m in enumerate(measured) if not m.finite]
            if bad and settings.on_nan == "stop":
                progress.stop()
                manager.wait_until_finished()
                fail(first + bad[0], measured[bad[0]], workdir)
            compiled = first == start + 1  # compilation is in the time of the first step
            values = recorder.record(measured, reported, seconds=None if compiled else seconds)
            log.write(step, values)
            progress.step(step, values)

            loss = evaluate(step) if evaluating and not signals else None
            if saving:
                save(loss)
            clock = time.perf_counter()

    # --- Summary ----------------------------------------------------------------------------
    if not processes.is_first():
        return
    if signals and int(state.step) < steps:
        name = signal.Signals(signals[0]).name
        console.print(f"\nstopped by {name}: saved at step {int(state.step)} of {steps}")
        console.print("the same command goes on from there")
    print_summary(console, workdir, seconds=time.perf_counter() - began)


def _report_damage(restored: resume.Restored, workdir: Path, console: Console) -> None:
    step = restored.record.step
    for why in restored.damaged:
        console.print(f"{why}; set aside as .damaged, going on from step {step}", soft_wrap=True)
        log_event(workdir, "damaged", step=step, why=why)


def _load_init(
    config: Config, mesh: jax.sharding.Mesh, make_model: MakeModel, *, step: int | None
) -> Params:
    """Read the parameters of --init, adapters included, in the form that the config asks for.

    From a workdir, read those of the checkpoint of `step`. `checks.check_init` comes before.
    """
    c = config.model
    assert config.init is not None
    return loading.load(
        config.init,
        dtype=jnp.dtype(c.param_dtype),
        experts=c.experts,
        mesh=mesh,
        step=step,
        requantise=c.requantise,
        make_model=model_of(loading.find_folder(config.init), make_model),
    )[1]


def _stop_handler(signals: list[int], *, alone: bool) -> Any:
    """Return a signal handler that asks the loop to stop; a second ctrl-C interrupts at once.

    It adds the signal to `signals`. In a run of several processes (not `alone`) it raises SIGTERM,
    by which JAX stops all processes at the same step.
    """

    def handler(number: int, _: Any) -> None:
        if alone:
            signals.append(number)
        else:
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return handler


if __name__ == "__main__":
    run_entry(main)
