"""What a plan reads from a compiled program, and what it says.

Programs are compiled for 8 virtual CPU devices; `tests/aot/plan_aot.py` compiles for chips.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gptoss_jax import chips, plan
from gptoss_jax.chips import topologies
from gptoss_jax.chips.facts import TARGETS
from gptoss_jax.config import MeshConfig, command_line
from gptoss_jax.errors import UserError, run_entry
from gptoss_jax.model import Transformer
from gptoss_jax.model.flops import matmul_params, step_flops
from gptoss_jax.parallel.mesh import AXES
from gptoss_jax.planning import cost, hlo, programs, traffic
from gptoss_jax.planning.cost import Plan
from gptoss_jax.planning.programs import Sampling

ROOT = Path(__file__).parents[2]
TINY = command_line.read_config_file(str(ROOT / "configs/tiny.py"))
ONE = Sampling(batch=1, context=64, prompt=64)
SMALL = [
    "--config", str(ROOT / "configs/tiny.py"), "--model.num_layers", "2", "--data.batch_size", "4",
    "--model.vocab_size", "256", "--data.sequence_length", "64",
]  # fmt: skip


def run(*argv: str) -> bool:
    return plan.run(*plan.parse(list(argv)))


def compiled_text(function, *shapes, in_specs, out_specs) -> str:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    run = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(run).lower(*inputs).compile().as_text()


def found(text: str) -> dict[str, tuple[int, float, float, int]]:
    """Return kind -> (times, bytes that a device puts in each time, bytes sent, group size)."""
    reading = hlo.read(text, num_devices=8)
    assert not reading.unknown_loops
    kinds = [one.kind for one in reading.collectives]
    assert len(set(kinds)) == len(kinds)
    return {
        one.kind: (one.times, one.operand_bytes, one.sent_bytes, one.group_size)
        for one in reading.collectives
    }


def test_every_kind_of_collective_is_counted_with_its_bytes():
    neighbours = [(i, (i + 1) % 4) for i in range(4)]

    def function(x, y):
        gathered = jax.lax.all_gather(x, "b", axis=0, tiled=True)  # [24, 6]
        summed = jax.lax.psum(y, "a")  # [8, 10]
        moved = jax.lax.ppermute(jnp.sin(summed), "b", neighbours)
        scattered = jax.lax.psum_scatter(moved * 2, "b", scatter_dimension=0, tiled=True)
        swapped = jax.lax.all_to_all(jnp.cos(scattered), "a", 0, 1, tiled=True)
        return gathered, swapped

    text = compiled_text(
        function, (24, 6), (8, 10), in_specs=(P("b"), P()), out_specs=(P(), P("a"))
    )
    assert found(text) == {
        "all-gather": (1, 6 * 6 * 4, 3 * 6 * 6 * 4, 4),
        "all-reduce": (1, 80 * 4, 80 * 4, 2),  # 2 * (2 - 1) / 2
        "collective-permute": (1, 80 * 4, 80 * 4, 2),
        "reduce-scatter": (1, 80 * 4, 80 * 4 * 3 / 4, 4),
        "all-to-all": (1, 20 * 4, 20 * 4 / 2, 2),
    }


def test_loops_multiply_and_loops_in_loops():
    def function(x, w):
        def layer(x, w):
            x = x @ jax.lax.all_gather(w, "b", axis=0, tiled=True)
            again = jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(jnp.sin(x), "a"), x)
            return again, None

        return jax.lax.scan(layer, x, w)[0]

    text = compiled_text(
        function, (16, 24), (5, 24, 24), in_specs=(P(), P(None, "b")), out_specs=P()
    )
    assert found(text) == {
        "all-gather": (5, 6 * 24 * 4, 3 * 6 * 24 * 4, 4),
        "all-reduce": (15, 16 * 24 * 4, 16 * 24 * 4, 2),
    }
    # Without the compiler's note the condition says it.
    assert "known_trip_count" in text
    assert found(text.replace("known_trip_count", "noted_nothing")) == found(text)


def test_a_loop_that_only_a_run_can_count_is_named():
    def function(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: jax.lax.psum(x, "a"), x)

    text = compiled_text(function, (6, 4), in_specs=P(), out_specs=P())
    reading = hlo.read(text, num_devices=8)
    assert [one.times for one in reading.collectives if one.operand_bytes > 4] == [1]
    assert len(reading.unknown_loops) == 1 and reading.unknown_loops[0] in text


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,3]<=[6]", ((0, 1, 2), (3, 4, 5))),
        ("[3,2]<=[2,3]T(1,0)", ((0, 3), (1, 4), (2, 5))),
        ("[4,2]<=[2,2,2]T(2,0,1)", ((0, 2), (4, 6), (1, 3), (5, 7))),
        ("{}", (tuple(range(6)),)),
        ("mesh['a'=2,'b'=3] {'b'}", ((0, 1, 2), (3, 4, 5))),
        ("mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
        ("mesh['a'=2,'b'=1,'c'=3] {'a','c'}", ((0, 1, 2, 3, 4, 5),)),
    ],
)
def test_groups_in_each_form(written, want):
    text = f"""ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %y = f32[4]{{0}} all-reduce(%x), replica_groups={written}, to_apply=%add
}}"""
    assert hlo.read(text, num_devices=6).collectives[0].groups == want


def test_asynchronous_forms_count_once():
    text = """%inside (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %s = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (x: bf16[8,4]) -> bf16[2,4] {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %g = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}
  %h = bf16[32,4]{1,0} all-gather-done(%g)
  %a = ((bf16[8,4]), bf16[2,4], u32[]) async-start(%x), calls=%inside
  ROOT %d = bf16[2,4]{1,0} async-done(%a), calls=%inside
}"""
    sums = {one.kind: (one.times, one.operand_bytes) for one in hlo.read(text).collectives}
    assert sums == {"all-gather": (1, 64), "reduce-scatter": (1, 64)}
    assert len(hlo.read(text).collectives) == 2


def test_a_collective_beside_other_work_counts_once():
    """A TPU has its start, its work and its end in fusions that each hold a copy of it."""
    gather = (
        "all-gather(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}"
        ', frontend_attributes={chain_id="CHAIN"}'
    )
    parts = "".join(
        f"""%fused.{i} (p: f32[6]) -> f32[12] {{
  %p = f32[6]{{0}} parameter(0)
  ROOT %g = f32[12]{{0}} {gather.replace("CHAIN", "7" if i < 3 else "8")}
}}

