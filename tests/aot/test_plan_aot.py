"""Plans by the compilers of chips that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoss_jax import plan
from gptoss_jax.chips.facts import TARGETS, GiB

ROOT = Path(__file__).parents[2]
TINY = ["--config", str(ROOT / "configs/tiny.py"), "--model.num_layers", "2"]
REAL = ["--config", str(ROOT / "configs/20b.py")]


def planned(tmp_path, *options: str) -> tuple[bool, dict]:
    file = tmp_path / "plan.json"
    fits = plan.run(*plan.parse([*options, "--json", str(file)]))
    return fits, json.loads(file.read_text())


@pytest.mark.parametrize("target", ["v5e:2x2", "h200:4"])
def test_a_train_step_on_a_mesh(target, tmp_path):
    mesh = ["--mesh.fsdp", "2", "--mesh.expert", "2"]
    fits, record = planned(tmp_path, *TINY, "--target", target, *mesh)
    assert fits and record["devices"] == 4
    (one,) = record["programs"]
    assert one["fits"] and one["peak"] < TARGETS[target.split(":")[0]].memory
    parts = one["parts"]
    # Float32 parameters and two moments; small ones are not split.
    assert parts["optimizer state"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    assert one["arguments"] >= sum(parts.values())
    kinds = one["collectives"]
    assert kinds["all-gather"]["count"] > 0 and kinds["all-gather"]["sent_bytes"] > 0
    assert all(entry["count"] > 0 for entry in kinds.values())
    # Rows go to experts in each of two layers, 4 rows of 512 tokens of 128 float32 a shard.
    assert one["receive_buffer"] == 2 * 2 * 512 * 128 * 4
    assert not one["unknown_loops"]


def test_a_refusal_for_memory_says_by_how_much(tmp_path, capsys):
    """20b in full on one v5e chip: the compiler itself refuses."""
    options = ["--target", "v5e:1x1", "--model.num_layers", "4", "--data.batch_size", "1"]
    fits, record = planned(tmp_path, *REAL, *options)
    (one,) = record["programs"]
    assert not fits and "RESOURCE_EXHAUSTED" in one["refused"]
    # 16 bytes a parameter, of 4 layers and the tables.
    assert one["peak"] > 14 * 4.3e9 > one["capacity"]
    assert "GiB too much: the compiler refused it" in capsys.readouterr().out


def test_20b_decodes_on_one_v5e_chip_with_8192_tokens_of_context(tmp_path):
    options = ["--what", "decode", "--context", "8192", "--model.experts", "mxfp4"]
    fits, record = planned(tmp_path, *REAL, "--target", "v5e:1x1", *options)
    (one,) = record["programs"]
    assert fits and one["spare"] > GiB
    assert one["parts"]["cache"] == 12 * (8192 + 128) * (8 * 64 * 2 * 2 + 4)
    # A token reads what is dense, four experts a layer of 32, and the cache: not the embedding.
    assert 3.5e9 < one["bytes_accessed"] < 4.2e9
