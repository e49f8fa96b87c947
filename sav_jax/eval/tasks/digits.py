"""Real handwritten digits, which scikit-learn ships: as they are, and scattered over coloured images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.examples import Example
from sav_jax.world.scene import SIZE, stands_out
from sav_jax.world.shapes import COLORS, jitter_color

_QUESTION = "What digit is this?"
_SCATTER = 41  # distinguishes these draws from all others


def _as_it_is(image: np.ndarray, _: int) -> PIL.Image.Image:
    grey = PIL.Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))  # 17 levels of grey
    return grey.convert("RGB")


def _scattered(image: np.ndarray, index: int) -> PIL.Image.Image:
    """The digit, 12 to 26 pixels wide, somewhere in a 32-pixel image, in one colour on another."""
    rng = np.random.default_rng([index, _SCATTER])
    names = tuple(COLORS)
    while True:
        ink, ground = (names[int(i)] for i in rng.integers(len(names), size=2))
        if stands_out(ink, ground):
            break
    width = int(rng.integers(12, 27))
    left, top = (int(i) for i in rng.integers(SIZE - width + 1, size=2))
    grey = PIL.Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    mask = PIL.Image.new("L", (SIZE, SIZE))
    mask.paste(grey.resize((width, width), PIL.Image.Resampling.BICUBIC), (left, top))
    alpha = np.asarray(mask, np.float32)[..., None] / 255
    pixels = alpha * jitter_color(ink, rng) + (1 - alpha) * jitter_color(ground, rng)
    return PIL.Image.fromarray(np.round(pixels).astype(np.uint8))


def _load(shown: Callable[[np.ndarray, int], PIL.Image.Image]) -> Callable[[Path], Data]:
    def load(_: Path) -> Data:
        from sklearn.datasets import load_digits

        data = load_digits()
        return Data(
            tuple(
                Item(
                    Example(
                        question=_QUESTION,
                        images=(shown(image, index),),
                        label=str(digit),
                        id=str(index),
                        source=f"load_digits[{index}]",
                    )
                )
                for index, (image, digit) in enumerate(zip(data.images, data.target, strict=True))
            )
        )

    return load


_SOURCE = (
    "E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (UCI, 1998), test set, as in scikit-learn's "
    "load_digits"
)

TASKS = (
    Task(
        "digits",
        "which digit is it? 1,797 real handwritten digits of 8 x 8 pixels, 10 classes (scikit-learn's load_digits)",
        _load(_as_it_is),
        source=_SOURCE,
        prompt=_QUESTION,
        class_prompt="the digit {label}",
    ),
    Task(
        "digits-scattered",
        "which digit is it? The same handwritten digits at random places and sizes, in random colours on random "
        "backgrounds, so that pixels say nothing",
        _load(_scattered),
        source=f"{_SOURCE}; scattered by fixed seeds",
        prompt=_QUESTION,
        class_prompt="the digit {label}",
    ),
)
