"""What every test runs under: a CPU, shown as 8 devices."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

try:
    import hypothesis
except ImportError:  # the environment of the aot tier has none
    hypothesis = None
else:
    # The same examples in each session: what passed here passes elsewhere. Other examples:
    # `pytest --hypothesis-profile=new`. To explain a failure takes minutes, so nothing does.
    _phases = [phase for phase in hypothesis.Phase if phase.name != "explain"]
    hypothesis.settings.register_profile("same", derandomize=True, database=None, phases=_phases)
    hypothesis.settings.register_profile("new", database=None, phases=_phases)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Compiled code is shared by all processes: xdist's workers and the runs that tests start. A folder
# of this environment keeps it, so that the next session (a later tier, too) finds it. The key says
# what it was made by and for: the program, the versions, the flags, the CPU.
COMPILED = Path(sys.prefix) / "compiled"
MOST = 1 << 30  # bytes that the folder has room for
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Tracing makes many small objects that live on: looking through them each 700 takes a tenth of all.
gc.set_threshold(50_000, 10, 10)
# The parity tests share a mapping that is no package.
sys.path.insert(0, str(Path(__file__).parent / "parity"))


def pytest_addoption(parser):
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of a test's cases only every N-th (every second at most where some JAX skips it)",
    )
    parser.addoption(
        "--part",
        type=int,
        default=0,
        metavar="K",
        help="which cases --every takes, 0 to N-1; the N parts together are all cases",
    )
    parser.addoption(
        "--in-turn",
        action="store_true",
        help="count the cases of all tests together: a test with few cases is not in every part",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="compile for the CPU with little optimisation: a quarter of the compiler's time",
    )


def pytest_configure(config):
    """Ask for little optimisation before JAX is imported; runs that tests start inherit it."""
    if hypothesis is not None and not config.getoption("--hypothesis-profile", None):
        hypothesis.settings.load_profile("same")
    if config.getoption("--quick"):
        flags = ["--xla_backend_optimization_level=0"]
        if version("jax").startswith("0.10."):  # others do not know it, and XLA ends the process
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ["XLA_FLAGS"] += " " + " ".join(flags)
    if not hasattr(config, "workerinput"):
        files = list(COMPILED.glob("*-cache"))
        if sum(file.stat().st_size for file in files) > MOST:
            for file in files:
                file.unlink(missing_ok=True)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    """Leave out the exhaustive lists, of ten thousand cases, where -m does not ask for them."""
    asked = collector.config.getoption("-m")
    if asked and asked.replace("not exhaustive", "").find("exhaustive") < 0:
        marks = getattr(obj, "pytestmark", None)
        if isinstance(marks, list) and any(mark.name == "exhaustive" for mark in marks):
            return []
    return None


@pytest.hookimpl(trylast=True)  # after the marks were looked at
def pytest_collection_modifyitems(config, items):
    every, part = config.getoption("--every"), config.getoption("--part")
    if every == 1:
        return
    in_turn = config.getoption("--in-turn")
    tests = [item.nodeid.partition("[")[0] for item in items]
    cases, seen, kept, left_out = Counter(tests), Counter(), [], []
    for i, (item, test) in enumerate(zip(items, tests, strict=True)):
        # Other versions of JAX skip these cases, so at least every second one runs.
        n = min(every, 2) if item.get_closest_marker("skipif") else every
        taken = i % n == part % n if in_turn else seen[test] % n == part % min(n, cases[test])
        (kept if taken else left_out).append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
