"""The files in launch/: what they start is a command of this package, with options that it has."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from gptoss_jax.config import command_line

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def train_options(text: str) -> list[str]:
    """Return the arguments after `gptoss-jax train`, with 1 in place of shell variables."""
    after = text.split("gptoss-jax train", 1)[1]
    words = shlex.split(after.replace("\\\n", " "))
    return [re.sub(r"\$\w+", "1", word) for word in words]


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def workers() -> dict:
    (job,) = jobset()["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def commands() -> dict[str, str]:
    (container,) = workers()["template"]["spec"]["containers"]
    docker = (LAUNCH / "Dockerfile").read_text().split("docker run")[1].split("# `docker stop`")[0]
    return {
        "jobset": container["args"][0],
        "skypilot": yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"],
        "docker": docker.replace("#", " ").replace(" train ", " gptoss-jax train "),
    }


@pytest.mark.parametrize("name", ["jobset", "skypilot", "docker"])
def test_the_command_has_only_options_that_there_are(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = command_line.load(train_options(commands()[name]))
    assert config.workdir == "/data/runs/first" and config.data.train == ("/data/chats.jsonl",)
    if name != "docker":
        assert config.mesh.fsdp == -1
        assert config.distributed.num_processes == config.distributed.process_id == 1


def test_every_process_of_the_jobset_finds_the_first():
    """The name of pod 0 is made of the names of the JobSet and its job."""
    name, (job,) = jobset()["metadata"]["name"], jobset()["spec"]["replicatedJobs"]
    assert f"--distributed.coordinator {name}-{job['name']}-0-0.{name}:" in commands()["jobset"]
    (container,) = workers()["template"]["spec"]["containers"]
    nodes = {env["name"]: env["value"] for env in container["env"]}["NODES"]
    assert workers()["completions"] == workers()["parallelism"] == int(nodes)
    (rule,) = workers()["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_image_has_what_it_copies_and_extras_that_there_are():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"EXTRA=(\w+)", text)) <= set(project["optional-dependencies"])
