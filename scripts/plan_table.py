#!/usr/bin/env python
"""A table of how LLaVA-OneVision's sizes fit TPU slices, compiled and never run, as docs/pods.md shows it.

    python scripts/plan_table.py 0.5B=ov-0.5b/config.json 7B=ov-7b/config.json 72B=ov-72b/config.json

Takes the models' ``config.json`` (no weights) and libtpu (extra ``plan``). A prompt is an image in nine tiles with its
base view and a question: 10 rows of pixels, 4,096 tokens at most. Some minutes a row: the largest batch is looked for.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TOKENS, TILES = 4096, 10
SLICES = (
    ("0.5B", "v5e:2x4", "data=8"),
    ("7B", "v5e:2x4", "fsdp=8"),
    ("7B", "v6e:2x4", "data=8"),
    ("7B", "v5p:2x2x2", "data=8"),
    ("7B", "v5e:16x16", "data=16,fsdp=16"),
    ("72B", "v5e:4x4", "fsdp=16"),
    ("72B", "v5e:16x16", "fsdp=32,model=8"),
    ("72B", "v5p:2x2x4", "fsdp=16"),
    ("72B", "v6e:4x4", "fsdp=16"),
)
GIB = 2**30
_TIMES = ("products", "links", "compiler")


def row(name: str, config: Path, topology: str, mesh: str) -> str:
    """One slice: the program of one prompt per chip that shares the batch, and the largest batch."""
    from sav_jax.plan import topology_devices
    from sav_jax.plan_extraction import largest_batch, plan_extraction
    from sav_jax.sharding import data_size, mesh_of

    one = data_size(mesh_of(topology_devices(topology), mesh))
    report = plan_extraction(config, topology, mesh, one, TOKENS, TILES)
    largest = largest_batch(lambda size: plan_extraction(config, topology, mesh, size, TOKENS, TILES), one, report, one)
    where = f"| {name} | {topology} | {mesh} | {one} |"
    if not report.fits:
        return f"{where} {report.total / GIB:.2f} of {report.memory / GIB:.2f} | does not fit | | | |"
    assert report.parameters is not None
    assert report.temporaries is not None
    times = {kind: f"{1e3 * seconds:.0f}" for kind, seconds in report.roofline().items()}
    memory = f"{report.parameters / GIB:.2f} + {report.temporaries / GIB:.2f} of {report.memory / GIB:.2f}"
    return " | ".join([where + " " + memory, str(largest), *(times.get(kind, "-") for kind in _TIMES)]) + " |"


def main(words: list[str]) -> int:
    """Prints the rows of the models that were given."""
    configs = {name: Path(path) for name, _, path in (word.partition("=") for word in words)}
    unknown = set(configs) - {name for name, _, _ in SLICES}
    if unknown or not configs:
        print(__doc__, file=sys.stderr)
        return 2
    titles = ["model", "slice", "mesh", "batch", "weights + temporaries, GiB", "largest batch"]
    print("| " + " | ".join([*titles, *(f"{kind}, ms" for kind in _TIMES)]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, topology, mesh in SLICES:
        if name in configs:
            print(row(name, configs[name], topology, mesh), flush=True)
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; a TPU, if there is one, is left alone
    raise SystemExit(main(sys.argv[1:]))
