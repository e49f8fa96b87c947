"""The table of families: what is compared with transformers alike for all of them.

``python tests/families.py [name ...]`` prints the tables in ``docs/parity.md``: the largest deviations over all cases.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    import conftest  # noqa: F401  (the settings the tests run under)

import checkpoints_dual as dual
import checkpoints_llava as llava
import checkpoints_qwen as qwen
import jax
import numpy as np
from checkpoints import Reference, picture
from PIL import Image

import sav_jax
from sav_jax.batching import BatchPlan, Bucket, assemble, round_rows, round_tokens
from sav_jax.extract import plan_prompts

if TYPE_CHECKING:
    from sav_jax.models.batch import Batch

FAMILIES: dict[str, Callable[..., Reference]] = {
    "llava": llava.build_llava,
    "llava_next": llava.build_llava_next,
    "llava_next-mistral": partial(llava.build_llava_next, mistral=True),
    "llava_onevision": llava.build_llava_onevision,
    "qwen2_vl": qwen.build_qwen2_vl,
    "qwen2_5_vl": qwen.build_qwen2_5_vl,
    "qwen3_vl": qwen.build_qwen3_vl,
}
"""Name -> ``build(directory, seed=0, tie=False, **options)``: a tiny random checkpoint and its PyTorch model."""

CASES: dict[str, tuple[list[tuple[int, int]], str]] = {
    "text only": ([], "What is the capital of France?"),
    "square": ([(30, 30)], "What is it?"),
    "wide": ([(30, 90)], "What is it?"),
    "very wide": ([(11, 400)], "What is it?"),
    "tall": ([(91, 33)], "What is it?"),
    "odd": ([(37, 53)], "Is this odd?"),
    "larger than every pinpoint": ([(300, 260)], "What is it?"),
    "smaller than a tile": ([(13, 11)], "What is it?"),
    "two": ([(40, 30), (20, 60)], "Which is larger?"),
    "two, marked": ([(40, 30), (20, 60)], "Is <image> left of <image>?"),
    "three": ([(28, 28), (60, 20), (100, 90)], "Which is odd?"),
    "long": ([(300, 260)], "Consider every detail with care. " * 20),
    "long text": ([], "Consider every detail with care. " * 25),
}
"""Name -> (height, width) of the images, question."""
ALONE = ("text only", "odd", "two, marked", "long")
"""Cases that are also run one by one."""


def case_images(name: str) -> list[Image.Image]:
    return [picture(height, width, seed) for seed, (height, width) in enumerate(CASES[name][0])]


def case_example(name: str) -> sav_jax.Example:
    return sav_jax.Example(CASES[name][1], tuple(case_images(name)))


@dataclass(frozen=True)
class Family:
    """One row of the table: the reference, and the same checkpoint loaded by this library in float32."""

    name: str
    reference: Reference
    lmm: sav_jax.LMM

    @classmethod
    def build(cls, name: str, directory: Path) -> Family:
        reference = FAMILIES[name](directory)
        return cls(name, reference, sav_jax.load(reference.directory))

    def theirs(self, case: str) -> Any:
        """The arguments of the PyTorch model."""
        images = case_images(case)
        return self.reference.inputs(self.lmm.processor.text(CASES[case][1], len(images)), images)

    @functools.cached_property
    def expected(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Heads ``[L, N, H]`` and logits ``[V]`` of every case, from PyTorch."""
        return {case: self.reference.run(self.theirs(case)) for case in CASES}

    @functools.cached_property
    def mixed(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same of ours, all cases in one batch that is as long and as wide as any of them needs."""
        heads, logits = run_together(self.lmm, [case_example(case) for case in CASES])
        return dict(zip(CASES, zip(heads, logits, strict=True), strict=True))

    @functools.cached_property
    def alone(self) -> dict[str, np.ndarray]:
        """Heads of some cases, each run by itself."""
        return {case: sav_jax.extract_heads(self.lmm, [case_example(case)], 1, progress=False)[0] for case in ALONE}


def run_together(lmm: sav_jax.LMM, examples: Sequence[sav_jax.Example]) -> tuple[np.ndarray, np.ndarray]:
    """Heads ``[E, L, N, H]`` and logits ``[E, V]`` of examples in one batch."""
    prompts = plan_prompts(lmm, examples)
    bucket = Bucket(
        tokens=round_tokens(max(len(prompt.token_ids) for prompt in prompts)),
        rows=round_rows(max(prompt.num_rows for prompt in prompts)),
        taps=max(prompt.visual_index.shape[1] for prompt in prompts),
    )
    plan = BatchPlan(bucket, tuple(range(len(prompts))), len(prompts))
    batch = assemble(plan, prompts, [example_pixels(lmm, example) for example in examples])
    heads, logits = _step(lmm)(lmm.params, batch)
    return np.asarray(heads[:, :, 0]).swapaxes(0, 1), np.asarray(logits[:, 0])


def example_pixels(lmm: sav_jax.LMM, example: sav_jax.Example) -> np.ndarray:
    return lmm.processor.pixels(example.load_images(), example.load_videos())


def _step(lmm: sav_jax.LMM) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    @jax.jit
    def step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output, state = lmm.module.apply({"params": params}, batch, logits="read", mutable=["intermediates"])
        return functools.reduce(lambda tree, name: tree[name], lmm.architecture.heads_path, state["intermediates"]), (
            output.logits
        )

    return step


def deviations(family: Family) -> dict[str, float]:
    """The largest deviation of each kind; see the table's head."""
    pixels = [
        np.abs(family.lmm.processor.pixels(case_images(case)) - family.reference.pixels(family.theirs(case))).max()
        for case in CASES
        if CASES[case][0]
    ]
    heads, logits = (
        max(np.abs(family.mixed[case][i] - family.expected[case][i]).max() for case in CASES) for i in (0, 1)
    )
    alone = max(np.abs(family.mixed[case][0] - family.alone[case]).max() for case in ALONE)
    return {"pixels": float(max(pixels)), "heads": float(heads), "logits": float(logits), "alone": float(alone)}


def main(names: Sequence[str]) -> None:
    """Print both tables, or those of some families."""
    print("| family | heads [L, N, H] | pixels | heads | logits | alone - in a mixed batch |")
    print("|---|---|---|---|---|---|")
    for name in [name for name in FAMILIES if name in names or not names]:
        with tempfile.TemporaryDirectory() as directory:
            family = Family.build(name, Path(directory))
            cells = [f"{value:.1e}" if value else "identical" for value in deviations(family).values()]
            print(f"| {' | '.join([name, str(family.lmm.heads_shape), *cells])} |", flush=True)
    print("\n| dual encoder | images | texts | logits |\n|---|---|---|---|")
    for name in [name for name in dual.BUILDERS if name in names or not names]:
        with tempfile.TemporaryDirectory() as directory:
            expected = dual.BUILDERS[name](Path(directory)).run(dual.images(), dual.TEXTS)
            encoder = sav_jax.load_dual_encoder(directory)
            ours = encoder.embed_images(dual.images()), encoder.embed_texts(dual.TEXTS)
            worst = [np.abs(a - b).max() for a, b in zip((*ours, encoder.logits(*ours)), expected, strict=True)]
            print(f"| {name} | {' | '.join(f'{value:.1e}' for value in worst)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
