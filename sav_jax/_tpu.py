"""libtpu, TPU's runtime and compiler, on machines that have no TPU."""

from __future__ import annotations

import os
from pathlib import Path


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
