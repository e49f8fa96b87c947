#!/usr/bin/env python
"""How cost grows: with labelled examples, classes, heads and tokens. A table, and a picture of four curves.

    python scripts/bench_scaling.py --picture docs/scaling.svg

Scoring is done on random heads of a Qwen2-7B's shape (784 heads of width 128), reading with a small decoder of random
weights. CPU time of the whole process, the least of a few runs: other programs on the machine matter little to it. Each
size is given as a multiple of the smallest one, and so is what it cost; where cost is in proportion, both are equal.
Padding is how much of the batches of a Qwen2-VL's images of any size is none of theirs: what packing could save.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

Section = Literal["examples", "classes", "heads", "tokens", "padding"]
SECTIONS: tuple[Section, ...] = ("examples", "classes", "heads", "tokens", "padding")
HEADS, WIDTH = 784, 128
TEXT = {
    "model_type": "llava",
    "image_token_index": 511,
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}


@dataclass(frozen=True)
class Arguments:
    """Runs sections of the benchmark."""

    sections: Annotated[tuple[Section, ...], tyro.conf.Positional, tyro.conf.arg(help="which; all by default")] = ()
    runs: Annotated[int, tyro.conf.arg(help="of each size; the least counts")] = 3
    quick: Annotated[bool, tyro.conf.arg(help="small sizes: for trying the script")] = False
    picture: Annotated[Path | None, tyro.conf.arg(help="draw the curves into this file (.svg, .png)")] = None
    output: Annotated[Path | None, tyro.conf.arg(help="write the numbers as JSON, too")] = None


@dataclass(frozen=True)
class Curve:
    """Sizes, and the CPU seconds that each took.

    Attributes:
        what, fixed: what grows, and what does not.
        linear: cost should be in proportion; else the curve is there to be looked at.
    """

    what: str
    fixed: str
    sizes: list[int]
    seconds: list[float]
    linear: bool

    def exponent(self) -> float:
        """By which power of the size cost grows over the larger half of the sizes: 1 is in proportion."""
        half = len(self.sizes) // 2
        x, y = np.log(self.sizes[half:]), np.log(self.seconds[half:])
        return float(np.polyfit(x, y, 1)[0])

    def rows(self) -> Iterator[str]:
        for size, seconds in zip(self.sizes, self.seconds, strict=True):
            ratio, cost = size / self.sizes[0], seconds / self.seconds[0]
            yield f"| {self.what} | {size:,} | {ratio:g} | {cost:.2f} | {cost / ratio:.2f} |"


def least(runs: int, work: Callable[[], Any]) -> float:
    """CPU seconds of the cheapest of some runs, after one that compiles."""
    work()
    found = []
    for _ in range(runs):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def scoring(runs: int, examples: int, classes: int, heads: int) -> float:
    """Class means of all heads, and which heads are right about each example."""
    from sav_jax._scoring import local_mesh, score_heads
    from sav_jax.models.aligned import aligned_zeros

    rng = np.random.default_rng(0)
    values = aligned_zeros((examples, heads, WIDTH))
    for row in values:
        row[:] = rng.standard_normal(row.shape, np.float32)
    labels = (np.arange(examples) % classes).astype(np.int32)
    return least(runs, lambda: score_heads(values, labels, classes, leave_one_out=False, mesh=local_mesh()))


class Reader:
    """A decoder of random weights, and prompts of any length."""

    def __init__(self) -> None:
        import jax

        from sav_jax.models.multimodal import init_params
        from sav_jax.models.registry import architecture, with_defaults

        self.module = architecture(with_defaults(TEXT)).module
        self.params = jax.jit(lambda key: init_params(self.module, key))(jax.random.key(0))

    def seconds(self, runs: int, tokens: int) -> float:
        """Heads of one prompt of so many tokens."""
        import jax

        from sav_jax.extract import heads_step
        from sav_jax.models.batch import Batch

        ids = np.random.default_rng(0).integers(0, 500, (1, tokens), np.int32)
        last = np.array([tokens], np.int32)
        batch = Batch(token_ids=ids, lengths=last, read_positions=last[:, None] - 1)
        step = heads_step(self.module)
        return least(runs, lambda: jax.block_until_ready(step(self.params, batch)))


def doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range(int(math.log2(last // first)) + 1)]


def measured(section: Section, arguments: Arguments) -> Curve:
    """One curve."""
    runs, quick = arguments.runs, arguments.quick
    if section == "examples":
        sizes, heads = doubling(50, 200 if quick else 3200), 8 if quick else HEADS
        costs = [scoring(runs, size, 10, heads) for size in sizes]
        return Curve("examples", f"{heads} heads, 10 classes", sizes, costs, True)
    if section == "classes":
        sizes = [10, 20, 40] if quick else [10, 30, 100, 300, 1000]
        examples, heads = (80, 8) if quick else (2000, 196)
        costs = [scoring(runs, examples, size, heads) for size in sizes]
        return Curve("classes", f"{examples:,} examples, {heads} heads", sizes, costs, True)
    if section == "heads":
        sizes, examples = ([8, 16, 32], 20) if quick else (doubling(98, 3136), 200)
        costs = [scoring(runs, examples, 10, size) for size in sizes]
        return Curve("heads", f"{examples} examples, 10 classes", sizes, costs, True)
    sizes = [64, 128, 256] if quick else doubling(256, 8192)
    reader = Reader()
    return Curve(
        "tokens", "one prompt, four layers of width 256", sizes, [reader.seconds(runs, n) for n in sizes], False
    )


def padding(images: int) -> tuple[float, float, int]:
    """Shares of patches and tokens that are padding, and the number of programs, of so many images of random sizes (320
    to 1,600 pixels along the longer side, usual proportions) in batches of eight, as a Qwen2-VL shows them.
    """
    from sav_jax.batching import plan_batches
    from sav_jax.models.processor import Prompt
    from sav_jax.models.qwen_plan import fitted_size

    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(images):
        longer, ratio = rng.uniform(320, 1600), rng.choice([1, 4 / 3, 3 / 2, 16 / 9, rng.uniform(1, 2.2)])
        size = (int(longer), int(longer / ratio)) if rng.random() < 0.4 else (int(longer / ratio), int(longer))
        height, width = fitted_size(size, 28, 56 * 56, 28 * 28 * 1280)
        patches = height * width // 14**2
        blank = np.zeros((patches // 4 + int(rng.integers(20, 80)), 1), np.int32)
        prompts.append(Prompt(blank[:, 0], patches, blank, blank))
    plans = plan_batches(prompts, 8)
    rows = sum(prompt.num_rows for prompt in prompts) / sum(plan.size * plan.bucket.rows for plan in plans)
    tokens = sum(len(prompt.token_ids) for prompt in prompts) / sum(plan.size * plan.bucket.tokens for plan in plans)
    return 1 - rows, 1 - tokens, len({(plan.bucket, plan.size) for plan in plans})


def draw(curves: list[Curve], path: Path) -> None:
    """Cost against size, both as multiples of the smallest, with a line where they are in proportion."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(curves), figsize=(3.1 * len(curves), 3.2), squeeze=False, layout="constrained")
    for axis, curve in zip(axes[0], curves, strict=True):
        line = [size / curve.sizes[0] for size in curve.sizes]
        axis.loglog(curve.sizes, line, ":", color="0.5", label="in proportion")
        axis.loglog(curve.sizes, [s / curve.seconds[0] for s in curve.seconds], "o-", color="C0", label="measured")
        axis.set(xlabel=curve.what, title=curve.fixed)
        axis.xaxis.set_minor_formatter(NullFormatter())  # between powers of ten they would overlap
        axis.set_xticks(shown := [curve.sizes[0], curve.sizes[-1]], [f"{size:,}" for size in shown])
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("CPU time, as a multiple")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Arguments) -> None:
    """Prints the table."""
    sections = arguments.sections or SECTIONS
    if "padding" in sections:
        print("| images of random sizes | patches padded | tokens padded | programs |\n|---|---|---|---|")
        for images in (64, 512, 4096):
            patches, tokens, programs = padding(images)
            print(f"| {images:,} | {patches:.1%} | {tokens:.1%} | {programs} |")
        print()
    growing = [section for section in sections if section != "padding"]
    if not growing:
        return
    print("| what grows | size | size, times | cost, times | cost per size |\n|---|---|---|---|---|")
    curves = []
    for section in growing:
        curves.append(measured(section, arguments))
        print("\n".join(curves[-1].rows()), flush=True)
    print("\nOver the larger half of the sizes cost grows like size to the power of:")
    for curve in curves:
        print(f"  {curve.what:<9} {curve.exponent():5.2f}   ({curve.fixed})")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([vars(curve) for curve in curves], indent=1) + "\n")
    if arguments.picture is not None:
        draw(curves, arguments.picture)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # CPU time says nothing about another device
    main(tyro.cli(Arguments, description=__doc__))
