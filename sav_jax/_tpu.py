"""libtpu, TPU's runtime and compiler, on machines that have no TPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """What one TPU chip can do.

    Attributes:
        memory: bytes that the compiler has to give away, as it says when a program takes more (libtpu 0.0.52).
        flops: of matrix products in bfloat16, per second, at most.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second that all its links to other chips carry, both ways together.
        clock: cycles per second: ``flops`` over those of a cycle (2 x 128 x 128 for each of a v5e's four and a v5p's
            eight matrix units, 2 x 256 x 256 for what v6e does as four of them).
    """

    memory: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    clock: float


CHIPS = {
    "TPU v5 lite": Chip(15.75 * 2**30, 197e12, 819e9, 400e9, 1.50e9),
    "TPU v5": Chip(95.73 * 2**30, 459e12, 2765e9, 1200e9, 1.75e9),
    "TPU v6 lite": Chip(31.24 * 2**30, 918e12, 1640e9, 800e9, 1.75e9),
}
"""By device kind: v5e, v5p and v6e. Rates are those that Cloud TPU's documentation of each states."""


def leave_tpus_alone() -> None:
    """On a machine without TPUs, keep libtpu from looking for some: it would ask the network, and complain on stderr.

    Before JAX looks for devices; does nothing where there is a TPU, or where somebody has said what there is.
    """
    devices = Path("/dev")
    if any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*")):
        return
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
