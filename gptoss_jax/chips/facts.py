"""The table of chips: data-sheet figures of each device, and JAX's name for it."""

from __future__ import annotations

from dataclasses import dataclass

GiB = 2**30

# GiB of a GPU that no XLA program can use: CUDA's context, and its libraries' handles and
# workspaces. To use all the rest, raise XLA_PYTHON_CLIENT_MEM_FRACTION from its default of 0.75.
GPU_RESERVE = 0.4


@dataclass(frozen=True)
class Facts:
    """Rates per second of one JAX device. One tpu7x chip is two devices, each half of the chip."""

    flops: float  # dense bfloat16 (float16 where there is none)
    bandwidth: float  # bytes between memory and chip
    source: str


@dataclass(frozen=True)
class Target(Facts):
    """A device that programs can be compiled for without having one: see `chips.topologies`."""

    nominal: str  # memory as advertised
    memory: int  # bytes that a program can use
    links: float  # bytes from a device to its neighbours, over all its links, in one direction
    network: float  # bytes to devices of another host or slice, in one direction


def _on_gpu(reported: float) -> int:
    """Return the usable bytes of a GPU whose driver reports `reported` GiB."""
    return int((reported - GPU_RESERVE) * GiB)


# TPU memory is the limit of libtpu's compiler ("exceeds available HBM (15.75G)"), which already
# excludes the system's part. TPU rates are from cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e
# and tpu7x. Links are half of the "bidirectional" figure; the network of a chip is its share of its
# host's network. Those pages count per chip. JAX shows the two chiplets of a tpu7x chip as two
# devices ("dual-chiplet architecture" on that page), so all its rates are halved.
# GPU memory is the total that CUDA reports (deviceQuery; torch's "total capacity"), less
# GPU_RESERVE. GPU rates are from NVIDIA's data sheets, without sparsity. Links are one direction of
# NVLink, or of PCIe with 16 lanes (T4: 3.0; L4, L40S and RTX 4090: 4.0; RTX 5090: 5.0). The network
# is one port per GPU: of 400 Gbit/s as in DGX H100, H200 and B200, 200 Gbit/s as in DGX A100, and
# 100 Gbit/s for GPUs on PCIe. The rates of the two RTX cards are from the white papers of their
# architectures, with float32 accumulation; GH200 is the one with 96 GB.
FACTS = {
    "v5e": Target(
        197e12, 819e9, "Cloud TPU v5e page", "16 GB", int(15.75 * GiB), 200e9, 6.25e9
    ),
    "v5p": Target(
        459e12, 2765e9, "Cloud TPU v5p page", "95 GB", int(95.73 * GiB), 600e9, 6.25e9
    ),
    "v6e": Target(
        918e12, 1638e9, "Cloud TPU v6e page", "32 GB", int(31.24 * GiB), 400e9, 12.5e9
    ),
    "tpu7x": Target(
        1153.5e12, 3690e9, "Cloud TPU7x page, half a chip", "96 GB", int(94.74 * GiB), 300e9, 6.25e9
    ),
    "t4": Target(65e12, 320e9, "T4 data sheet (float16)", "16 GB", _on_gpu(14.56), 16e9, 12.5e9),
    "l4": Target(121e12, 300e9, "L4 data sheet", "24 GB", _on_gpu(22.05), 32e9, 12.5e9),
    "h100": Target(989e12, 3350e9, "H100 SXM data sheet", "80 GB", _on_gpu(79.11), 450e9, 50e9),
    "h200": Target(989e12, 4800e9, "H200 SXM data sheet", "141 GB", _on_gpu(139.8), 450e9, 50e9),
    "b200": Target(2250e12, 8000e9, "HGX B200 data sheet", "180 GB", _on_gpu(178.34), 900e9, 50e9),
    "gh200": Target(989e12, 4000e9, "GH200 data sheet", "96 GB", _on_gpu(94.5), 450e9, 50e9),
    "a100": Target(
        312e12, 2039e9, "A100 SXM 80 GB data sheet", "80 GB", _on_gpu(79.15), 300e9, 25e9
    ),
    "a100-40": Target(
        312e12, 1555e9, "A100 SXM 40 GB data sheet", "40 GB", _on_gpu(39.38), 300e9, 25e9
    ),
    "l40s": Target(362e12, 864e9, "L40S data sheet", "48 GB", _on_gpu(44.39), 32e9, 12.5e9),
    "rtx4090": Target(
        165e12, 1008e9, "white paper of Ada", "24 GB", _on_gpu(23.64), 32e9, 12.5e9
    ),
    "rtx5090": Target(
        209.5e12, 1792e9, "white paper of RTX Blackwell", "32 GB", _on_gpu(31.35), 64e9, 12.5e9
    ),
    # Chips that a run can use, but that have no description for a compiler here.
    "v4": Facts(275e12, 1228e9, "Cloud TPU v4 page"),
    "h100-pcie": Facts(756e12, 2000e9, "H100 PCIe data sheet"),
    "l40": Facts(181e12, 864e9, "L40 data sheet"),
    "v100": Facts(125e12, 900e9, "V100 SXM2 data sheet (float16)"),
}  # fmt: skip
TARGETS = {name: row for name, row in FACTS.items() if isinstance(row, Target)}
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
GPUS = tuple(name for name in TARGETS if name not in TPUS)

# Forms of a chip that take the programs of another row, at rates of their own.
_FORMS = {"h100-pcie": "h100", "gh200": "h100", "a100-40": "a100"}

# Substrings of a device's `device_kind`, and the row above that they mean; the first match counts.
_SHOWN = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7": "tpu7x",
    "TPU v7": "tpu7x",
    "H100 PCIe": "h100-pcie",
    "GH200": "gh200",
    "H100": "h100",
    "H200": "h200",
    "B200": "b200",
    "A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "A100": "a100",
    "RTX 4090": "rtx4090",
    "RTX 5090": "rtx5090",
    "L40S": "l40s",
    "L40": "l40",
    "L4": "l4",
    "V100": "v100",
    "T4": "t4",
}


def name_of(device_kind: str) -> str | None:
    """Return the name in `FACTS` of a device with this `device_kind`; None if it is not there."""
    return next((name for shown, name in _SHOWN.items() if shown in device_kind), None)


def programs_of(name: str) -> str:
    """Return the row of `FACTS` whose programs a chip takes: its own, or that of another form."""
    return _FORMS.get(name, name)