"""
        for i in range(4)
    )
    calls = "".join(
        f"  %f.{i} = f32[12]{{0}} fusion(%x), kind=kCustom, calls=%fused.{i}\n" for i in range(4)
    )
    kernel = "  %k = f32[6]{0} custom-call(%x), kernel_metadata={\n{\n}\n}}, metadata={}\n"
    text = f"{parts}ENTRY %main (x: f32[6]) -> f32[12] {{\n  %x = f32[6]{{0}} parameter(0)\n"
    reading = hlo.read(f"{text}{kernel}{calls}}}\n", num_devices=4)
    want = hlo.Collective("all-gather", 24, ((0, 1), (2, 3)), 1)
    assert reading.collectives == [want, want]


def test_bytes_of_shapes():
    assert hlo.shape_bytes("bf16[8,128]{1,0:T(8,128)(2,1)}") == 2048
    assert hlo.shape_bytes("(f32[], pred[3], (u8[2,5]{1,0}, f4e2m1fn[6]))") == 4 + 3 + 10 + 3
    assert hlo.shape_bytes("f8e4m3fn[10]") == 10


def test_traffic_counts_slices_and_trips():
    """A scan reads each layer once, and of a stack that it writes into, a layer each trip."""

    def function(x, w):
        def layer(x, w):
            x = jnp.tanh(x @ w)
            return x, x

        return jax.lax.scan(layer, x, w)

    def read(layers: int) -> float:
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 64), (layers, 64, 64))]
        return traffic.accessed_bytes(jax.jit(function).lower(*shapes).compile().as_text())

    per_layer = (read(20) - read(10)) / 10
    weights, rows = 64 * 64 * 4, 8 * 64 * 4
    assert weights + 3 * rows <= per_layer <= 3 * weights + 10 * rows


def test_a_refusal_is_read():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (23.09G) exceeds available HBM (15.75G). HLO module: jit_prefill."
    )
    assert cost.wanted_bytes(said) == int(23.09 * 2**30)
    assert cost.wanted_bytes("Used 21.95G of 15.48G hbm. Exceeded") == int(21.95 * 2**30)
    assert cost.wanted_bytes("something else") is None
    refused = Plan("train", {"parameters": 2**30}, 0, 2**34, refused=said, peak=int(23.09 * 2**30))
    text = "\n".join(cost.lines(refused))
    assert not refused.fits
    assert "it does not fit, 7.09 GiB too much: the compiler refused it" in text


def test_flops_of_each_program():
    c = TINY.model
    assert cost.flops(TINY, "train", ONE) == step_flops(
        c, tokens=4096, trained=4096, sequence_length=512
    )
    again = dataclasses.replace(TINY, model=dataclasses.replace(c, remat="full"))
    layers = step_flops(c, tokens=4096, trained=0, sequence_length=512)
    assert cost.flops(again, "train", ONE) - cost.flops(TINY, "train", ONE) == layers / 3
    # One token: 2 a matmul parameter, 4 N H a key: two layers see 32, two the whole context.
    wide, unembedding = matmul_params(c)
    want = 3 * (2 * (wide + unembedding) + 4 * 8 * 16 * (2 * 32 + 2 * 64))
    assert cost.flops(TINY, "decode", Sampling(3, 64, 64)) == want


def test_decoding_reads_the_chosen_experts_alone():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1, 1), AXES)
    experts = 4 * 8 * 3 * 128 * 96 * 4
    table = 1024 * 128 * 4
    parts = {"parameters": experts + 10 * table, "cache": 1000}
    read = partial(cost.decode_bytes, TINY.model, parts, mesh=mesh)
    assert read(ONE) == pytest.approx(experts / 4 + 9 * table + 1000)
    assert read(Sampling(2, 64, 64)) == pytest.approx(experts * (1 - 0.75**2) + 9 * table + 1000)


def test_links_and_network():
    inside = hlo.Collective("all-gather", 8e6, (tuple(range(8)),), 3)
    across = hlo.Collective("all-gather", 1e6, (tuple(range(16)),), 1)
    facts = TARGETS["h200"]
    sums = cost.summarise([inside, across], facts, gpu=True)["all-gather"]
    assert sums["count"] == 4 and sums["sent_bytes"] == 3 * 56e6 + 15e6
    assert sums["seconds"] == pytest.approx(3 * 56e6 / 450e9 + 15e6 / 50e9)


@pytest.fixture
def eight_devices(monkeypatch):
    """Take this machine's virtual devices for the target's."""
    monkeypatch.setattr(topologies, "devices", lambda _: jax.devices()[:8])
    monkeypatch.setattr(chips, "assume", _as_a_cpu)
    monkeypatch.chdir(ROOT)


class _as_a_cpu:
    def __init__(self, _: str) -> None:
        pass

    def __enter__(self):
        return chips.named("cpu")

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_plan_from_the_command_line(eight_devices, tmp_path, capsys):
    """By default fsdp takes all devices; the parts are shares of what there is."""
    file = tmp_path / "plan.json"
    assert run(*SMALL, "--target", "h200:8", "--data.batch_size", "8", "--json", str(file))
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["devices"] == 8 and record["mesh"]["fsdp"] == 8
    (one,) = record["programs"]
    assert one["fits"] and one["name"] == "train"
    # Some small ones are whole on each device, everything else is an eighth.
    count = Transformer(
        dataclasses.replace(TINY.model, num_layers=2, vocab_size=256)
    ).num_parameters()[0]
    assert count * 4 / 8 <= one["parts"]["parameters"] < count * 4 / 8 * 1.15
    assert one["parts"]["optimizer state"] == pytest.approx(
        2 * one["parts"]["parameters"], rel=0.01
    )
    assert one["gradients"] == one["parts"]["parameters"]
    assert one["peak"] >= one["arguments"] + one["temporaries"]
    assert one["collectives"]["all-gather"]["count"] >= 2 * 2  # layers, forward and backward
    for words in (
        "parameters",
        "it fits",
        "all-gather",
        "at least",
        "assumed: peak",
        "mesh: fsdp 8",
    ):
        assert words in printed, words


@pytest.mark.parametrize(("capacity", "code", "words"), [(10, 0, "it fits"), (7, 1, "not fit")])
def test_what_does_not_fit_is_exit_code_1(
    capacity, code, words, eight_devices, monkeypatch, capsys
):
    def measured(lowered, *_, **__):
        seconds = {"compute": 1.0, "memory": 0.5, "collectives": 0.0}
        return Plan(
            lowered, {"parameters": 4}, 2, capacity, arguments=5, temporaries=3, peak=8,
            flops=1e3, seconds=seconds,
        )  # fmt: skip

    monkeypatch.setattr(programs, "train", lambda *_: "train")
    monkeypatch.setattr(cost, "measure", measured)
    monkeypatch.setattr(plan, "_keep_from_devices", lambda _: None)
    monkeypatch.setattr(
        "sys.argv", ["plan", *SMALL, "--target", "h200:8", "--data.batch_size", "8"]
    )
    with pytest.raises(SystemExit) as stopped:
        run_entry(plan.main)
    assert stopped.value.code == code
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "v4"], "the chips are v5e"),
        ([], "no --target: give one, such as v5p:4x4x4"),
        (["--target", "h200:8", "--what", "train,tune"], "--what tune: there are train, prefill"),
        (["--target", "h200:8", "--mesh.fsdp", "3"], "mesh: fsdp 3"),
        (["--target", "h200:8", "--data.batch_size", "6"], "data.batch_size"),
        (["--target", "h200:8", "--batch", "0"], "--batch is 0"),
        (["--target", "h200:8", "--batch", "x"], "--batch: invalid int value: 'x'"),
        (["--target", "v100"], "the chips are v5e"),
        (["--target", "h200:8", "--model.layers", "3"], "unknown option --model.layers"),
    ],
)
def test_errors_are_one_line(options, words, eight_devices):
    with pytest.raises(UserError) as error:
        run(*SMALL, *options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_receive_buffer_holds_all_rows_of_the_axis():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4, 1, 1), AXES)
    config = dataclasses.replace(TINY, mesh=MeshConfig(fsdp=2, expert=4))
    want = 4 * 512 * 128 * 4  # 4 shards' row of 512 tokens, of 128 float32
    assert cost.receive_bytes(config, mesh, "train", ONE) == want
    pieces = dataclasses.replace(config, model=dataclasses.replace(TINY.model, expert_chunk=100))
    assert cost.receive_bytes(pieces, mesh, "train", ONE) == 4 * 100 * 128 * 4
    assert cost.receive_bytes(config, mesh, "decode", Sampling(16, 64, 64)) == 4 * 2 * 128 * 4


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--help"])
    assert stopped.value.code == 0
    assert "--target" in capsys.readouterr().out


def test_it_is_refused_by_name_where_fields_do_not_fit():
    with pytest.raises(UserError, match="no --config FILE"):
        run("--target", "v5e")
