"""What every test runs under: a CPU, shown as 8 devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# The parity tests share a mapping that is no package.
sys.path.insert(0, str(Path(__file__).parent / "parity"))
