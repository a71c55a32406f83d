"""How processes find each other, agree and end: by tables, and by processes that only talk."""

from __future__ import annotations

import os
import textwrap

import jax
import numpy as np
import pytest
from hosts import ROOT, Processes, python

from gptoss_jax import data, train
from gptoss_jax.config import Config, DistributedConfig, MeshConfig, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel.hosts import launchers, processes
from gptoss_jax.types import Batch

STEP = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
STEP |= {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


# --- What starts them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"HOME": "/root", "PATH": "/bin"}, None),
        (STEP, "Slurm"),
        # One task; an interactive shell of a job of two; a batch script before srun.
        (STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, None),
        (MPI | URI, "Open MPI"),
        (MPI | URI | STEP, "Open MPI"),
        (MPI | URI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (POD, None),  # every pod has it
        (POD | {"JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
    ],
)
def test_the_environment_says_that_there_are_others(environ, found, monkeypatch):
    monkeypatch.setattr(launchers, "_has", lambda module: module == "kubernetes")
    assert launchers.detect(environ) == found


@pytest.mark.parametrize(
    ("environ", "metadata", "found"),
    [
        # Google Kubernetes Engine says it in variables.
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, None, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, None),
        ({"TPU_PROCESS_ADDRESSES": "local"}, None, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None, "Cloud TPU"),
        # A job of a TPU on one host is one process, indexed or not.
        ({**POD, "JOB_COMPLETION_INDEX": "0", "TPU_WORKER_HOSTNAMES": "a"}, None, None),
        # A TPU VM asks its metadata server; without chips JAX sets TPU_SKIP_MDS_QUERY.
        ({}, ("w:0:10.0.0.2,w:1:10.0.0.3", ""), "Cloud TPU"),
        ({}, ("10.0.0.2", "ZONE: 'x'"), None),
        ({}, ("10.0.0.2", "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'"), "Cloud TPU"),
        ({}, None, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ("a,b", ""), None),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, None, None),
    ],
)
def test_tpus(environ, metadata, found, monkeypatch):
    def answer(key):
        if metadata is None:
            raise TimeoutError
        return metadata[key == "tpu-env"]

    monkeypatch.setattr(launchers, "_has", lambda module: module == "libtpu")
    monkeypatch.setattr(launchers, "_metadata", answer)
    assert launchers.detect(environ) == found


def test_what_a_launcher_needs_is_said(monkeypatch):
    monkeypatch.setattr(launchers, "_has", lambda module: False)
    with pytest.raises(UserError, match=r"pip install mpi4py, or give --distributed\.coordinator"):
        launchers.detect(MPI)
    with pytest.raises(UserError, match=r"jax\[k8s\].*--distributed\.num-processes 1 to run alone"):
        launchers.detect(POD | {"JOB_COMPLETION_INDEX": "0"})


def test_a_task_of_slurm_has_the_gpus_that_it_is_shown():
    nodes = STEP | {"SLURM_STEP_NUM_NODES": "2"}
    assert launchers.options("Slurm", nodes) == {"local_device_ids": []}
    many = nodes | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}
    assert launchers.options("Slurm", many) == {}  # JAX gives each the one of its number
    assert launchers.options("Slurm", many | {"CUDA_VISIBLE_DEVICES": "3"}) != {}
    assert launchers.options("Open MPI", MPI | URI) == {}
    assert launchers.options("Open MPI", MPI) == {"cluster_detection_method": "mpi4py"}


def test_jax_reads_the_same_variables(monkeypatch):
    """Hold the names that are read here against those of JAX's own detection."""
    from jax._src.clusters import OmpiCluster, SlurmCluster

    for name, value in (STEP | MPI | URI).items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present() and OmpiCluster.is_env_present()
    assert SlurmCluster.get_process_count() == 2 and SlurmCluster.get_process_id() == 1
    monkeypatch.setenv("OMPI_VERSION", "4.1.6")
    assert OmpiCluster.get_process_count() == 2 and OmpiCluster.get_process_id() == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--distributed.num-processes 2", "--distributed.coordinator and --distributed.process-id"),
        ("--distributed.coordinator a:1", "-processes and --distributed.process-id missing"),
        (
            "--distributed.process-id 2 --distributed.num-processes 2 --distributed.coordinator a:1",  # noqa: E501
            "--distributed.process-id is 2: for 2 processes give one of 0 to 1",
        ),
        (
            "--distributed.coordinator a --distributed.num-processes 2 --distributed.process-id 1",
            "--distributed.coordinator a: give it as HOST:PORT",
        ),
    ],
)
def test_flags_that_are_incomplete_or_wrong(flags, message, tmp_path):
    args = ["--config", "configs/tiny.py", "--workdir", str(tmp_path / "w"), *flags.split()]
    with pytest.raises(UserError) as error:
        train.main(args)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "w").exists()


