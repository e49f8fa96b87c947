#!/usr/bin/env python
"""Trains a bundled model from nothing and writes it as a checkpoint directory.

    python scripts/train_tiny.py --preset tiny --run-dir runs/tiny --output sav_jax/models/tiny

A killed run goes on where it was when started again with the same arguments, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Before NumPy is loaded, here and in the processes that draw: each of those has one core.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(_name, "false" if _name.startswith("TOK") else "1")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    presets = ("tiny", "tiny-qwen", "debug", "debug-qwen")
    add("--run-dir", type=Path, required=True, help="folder for the training's state and log (made if missing)")
    add("--output", type=Path, help="checkpoint directory to write at the end; its weights also now and then")
    add("--preset", choices=presets, default="tiny", help="the recipe; debug ones take seconds and learn nothing")
    add("--steps-scale", type=float, default=1.0, help="times as many steps in every stage (default: 1)")
    add("--dtype", choices=("float32", "bfloat16"), help="that the loss is computed in (default: the recipe's)")
    add("--log-every", type=int, help="steps between rows of losses and rates (default: the recipe's)")
    add("--workers", type=int, default=1, help="processes that draw (default: 1)")
    add("--max-seconds", type=float, help="stop after so many, with the state saved; the schedule stays the same")
    add("--stop-step", type=int, help="stop when so many steps are done, with the state saved; the same schedule")
    add("--save-seconds", type=float, default=60.0, help="between states written (default: 60)")
    add(
        "--export-only", action="store_true", help="train no more: export the state (or model.safetensors) in --run-dir"
    )
    add("--account", default="", help="for the card: how this training went (machine, time, where it was stopped)")
    add("--no-evaluation", action="store_true", help="write the weights only, without evaluating them")
    return parser.parse_args()


def main(given: argparse.Namespace) -> int:
    """Trains, evaluates and exports."""
    from dataclasses import replace

    from sav_jax.errors import UserError
    from sav_jax.train.tiny import Trainer
    from sav_jax.train.tiny_recipe import PRESETS

    for option, path in (("--run-dir", given.run_dir), ("--output", given.output)):
        if path is not None and path.exists() and not path.is_dir():
            raise UserError(f"{option} {path}: not a folder")
    recipe = PRESETS[given.preset]
    if given.steps_scale != 1.0:
        recipe = recipe.scaled(given.steps_scale)
    if given.dtype:
        recipe = replace(recipe, dtype=given.dtype)
    if given.log_every:
        recipe = replace(recipe, log_every=given.log_every)
    trainer = Trainer(recipe, given.run_dir)
    if given.export_only:
        params, step = trainer.latest()
    else:
        say(f"{recipe.family}: {recipe.steps} steps, {recipe.images / 1e6:.2f} million images")
        began = time.perf_counter()
        output = given.output
        state = trainer.run(
            workers=given.workers,
            max_seconds=given.max_seconds,
            save_seconds=given.save_seconds,
            stop_step=given.stop_step,
            snapshot=None if output is None else lambda params: trainer.write_weights(params, output),
        )
        params, step = state.params, state.step
        say(f"{recipe.family}: step {step} of {recipe.steps} after {time.perf_counter() - began:.0f} s")
    if given.output is not None:
        if given.no_evaluation:
            trainer.write_weights(params, given.output)
        else:
            trainer.export(params, given.output, given.account, options_of(given, step, recipe.steps))
        say(f"{recipe.family}: {f'step {step}' if step >= 0 else 'weights'} written to {given.output}")
    return 0


def options_of(given: argparse.Namespace, step: int, steps: int) -> list[str]:
    """What decides about the weights besides the preset, as far as it differs from its default."""
    options = [f"--steps-scale {given.steps_scale:g}"] if given.steps_scale != 1.0 else []
    options += [f"--dtype {given.dtype}"] if given.dtype else []
    return options + ([f"--stop-step {step}"] if 0 <= step < steps else [])


def say(text: str) -> None:
    """To stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from sav_jax.errors import UserError

    try:
        sys.exit(main(arguments()))
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
