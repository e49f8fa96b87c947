#!/usr/bin/env python
"""How fast a checkpoint loads, against how fast its files can be read, and how much host memory that takes.

    python scripts/bench_loading.py --folder /a/disk/with/room              # 16 GB: 7B-shaped, bfloat16
    python scripts/bench_loading.py --folder /tmp --layers 4                # a part of it

Writes a LLaVA-OneVision of random numbers once, in files of at most 5 GB as the hub's are, and keeps it. Then, several
times in turn, each time after the files have left the page cache and each in a process of its own: their bytes read
from start to end by as many threads as the loader has, and thrown away; the same, but kept; and `sav_jax.load`; the
last two once more at the end with memory that is new to the process. A system must find and clear such memory, which
on a virtual machine, that fetches it from its host, can take longer than the disk does; the other runs have had theirs
from the start. (Pages of files are memory, too: all three sides have them given back at once where the loader does,
when there is no room for files and parameters.) Peak memory is anonymous memory (what is mapped from files can be taken
back at any time) of the last run, beyond the parameters themselves where these live on the host.
"""

from __future__ import annotations

import json
import os
import resource
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

from sav_jax.models import reading_weights
from sav_jax.models.reading_weights import forget_pages, pages_fit

GIB = 2**30
SETTLING = 15  # seconds in which a virtual machine has given memory back that the run before has left
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc returns nothing to the system


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
            forget_pages(stream.fileno(), 0, 0)


class Processors:
    """Seconds of processors that this process has used from here on, by itself and by the system for it."""

    def __init__(self) -> None:
        self._start = resource.getrusage(resource.RUSAGE_SELF)

    def since(self) -> dict[str, float]:
        now = resource.getrusage(resource.RUSAGE_SELF)
        return {"user": now.ru_utime - self._start.ru_utime, "system": now.ru_stime - self._start.ru_stime}


def touch(size: int) -> None:
    """Have the machine find so many bytes of memory; the process keeps them (see ``KEEPING``) for whoever asks next."""
    np.full(size, 1, np.uint8)


def read_through(files: list[Path], keep: bool, touched: bool) -> dict[str, float]:
    """In this process: seconds to read all bytes, each into its own place or all into the same.

    As the loader does, it has the system give pages back at once where there is no room for them.
    """
    piece = 32 << 20
    sizes = [file.stat().st_size for file in files]
    starts = np.cumsum([0, *sizes])
    parts = [
        (file, at, start)
        for file, size, start in zip(files, sizes, starts, strict=False)
        for at in range(0, size, piece)
    ]
    whole = np.empty(int(starts[-1]) if keep else 0, np.uint8)
    if touched:
        whole[:] = 1
    own = threading.local()
    forget = not pages_fit(int(starts[-1]), int(starts[-1]))

    def read(part: tuple[Path, int, int]) -> None:
        file, at, start = part
        if keep:
            room = whole[start + at : start + min(at + piece, file.stat().st_size)]
        else:
            if not hasattr(own, "room"):
                own.room = np.empty(piece, np.uint8)
            room = own.room
        with file.open("rb", buffering=0) as stream:
            stream.seek(at)
            stream.readinto(room.data)
            if forget:
                forget_pages(stream.fileno(), at, piece)

    used, begin = Processors(), time.perf_counter()
    with ThreadPoolExecutor(reading_weights.THREADS) as pool:
        list(pool.map(read, parts))
    return {"seconds": time.perf_counter() - begin, "bytes": float(starts[-1])} | used.since()


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load(directory: Path, mesh: str | None, touched: bool) -> dict[str, float]:
    """In this process: seconds, and bytes at the peak beyond what was there before and what the parameters take."""
    import jax

    import sav_jax
    from sav_jax.sharding import mesh_of

    sav_jax.load("tiny")
    devices = None if mesh is None else mesh_of(jax.devices(), mesh)
    if touched:
        touch(sum(file.stat().st_size for file in directory.glob("*.safetensors")))
    before = anonymous()
    peak, over = [before], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    used, start = Processors(), time.perf_counter()
    lmm = sav_jax.load(directory, dtype="bfloat16", mesh=devices)
    jax.block_until_ready(lmm.params)
    seconds, spent = time.perf_counter() - start, used.since()
    over.set()
    watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lmm.params))
    on_host = size if jax.default_backend() == "cpu" else 0
    return {"seconds": seconds, "bytes": size, "beyond": max(peak) - before - on_host} | spent


def main(arguments: Arguments) -> None:
    """Prints what was measured."""
    name = f"sav_jax-loading-{'small' if arguments.small else arguments.layers or 28}"
    directory = arguments.folder / name
    if not (directory / "config.json").exists() or not list(directory.glob("*.safetensors")):
        write(directory, arguments.layers, arguments.small)
    files = sorted(directory.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    found: dict[str, list[dict[str, float]]] = {"read": [], "read and keep": [], "sav_jax.load": []}

    def measure(what: str, fresh: bool) -> dict[str, float]:
        forget(files)
        time.sleep(0 if arguments.small else SETTLING)
        words = [sys.executable, __file__, "--one", what, str(directory), arguments.mesh or "", str(fresh)]
        environment = os.environ | ({} if fresh else KEEPING)
        ran = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        return json.loads(ran.stdout.splitlines()[-1])

    room = pages_fit(sum(sizes), GIB)
    if not room:
        print("all runs are in memory new to them: there is not enough for the checkpoint and 1 GiB")
    for _ in range(arguments.runs):
        for what, done in found.items():
            done.append(measure(what, fresh=not room))
    for what in ("read and keep", "sav_jax.load"):
        found[f"{what}, new memory"] = [measure(what, fresh=True)]
    rates = {what: [one["bytes"] / GIB / one["seconds"] for one in done] for what, done in found.items()}
    print(
        f"{sum(sizes) / GIB:.2f} GiB in {len(files)} files, the largest {max(sizes) / GIB:.2f} GiB; "
        f"{reading_weights.THREADS} threads"
    )
    if arguments.small:
        print("tiny sizes: the rates below are those of starting, not of reading")
    for what, values in rates.items():
        user, system = (
            statistics.median(one[of] * GIB / one["bytes"] for one in found[what]) for of in ("user", "system")
        )
        print(
            f"{what + ':':26} {statistics.median(values):.2f} GiB/s ({min(values):.2f}-{max(values):.2f}); seconds of "
            f"processors for each GiB: {user:.2f} by itself, {system:.2f} by the system"
        )
    for what in ("read", "read and keep"):
        shares = [load / read for load, read in zip(rates["sav_jax.load"], rates[what], strict=True)]
        print(f"load / {what}, run by run: {', '.join(f'{share:.2f}' for share in shares)}")
    beyond = found["sav_jax.load, new memory"][0]["beyond"]
    print(
        f"anonymous memory at the peak, beyond the parameters: {beyond / GIB:.2f} GiB "
        f"({beyond / max(sizes):.2f} of the largest file)"
    )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found | {"files": sizes}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        what, folder, mesh, fresh = sys.argv[2:]
        touched = fresh == "False"
        if what == "sav_jax.load":
            found = load(Path(folder), mesh or None, touched)
        else:
            found = read_through(sorted(Path(folder).glob("*.safetensors")), what == "read and keep", touched)
        print(json.dumps(found))
    else:
        main(tyro.cli(Arguments, description=__doc__))
