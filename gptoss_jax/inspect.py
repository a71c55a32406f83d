"""Show packed batches as text: `python -m gptoss_jax.inspect --config FILE [--batches N]`.

What the loss counts is coloured, the rest dim; without colours it stands in [[ ]]. Where its weight
is not 1 that comes before it: [0.3[ ]] (see data.train_on). Special tokens are shown by name,
control characters by a symbol. `--html FILE` writes a page instead.
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
    """Run the command. Raises UserError for whatever is wrong with what was given."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    for name in ("batches", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}: it must be positive")
    if args.config is not None:
        rest += ["--config", args.config]
    # Not before: they take a second, for which --help need not wait.
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
        epilog="All other options are the config's: python -m gptoss_jax.train --help names them\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="a file, or a name as tiny; required")
    add("--batches", type=int, default=1, metavar="N", help="how many, from the first; default: 1")
    add("--rows", type=int, metavar="N", help="rows shown of a batch; default: all")
    add("--held-out", action="store_true", help="the batches of data.held_out")
    add("--html", metavar="FILE", help="write a page that needs nothing else, and print its name")
    return parser


def _take(config: Config, count: int, *, held_out: bool) -> tuple[tuple[str, ...], list[Batch]]:
    """Return the names of the sources, none without a mixture, and the first batches."""
    from gptoss_jax.data.loader import eval_batches, train_batches  # as in main

    if config.objective.kind.records == "questions":
        raise UserError(
            "objective.name is grpo, whose rows are made of the answers that are sampled: see "
            "answers.jsonl of a run; --objective.name sft shows chats as they would be trained on"
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