def test_alone_nothing_is_started(monkeypatch):
    def initialize(**options):
        raise AssertionError("it was")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in {**STEP, **MPI, **URI, **POD}:
        monkeypatch.delenv(name, raising=False)
    with processes.start(DistributedConfig()):
        assert (processes.index(), processes.count()) == (0, 1) and processes.is_first()
        assert processes.from_first(lambda: 3) == processes.together(lambda: 3) == 3
        processes.same({"a": 1}, "the config")
        with pytest.raises(ValueError, match="x"), processes.start(DistributedConfig()):
            raise ValueError("x")
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with processes.start(DistributedConfig(num_processes=1)):
        assert processes.count() == 1
    with pytest.raises(UserError, match=r"can't be joined \(Slurm\): it was"):
        processes.start(DistributedConfig()).__enter__()


# --- Rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "per_process", "ranges"),
    [
        ({"data": 8}, 4, [(0, 8), (8, 16)]),
        ({"fsdp": 2, "expert": 4}, 2, [(0, 4), (4, 8), (8, 12), (12, 16)]),
        ({"data": 2, "tensor": 4}, 4, [(0, 8), (8, 16)]),
        # Axes that spread no rows: processes along them read the same ones.
        ({"data": 2, "tensor": 4}, 2, [(0, 8), (0, 8), (8, 16), (8, 16)]),
        ({"context": 4, "tensor": 2}, 4, [(0, 16), (0, 16)]),
        # Processes of unequal numbers of devices.
        ({"fsdp": 4, "context": 2}, 3, [(0, 8), (4, 12), (12, 16)]),
        ({"data": 2, "fsdp": 2, "expert": 2}, 8, [(0, 16)]),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(sizes, per_process, ranges):
    mesh = meshes.make(MeshConfig(**sizes))
    devices = list(mesh.devices.flat)
    parts = [devices[at : at + per_process] for at in range(0, 8, per_process)]
    assert [data.rows_of(part, mesh, 16) for part in parts] == ranges
    assert data.rows_here(mesh, 16) == (0, 16)


def test_rows_become_global_arrays():
    mesh = meshes.make(MeshConfig(data=2, context=2, tensor=-1))
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 9, (6, 10)).astype(np.int32) for _ in range(5)]
    batch = Batch(*arrays, sources=np.arange(6, dtype=np.int32))
    found = data.spread(batch, mesh, rows=(0, 6), size=6)
    jax.tree.map(np.testing.assert_array_equal, found, batch)
    assert found.tokens.sharding.shard_shape((6, 10)) == (3, 5)
    assert found.sources.sharding.shard_shape((6,)) == (3,)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(tmp_path):
    args = ["--config", "configs/tiny.py", "--workdir", str(tmp_path / "w"), "--mesh.fsdp", "8"]
    with pytest.raises(UserError, match=r"make it a multiple of 8") as error:
        train.main([*args, "--data.batch_size", "12"])
    assert "\n" not in str(error.value) and not (tmp_path / "w").exists()


def test_a_config_as_a_flat_table_leaves_out_who_one_is():
    flat = command_line.flat(Config(distributed=DistributedConfig("a:1", 2, 1)))
    assert flat["train.steps"] == Config().train.steps and flat["name"] == "20b"
    assert not [name for name in flat if "process" in name]


# --- Processes --------------------------------------------------------------------------------

TALK = """
    import os, sys, time
    from gptoss_jax.config import DistributedConfig
    from gptoss_jax.errors import UserError, run_entry
    from gptoss_jax.parallel.hosts import processes

    BODY = sys.argv.pop(1)

    def fail(text):
        raise UserError(text)

    def main(args):
        at = dict(zip(args[::2], args[1::2]))
        i = int(at["--distributed.process-id"])
        count = int(at["--distributed.num-processes"])
        config = DistributedConfig(at["--distributed.coordinator"], count + OTHER * i, i, WAIT)
        with processes.start(config):
            exec(BODY, globals() | {"i": i})

    run_entry(main)
"""


def talk(tmp_path, body: str, *, count: int = 2, other: int = 0, wait: int = 120) -> Processes:
    """Start processes that run a line of Python in a job, without a device."""
    code = textwrap.dedent(TALK).replace("OTHER", str(other)).replace("WAIT", str(wait))
    return Processes(python("-c", code, body), folder=tmp_path, count=count)


