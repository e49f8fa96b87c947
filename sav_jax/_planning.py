"""What ``sav-jax plan`` does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import jax

from sav_jax._training_options import Plan
from sav_jax.errors import UserError
from sav_jax.plan import Report, largest_batch, likely_largest, topology_devices
from sav_jax.sharding import data_size, mesh_of


def run(options: Plan) -> None:
    jax.config.update("jax_platforms", "cpu")  # what is compiled runs nowhere; a TPU here, if any, is left alone
    if options.max_tokens < 1 or options.image_rows < 0:
        raise UserError("--max-tokens must be at least 1, and --image-rows not negative")
    plan, multiple, size = (_extraction if options.task == "extract" else _training)(options)

    def compiled(batch: int) -> Report:
        if options.largest:
            print(f"compiling for a batch of {batch} ...", file=sys.stderr)
        return plan(batch)

    if size < 1:
        raise UserError(f"--batch-size must be at least 1, not {size}")
    report = compiled(size)
    largest = largest_batch(compiled, multiple, report, size) if options.largest else None
    if options.json:
        print(json.dumps(json.loads(report.json()) | ({} if largest is None else {"largest_batch": largest})))
        return
    print(report.text())
    if largest is not None:
        print(
            f"  largest batch that fits: {largest}" if largest else "  no batch fits: take more chips, or fsdp, model"
        )
    elif likely := likely_largest(report, size, multiple):
        print(f"  a batch of about {likely} fits, if what it takes grows with it; --largest compiles to make sure")


def _extraction(options: Plan) -> tuple[Callable[[int], Report], int, int]:
    """What plans a batch of some size, what every size is a multiple of, and the size to begin with."""
    from sav_jax.plan_extraction import plan_extraction

    refused = [name for name in ("preset", "micro_batches", "remat") if getattr(options, name) is not None]
    if refused:
        raise UserError(f"--{refused[0].replace('_', '-')} is for --task train-lora and train-sq")
    multiple = _sharing(options)
    where = options.model, options.topology, options.mesh
    lengths = options.max_tokens, options.image_rows
    return (
        lambda batch: plan_extraction(*where, batch, *lengths),
        multiple,
        (multiple if options.batch_size is None else options.batch_size),
    )


def _training(options: Plan) -> tuple[Callable[[int], Report], int, int]:
    """The same of a step of a recipe, whose batch size is overridden."""
    from sav_jax.train.plan import plan_training
    from sav_jax.train.recipes import LORA_PRESETS, SQ_PRESETS, overridden

    presets, usual = (LORA_PRESETS, "llava") if options.task == "train-lora" else (SQ_PRESETS, "stage2")
    name = options.preset or usual
    if name not in presets:
        raise UserError(f"no preset is called {name!r}; there are: {', '.join(presets)}")
    given = {key: getattr(options, key) for key in ("batch_size", "micro_batches", "remat")}
    recipe = overridden(presets[name], given)
    where = options.model, options.topology, options.mesh
    lengths = options.max_tokens, options.image_rows

    def plan(batch: int) -> Report:
        return plan_training(*where, overridden(recipe, {"batch_size": batch}), *lengths)

    multiple, size = _sharing(options) * recipe.optimization.micro_batches, recipe.optimization.batch_size
    if options.largest and options.batch_size is None:
        # Nobody asked for the preset's: one that these chips can share is as good to begin with.
        size = max(multiple, size // multiple * multiple)
    return plan, multiple, size


def _sharing(options: Plan) -> int:
    """How many chips share a batch."""
    return data_size(mesh_of(topology_devices(options.topology), options.mesh))
