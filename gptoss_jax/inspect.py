"""Show packed batches as text: `python -m gptoss_jax.inspect --config FILE [--batches N]`.

Tokens that count in the loss are coloured, the others are dim; without colours they stand in [[ ]].
A loss weight other than 1 comes before its tokens: [0.3[ ]] (see data.train_on). Special tokens are
shown by name, control characters by a symbol. `--html FILE` writes an HTML page instead.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.errors import Parser, UserError, command_name, run_entry

if TYPE_CHECKING:
    from gptoss_jax.config import Config
    from gptoss_jax.types import Batch


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError if an option or an input is wrong."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    for name in ("batches", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be positive")
    if args.config is not None:
        rest += ["--config", args.config]
    # Imported late: they take a second, and --help need not wait for them.
    from rich.console import Console

    from gptoss_jax.config import command_line
    from gptoss_jax.data.show import show, write_page
    from gptoss_jax.harmony import tokenizer

    config = command_line.load(rest, prog=command_name("inspect"))
    field = "data.held_out" if args.held_out else "data.train"
    if not (config.data.held_out if args.held_out else config.data.train):
        raise UserError(f"there is no {field}: give --{field} FILE")
    names, batches = _take(config, args.batches, held_out=args.held_out)
    how: dict[str, Any] = {
        "encoding": tokenizer.get_tokenizer(config.model.vocab_size),
        "names": names,
        "rows": args.rows,
        "pairs": config.objective.kind.records == "pairs",
    }
    if args.html is None:
        show(Console(), batches, **how)
        return
    try:
        write_page(Path(args.html), batches, **how)
    except OSError as error:
        raise UserError(f"--html {Path(args.html)}: {error.strerror or error}") from None
    print(Path(args.html))


def _parser() -> Parser:
    parser = Parser(
        command_name("inspect"),
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="All other options set the config: python -m gptoss_jax.train --help lists them\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="config file, or a name such as tiny; required")
    add("--batches", type=int, default=1, metavar="N", help="show the first N batches; default: 1")
    add("--rows", type=int, metavar="N", help="show the first N rows of each batch; default: all")
    add("--held-out", action="store_true", help="show the batches of data.held_out")
    add("--html", metavar="FILE", help="write a self-contained page to FILE, and print its path")
    return parser


def _take(config: Config, count: int, *, held_out: bool) -> tuple[tuple[str, ...], list[Batch]]:
    """Return the first batches, after the names of a mixture's sources (empty without one)."""
    from gptoss_jax.data.loader import eval_batches, train_batches  # imported late, as in main

    if config.objective.kind.records == "questions":
        raise UserError(
            "objective.name is grpo, which trains on sampled answers: see answers.jsonl in the "
            "workdir of a run; --objective.name sft shows the chats as sft would train on them"
        )
    if held_out:
        return (), eval_batches(config)[:count]
    batches = train_batches(config)
    try:
        return batches.source_names, list(itertools.islice(batches, count))
    finally:
        batches.close()


if __name__ == "__main__":
    run_entry(main)
