"""The table: every parameter and every optimizer's state is in it, what is not raises."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from programs import make_program

from gptoss_jax import loading, weights
from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel import padding, sharding
from gptoss_jax.parameters.tree import path_name

MODEL = ModelConfig(
    vocab_size=512, num_layers=3, d_model=64, num_heads=16, num_kv_heads=2, head_dim=12,
    num_experts=24, active_experts=3, d_expert=160, context=128, initial_context=40,
    dtype="float32", param_dtype="float32",
)  # fmt: skip


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return meshes.make(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("experts", ["dense", "mxfp4"])
def test_a_state_is_split_over_all_that_the_mesh_has(optimizer: Any, experts: Any):
    model = dataclasses.replace(MODEL, experts=experts, param_dtype="bfloat16", qk_norm=True)
    optimizers = OptimizerConfig(name=optimizer, ema=0.5)
    config = Config(model=model, optimizer=optimizers, data=DataConfig(sequence_length=48))
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, tensor=2)):
        state = make_program(config).abstract_state()
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = path_name(path)
        part = math.prod(x.sharding.shard_shape(x.shape))
        big = "_weight" in name or name.endswith("unembedding/weight")
        if big and math.prod(x.shape) >= 24 * 64 * 64 and "v_row" not in name:
            kv = "k_weight" in name or "v_weight" in name
            assert part * 8 == math.prod(x.shape), f"{name} {x.shape} is split as {x.sharding.spec}"
            assert not kv or x.sharding.spec[1] == "tensor"
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    assert flat["params/layers/attention/sinks"].sharding.spec == P(None, "tensor")
    assert flat["step"].sharding.spec == P()


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"expert": 2, "fsdp": 2, "context": 2}])
def test_adapters_and_their_moments_are_split_where_they_are_large(sizes: dict):
    """Those of experts. Small ones are whole on each device."""
    lora = LoRAConfig(targets=("attention", "router", "experts"), rank=8)
    model = dataclasses.replace(MODEL, experts="mxfp4", num_heads=4, lora=lora)
    config = Config(model=model, data=DataConfig(sequence_length=48))
    with jax.set_mesh(mesh_of(**sizes)):
        state = make_program(config).abstract_state()
    flat = {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    adapters = {path: x for path, x in flat.items() if "lora/" in path}
    assert len(adapters) == 3 * 2 * (4 + 1 + 2)  # they and two moments, A and B
    for path, x in adapters.items():
        parts = 8 if "/experts/" in path else 1
        part = math.prod(x.sharding.shard_shape(x.shape))
        assert part * parts == math.prod(x.shape), f"{path} is split as {x.sharding.spec}"


def test_kv_heads_are_whole_where_there_are_more_shards_than_heads():
    mesh = mesh_of(tensor=4)
    shape = (3, 2, 12, 64)
    assert sharding.spec("params/layers/attention/k_weight", shape, mesh)[1] is None
    assert sharding.spec("params/layers/attention/q_weight", (3, 16, 12, 64), mesh)[1] == "tensor"


def test_a_path_that_is_not_in_the_table_and_a_wrong_rank_raise():
    mesh = mesh_of(fsdp=2)
    with pytest.raises(ValueError, match="has no params/layers/attention/z_weight"):
        sharding.spec("params/layers/attention/z_weight", (3, 4), mesh)
    with pytest.raises(ValueError, match="has no opt_state/of/something"):
        sharding.spec("opt_state/of/something", (3, 4), mesh)
    with pytest.raises(ValueError, match="has 2 axes, and the table of parameters 4"):
        sharding.spec("params/layers/attention/q_weight", (3, 4), mesh)


def test_sizes_that_do_not_divide_are_refused_by_name():
    with pytest.raises(UserError, match=r"axis 0 of embedding/weight, of 510.*tensor 4"):
        sharding.spec("embedding/weight", (510, 64), mesh_of(tensor=4))
    with pytest.raises(UserError, match=r"batch_size over optimizer.accumulate is 6.* over 4"):
        sharding.check_batch(6, 64, mesh_of(fsdp=2, expert=2))
    with pytest.raises(UserError, match=r"sequence_length is 66.* multiple of 4"):
        sharding.check_batch(8, 66, mesh_of(context=2))
    sharding.check_batch(8, 64, mesh_of(context=2))


@pytest.mark.slow
def test_padding_comes_and_goes_without_a_trace():
    model = Transformer(dataclasses.replace(MODEL, experts="mxfp4"))
    params = init_params(model, seed=2)
    wide = padding.resize(params, by=96)
    assert wide["layers"]["experts"]["gate_up_weight"].blocks.shape[3] == 256
    assert wide["layers"]["experts"]["down_weight"].blocks.shape[3] == 8
    assert wide["layers"]["experts"]["gate_up_bias"].shape[3] == 256
    padded = Transformer(dataclasses.replace(model.config, expert_padding=96))
    tokens = jnp.arange(20).reshape(2, 10)
    want = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(jax.jit(padded.apply)({"params": wide}, tokens), want, atol=1e-5)
    back = padding.resize(wide, by=-96)
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 2, "tensor": 4},
        pytest.param({"expert": 2, "context": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_loads_into_its_shards_and_is_written_as_it_was(
    tmp_path: Path, sizes: dict[str, int]
):
    model = Transformer(dataclasses.replace(MODEL, experts="mxfp4"))
    params = init_params(model, seed=2)
    weights.save(tmp_path / "a", model, params)
    mesh = mesh_of(**sizes)
    loaded, spread = loading.load(tmp_path / "a", mesh, dtype=jnp.float32)
    assert loaded.config.expert_padding == (96 if "tensor" in sizes else 0)
    want: Any = padding.resize(params, by=loaded.config.expert_padding)
    where = sharding.shardings(spread, mesh)
    for (path, x), y, s in zip(
        jax.tree_util.tree_leaves_with_path(spread),
        jax.tree.leaves(want),
        jax.tree.leaves(where),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y, err_msg=path_name(path))
        assert x.sharding.is_equivalent_to(s, x.ndim)
    weights.save(tmp_path / "b", loaded, spread)
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.slow
def test_a_kernels_layout_is_refused_where_it_can_not_be_split(tmp_path: Path):
    model = Transformer(dataclasses.replace(MODEL, experts="mxfp4"))
    params = init_params(model, seed=2)
    weights.save(tmp_path / "a", model, params)
    with pytest.raises(UserError, match=r"over mesh\.expert only, and the mesh has tensor"):
        loading.load(tmp_path / "a", mesh_of(tensor=2), layout="planes")
    _, spread = loading.load(tmp_path / "a", mesh_of(expert=2), jnp.float32, layout="planes")
    want = loading.load(tmp_path / "a", None, jnp.float32, layout="planes")[1]
    jax.tree.map(np.testing.assert_array_equal, spread, want)
    codes = spread["layers"]["experts"]["down_weight"].codes
    assert codes.sharding.shard_shape(codes.shape)[1] == 12
