"""What ``sav-jax plan`` does."""

from __future__ import annotations

import json
import sys

import jax

from sav_jax._training_options import Plan
from sav_jax.errors import UserError
from sav_jax.plan import Report, topology_devices
from sav_jax.sharding import data_size, mesh_of


def run(options: Plan) -> None:
    jax.config.update("jax_platforms", "cpu")  # what is compiled runs nowhere; a TPU here, if any, is left alone
    if options.max_tokens < 1 or options.image_rows < 0:
        raise UserError("--max-tokens must be at least 1, and --image-rows not negative")
    if options.task == "extract":
        _plan_extraction(options)
        return
    from sav_jax.train.plan import plan_training
    from sav_jax.train.recipes import LORA_PRESETS, SQ_PRESETS, overridden

    presets, usual = (LORA_PRESETS, "llava") if options.task == "train-lora" else (SQ_PRESETS, "stage2")
    name = options.preset or usual
    if name not in presets:
        raise UserError(f"no preset is called {name!r}; there are: {', '.join(presets)}")
    if options.largest:
        raise UserError("--largest is for --task extract; a recipe says how large its batches are")
    given = {key: getattr(options, key) for key in ("batch_size", "micro_batches", "remat")}
    recipe = overridden(presets[name], given)
    report = plan_training(
        options.model, options.topology, options.mesh, recipe, options.max_tokens, options.image_rows
    )
    print(report.json() if options.json else report.text())


def _plan_extraction(options: Plan) -> None:
    from sav_jax.plan_extraction import largest_batch, plan_extraction

    refused = [name for name in ("preset", "micro_batches", "remat") if getattr(options, name) is not None]
    if refused:
        raise UserError(f"--{refused[0].replace('_', '-')} is for --task train-lora and train-sq")
    multiple = data_size(mesh_of(topology_devices(options.topology), options.mesh))
    size = options.batch_size or multiple

    def compiled(batch: int) -> Report:
        if options.largest:
            print(f"compiling for a batch of {batch} ...", file=sys.stderr)
        where = options.topology, options.mesh
        return plan_extraction(options.model, *where, batch, options.max_tokens, options.image_rows)

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
