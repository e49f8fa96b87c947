#!/usr/bin/env python
"""Trains the bundled model from nothing and writes it as a checkpoint directory.

    python scripts/train_tiny.py --run-dir runs/tiny --output sav_jax/models/tiny

A killed run goes on where it was when started again with the same arguments, and ends with the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Arguments:
    """Trains the bundled model: first to see, then to answer questions about drawn scenes."""

    run_dir: Annotated[Path, tyro.conf.arg(help="folder for the training's state and log (made if missing)")]
    output: Annotated[Path | None, tyro.conf.arg(help="checkpoint directory to write at the end")] = None
    preset: Annotated[
        Literal["tiny", "debug"], tyro.conf.arg(help="the recipe; 'debug' takes seconds and learns nothing")
    ] = "tiny"


def main(arguments: Arguments) -> None:
    """Trains, evaluates and exports."""
    from sav_jax.train.tiny import Trainer
    from sav_jax.train.tiny_recipe import PRESETS

    trainer = Trainer(PRESETS[arguments.preset], arguments.run_dir)
    params = trainer.run()
    if arguments.output is not None:
        trainer.export(params, arguments.output)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
