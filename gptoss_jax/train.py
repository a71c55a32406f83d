"""Train: `python -m gptoss_jax.train --config FILE [--init DIR] [--data.train FILE ...]`.

Started again on the same workdir it goes on where it was. SIGTERM and ctrl-C save and stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from gptoss_jax import checkpoint, config_cli, data, dry_run, held_out, metrics, profiling, weights
from gptoss_jax.config import Config
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.program import check_patterns, expert_load, keep_load, make_program
from gptoss_jax.progress import RunProgress, fail, give_up, print_summary
from gptoss_jax.same_run import architecture_changes, check_same_run
from gptoss_jax.spikes import SpikeGuard
from gptoss_jax.step_record import StepRecorder
from gptoss_jax.train_step import StepMetrics, averaged_params
from gptoss_jax.types import Params
from gptoss_jax.workdir import Hold, log_event, write_text


def main(argv: list[str]) -> None:
    """Run training from the command line's arguments to the summary.

    Raises:
        UserError: for whatever is wrong with what was given, before anything is written.
            And for a disk that gets full: what is saved by then is whole.
        SystemExit: with 1 when a loss or gradient is not finite and `train.on_nan` is "stop", or at
            a spike after `train.max_rewinds` others.
    """
    console = Console(highlight=False)
    config = config_cli.load(argv)
    config_cli.print_config(config, console)
    if config.dry_run:
        dry_run.show(config, console)
        return
    with Hold(config.run_folder) as hold:
        run(config, hold, console)


def run(config: Config, hold: Hold, console: Console) -> None:
    """Train, from the data to the summary: see `main`."""
    workdir = Path(config.run_folder)
    steps, every = config.train.steps, config.train

    # --- Data -------------------------------------------------------------------------------
    if not config.data.train:
        raise UserError(
            "there is no training data: give --data.train FILE (.jsonl, .parquet, .txt) or hf:NAME"
        )
    batches = data.train_batches(config)
    console.print(f"\n{data.describe(config)}", soft_wrap=True)
    eval_batches = data.eval_batches(config)
    questions = data.eval_questions(config, config.train.eval_questions)
    if eval_batches:
        console.print(data.describe(config, held_out=True), soft_wrap=True)
    else:
        console.print("data.held_out: none, so neither held-out loss nor exact match")
    fingerprint = data.fingerprint(config)
    check_patterns(config)

    # --- Model and parameters ---------------------------------------------------------------
    # They come from the first of these that there is:
    #   1. the newest checkpoint of the workdir, with optimizer, data position and random state;
    #   2. the folder of --init: parameters alone;
    #   3. the seed.
    record = checkpoint.newest_record(workdir)
    if record is not None:
        changes = data.differences(record.fingerprint, fingerprint)
        check_same_run(record, config, data_changes=changes, workdir=workdir)
        if record.step >= steps:
            console.print(f"\n{workdir} is complete: step {record.step} of {steps}")
            print_summary(console, workdir, seconds=None)
            return
    params = None
    if record is None and config.init is None:
        raise UserError(
            "no weights to start from: give --init DIR (a checkpoint), or --init random"
        )
    if record is None and config.init != "random":
        params = _load_init(config)

    # --- Optimizer and step -----------------------------------------------------------------
    load = expert_load(config, params, workdir, resuming=record is not None)
    program = make_program(config, load=load, num_sources=len(batches.source_names))
    if record is not None:
        restored = checkpoint.restore_newest(workdir, jax.eval_shape(program.begin, None))
        state, record = restored.state, restored.record
        _tell_damaged(restored, workdir, console)
        batches.set_state(record.data_state)
        source = f"step {record.step} of {workdir}"
    else:
        # Placed as restored arrays are, so that a run and its continuation are one program.
        state = jax.device_put(program.begin(params), jax.devices()[0])
        source = f"random, seed {config.train.seed}" if config.init == "random" else config.init
    del params  # the state's, and given up to the first step
    total, active = program.model.num_parameters()
    kind = jax.devices()[0].device_kind
    console.print(
        f"model     {total / 1e6:,.2f}M parameters, {active / 1e6:,.2f}M active; {source}"
    )
    for line in program.describe_trained():
        console.print(line, soft_wrap=True)
    console.print(f"device    {kind}\nworkdir   {workdir}\n")

    # --- From here on things are written ----------------------------------------------------
    hold.take()
    write_text(workdir / "config.json", config_cli.to_json(config))
    keep_load(load, workdir)
    start, fresh = int(state.step), record is None
    spikes = SpikeGuard(config.train, record.spikes if record else {}, step=start)
    log = metrics.MetricsLog(workdir, step=None if fresh else start)
    manager = checkpoint.open_manager(workdir, keep=config.train.keep)
    recorder = StepRecorder(config, batches.source_names, log=metrics.read(workdir))
    progress = RunProgress(console, start=start, steps=steps)
    profile = profiling.Window(config.train, workdir, console)

    def evaluate(step: int) -> float | None:
        if not eval_batches:
            return None
        scores, samples = held_out.evaluate(
            program.model.dropless(),
            averaged_params(state),
            eval_batches,
            questions=questions,
            config=config,
        )
        log.write(step, scores)
        log.write_samples(step, samples)
        progress.say(step, scores)
        return scores["held_out_loss"]

    def save(held_out_loss: float | None) -> None:
        checkpoint.save(
            manager,
            state,
            config=config,
            data_state=batches.get_state(),
            fingerprint=fingerprint,
            spikes=spikes.state(),
            held_out_loss=held_out_loss,
        )

    # --- Loop -------------------------------------------------------------------------------
    stopped: list[int] = []
    began = clock = time.perf_counter()
    waiting: list[StepMetrics] = []  # measured, not read yet: reading waits for the device
    with contextlib.ExitStack() as at_end:  # from the last to the first, whatever fails
        for number in (signal.SIGTERM, signal.SIGINT):
            at_end.callback(signal.signal, number, signal.signal(number, _once(stopped)))
        at_end.callback(lambda: log.close())
        at_end.callback(lambda: manager.close())  # waits for what is being written
        at_end.callback(batches.close)
        at_end.callback(profile.close)
        at_end.callback(progress.stop)
        if fresh:
            loss = evaluate(0)
            if spikes.is_on:
                save(loss)
            clock = time.perf_counter()
        step, last = start, False
        while not last:
            step += 1
            profile.begin(step, state)
            state, measured = program.step(state, spikes.next_batch(batches))
            clock += profile.end(step, state)
            waiting.append(measured)
            last = step == steps or bool(stopped)
            evaluating = last or step % every.eval_every == 0
            saving = last or step % every.checkpoint_every == 0
            if not (evaluating or saving or step % every.log_every == 0):
                continue

            done = jax.device_get(waiting)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            waiting = []
            spike = spikes.find(done, step=step)
            if spike:
                manager.close()
                if not spikes.may_rewind:
                    progress.stop()
                    give_up(spike, workdir, max_rewinds=every.max_rewinds)
                del state  # there is room for one
                restored = checkpoint.restore_newest(workdir, jax.eval_shape(program.begin, None))
                _tell_damaged(restored, workdir, console)
                state, start, last = restored.state, restored.record.step, False
                step = start
                batches.set_state(restored.record.data_state)
                spikes.rewind(spike, restored.record.spikes, step=step)
                log.close()
                log = metrics.MetricsLog(workdir, step=step)
                manager = checkpoint.open_manager(workdir, keep=config.train.keep)
                recorder = StepRecorder(config, batches.source_names, log=metrics.read(workdir))
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
            values = recorder.record(done, seconds=None if compiled else seconds)
            log.write(step, values)
            progress.step(step, values)

            loss = evaluate(step) if evaluating and not stopped else None
            if saving:
                save(loss)
            clock = time.perf_counter()

    # --- Summary ----------------------------------------------------------------------------
    if stopped and int(state.step) < steps:
        name = signal.Signals(stopped[0]).name
        console.print(f"\nstopped by {name}: saved at step {int(state.step)} of {steps}")
        console.print("the same command goes on from there")
    print_summary(console, workdir, seconds=time.perf_counter() - began)


def _tell_damaged(restored: checkpoint.Restored, workdir: Path, console: Console) -> None:
    step = restored.record.step
    for why in restored.damaged:
        console.print(f"{why}; set aside as .damaged, going on from step {step}", soft_wrap=True)
        log_event(workdir, "damaged", step=step, why=why)


def _load_init(config: Config) -> Params:
    """Read the parameters of --init in the form that the config asks for."""
    c = config.model
    assert config.init is not None
    changes = architecture_changes(weights.read_config(config.init), c)
    if changes:
        raise UserError(
            f"--init {config.init} is another model than the config's: {', '.join(changes)}"
        )
    return weights.load(config.init, dtype=jnp.dtype(c.param_dtype), experts=c.experts)[1]


def _once(stopped: list[int]) -> Any:
    """Return a signal handler that asks the loop to stop; a second ctrl-C interrupts at once."""

    def handler(number: int, _: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return handler


if __name__ == "__main__":
    run_entry(main)
