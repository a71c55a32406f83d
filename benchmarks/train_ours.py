"""This project's side of `benchmarks/train.py`: the step that `gptoss_jax.train` runs.

Run by it, in a process of its own. The weights of a case on a CPU come from a folder, those on a
device are random bytes, made there.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
if "--device" in sys.argv:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")  # nobody else is on it
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import train_cases  # noqa: E402
from train_cases import Case  # noqa: E402

import gptoss_jax  # noqa: E402
from gptoss_jax import chips  # noqa: E402
from gptoss_jax.config import ModelConfig  # noqa: E402
from gptoss_jax.lora import fold, select  # noqa: E402
from gptoss_jax.model import Transformer  # noqa: E402
from gptoss_jax.objectives import make_objective  # noqa: E402
from gptoss_jax.optimizer import split_trainable  # noqa: E402
from gptoss_jax.parameters import patterns  # noqa: E402
from gptoss_jax.training import setup  # noqa: E402
from gptoss_jax.types import Batch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", type=int, default=0)
    parser.add_argument("--form", choices=("dense", "mxfp4"))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--write", help="write the weights of a size, in both forms, and stop")
    arguments = parser.parse_args()
    if arguments.write:
        write(train_cases.SIZES[arguments.write], arguments.weights)
        return
    case = train_cases.choose(arguments.case, device=arguments.device, tiny=arguments.tiny)
    folder = arguments.weights / arguments.form if arguments.weights else None
    train_cases.serve(*side(case, arguments.form, folder))


def random_params(config: ModelConfig, *, seed: int = 0) -> Any:
    """Make parameters of the size of a checkpoint's, a leaf at a time: packed ones are bytes."""
    shapes = Transformer(config).abstract_params()
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    @partial(jax.jit, static_argnums=(1, 2))
    def make(key: jax.Array, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if shape.dtype == jnp.uint8:  # scales such that weights come out at 0.02
            low, high = (119, 122) if "scales" in name else (0, 256)
            return jax.random.randint(key, shape.shape, low, high, jnp.uint8)
        if "norm" in name:
            return jnp.ones(shape.shape, shape.dtype)
        return 0.02 * jax.random.normal(key, shape.shape, shape.dtype)

    made = [
        make(key, jax.tree_util.keystr(path), leaf)
        for key, (path, leaf) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def write(config: ModelConfig, folder: Path) -> None:
    """Write random packed weights, floats in float32, to folder/mxfp4, and decoded to folder/dense.

    The values of both are the same.
    """
    floats = {"dtype": "float32", "param_dtype": "float32"}
    config = dataclasses.replace(config, experts="mxfp4", **floats)
    params = random_params(config)
    gptoss_jax.save(folder / "mxfp4", Transformer(config), params)
    dense, decoded = fold.decode_experts(config, params)
    gptoss_jax.save(folder / "dense", Transformer(dense), decoded)


def side(case: Case, form: str, folder: Path | None) -> tuple[Any, Any, Any]:
    """Return what `train_cases.serve` takes."""
    config = train_cases.run_config(case, form)
    model, objective = Transformer(config.model), make_objective(config)
    factors = select.masks(model.abstract_params(), model.config, config.optimizer)
    optimizer = setup.optimizer_of(config, factors)
    train_step = setup.make_step(config, model, optimizer, objective, factors=factors)
    state: list[Any] = []
    before = train_cases.status("VmRSS")
    ids = jnp.asarray(train_cases.token_ids(case), jnp.int32)
    ones = jnp.ones_like(ids)
    batch = Batch(
        tokens=ids,
        targets=jnp.roll(ids, -1, axis=1),
        weights=ones.at[:, -1].set(0).astype(jnp.float32),
        segment_ids=ones,
        positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
    )

    def step() -> float:
        state[0], measured = train_step(state[0], batch)
        return float(measured.loss)  # waits for it, and so for the step

    def begin() -> dict[str, Any]:
        if folder is None:
            params = random_params(config.model)
        else:
            params = gptoss_jax.load(folder, dtype=jnp.dtype(case.dtype))[1]
        state.append(setup.first_state(config, model, optimizer, params, factors=factors))
        del params
        loss = step()
        step()
        train_cases.forget_peak()
        trained = split_trainable(state[0].params, patterns.frozen_paths(factors))[0]
        count = sum(x.size for x in jax.tree.leaves(trained))
        said = {"loss": loss, "trained": count, "jax": jax.__version__}
        device = jax.devices()[0].device_kind
        return said | {"device": device, "peak FLOP/s": chips.peak_flops()}

    def peak() -> dict[str, Any]:
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "peak bytes": stats.get("peak_bytes_in_use", train_cases.status("VmHWM")),
            "of which libraries": 0 if stats else before,
        }

    return begin, step, peak


if __name__ == "__main__":
    main()
