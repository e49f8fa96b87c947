#!/usr/bin/env python
"""Measures what training a bundled model would reach on this machine: images a second, by part and by arithmetic.

    python scripts/tiny_rates.py --work /tmp/tiny

Each row is one program alone on the device; drawing is that of all the processes together.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(_name, "false" if _name.startswith("TOK") else "1")


def main() -> None:
    """Prints a row per measurement as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for tokenizers and the like")
    add("--presets", nargs="+", default=["tiny", "tiny-qwen"], help="recipes")
    add("--dtypes", nargs="+", default=["float32:xla", "bfloat16:xla", "bfloat16:cudnn"], help="dtype:attention")
    add("--buckets", nargs="+", default=["image", "square"], help="sorts of prompt")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw; 0: do not measure")
    add("--repeats", type=int, default=20, help="steps that are timed")
    given = parser.parse_args()

    from copy import copy
    from dataclasses import replace

    import jax
    import numpy as np

    from sav_jax.train.tiny import Trainer
    from sav_jax.train.tiny_data import bucket_of, prefetched
    from sav_jax.train.tiny_recipe import PRESETS

    print(jax.default_backend(), jax.devices()[0].device_kind, os.cpu_count(), "cores", flush=True)
    states: dict[str, Any] = {}
    jobs: list[tuple[str, Any, Any]] = []
    with ThreadPoolExecutor(8) as pool:
        for preset in given.presets:
            recipe = PRESETS[preset]
            first_of = Trainer(recipe, given.work / f"rates-{preset}")
            states[preset] = pool.submit(first_of.restore)
            for form in given.dtypes:
                dtype, os.environ["SAV_JAX_ATTENTION"] = form.split(":")
                trainer = copy(first_of)
                trainer.recipe = replace(recipe, dtype=dtype)
                steps: dict[str, int] = {}
                for step in range(recipe.steps):
                    stage, at = recipe.place(step)
                    steps.setdefault(bucket_of(stage, at), step)
                shapes = trainer._state_shapes().params
                for bucket in given.buckets:
                    if bucket not in steps:
                        continue
                    batch = trainer.chats.training_batch(recipe, steps[bucket])
                    weight = jax.ShapeDtypeStruct((), np.dtype(np.float32))

                    def run(params: Any, weight: Any, *arrays: Any, t: Any = trainer, b: str = bucket) -> Any:
                        return jax.value_and_grad(t._loss, has_aux=True)(params, weight, arrays, b)

                    lowered = jax.jit(run).lower(shapes, weight, *trainer._shapes(bucket, len(batch.images)))
                    jobs.append((f"{preset} {form} {bucket}", batch, pool.submit(lowered.compile)))
            jobs.append((f"{preset} update", None, trainer.update()))
        for name, batch, future in jobs:
            try:
                program = future.result()
                state = states[name.split()[0]].result()
                update = batch is None
                gradients = jax.tree.map(jax.numpy.zeros_like, state.params) if update else None
                params, optimizer, out = state.params, state.optimizer, None
                for repeat in range(-3, given.repeats):
                    if repeat == 0:
                        jax.block_until_ready((params, out))
                        began = time.perf_counter()
                    if update:
                        params, optimizer, out = program(params, optimizer, gradients, np.ones(3, np.float32))
                    else:
                        out = program(params, np.float32(0.1), *batch.arrays())
                jax.block_until_ready((params, out))
                seconds = (time.perf_counter() - began) / given.repeats
                rate = "" if update else f", {len(batch.images) / seconds:.0f} images/s"
                print(f"{name}: {1000 * seconds:.1f} ms{rate}", flush=True)
            except Exception as error:  # one form may not be had on this machine; the others still count
                print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    recipe, first = PRESETS[given.presets[0]], PRESETS[given.presets[0]].stages[0].steps
    for name, start in (("seeing", 0), ("answering", first)) if given.workers else ():
        images = 0
        for i, batch in enumerate(
            prefetched(given.work / f"rates-{given.presets[0]}", recipe, range(start, start + 120), given.workers)
        ):
            if i == 40:
                began, images = time.perf_counter(), 0
            images += len(batch.images)
        print(f"drawing, {name}: {images / (time.perf_counter() - began):.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
