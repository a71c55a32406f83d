"""Train: `python -m gptoss_jax.train --config FILE [--init DIR] [--data.train FILE ...]`.

Started again on the same workdir it goes on where it was. SIGTERM and ctrl-C save and stop.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptoss_jax import checkpoint, config_cli, data, harmony_parser, metrics, tokenizer, weights
from gptoss_jax.config import Config
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.loss import loss_fn
from gptoss_jax.model import Transformer
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.sampler import Sampler
from gptoss_jax.train_step import StepMetrics, init_state, make_train_step
from gptoss_jax.types import Batch, Params

_QUESTIONS_AT_ONCE = 64


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

    # --- Data -------------------------------------------------------------------------------
    if not config.data.train:
        raise UserError("there is no training data: give --data.train FILE (.jsonl or .txt)")
    batches = data.train_batches(config)
    console.print(f"\n{data.describe(config)}", soft_wrap=True)
    held_out = data.eval_batches(config)
    questions = data.eval_questions(config, config.train.eval_questions)
    if held_out:
        console.print(data.describe(config, held_out=True), soft_wrap=True)
    else:
        console.print("data.held_out: none, so neither held-out loss nor exact match")
    fingerprint = data.fingerprint(config)

    # --- Model and parameters ---------------------------------------------------------------
    # They come from the first of these that there is:
    #   1. the newest checkpoint of the workdir, with optimizer, data position and random state;
    #   2. the folder of --init: parameters alone;
    #   3. the seed.
    model = Transformer(config.model)
    record = checkpoint.read_record(workdir) if checkpoint.steps(workdir) else None
    if record is not None:
        changes = data.differences(record.fingerprint, fingerprint)
        checkpoint.check_same_run(record, config, data_changes=changes, workdir=workdir)
        if record.step >= steps:
            console.print(f"\n{workdir} is complete: step {record.step} of {steps}")
            _print_summary(console, workdir, seconds=None)
            return
    params = None
    if record is None and config.init is None:
        raise UserError(
            "no weights to start from: give --init DIR (a checkpoint), or --init random"
        )
    if record is None and config.init != "random":
        params = _load_init(config)

    # --- Optimizer and step -----------------------------------------------------------------
    optimizer = make_optimizer(config.optimizer, steps)
    objective = partial(loss_fn, balance_loss=config.train.balance_loss, z_loss=config.train.z_loss)
    train_step = make_train_step(
        model,
        optimizer,
        objective,
        accumulate=config.optimizer.accumulate,
        on_nan=config.train.on_nan,
    )
    begin = partial(init_state, model, optimizer, seed=config.train.seed)
    if record is not None:
        state, record = checkpoint.restore(workdir, jax.eval_shape(begin, None), step=record.step)
        batches.set_state(record.data_state)
        source = f"step {record.step} of {workdir}"
    else:
        # Placed as restored arrays are, so that a run and its continuation are one program.
        state = jax.device_put(begin(params), jax.devices()[0])
        source = f"random, seed {config.train.seed}" if config.init == "random" else config.init
    del params  # the state's, and given up to the first step
    total, active = model.num_parameters()
    kind = jax.devices()[0].device_kind
    console.print(
        f"model     {total / 1e6:,.2f}M parameters, {active / 1e6:,.2f}M active; {source}"
    )
    console.print(f"device    {kind}\nworkdir   {workdir}\n")

    # --- From here on things are written ----------------------------------------------------
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config_cli.to_json(config))
    except OSError as error:
        raise UserError(f"the workdir {workdir} can't be written: {error.strerror}") from None
    start = int(state.step)
    log = metrics.MetricsLog(workdir, step=start)
    manager = checkpoint.open_manager(workdir, keep=config.train.keep)
    peak = metrics.peak_flops(config.train.peak_tflops)
    progress = _Progress(console, start=start, steps=steps)

    def evaluate(step: int) -> float | None:
        if not held_out:
            return None
        scores = _evaluate(model, state.params, held_out, questions=questions, config=config)
        log.write(step, scores)
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
            state, measured = train_step(state, next(batches))
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
                _fail(bad[0], done[bad[0] - step - 1], workdir)
            compiled = step - len(done) == start  # its time says nothing about the rest
            values = _describe_step(config, done, seconds=None if compiled else seconds, peak=peak)
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
        batches.close()
        manager.close()  # waits for what is being written
        log.close()

    # --- Summary ----------------------------------------------------------------------------
    if stopped and int(state.step) < steps:
        name = signal.Signals(stopped[0]).name
        console.print(f"\nstopped by {name}: saved at step {int(state.step)} of {steps}")
        console.print("the same command goes on from there")
    _print_summary(console, workdir, seconds=time.perf_counter() - began)


def _load_init(config: Config) -> Params:
    """Read the parameters of --init in the form that the config asks for."""
    c = config.model
    assert config.init is not None
    there, params = weights.load(config.init, dtype=jnp.dtype(c.param_dtype), experts=c.experts)
    changes = checkpoint.architecture_changes(there.config, c)
    if changes:
        raise UserError(
            f"--init {config.init} is another model than the config's: {', '.join(changes)}"
        )
    return params


def _evaluate(
    model: Transformer,
    params: Params,
    batches: list[Batch],
    *,
    questions: list[data.Question],
    config: Config,
) -> dict[str, Any]:
    """Return held-out loss and perplexity, and the share of questions answered exactly."""
    sums = jax.device_get([_held_out(model, params, batch) for batch in batches])
    nll, weight = (sum(float(s[i]) for s in sums) for i in (0, 1))
    loss = nll / weight if weight else math.nan
    scores: dict[str, Any] = {
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(min(loss, 700.0)),
    }
    if questions:
        sampler = Sampler(model, params)
        encoding = tokenizer.get_tokenizer(config.model.vocab_size)
        right = 0
        for at in range(0, len(questions), _QUESTIONS_AT_ONCE):
            some = questions[at : at + _QUESTIONS_AT_ONCE]
            out = sampler.generate(
                [q.prompt for q in some], max_tokens=config.train.eval_max_tokens, temperature=0.0
            )
            said = [_final_text(ids, encoding) for ids in out.tokens]
            right += sum(text == q.answer.strip() for text, q in zip(said, some, strict=True))
        scores["exact_match"] = right / len(questions)
    return scores


@partial(jax.jit, static_argnums=0)
def _held_out(model: Transformer, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    sums = loss_fn(model, params, batch)
    return sums.nll, sums.weight


def _final_text(ids: list[int], encoding: Any) -> str | None:
    """Return what sampled ids say in the final channel, None if they never come to it."""
    parser = harmony_parser.StreamParser(encoding)
    for token in ids:
        parser.process(token)
    parser.finish()
    final = [m.content for m in parser.messages if m.header.channel == "final"]
    return final[-1].strip() if final else None


def _describe_step(
    config: Config, done: list[StepMetrics], *, seconds: float | None, peak: float | None
) -> dict[str, Any]:
    """Turn the steps since the last record into one: rates over all, the rest of the last."""
    m = done[-1]
    values: dict[str, Any] = {
        "loss": float(m.loss),
        "grad_norm": float(m.grad_norm),
        "learning_rate": float(m.learning_rate),
        "trained_tokens": float(m.trained),
        "tokens": float(m.tokens),
        "balance_loss": float(np.mean(m.router.balance_loss)),
        "z_loss": float(np.mean(m.router.z_loss)),
        "expert_load": np.round(m.router.load.astype(np.float64), 5).tolist(),
    }
    skipped = sum(not bool(x.finite) for x in done)
    if skipped:
        values["skipped_steps"] = skipped
    if seconds is not None:
        flops = sum(
            metrics.step_flops(
                config.model,
                tokens=float(x.tokens),
                trained=float(x.trained),
                sequence_length=config.data.sequence_length,
            )
            for x in done
        )
        values["tokens_per_second"] = sum(float(x.tokens) for x in done) / seconds
        values["flops_per_second"] = flops / seconds
        values["mfu"] = flops / seconds / peak if peak else None
        values["step_seconds"] = seconds / len(done)
    return values


class _Progress:
    """A bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, console: Console, *, start: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._every = max(1, steps // 20)
        self._start, self._said, self._began = start, start, time.perf_counter()
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling")
        self._bar.start()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Show a step's record."""
        text = f"loss {values['loss']:.4f}"
        if "tokens_per_second" in values:
            text += f"  {values['tokens_per_second']:,.0f} tokens/s"
        if values.get("mfu"):
            text += f"  MFU {values['mfu']:.1%}"
        if values.get("skipped_steps"):
            text += f"  skipped {values['skipped_steps']} (not finite)"
        self._bar.update(self._task, completed=step, text=text)
        due = step - self._said >= self._every or step == self._steps or step == self._start + 1
        if not self._console.is_terminal and due:
            self._said = step
            pace = (time.perf_counter() - self._began) / (step - self._start)
            left = _duration(pace * (self._steps - step))
            self._line(f"step {step}/{self._steps}  {text}  left {left}")

    def say(self, step: int, scores: dict[str, Any]) -> None:
        """Print an evaluation, which stays on the screen."""
        text = f"step {step}/{self._steps}  held-out loss {scores['held_out_loss']:.4f}"
        text += f"  perplexity {scores['held_out_perplexity']:,.2f}"
        if "exact_match" in scores:
            text += f"  exact match {scores['exact_match']:.3f}"
        self._line(text, style="bold")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def _line(self, text: str, style: str | None = None) -> None:
        self._bar.console.print(text, style=style, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _once(stopped: list[int]) -> Any:
    """Return a signal handler that asks the loop to stop; a second ctrl-C interrupts at once."""

    def handler(number: int, _: Any) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return handler


def _fail(step: int, m: StepMetrics, workdir: Path) -> None:
    """Say which step was not finite, and exit with 1."""
    what = "loss" if not math.isfinite(m.loss) else "gradient"
    kept = checkpoint.steps(workdir)
    since = f"the newest checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint"
    print(
        f"error: the {what} is not finite at step {step} (loss {float(m.loss)}, gradient norm "
        f"{float(m.grad_norm)}); {since}; --train.on_nan skip leaves such steps out",
        file=sys.stderr,
    )
    sys.exit(1)


def _print_summary(console: Console, workdir: Path, *, seconds: float | None) -> None:
    """Draw the curves, and say where everything lies."""
    curves = metrics.plot(workdir)
    kept, best = checkpoint.steps(workdir), checkpoint.best_step(workdir)
    lines = {
        "curves": curves,
        "metrics": workdir / metrics.FILE,
        "tensorboard": workdir / "tensorboard",
        "checkpoints": f"{workdir / checkpoint.FOLDER}, steps {', '.join(map(str, kept))}",
        "sample": f"python -m gptoss_jax.sample --checkpoint {workdir} --prompt TEXT",
    }
    lines["go on"] = "the same command, with a larger --train.steps once it is complete"
    if best:
        lines["best"] = f"step {best[0]}, held-out loss {best[1]:.4f}"
    if seconds is not None:
        lines["time"] = _duration(seconds)
    console.print()
    for name, text in lines.items():
        console.print(f"{name:<12}{text}", soft_wrap=True)  # paths are not to be broken


if __name__ == "__main__":
    run_entry(main)
