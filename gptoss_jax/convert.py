"""Convert a checkpoint from any layout to another: `python -m gptoss_jax.convert SRC DST --to hf`.

Streams from file to file without a model in memory (a workdir's parameters are restored first).
Adapters, the workdir's own or a folder of PEFT's (`--adapters`), are merged on the way. By default
every other number is as stored: the bytes of each tensor are the same, reordered where the layouts
differ. Converting to the same layout rewrites the folder into shards of 5 GB and copies config.json
as it is; a file that the safetensors library wrote whole comes out identical. `--to peft` writes a
workdir's adapters alone. docs/export.md says who reads what. A run whose model a config file builds
(`make_model`) is given with `--config FILE`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gptoss_jax.errors import Parser, command_name, run_entry

if TYPE_CHECKING:
    from gptoss_jax.weights.names import Form


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser(command_name("convert"), description="Convert a checkpoint to another layout.")
    parser.add_argument("source", metavar="SRC", help="checkpoint folder of any layout, or workdir")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument(
        "--to", choices=("hf", "openai", "peft"), required=True, help="peft: the adapters alone"
    )
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), help="default: as stored")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32", "float16"), help="of floats; default: as stored"
    )
    parser.add_argument("--adapters", metavar="DIR", help="a folder of PEFT's, to be merged")
    parser.add_argument("--step", type=int, help="of a workdir; default: its latest")
    parser.add_argument("--base", metavar="DIR", help="of a LoRA run whose base was moved")
    parser.add_argument(
        "--config", metavar="FILE", help="of a workdir whose model is built by make_model() in FILE"
    )
    parser.add_argument(
        "--force", action="store_true", help="write weights that keep less than 0.9 of their update"
    )
    args = parser.parse_args(argv)
    # Not before: JAX takes a second, for which --help need not wait.
    from gptoss_jax.config import command_line
    from gptoss_jax.loading.convert import convert
    from gptoss_jax.model import Transformer

    make_model = command_line.read_make_model(args.config) if args.config else None
    experts: Form | None = "dense" if args.experts == "bf16" else args.experts
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
        make_model=make_model or Transformer,
    )
    if report.costs:
        from rich.console import Console

        Console().print(report.table())
    print(f"wrote {args.destination}")
    if make_model is not None:
        print(
            "note: files of weights hold no code: other programs compute GPT-OSS's own model with "
            f"{args.destination}, not what make_model() of {args.config} builds (a copy of its "
            "source is in model_source/). Here --config runs it",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_entry(main)
