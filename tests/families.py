"""The table of families: what is compared with transformers alike for all of them.

``python tests/families.py [name ...]`` prints the tables in ``docs/parity.md``: the largest deviations over all cases.
"""

from __future__ import annotations

import functools
import operator
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
import checkpoints_qwen1 as qwen1
import jax
import numpy as np
from checkpoints import Reference, picture
from PIL import Image

import sav_jax
from sav_jax.batching import BatchPlan, Bucket, assemble, round_rows, round_tokens
from sav_jax.extract import plan_prompts
from sav_jax.generation import _generate_step
from sav_jax.sharding import on, put_batch

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
"""Cases that are also run one by one, and continued."""
NEW_TOKENS = 16
EIGHT = ("text only", "square", "wide", "tall", "odd", "smaller than a tile", "two", "two, marked")
"""A batch that eight devices can share; without the longest prompts, to save time."""
MESHES = ({"model": 2}, {"data": 2, "fsdp": 4}, {"data": 2, "model": 4})


def mesh_of(axes: dict[str, int]) -> jax.sharding.Mesh:
    """The first devices, in a mesh of these axes."""
    count = int(np.prod(list(axes.values())))
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(tuple(axes.values())), tuple(axes))


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
    def expected_greedy(self) -> dict[str, list[int]]:
        """How PyTorch continues some cases."""
        return {case: self.reference.greedy(self.theirs(case), NEW_TOKENS) for case in ALONE}

    @functools.cached_property
    def greedy(self) -> dict[str, list[int]]:
        """How we do, all of them in one batch."""
        tokens = continue_together(self.lmm, [case_example(case) for case in ALONE])
        return dict(zip(ALONE, tokens, strict=True))

    @functools.cached_property
    def eight(self) -> tuple[np.ndarray, np.ndarray]:
        """Heads ``[8, L, N, H]`` and logits ``[8, V]`` of eight cases on one device."""
        return run_together(self.lmm, [case_example(case) for case in EIGHT])

    def sharded(self, axes: dict[str, int]) -> tuple[sav_jax.LMM, np.ndarray, np.ndarray]:
        """The model on several devices, and the same of it."""
        lmm = sav_jax.load(self.reference.directory, mesh=mesh_of(axes))
        return lmm, *run_together(lmm, [case_example(case) for case in EIGHT])

    @functools.cached_property
    def alone(self) -> dict[str, np.ndarray]:
        """Heads of some cases, each run by itself."""
        return {case: sav_jax.extract_heads(self.lmm, [case_example(case)], 1, progress=False)[0] for case in ALONE}


