"""Convert a checkpoint from any layout to another: `python -m gptoss_jax.convert SRC DST --to hf`.

Streams from file to file without a model in memory (a workdir's parameters are restored first).
By default every number is as stored: the bytes of each tensor are the same, reordered where the
layouts differ. Converting to the same layout rewrites the folder into shards of 5 GB and copies
config.json as it is; a file that the safetensors library wrote whole comes out identical.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gptoss_jax.errors import Parser, UserError, run_entry
from gptoss_jax.weights import config_io
from gptoss_jax.weights.names import Form, Layout
from gptoss_jax.weights.read import Stored, find_folder, open_checkpoint, open_workdir
from gptoss_jax.weights.write import (
    SHARD_BYTES,
    write_checkpoint,
    write_json,
    write_side_files,
)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Layout,
    experts: Form | None = None,
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint `source` (see `weights.load`) to the new folder `destination`.

    `experts`: None as stored, "mxfp4" (encoded by the OCP rule), "dense" (decoded to, or cast to,
    bfloat16). Tokenizer files are copied from a Hugging Face source and made for any other.
    Raises UserError, with nothing written, as `weights.load` and `weights.save` do.
    """
    folder = find_folder(source)
    if (folder / "checkpoints").is_dir():
        weights = open_workdir(folder, step)
    elif step is not None:
        raise UserError(f"{folder}: --step is for workdirs, and this is none (no checkpoints)")
    else:
        weights = open_checkpoint(folder)
    form = experts or weights.config.experts

    def finish(new: Path) -> None:
        if isinstance(weights, Stored) and weights.layout == to:
            _copy_side_files(folder, new, weights=weights, form=form)
        else:
            dtype = weights.config.param_dtype
            write_side_files(new, weights.config, layout=to, form=form, dtype=dtype)

    write_checkpoint(
        destination,
        weights,
        layout=to,
        form=form,
        dense_dtype="bfloat16" if experts == "dense" else None,
        shard_bytes=shard_bytes,
        finish=finish,
    )


def _copy_side_files(folder: Path, new: Path, *, weights: Stored, form: Form) -> None:
    """Copy what lies beside the tensors, within one layout."""
    from gptoss_jax.tokenizer import TOKENIZER_FILES

    names = ["config.json"]
    if weights.layout == "hf":
        names += ["generation_config.json", *TOKENIZER_FILES]
    elif form == weights.config.experts:
        names += ["dtypes.json"]
    for name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, new / name)
    if weights.layout == "hf" and form != weights.config.experts:
        raw = config_io.read_json(folder / "config.json")
        write_json(new / "config.json", config_io.with_form(raw, form))


def main(argv: list[str]) -> None:
    """Run the command."""
    parser = Parser("gptoss_jax.convert", description="Convert a checkpoint to another layout.")
    parser.add_argument("source", metavar="SRC", help="checkpoint folder of any layout, or workdir")
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument("--to", choices=("hf", "openai"), required=True)
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), help="default: as stored")
    parser.add_argument("--step", type=int, help="of a workdir; default: its latest")
    args = parser.parse_args(argv)
    experts: Form | None = "dense" if args.experts == "bf16" else args.experts
    convert(args.source, args.destination, to=args.to, experts=experts, step=args.step)
    print(f"wrote {args.destination}")


if __name__ == "__main__":
    run_entry(main)
