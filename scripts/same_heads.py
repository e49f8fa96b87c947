#!/usr/bin/env python
"""Are heads the same, however they are computed? Every back end, bucket, truncation, reuse and mesh against one way.

    python scripts/same_heads.py

The one way: each prompt by itself, the back end ``xla``, one device. Differences are given three times: as they are; as
a share of the largest number of all heads, which is what float32 can promise (a sum of 24 bits is no better than its
largest part); and of unit vectors, as classifiers compare heads: scaling a head changes no answer. Ends with status 1
if unit vectors differ by more than 1e-5 anywhere. Without an accelerator the meshes are of eight devices that the CPU
plays. The back end of TPUs is compared by tests (``tests/models/test_splash_models.py``), and two processes with one by
``tests/test_processes.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tyro

LIMIT = 1e-5
"""Largest difference of unit vectors."""
MESHES = ("data=8", "model=8", "data=2,fsdp=2,model=2")


@dataclass(frozen=True)
class Arguments:
    """Compares heads."""

    models: str = "tiny,tiny-qwen"
    """Names separated by commas, as for ``--model``."""
    number: int = 8
    """Prompts of each kind."""


def questions(number: int) -> list[Any]:
    """One picture of a size of its own, several questions about a picture, two pictures, pictures that come again
    beside others, and none.
    """
    import sav_jax
    from sav_jax.world.scene import draw, sample_scene
    from sav_jax.world.several import sample_images

    pictures = [draw(sample_scene(seed, "glyph", side=40 + 8 * (seed % 5))) for seed in range(number)]
    asked = [sav_jax.Example("what color is the background?", (picture,)) for picture in pictures]
    same = draw(sample_scene(1, "pair"))
    asked += [sav_jax.Example(f"is there a {word} thing?", (same,)) for word in ("red", "blue", "large", "striped")]
    several = [tuple(draw(scene) for scene in sample_images(seed)) for seed in range(number)]
    asked += [sav_jax.Example("same or different color?", images) for images in several]
    asked += [sav_jax.Example("what is on the left of the second?", (pictures[0], picture)) for picture in pictures[1:]]
    return [*asked, sav_jax.Example("is there a red star?")]


def unit(heads: np.ndarray) -> np.ndarray:
    """Head vectors of length 1."""
    return heads / np.linalg.norm(heads, axis=-1, keepdims=True)


def main(arguments: Arguments) -> int:
    """Prints the table; the status."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    import jax

    import sav_jax
    from sav_jax.extract import heads_step
    from sav_jax.models.attention import OVERRIDE
    from sav_jax.sharding import mesh_of

    examples = questions(arguments.number)

    def run(lmm: Any, backend: str = "", **options: Any) -> np.ndarray:
        heads_step.cache_clear()  # a program keeps the back end that it was traced with
        os.environ.pop(OVERRIDE, None)
        if backend:
            os.environ[OVERRIDE] = backend
        return sav_jax.extract_heads(lmm, examples, progress=False, **options)

    print(f"{len(examples)} prompts, float32, {jax.device_count()} x {jax.devices()[0].device_kind}\n")
    print("| model | computed with | largest difference | of the largest head | of unit vectors |")
    print("|---|---|--:|--:|--:|")
    worst = 0.0
    for name in arguments.models.split(","):
        lmm = sav_jax.load(name, lm_head=False)
        alone = run(lmm, "xla", batch_size=1, reuse_images=False)
        ways: dict[str, Callable[[], np.ndarray]] = {}
        for backend in ("blocked", "chunked"):
            ways[f"back end `{backend}`"] = partial(run, lmm, backend, batch_size=1, reuse_images=False)
        for size in (3, 8, 32):
            ways[f"batches of {size}"] = partial(run, lmm, batch_size=size, reuse_images=False)
        for depth in (1, lmm.num_layers // 2, lmm.num_layers):
            ways[f"the first {depth} layers"] = partial(run, lmm, num_layers=depth)
        ways["images read once"] = partial(run, lmm)
        for axes in MESHES if jax.device_count() == 8 else ():
            spread = sav_jax.load(name, lm_head=False, mesh=mesh_of(jax.devices(), axes))
            ways[f"mesh `{axes}`"] = partial(run, spread)
        for what, compute in ways.items():
            heads = compute()
            expected = alone[:, : heads.shape[1]]
            difference = float(np.abs(heads - expected).max())
            scaled = float(np.abs(unit(heads) - unit(expected)).max())
            worst = max(worst, scaled)
            share = difference / float(np.abs(expected).max())
            print(f"| `{name}` | {what} | {difference:.1e} | {share:.1e} | {scaled:.1e} |", flush=True)
    print(f"\nunit vectors differ by at most {worst:.1e}; {LIMIT:.0e} is allowed")
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
