"""Hold real weights against known numbers: `python -m gptoss_jax.verify --checkpoint DIR`.

Greedily decodes 12 tokens after a fixed prompt and compares their log-probabilities with those
that transformers' own integration test expects of the two published models, within its tolerance.
Exit code 0 if all agree, 1 if not.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import Parser, UserError, run_entry
from gptoss_jax.loading import find_folder, load
from gptoss_jax.ops import moe
from gptoss_jax.runs import records
from gptoss_jax.weights.read import open_checkpoint

PROMPT = "Roses are red, violets"
TOLERANCE = 0.1
_20B = ModelConfig()
_120B = dataclasses.replace(_20B, num_layers=36, num_experts=128)
# fmt: off
GOLDEN = {
    "20b": (-0.0374, -0.0815, -1.2188, -1.9531, -2.2344, -0.9688, -1.5469, -1.6406, -0.9336,
            -1.6094, -1.6250, -0.8555),
    "120b": (-0.9023, -0.6602, -1.5469, -2.7031, -2.0781, -1.2188, -2.4844, -0.0320, -0.8477,
             -1.8906, -0.1924, -2.0469),
}
# fmt: on


def size_of(config: ModelConfig) -> str:
    """Return "20b" or "120b". UserError for any other model: nothing is known of it."""
    for name, known in (("20b", _20B), ("120b", _120B)):
        if config.architecture == known.architecture:
            return name
    raise UserError(
        f"verify knows gpt-oss-20b and gpt-oss-120b, and this is neither: {config.num_layers} "
        f"layers, {config.num_experts} experts, d_model {config.d_model}, vocabulary "
        f"{config.vocab_size}"
    )


def agrees(logprobs: Sequence[float], golden: Sequence[float]) -> list[bool]:
    """Say of each golden log-probability whether it was met; one that is missing or NaN was not."""
    padded = [*logprobs, *[float("nan")] * (len(golden) - len(logprobs))]
    return [abs(ours - known) <= TOLERANCE for ours, known in zip(padded, golden, strict=False)]


def verify(checkpoint: str | Path) -> bool:
    """Decode, print a table a token a row, and say whether the checkpoint is right."""
    from rich.console import Console
    from rich.table import Table

    from gptoss_jax.harmony import tokenizer
    from gptoss_jax.sampler import Sampler

    folder = find_folder(checkpoint)
    if records.is_workdir(folder):
        raise UserError(f"{folder}: is a workdir; verify is for the published weights")
    golden = GOLDEN[size_of(open_checkpoint(folder).config)]
    # A CPU computes in float32, from separate arrays; bf16 it would have to widen at every use.
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    model, params = load(folder, dtype=dtype, split=on_cpu, layout=moe.layout_for_chip())
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
    parser = Parser("gptoss_jax.verify", description="Hold weights against golden numbers.")
    parser.add_argument("--checkpoint", required=True, help="folder of gpt-oss-20b or -120b")
    if not verify(parser.parse_args(argv).checkpoint):
        sys.exit(1)


if __name__ == "__main__":
    run_entry(main)
