from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint as tiny
from tiny_checkpoint import small_model

from gptoss_jax import loading, verify, weights
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.weights import golden


def test_the_two_published_sizes_are_told_apart() -> None:
    assert golden.size_of(ModelConfig(experts="mxfp4", dtype="float32")) == "20b"
    assert golden.size_of(ModelConfig(num_layers=36, num_experts=128)) == "120b"
    for other in ({"num_layers": 36}, {"layer_pattern": "full"}, {"rope_factor": 16.0}):
        with pytest.raises(UserError, match="and this is neither"):
            golden.size_of(dataclasses.replace(ModelConfig(), **other))


def test_agreement_is_within_the_tolerance_and_complete() -> None:
    for known in golden.LOGPROBS.values():
        assert len(known) == 12
        assert golden.agrees([x + 0.09 for x in known], known) == [True] * 12
        assert golden.agrees([x - 0.11 for x in known], known) == [False] * 12
        assert golden.agrees(known[:-1], known) == [True] * 11 + [False]
    assert golden.agrees([math.nan], [0.0]) == [False]


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    tiny.write(tmp_path / "c", tiny.make_tree(packed=True), "hf")
    with pytest.raises(UserError, match="4 layers, 5 experts, d_model 64, vocabulary 97"):
        verify.verify(tmp_path / "c")


def test_a_whole_run_on_a_small_model(tmp_path: Path, monkeypatch, capsys) -> None:
    """With the golden numbers taken from the model itself, and then with one of them moved."""
    model, params = small_model(vocab_size=500, param_dtype="float32", dtype="float32")
    rng = np.random.default_rng(0)
    params["embedding"]["weight"] = rng.standard_normal((500, 32)).astype(np.float32)
    params["unembedding"]["weight"] = rng.standard_normal((500, 32)).astype(np.float32)
    weights.save(tmp_path / "c", model, params)
    monkeypatch.setattr(golden, "_20B", loading.load(tmp_path / "c")[0].config)
    monkeypatch.setitem(golden.LOGPROBS, "20b", (0.0,) * 12)
    seen = []
    monkeypatch.setattr(golden, "agrees", lambda ours, _: seen.append(list(ours)) or [True] * 12)
    assert verify.verify(tmp_path / "c")
    monkeypatch.undo()
    monkeypatch.setattr(golden, "_20B", loading.load(tmp_path / "c")[0].config)
    monkeypatch.setitem(golden.LOGPROBS, "20b", tuple(seen[0]))
    verify.main(["--checkpoint", str(tmp_path / "c")])
    assert "12 of 12 within 0.1: ok" in capsys.readouterr().out
    moved = [*seen[0][:5], seen[0][5] - 0.2, *seen[0][6:]]
    monkeypatch.setitem(golden.LOGPROBS, "20b", tuple(moved))
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--checkpoint", str(tmp_path / "c")])
    assert stopped.value.code == 1
    assert "11 of 12 within 0.1: WRONG" in capsys.readouterr().out
