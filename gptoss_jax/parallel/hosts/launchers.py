"""Find what launched a run's processes: Cloud TPU, Slurm, Kubernetes, Open MPI, or flags."""

from __future__ import annotations

import importlib.util
import re
import urllib.request
from collections.abc import Mapping
from typing import Any

from gptoss_jax.config import DistributedConfig
from gptoss_jax.errors import UserError

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def find(config: DistributedConfig, environ: Mapping[str, str]) -> str | None:
    """Return the launcher that started this process as one of several, or "flags".

    None means that the process runs alone.

    Raises:
        UserError: The flags are incomplete or invalid, or as `detect` raises.
    """
    given = {f: getattr(config, f) for f in ("coordinator", "num_processes", "process_id")}
    missing = [f"--distributed.{f.replace('_', '-')}" for f, v in given.items() if v is None]
    if config.num_processes == 1:
        return None
    if len(missing) == 3:
        return detect(environ)
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: --distributed.coordinator HOST:PORT, "
            "--distributed.num-processes and --distributed.process-id go together"
        )
    number, i = given["num_processes"], given["process_id"]
    if not 0 <= i < number:
        raise UserError(
            f"--distributed.process-id is {i}: for {number} processes give one of 0 to {number - 1}"
        )
    host, _, port = given["coordinator"].rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65_536):
        raise UserError(f"--distributed.coordinator {given['coordinator']}: give it as HOST:PORT")
    return "flags"


def detect(environ: Mapping[str, str]) -> str | None:
    """Return the launcher that started this process as one of several; None if it runs alone.

    It reads environment variables, so that a process alone never waits. Only on a machine with TPU
    chips it asks the metadata server, for at most 2 seconds.

    Raises:
        UserError: JAX needs a package to join the processes, and it is not installed.
    """
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ and not _has("mpi4py"):
            raise UserError(
                "Open MPI 5 started several processes: pip install mpi4py, or give "
                "--distributed.coordinator HOST:PORT --distributed.num-processes "
                "$OMPI_COMM_WORLD_SIZE --distributed.process-id $OMPI_COMM_WORLD_RANK"
            )
        return "Open MPI"
    # A number of tasks is not enough: an interactive shell, or a batch script before `srun`, has
    # the job's number of tasks in its environment, but is a single task.
    step = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if step > 1 and "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        return "Slurm"
    tpu = _tpu_processes(environ)
    if tpu is not None:
        return "Cloud TPU" if tpu > 1 else None
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if not _has("kubernetes"):
            raise UserError(
                "this is a pod of an indexed Kubernetes job: pip install 'jax[k8s]' to join the "
                "others, or give --distributed.num-processes 1 to run alone"
            )
        return "Kubernetes"
    return None


def _number(environ: Mapping[str, str], *names: str) -> int:
    found = [environ[name] for name in names if environ.get(name, "").isdigit()]
    return int(found[0]) if found else 0


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _tpu_processes(environ: Mapping[str, str]) -> int | None:
    """Return the number of hosts of this machine's TPU; None if it uses no TPU."""
    platforms = environ.get("JAX_PLATFORMS")
    if (platforms and "tpu" not in platforms) or not _has("libtpu"):
        return None
    slices = max(1, _number(environ, "MEGASCALE_NUM_SLICES"))
    named = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if named is not None:  # Google Kubernetes Engine
        return slices * len(named.split(","))
    if "TPU_SKIP_MDS_QUERY" in environ:  # JAX sets it if there are no chips
        return None
    try:
        hosts, about = (_metadata(key) for key in ("worker-network-endpoints", "tpu-env"))
    except OSError:
        return None
    found = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", about)
    return (int(found[1]) if found else slices) * len(hosts.split(","))


def _metadata(key: str) -> str:
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=2) as answer:
        return answer.read().decode()


def options(kind: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of `jax.distributed.initialize` that it does not find by itself."""
    if kind == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in environ:
        return {"cluster_detection_method": "mpi4py"}
    # By default JAX gives each Slurm task only the GPU with the task's number. That is wrong for
    # one task per node, which has all GPUs, and for a task to which Slurm shows one GPU, which is
    # number 0.
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    whole = nodes == _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if kind == "Slurm" and (whole or environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()):
        return {"local_device_ids": []}
    return {}
