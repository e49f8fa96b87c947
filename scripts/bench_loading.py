#!/usr/bin/env python
"""How fast a checkpoint loads, against how fast its files can be read, and how much host memory that takes.

    python scripts/bench_loading.py --folder /a/disk/with/room              # 16 GB: 7B-shaped, bfloat16
    python scripts/bench_loading.py --folder /tmp --layers 4                # a part of it

Writes a LLaVA-OneVision of random numbers once, in files of at most 5 GB as the hub's are, and keeps it. Then, several
times in turn and each time after the files have left the page cache: their bytes read from start to end by as many
threads as the loader has, and `sav_jax.load` in a process of its own. Memory is anonymous memory at its peak (what is
mapped from files can be taken back at any time), beyond the parameters themselves where these live on the host.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

GIB = 2**30


@dataclass(frozen=True)
class Arguments:
    """Measures loading."""

    folder: Annotated[Path, tyro.conf.arg(help="where the checkpoint is made and kept")]
    layers: Annotated[int | None, tyro.conf.arg(help="of the decoder (default: all 28)")] = None
    small: Annotated[bool, tyro.conf.arg(help="tiny sizes: for trying the script")] = False
    runs: Annotated[int, tyro.conf.arg(help="of each side")] = 3
    mesh: Annotated[str | None, tyro.conf.arg(help="as of sav-jax, such as fsdp=8")] = None
    output: Annotated[Path | None, tyro.conf.arg(help="write the numbers as JSON, too")] = None


def write(directory: Path, layers: int | None, small: bool) -> None:
    """The checkpoint. Every layer has the same random numbers, so that no more than one file's are in memory."""
    import jax
    import ml_dtypes
    from _gpu_models import write_skeleton  # type: ignore[import-not-found]

    from sav_jax.models.multimodal import init_params
    from sav_jax.models.registry import architecture, read_config
    from sav_jax.models.weights import save_checkpoint

    write_skeleton(directory, "onevision", small, layers)
    config = read_config(directory)
    module = architecture(config).module
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        inner = leaf.shape[1:] if leaf.ndim > 1 else leaf.shape
        numbers = (0.02 * rng.standard_normal(inner, np.float32)).astype(ml_dtypes.bfloat16)
        return np.broadcast_to(numbers, leaf.shape)

    shapes = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
    raw = json.loads((directory / "config.json").read_text())
    save_checkpoint(directory, raw, jax.tree.map(values, shapes), "bfloat16", architecture(config).table)


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(files: list[Path], threads: int) -> float:
    """Seconds to read all bytes."""
    piece = 16 << 20
    parts = [(file, at) for file in files for at in range(0, file.stat().st_size, piece)]

    def read(part: tuple[Path, int]) -> None:
        with part[0].open("rb", buffering=0) as stream:
            stream.seek(part[1])
            stream.read(piece)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, parts))
    return time.perf_counter() - start


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load(directory: Path, mesh: str | None) -> dict[str, float]:
    """In this process: seconds, and bytes at the peak beyond what was there before and what the parameters take."""
    import jax
    import jax.numpy as jnp

    import sav_jax
    from sav_jax.sharding import mesh_of

    jnp.zeros(8).block_until_ready()
    devices = None if mesh is None else mesh_of(jax.devices(), mesh)
    before = anonymous()
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    lmm = sav_jax.load(directory, dtype="bfloat16", mesh=devices)
    jax.block_until_ready(lmm.params)
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lmm.params))
    on_host = size if jax.default_backend() == "cpu" else 0
    return {"seconds": seconds, "bytes": size, "beyond": max(peak) - before - on_host}


def main(arguments: Arguments) -> None:
    """Prints what was measured."""
    name = f"sav_jax-loading-{'small' if arguments.small else arguments.layers or 28}"
    directory = arguments.folder / name
    if not (directory / "config.json").exists() or not list(directory.glob("*.safetensors")):
        write(directory, arguments.layers, arguments.small)
    files = sorted(directory.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    threads = min(8, os.cpu_count() or 1)
    reads, loads = [], []
    for _ in range(arguments.runs):
        forget(files)
        reads.append(sum(sizes) / GIB / read_through(files, threads))
        forget(files)
        words = [sys.executable, __file__, "--loading", str(directory), arguments.mesh or ""]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
        loads.append(json.loads(done.stdout.splitlines()[-1]))
    rates = [one["bytes"] / GIB / one["seconds"] for one in loads]
    beyond = max(one["beyond"] for one in loads)
    print(
        f"{sum(sizes) / GIB:.2f} GiB in {len(files)} files, the largest {max(sizes) / GIB:.2f} GiB; {threads} threads\n"
        f"read from start to end: {statistics.median(reads):.2f} GiB/s ({min(reads):.2f}-{max(reads):.2f})\n"
        f"sav_jax.load:           {statistics.median(rates):.2f} GiB/s ({min(rates):.2f}-{max(rates):.2f})\n"
        f"load / read, run by run: {', '.join(f'{b / a:.2f}' for a, b in zip(reads, rates, strict=True))}\n"
        f"anonymous memory at the peak, beyond the parameters: {beyond / GIB:.2f} GiB "
        f"({beyond / max(sizes):.2f} of the largest file)"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps({"read": reads, "loads": loads, "files": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loading"]:
        print(json.dumps(load(Path(sys.argv[2]), sys.argv[3] or None)))
    else:
        main(tyro.cli(Arguments, description=__doc__))
