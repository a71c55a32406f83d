"""Runs, exports and answers of the code as it was: the code of today reads them and does the same.

tests/fixtures/before.tar.gz holds a data set, a base and the checkpoints of three runs, and
expected.json what the code that wrote them went on to compute, write and print. Both were made by
tests/fixtures/make_fixtures.py, which shows the commands. Bits are compared on the version of JAX
and the kind of CPU that they were made on; elsewhere numbers, to a few digits. What has come since
may be more: fields, options and lines are looked for, and others beside them are no difference.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gptoss_jax

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
BEFORE = json.loads((FIXTURES / "expected.json").read_text())
MADE_IN = "/tmp/gptoss_before"  # which records of runs over a base name still
KEPT = BEFORE["kept"]
RTOL = {"plain": 1e-5, "lora": 2e-2, "state": 2e-2}  # two of them in bfloat16
TEMPLATE = "chat_template.jinja"
CALCULATED = ("lora_hf",)  # of the exports: sums; the others are numbers as they are
LOSSES = ("step", "loss", "held_out_loss", "learning_rate", "tokens", "trained_tokens")
TIMES = ("tokens_per_second", "flops_per_second", "step_seconds", "mfu")

# Several commands one after the other: importing JAX takes longer than most of them.
MANY = """
import json, runpy, sys
for module, *args in json.loads(sys.argv[1]):
    sys.argv = [module, *args]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print("\\f", flush=True)
"""


def is_same_place() -> bool:
    """Say whether sums have the bits that they had where the fixtures were made."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.is_file() else set()
    vectors = sorted(w for w in words if re.fullmatch(r"avx\w*|fma|amx\w*|f16c", w))
    here = {"jax": jax.__version__, "machine": platform.machine(), "vectors": vectors}
    return here == BEFORE["made"]


EXACT = is_same_place()


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    """Return the folder of the unpacked fixtures, which nothing is written to."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(FIXTURES / "before.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """Return the environment that commands had then, with what is compiled shared among them."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "GPTOSS_"))}
    compiled = str(tmp_path_factory.mktemp("compiled"))
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    more = {"JAX_COMPILATION_CACHE_DIR": compiled, "PYTHONPATH": paths}
    return clean | BEFORE["env"] | more


def command(*args: str, env: dict[str, str]) -> str:
    run = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def commands(lines: list[list[str]], *, env: dict[str, str]) -> list[str]:
    said = command("-c", MANY, json.dumps(lines), env=env).split("\f\n")
    assert len(said) == len(lines) + 1
    return said[:-1]


def fill(args: list[str], **places: Path) -> list[str]:
    """Put folders in the places that the arguments name."""
    for name, path in places.items():
        args = [arg.replace("{" + name + "}", str(path)) for arg in args]
    return args


def check_printed(text: str, then: list[str], places: dict[Path, str]) -> None:
    """Hold all lines that there were to be there still, in their order; times apart.

    The sections of the config are in another order, that of --help, and so are their fields.
    """
    for path, name in places.items():
        text = text.replace(str(path), name)
    text = re.sub(r"  [\d,]+ tokens/s|  left [\d:]+|^time .*$", "", text, flags=re.M)
    text = re.sub(r"of [\d.,]+ .B that this device has", "of what this device has", text)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not EXACT:
        number = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")
        lines, then = ([number.sub("#", line) for line in some] for some in (lines, then))
    rest = iter(lines)
    gone = [
        line
        for line in then
        if not any(_is_line(line, new) for new in (lines if "=" in line else rest))
    ][:1]
    assert not gone, f"not printed, or not in its place: {gone[0]}\n" + "\n".join(lines)


def _is_line(then: str, now: str) -> bool:
    """Say whether a line is the one that it was, or a list of settings with more of them."""
    if "=" not in then:
        return then == now
    return not Counter(then.split()) - Counter(now.split())


def check_within(then: Any, now: Any, *, rtol: float, at: str = "") -> None:
    """Hold a record to what it was; it may have more fields."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key, value in then.items():
            assert key in now, f"{at}/{key} is gone"
            if EXACT or key not in ("checksums", "rng"):
                check_within(value, now[key], rtol=rtol, at=f"{at}/{key}")
    elif isinstance(then, list) and isinstance(now, list):
        assert len(then) == len(now), at
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            check_within(a, b, rtol=rtol, at=f"{at}/{i}")
    elif isinstance(then, float) and not EXACT:
        np.testing.assert_allclose(now, then, rtol=rtol, atol=rtol / 10, err_msg=at)
    else:
        assert then == now, at


def check_run(name: str, workdir: Path, here: Path) -> None:
    """Hold what a run wrote to what it wrote then, to the bit where that can be."""
    then, end = BEFORE["runs"][name], BEFORE["runs"][name]["record"]["step"]
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in values.items() if k not in TIMES} for values in log]
    wanted = then["metrics"]
    if not EXACT:  # a token that takes another expert changes the rest
        wanted = [{k: v for k, v in values.items() if k in LOSSES} for values in wanted]
    check_within(wanted, log, rtol=RTOL[name], at="metrics")
    samples = workdir / "samples.jsonl"
    if EXACT:
        assert then["samples"] == (samples.read_text().splitlines() if samples.exists() else [])
    text = (workdir / "checkpoints" / str(end) / "record" / "metadata").read_text()
    text = text.replace(str(workdir), "{here}/" + name)
    text = text.replace(str(here), "{here}").replace(MADE_IN, "{here}")
    check_within(then["record"], json.loads(text), rtol=RTOL[name], at="record")
    there = {path.name for path in workdir.iterdir()}
    assert {"config.json", "metrics.jsonl", "report.html", "curves.png", "tensorboard"} <= there


def hashes(folder: Path, *, here: Path) -> dict[str, str]:
    """Hash the files of an export, without fields that came since, and with the base's old path."""
    found = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.name == "config.json":
            content = re.sub(rb'  "(transformers_version|gptoss_jax_\w+)": .*\n', b"", content)
        elif file.name == "adapter_config.json":
            content = content.replace(str(here).encode(), MADE_IN.encode())
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("name", BEFORE["loaded"])
def test_parameters_are_loaded_as_before(name, before):
    more = {"base": str(before / "base")} if name == "lora" else {}
    _, params = gptoss_jax.load(before / name, **more)
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        x = np.asarray(x)
        what = hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]
        found[jax.tree_util.keystr(path)] = f"{x.dtype.name}{list(x.shape)} {what}"
    assert found == BEFORE["loaded"][name]


