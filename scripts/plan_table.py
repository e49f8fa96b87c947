#!/usr/bin/env python
"""A table of how LLaVA-OneVision's sizes fit TPU slices, compiled and never run, as docs/pods.md shows it.

    python scripts/plan_table.py              # all of it
    python scripts/plan_table.py 0.5B 7B      # the rows of these

Needs libtpu (extra ``plan``) and nothing else: the sizes stand below. A prompt is an image in nine tiles with its base
view and a question: 10 rows of pixels, 4,096 tokens at most. Some minutes a row: the largest batch is looked for.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TOKENS, TILES = 4096, 10
SLICES = (
    ("0.5B", "v5e:2x4", "data=8"),
    ("0.5B", "v6e:2x4", "data=8"),
    ("0.5B", "v5p:2x2x2", "data=8"),
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
TEXT_SIZES = {
    # hidden, intermediate, layers, heads, key heads, vocabulary; tied embeddings
    "0.5B": ((896, 4864, 24, 14, 2, 152_000), True),
    "7B": ((3584, 18944, 28, 28, 4, 152_128), False),
    "72B": ((8192, 29568, 80, 64, 8, 152_128), False),
}
_TIMES = ("products", "links", "compiler")


def config(name: str) -> dict[str, Any]:
    """The ``config.json`` of a size, as far as it matters here."""
    sizes, tied = TEXT_SIZES[name]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {**dict(zip((*keys, "vocab_size"), sizes, strict=True)), "model_type": "qwen2", "rope_theta": 1e6}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 384}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False}
    return {
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "image_token_index": 151_646,
        "vision_config": vision,
        "text_config": {**text, "tie_word_embeddings": tied},
        "tie_word_embeddings": tied,
    }


def row(name: str, config: Path, topology: str, mesh: str) -> str:
    """One slice: the program of one prompt per chip that shares the batch, and the largest batch."""
    from sav_jax.plan import largest_batch, topology_devices
    from sav_jax.plan_extraction import plan_extraction
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
    """Prints the rows of the models that were named."""
    if unknown := sorted(set(words) - set(TEXT_SIZES)):
        print(f"error: no size {', '.join(unknown)} (there are {', '.join(TEXT_SIZES)})", file=sys.stderr)
        return 2
    titles = ["model", "slice", "mesh", "batch", "weights + temporaries, GiB", "largest batch"]
    print("| " + " | ".join([*titles, *(f"{kind}, ms" for kind in _TIMES)]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, topology, mesh in SLICES:
            if name in (words or TEXT_SIZES):
                (file := Path(folder) / "config.json").write_text(json.dumps(config(name)))
                print(row(name, file, topology, mesh), flush=True)
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; a TPU, if there is one, is left alone
    raise SystemExit(main(sys.argv[1:]))
