"""Train: `python -m gptoss_jax.train --config FILE [--init DIR] [--data.train FILE ...]`.

Started again on the same workdir it goes on where it was. SIGTERM and ctrl-C save and stop.
"""

from __future__ import annotations

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
from gptoss_jax.progress import RunProgress, fail, print_summary
from gptoss_jax.step_record import StepRecorder
from gptoss_jax.train_step import StepMetrics, averaged_params
from gptoss_jax.types import Params


def main(argv: list[str]) -> None:
    """Run training from the command line's arguments to the summary.

    Raises:
        UserError: for whatever is wrong with what was given, before anything is written.
        SystemExit: with 1 when a loss or gradient is not finite and `train.on_nan` is "stop".
    """
    console = Console(highlight=False)

    # --- Config -----------------------------------------------------------------------------
    config = config_cli.load(argv)
    workdir = Path(config.run_folder)
    steps, every = config.train.steps, config.train
    config_cli.print_config(config, console)
    if config.dry_run:
        dry_run.show(config, console)
        return

    # --- Data -------------------------------------------------------------------------------
    if not config.data.train:
        raise UserError("there is no training data: give --data.train FILE (.jsonl or .txt)")
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
    record = checkpoint.read_record(workdir) if checkpoint.steps(workdir) else None
    if record is not None:
        changes = data.differences(record.fingerprint, fingerprint)
        checkpoint.check_same_run(record, config, data_changes=changes, workdir=workdir)
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
        state, record = checkpoint.restore(
            workdir, jax.eval_shape(program.begin, None), step=record.step
        )
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
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config_cli.to_json(config))
        keep_load(load, workdir)
    except OSError as error:
        raise UserError(f"the workdir {workdir} can't be written: {error.strerror}") from None
    start = int(state.step)
    log = metrics.MetricsLog(workdir, step=start)
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

    # --- Loop -------------------------------------------------------------------------------
    stopped: list[int] = []
    previous = {s: signal.signal(s, _once(stopped)) for s in (signal.SIGTERM, signal.SIGINT)}
    began = clock = time.perf_counter()
    waiting: list[StepMetrics] = []  # measured, not read yet: reading waits for the device
    try:
        if start == 0:
            evaluate(0)
            clock = time.perf_counter()
        for step in range(start + 1, steps + 1):
            profile.begin(step, state)
            state, measured = program.step(state, next(batches))
            clock += profile.end(step, state)
            waiting.append(measured)
            last = step == steps or bool(stopped)
            evaluating = last or step % every.eval_every == 0
            saving = last or step % every.checkpoint_every == 0
            if not (evaluating or saving or step % every.log_every == 0):
                continue

            done = jax.device_get(waiting)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            bad = [step - len(done) + 1 + i for i, m in enumerate(done) if not m.finite]
            if bad and config.train.on_nan == "stop":
                progress.stop()
                manager.wait_until_finished()
                fail(bad[0], done[bad[0] - step - 1], workdir)
            compiled = step - len(done) == start  # its time says nothing about the rest
            values = recorder.record(done, seconds=None if compiled else seconds)
            log.write(step, values)
            progress.step(step, values)
            waiting = []

            loss = evaluate(step) if evaluating and not stopped else None
            if saving:
                checkpoint.save(
                    manager,
                    state,
                    config=config,
                    data_state=batches.get_state(),
                    fingerprint=fingerprint,
                    held_out_loss=loss,
                )
            clock = time.perf_counter()
            if stopped:
                break
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        progress.stop()
        profile.close()
        batches.close()
        manager.close()  # waits for what is being written
        log.close()

    # --- Summary ----------------------------------------------------------------------------
    if stopped and int(state.step) < steps:
        name = signal.Signals(stopped[0]).name
        console.print(f"\nstopped by {name}: saved at step {int(state.step)} of {steps}")
        console.print("the same command goes on from there")
    print_summary(console, workdir, seconds=time.perf_counter() - began)


def _load_init(config: Config) -> Params:
    """Read the parameters of --init in the form that the config asks for."""
    c = config.model
    assert config.init is not None
    changes = checkpoint.architecture_changes(weights.read_config(config.init), c)
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