def errors(run: Processes, i: int) -> list[str]:
    return [line for line in run.said(i).splitlines() if not line.startswith("[Gloo]")]


def test_processes_agree_and_fail_together(tmp_path):
    body = (
        "assert processes.from_first(lambda: [i]) == [0]\n"
        "assert processes.together(lambda: i) == i\n"
        "try: processes.from_first(lambda: fail(f'at {i}'))\n"
        "except UserError as error: print(error, processes.count(), flush=True)\n"
        "try: processes.together(lambda: i and fail(f'by {i}'))\n"
        "except UserError as error: print(error, flush=True)\n"
        "if i: fail('of 1 alone')\n"
        "time.sleep(100)"
    )
    run = talk(tmp_path, body)
    assert run.codes(seconds=90) == [2, 2]
    for i in range(2):
        assert errors(run, i) == ["at 0 2", "by 1", "error: process 1: of 1 alone"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "codes", "said"),
    [
        ("pass", [0, 0], [[], []]),
        # What all find is said once.
        ("fail('alike')", [2, 2], [["error: alike"], []]),
        ("processes.same({'a': {'b': i}}, 'the config')", [2, 2], [["a is {'b': 0} on"], []]),
        ("sys.exit(1)", [1, 1], [[], []]),
        ("1 / i if i == 0 else time.sleep(99)", [1, 1], [["ZeroDivisionError: division"], []]),
    ],
)
def test_how_processes_end(tmp_path, body, codes, said):
    run = talk(tmp_path, body)
    assert run.codes(seconds=90) == codes
    for i in range(2):
        lines = [line for line in errors(run, i) if line.startswith("error: ")]
        assert len(lines) == len(said[i])
        assert all(want in line for want, line in zip(said[i], lines, strict=True))


@pytest.mark.slow
def test_others_that_do_not_come(tmp_path):
    run = talk(tmp_path / "counts", "time.sleep(99)", other=1)
    assert run.codes(seconds=90) == [2, 2]
    (line,) = errors(run, 0)
    assert line.startswith("error: --distributed.num-processes is not the same on all processes")
    for alone in (0, 1):
        run = talk(tmp_path / f"alone{alone}", "pass", wait=8)
        run.all[1 - alone].kill()
        assert run.codes(seconds=90)[alone] == 2
        (line,) = errors(run, alone)
        want = (
            "error: process 1: localhost:" if alone else "error: not all 2 processes joined in 8 s"
        )
        assert line.startswith(want) and "start all of them" in line
        assert "was not reached in 8 s" in line or alone == 0


@pytest.mark.slow
def test_a_workdir_that_not_all_hosts_see(tmp_path):
    """As two hosts would have it whose disks are their own."""
    body = (
        "from gptoss_jax.runs.workdir import Hold\n"
        f"with Hold('{tmp_path}/run' + str(i)) as hold: hold.take()"
    )
    run = talk(tmp_path, body)
    assert run.codes(seconds=90) == [2, 2]
    (line,) = errors(run, 0)
    assert line.startswith("error: process 1, on ") and "does not see the workdir" in line
    assert f"{tmp_path}/run1 of process 0: name one" in line
    assert not (tmp_path / "run0/lock").exists() and not (tmp_path / "run1").exists()


def slurm(i: int) -> dict[str, str]:
    nodes = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "2"}
    return STEP | nodes | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_PROCID": str(i)}


def open_mpi(i: int) -> dict[str, str]:
    uri = f"{os.getpid() * 2**12}.0;tcp://127.0.0.1:34911"
    rank = {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
    return MPI | rank | {"OMPI_MCA_orte_hnp_uri": uri, "OMPI_VERSION": "4.1.6"}


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_processes_that_a_launcher_started(tmp_path, launcher):
    code = (
        "import jax\n"
        "from gptoss_jax.parallel.hosts import processes\n"
        "from gptoss_jax.config import DistributedConfig\n"
        "with processes.start(DistributedConfig(wait_seconds=60)):\n"
        "    print(processes.index(), processes.from_first(processes.count), flush=True)\n"
        "    print(jax.process_index(), jax.device_count(), jax.local_device_count())\n"
    )
    run = Processes(python("-c", code), folder=tmp_path, count=2, devices=3, launcher=launcher)
    assert run.codes(seconds=90) == [0, 0], run.said(0)
    for i in range(2):
        assert errors(run, i) == [f"{i} 2", f"{i} 6 3"]