def assert_invariant(ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same sums in another company, or on other devices, differ by the order of addition only."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def run_together(lmm: sav_jax.LMM, examples: Sequence[sav_jax.Example]) -> tuple[np.ndarray, np.ndarray]:
    """Heads ``[E, L, N, H]`` and logits ``[E, V]`` of examples in one batch."""
    return run(lmm, together(lmm, examples))


def run(lmm: sav_jax.LMM, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Heads ``[B, L, N, H]`` and logits ``[B, V]`` at the last token."""
    with on(lmm.mesh):
        heads, logits = step_of(lmm.module, lmm.architecture.heads_path)(lmm.params, put_batch(batch, lmm.mesh))
    return np.asarray(heads[:, :, 0]).swapaxes(0, 1), np.asarray(logits[:, 0])


def continue_together(lmm: sav_jax.LMM, examples: Sequence[sav_jax.Example]) -> list[list[int]]:
    """The 16 likeliest next tokens, one by one, of examples in one batch (``generate`` would sort them by length); a
    random model would rarely stop, so none does.
    """
    step = _generate_step(lmm.module, NEW_TOKENS, (), draw=False, top_k=None, nucleus=False)
    rows = np.arange(len(examples), dtype=np.uint32)
    options = np.uint32(0), np.int32(NEW_TOKENS), np.float32(1), np.float32(1)
    tokens, lengths = step(lmm.params, together(lmm, examples), rows, *options)
    assert (np.asarray(lengths) == NEW_TOKENS).all()
    return np.asarray(tokens).tolist()


def together(lmm: sav_jax.LMM, examples: Sequence[sav_jax.Example], **sizes: int) -> Batch:
    """Examples in one batch, as long and as wide as any of them needs, or of the sizes given."""
    prompts = plan_prompts(lmm, examples)
    needed = {
        "tokens": round_tokens(max(len(prompt.token_ids) for prompt in prompts)),
        "rows": round_rows(max(prompt.num_rows for prompt in prompts)),
        "taps": max(prompt.visual_index.shape[1] for prompt in prompts),
    }
    plan = BatchPlan(Bucket(**{**needed, **sizes}), tuple(range(len(prompts))), len(prompts))
    return assemble(plan, prompts, [example_pixels(lmm, example) for example in examples])


def example_pixels(lmm: sav_jax.LMM, example: sav_jax.Example) -> np.ndarray:
    return lmm.processor.pixels(example.load_images(), example.load_videos())


@functools.cache
def step_of(module: Any, heads_path: tuple[str, ...]) -> Any:
    """``(params, batch) -> (heads [L, B, R, N, H], logits [B, R, V])``, compiled once for models alike."""

    @jax.jit
    def step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        output, state = module.apply({"params": params}, batch, logits="read", mutable=["intermediates"])
        return functools.reduce(operator.getitem, heads_path, state["intermediates"]), output.logits

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
    devices = max(np.abs(family.eight[0] - family.sharded(axes)[1]).max() for axes in MESHES)
    differing = sum(family.greedy[case] != family.expected_greedy[case] for case in ALONE)
    return {
        "pixels": float(max(pixels)),
        "heads": float(heads),
        "logits": float(logits),
        "greedy": float(differing),
        "alone": float(alone),
        "devices": float(devices),
    }


def recorded_deviations(directory: Path) -> tuple[sav_jax.LMM, dict[str, float]]:
    """The same of the first Qwen-VL, from the recorded outputs of its published code."""
    found: dict[str, list[float]] = {"pixels": [], "heads": [], "logits": [], "greedy": [], "alone": [], "devices": []}
    for i, config in enumerate(qwen1.CONFIGS):
        lmm = sav_jax.load(qwen1.build(directory / str(i), qwen1.CONFIGS[config], qwen1.is_chat(config)))
        names = qwen1.prompts_of(config)
        examples = [qwen1.example_of(name) for name in names]
        ours = zip(*run_together(lmm, examples), continue_together(lmm, examples), examples, strict=True)
        for name, (heads, logits, greedy, example) in zip(names, ours, strict=True):
            found["heads"].append(np.abs(heads - qwen1.OUTPUTS[f"{name}/heads"]).max())
            found["logits"].append(np.abs(logits - qwen1.OUTPUTS[f"{name}/logits"]).max())
            found["greedy"].append(greedy != qwen1.OUTPUTS[f"{name}/greedy"].tolist())
            if f"{name}/pixels" in qwen1.OUTPUTS:
                pixels = lmm.processor.pixels(example.load_images()).transpose(0, 3, 1, 2)
                found["pixels"].append(np.abs(pixels - qwen1.OUTPUTS[f"{name}/pixels"]).max())
        alone = sav_jax.extract_heads(lmm, examples[:1], 1, progress=False)[0]
        found["alone"].append(np.abs(run_together(lmm, examples)[0][0] - alone).max())
        eight = (examples * 8)[:8]
        for axes in MESHES:
            sharded = sav_jax.load(lmm.name, mesh=mesh_of(axes))
            found["devices"].append(np.abs(run_together(sharded, eight)[0] - run_together(lmm, eight)[0]).max())
    worst = {key: float(max(values)) for key, values in found.items()}
    return lmm, worst | {"greedy": float(sum(found["greedy"]))}


def main(names: Sequence[str]) -> None:
    """Print both tables, or those of some families."""
    columns = ["heads [L, N, H]", "pixels", "heads", "logits", "greedy tokens", "alone - mixed", "1 - 2, 8 devices"]
    print(f"| family | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name in [name for name in (*FAMILIES, "qwen") if name in names or not names]:
        with tempfile.TemporaryDirectory() as directory:
            if name == "qwen":
                lmm, worst = recorded_deviations(Path(directory))
            else:
                family = Family.build(name, Path(directory))
                lmm, worst = family.lmm, deviations(family)
            cells = [f"{value:.1e}" if value else "identical" for value in worst.values()]
            print(f"| {' | '.join([name, str(lmm.heads_shape), *cells])} |", flush=True)
    print("\n| dual encoder | images | texts | logits |\n|---|---|---|---|")
    for name in [name for name in dual.BUILDERS if name in names or not names]:
        with tempfile.TemporaryDirectory() as directory:
            expected = dual.BUILDERS[name](Path(directory)).run(dual.images(), dual.TEXTS)
            encoder = sav_jax.load_dual_encoder(directory)
            ours = encoder.embed_images(dual.images()), encoder.embed_texts(dual.TEXTS)
            off = [np.abs(a - b).max() for a, b in zip((*ours, encoder.logits(*ours)), expected, strict=True)]
            print(f"| {name} | {' | '.join(f'{value:.1e}' for value in off)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