def test_a_base_is_saved_as_it_was(before, tmp_path):
    model, params = gptoss_jax.load(before / "base")
    gptoss_jax.save(tmp_path / "out", model, params, to="hf")
    now, then = (hashes(x, here=before) for x in (tmp_path / "out", before / "base"))
    # Both are other texts since; the new template has tests of its own.
    others = {"config.json": "", TEMPLATE: ""}
    assert now | others == then | others
    folders = (tmp_path / "out", before / "base")
    a, b = (json.loads((folder / "config.json").read_text()) for folder in folders)
    new = {"gptoss_jax_cut_vocabulary": 320, "transformers_version": "4.55.0"}
    assert a == {**b, **new, "initializer_range": 0.02}  # which is not read


@pytest.mark.slow
@pytest.mark.parametrize("name", BEFORE["runs"])
def test_a_run_goes_on_as_before(name, before, tmp_path, env):
    workdir = tmp_path / name
    shutil.copytree(before / name, workdir)
    args = fill(BEFORE["runs"][name]["args"], here=before)
    said = command("-m", "gptoss_jax.train", *args, "--workdir", str(workdir), env=env)
    places = {workdir: "{here}/" + name, before: "{here}"}
    check_printed(said, BEFORE["runs"][name]["again"], places)
    check_run(name, workdir, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain"])  # expected.json has the others' as well
def test_a_new_run_is_as_before(name, before, tmp_path, env):
    workdir = tmp_path / name
    args = fill(BEFORE["runs"][name]["args"], here=before)
    said = command("-m", "gptoss_jax.train", *args, "--workdir", str(workdir), env=env)
    places = {workdir: "{here}/" + name, before: "{here}"}
    check_printed(said, BEFORE["runs"][name]["first"], places)
    check_run(name, workdir, before)
    kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert str(KEPT) in kept


@pytest.mark.slow
def test_a_dry_run_prints_what_it_printed(before, env):
    args = fill(BEFORE["dry_run"]["args"], here=before)
    said = command("-m", "gptoss_jax.train", *args, env=env)
    check_printed(said, BEFORE["dry_run"]["printed"], {before: "{here}"})


@pytest.mark.slow
def test_answers_are_as_before(before, env):
    then = BEFORE["samples"]
    lines = [["gptoss_jax.sample", *fill(x["args"], here=before), "--json"] for x in then.values()]
    for name, said in zip(then, commands(lines, env=env), strict=True):
        now, was = json.loads(said), then[name]["said"]
        assert now.keys() >= was.keys()
        for key in was if EXACT else ("prompt_ids",):
            assert now[key] == was[key], f"{name}: {key}"
        if not EXACT:  # beyond the first token a near tie would make another answer
            rtol = RTOL[name.partition("_")[0]]
            np.testing.assert_allclose(now["logprobs"][0], was["logprobs"][0], rtol=rtol)


@pytest.mark.slow
def test_exports_are_as_before(before, tmp_path, env):
    then = BEFORE["exports"]
    lines = [
        ["gptoss_jax.convert", *fill(x["args"], here=before, out=tmp_path / name)]
        for name, x in then.items()
    ]
    for name, said in zip(then, commands(lines, env=env), strict=True):
        found, files = hashes(tmp_path / name, here=before), dict(then[name]["files"])
        # The chat template is another text since: a run's is ours, any other is the source's.
        files.pop(TEMPLATE, None)
        source = Path(fill(then[name]["args"], here=before)[0]) / TEMPLATE
        text = source.read_text() if source.is_file() else gptoss_jax.harmony.chat_template()
        assert found.pop(TEMPLATE) == hashlib.sha256(text.encode()).hexdigest(), name
        if EXACT or name not in CALCULATED:
            assert found == files, name
        assert found.keys() == files.keys(), name
        places = {tmp_path: "{here}/exports", before: "{here}"}
        check_printed(said, then[name]["printed"], places)
        if "--to peft" not in " ".join(then[name]["args"]):
            gptoss_jax.load(tmp_path / name)
