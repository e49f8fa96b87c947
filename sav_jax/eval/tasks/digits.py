"""Real handwritten digits, which scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.examples import Example


def _load(_: Path) -> Data:
    from sklearn.datasets import load_digits

    data = load_digits()
    items = []
    for index, (image, digit) in enumerate(zip(data.images, data.target, strict=True)):
        grey = PIL.Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))  # 17 levels of grey
        example = Example(
            question="What digit is this?",
            images=(grey.convert("RGB"),),
            label=str(digit),
            id=str(index),
            source=f"load_digits[{index}]",
        )
        items.append(Item(example))
    return Data(tuple(items))


TASKS = (
    Task(
        "digits",
        "which digit is it? 1,797 real handwritten digits of 8 x 8 pixels, 10 classes (scikit-learn's load_digits)",
        _load,
        source="E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits (UCI, 1998), test set, as in "
        "scikit-learn's load_digits",
        prompt="What digit is this?",
        class_prompt="the digit {label}",
    ),
)
