"""Check real weights against known numbers: `python -m gptoss_jax.verify --checkpoint DIR`.

It decodes 12 tokens greedily after a fixed prompt, and compares their log-probabilities with those
that the integration test of transformers expects of the two published models, within that test's
tolerance. Exit code 0 if all agree, 1 if not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gptoss_jax.errors import Parser, UserError, command_name, run_entry


def verify(checkpoint: str | Path, *, ignore_config: Collection[str] = ()) -> bool:
    """Decode, print a table with one row per token, and say whether the checkpoint is right.

    `ignore_config` is as in `loading.load`.
    """
    # Imported after the arguments are read: JAX takes a second, and --help need not wait for it.
    import jax
    from rich.console import Console
    from rich.table import Table

    from gptoss_jax.harmony import tokenizer
    from gptoss_jax.loading import find_folder, ignoring, load
    from gptoss_jax.ops import moe
    from gptoss_jax.runs import records
    from gptoss_jax.sampler import Sampler
    from gptoss_jax.weights.golden import LOGPROBS, PROMPT, TOLERANCE, agrees, size_of
    from gptoss_jax.weights.read import open_checkpoint

    folder = find_folder(checkpoint)
    if records.is_workdir(folder):
        raise UserError(f"{folder}: is a workdir; verify is for the published weights")
    with ignoring(ignore_config):
        golden = LOGPROBS[size_of(open_checkpoint(folder).config)]
    # On a CPU, compute in float32 from separate arrays: a CPU would widen bf16 at every use.
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    how: dict[str, Any] = {"dtype": dtype, "split": on_cpu, "layout": moe.layout_for_chip()}
    model, params = load(folder, ignore_config=ignore_config, **how)
    encoding = tokenizer.get_tokenizer(model.config.vocab_size)
    prompt = encoding.encode(PROMPT)
    out = Sampler(model, params).generate([prompt], max_tokens=len(golden), stop_ids=())
    tokens, logprobs = out.tokens[0], out.logprobs[0]
    right = agrees(logprobs, golden)
    table = Table("token", "text", "log-probability", "golden", "", title=PROMPT)
    for token, ours, known, ok in zip(tokens, logprobs, golden, right, strict=True):
        text = repr(encoding.decode([token]))
        table.add_row(str(token), text, f"{ours:.4f}", f"{known:.4f}", "ok" if ok else "WRONG")
    console = Console()
    console.print(table)
    met = sum(right)
    console.print(f"{met} of {len(golden)} within {TOLERANCE}: {'ok' if all(right) else 'WRONG'}")
    return all(right)


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(argv)
    if not verify(args.checkpoint, ignore_config=args.ignore_config):
        sys.exit(1)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command's arguments."""
    parser = Parser(
        command_name("verify"), description="Check weights against known log-probabilities."
    )
    parser.add_argument("--checkpoint", required=True, help="folder of gpt-oss-20b or -120b")
    parser.add_ignore_config()
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_entry(main)
