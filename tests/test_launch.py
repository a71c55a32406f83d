"""The files in launch/: what they start is a command of this package, with options that it has."""

from __future__ import annotations

import math
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gptoss_jax.chips import topologies
from gptoss_jax.config import Config, command_line
from gptoss_jax.parallel import mesh, sharding

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from launch import whole_run  # noqa: E402

LAUNCH = ROOT / "launch"


def train_options(text: str) -> list[str]:
    """Return the arguments of the command, up to its end, with 1 in place of shell variables."""
    text = text.replace("\\\n", " ")
    after = re.split(
        r"gptoss-jax train|launch\.whole_run|slurm\.sh|tpu\.sh train", text, maxsplit=1
    )
    words = shlex.split(after[1].strip().splitlines()[0], comments=True)
    return [re.sub(r"\$\w+", "1", word) for word in words]


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def skypilot() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def workers() -> dict:
    (job,) = jobset()["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def container() -> dict:
    (one,) = workers()["template"]["spec"]["containers"]
    return one


def text_of(name: str) -> str:
    """Return a file's text without the signs of comments, which hold commands."""
    return re.sub(r"^# ?", "", (LAUNCH / name).read_text(), flags=re.MULTILINE)


def commands() -> dict[str, str]:
    docs = (ROOT / "docs" / "many_devices.md").read_text()
    return {
        "jobset": container()["args"][0],
        "skypilot": skypilot()["run"],
        "docker": text_of("Dockerfile").replace(" train ", " gptoss-jax train ", 1),
        "slurm": text_of("slurm.sh"),
        "cloud_tpu": text_of("cloud_tpu.sh"),
        "docs": docs,
    }


def devices(name: str) -> int:
    """Return how many devices the command of a file gets."""
    if name == "jobset":
        return workers()["parallelism"] * int(container()["resources"]["limits"]["nvidia.com/gpu"])
    if name == "skypilot":
        return skypilot()["num_nodes"] * int(skypilot()["resources"]["accelerators"].split(":")[1])
    if name == "cloud_tpu":
        (slice_name,) = re.findall(r"TYPE:-([\w-]+)", text_of("cloud_tpu.sh"))
        return math.prod(map(int, topologies.split(slice_name)[1].split("x")))
    if name == "docker":
        return 8  # --gpus all
    counts = re.findall(r"SBATCH --(?:nodes|gpus-per-node)=(\d+)", text_of("slurm.sh"))
    return math.prod(map(int, counts))


def config_of(name: str) -> Config:
    return command_line.load(train_options(commands()[name]))


@pytest.mark.parametrize("name", ["jobset", "skypilot", "docker"])
def test_the_command_has_only_options_that_there_are(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_of(name)
    assert config.workdir == "/data/runs/first" and config.data.train == ("/data/chats.jsonl",)
    if name != "docker":
        assert config.mesh.fsdp == -1
        assert config.distributed.num_processes == config.distributed.process_id == 1


@pytest.mark.parametrize("name", ["jobset", "skypilot", "docker", "slurm", "cloud_tpu", "docs"])
def test_the_batch_divides_over_the_devices_of_the_file(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, count = config_of(name), devices(name)
    sizes = mesh.resolve(config.mesh, count)
    assert math.prod(sizes) == count or name == "docker"  # which has one process, on one device
    rows = config.data.batch_size // config.optimizer.accumulate
    shape = dict(zip(mesh.AXES, sizes, strict=True))
    sharding.check_batch(rows, config.data.sequence_length, SimpleNamespace(shape=shape))


@pytest.mark.parametrize(("step", "code"), [(None, 75), (7, 75), (10, 0)])
def test_a_run_that_was_stopped_is_started_again(step, code, tmp_path, monkeypatch):
    """Its exit code is one that the files start again, not 0 and not that of a user's mistake."""
    config = command_line.load(["--config", "20b_lora", "--train.steps", "10"])
    record = None if step is None else SimpleNamespace(step=step, config=config)
    monkeypatch.setattr(whole_run.train, "main", lambda argv: None)
    monkeypatch.setattr(whole_run.records, "newest_record", lambda workdir: record)
    argv = ["whole_run", "--config", "20b_lora", "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stopped:
        whole_run.run_entry(whole_run.main)
    assert stopped.value.code == code
    assert skypilot()["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    for name in ("jobset", "skypilot"):
        assert "exec" in commands()[name] and "launch.whole_run" in commands()[name]


def test_every_process_of_the_jobset_finds_the_first():
    """The name of pod 0 is made of the names of the JobSet and its job."""
    name, (job,) = jobset()["metadata"]["name"], jobset()["spec"]["replicatedJobs"]
    assert f"--distributed.coordinator {name}-{job['name']}-0-0.{name}:" in commands()["jobset"]
    nodes = {env["name"]: env["value"] for env in container()["env"]}["NODES"]
    assert workers()["completions"] == workers()["parallelism"] == int(nodes)
    (rule,) = workers()["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container()["name"]


def test_the_image_has_what_it_copies_and_extras_that_there_are():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"EXTRA=(\w+)", text)) <= set(project["optional-dependencies"])
