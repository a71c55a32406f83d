"""Convert a checkpoint from any layout to another: `python -m gptoss_jax.convert SRC DST --to hf`.

It streams from file to file and never holds the model in memory (only from a workdir it restores
the parameters first). It merges adapters into the weights, those of the workdir or a folder of PEFT
adapters (`--adapters`). By default it leaves every other number as stored: each tensor keeps its
bytes, reordered where the layouts differ. Conversion to the same layout rewrites the folder into
shards of 5 GB and copies config.json as it is; a file that the safetensors library wrote whole
comes out identical. `--to peft` writes only the adapters of a workdir. docs/export.md says which
programs read which layout, and which chat template is written; `--for PROGRAM` warns of what a
program does not serve. If a config file built the model of the run (`make_model`), give it with
`--config FILE`.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from gptoss_jax.errors import Parser, UserError, command_name, run_entry

if TYPE_CHECKING:
    from gptoss_jax.weights.names import Form

# As `weights.serving.PROGRAMS`, which takes a second to import, and --help need not wait for it.
_PROGRAMS = ("vllm", "llama.cpp", "mlx")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command's arguments."""
    parser = Parser(command_name("convert"), description="Convert a checkpoint to another layout.")
    parser.add_argument("source", metavar="SRC", help="checkpoint folder of any layout, or workdir")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument(
        "--to",
        choices=("hf", "openai", "peft"),
        required=True,
        help="layout to write; peft: the adapters alone",
    )
    parser.add_argument(
        "--experts", choices=("mxfp4", "bf16"), help="form of the experts; default: as stored"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float16"),
        help="dtype of floats; default: as stored",
    )
    parser.add_ignore_config()
    parser.add_argument("--adapters", metavar="DIR", help="folder of PEFT adapters to merge")
    parser.add_argument("--step", type=int, help="checkpoint of a workdir; default: its latest")
    parser.add_argument("--base", metavar="DIR", help="base of a LoRA run, if it was moved")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config of a workdir whose model make_model() in FILE builds",
    )
    parser.add_argument(
        "--for",
        dest="programs",
        metavar="PROGRAM,...",
        action="append",
        default=[],
        help="warn of what a program does not serve: vllm, llama.cpp, mlx; commas between several",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write weights even if they keep less than 0.9 of their update",
    )
    args = parser.parse_args(argv)
    args.programs = [name for given in args.programs for name in given.split(",")]
    for name in args.programs:
        if name not in _PROGRAMS:
            raise UserError(f"--for {name}: it is one of {', '.join(_PROGRAMS)}")
    if args.programs and args.to == "peft":
        raise UserError("--for is for whole models: leave it out with --to peft")
    return args


def _warn(args: argparse.Namespace, experts: Form | None) -> None:
    """Print a line for each thing that the programs of `--for` do not serve as it is."""
    from gptoss_jax import loading
    from gptoss_jax.weights import serving

    with loading.ignoring(args.ignore_config):
        config = loading.read_config(args.source)
    rules = loading.read_rules(args.source, step=args.step)
    date = "today" if rules.date.startswith("today") else rules.date
    form = experts or config.experts
    export = serving.Export(config, args.to, form, history=rules.history, date=date)
    for program in args.programs:
        for line in serving.warnings(program, export):
            print(f"warning: {line}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """Run the command."""
    args = parse(argv)
    # Imported late: JAX takes a second, and --help need not wait for it.
    from gptoss_jax.config import command_line
    from gptoss_jax.loading.convert import convert
    from gptoss_jax.loading.rules import describe_template
    from gptoss_jax.model import Transformer

    make_model = command_line.read_make_model(args.config) if args.config else None
    experts: Form | None = "dense" if args.experts == "bf16" else args.experts
    if args.programs:
        _warn(args, experts)
    report = convert(
        args.source,
        args.destination,
        to=args.to,
        experts=experts,
        dtype=args.dtype,
        step=args.step,
        base=args.base,
        adapters=args.adapters,
        force=args.force,
        ignore_config=args.ignore_config,
        make_model=make_model or Transformer,
    )
    if report.costs:
        from rich.console import Console

        Console().print(report.table())
    print(f"wrote {args.destination}\n{describe_template(args.destination)}")
    if make_model is not None:
        print(
            "note: files of weights hold no code: other programs run the original GPT-OSS model "
            f"with {args.destination}, not what make_model() of {args.config} builds (a copy of "
            "its source is in model_source/). The commands of this package run it with --config",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_entry(main)
