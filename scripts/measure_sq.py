#!/usr/bin/env python
"""Measures what learning to ask is worth to the bundled model: the same training with and without its own questions.

    python scripts/measure_sq.py --output results/sq

Conversations about drawn scenes, several questions each. In the arm "answers" the model learns to answer all, in
"questions" also to ask half of those after the first (SQ-LLaVA), in "frozen tower" the same with the tower left alone.
All else is equal, seed by seed. Measured on scenes of other seeds, glyphs in unseen typefaces: the share of exact
answers, the loss of answers and of questions. Cells that are there are not measured again.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import sav_jax
from sav_jax._files import write_file
from sav_jax.errors import UserError
from sav_jax.eval.statistics import cluster_interval, paired_bootstrap, student_interval
from sav_jax.lmm import LMM
from sav_jax.models.decoder import read_at
from sav_jax.train.chats import Chat, Turn
from sav_jax.train.data import ChatData
from sav_jax.train.optimizer import Optimization
from sav_jax.train.recipes import Recipe
from sav_jax.train.tune import form_of, tune
from sav_jax.world.questions import QA, ask
from sav_jax.world.scene import draw, sample_scene
from sav_jax.world.shapes import SHAPES

TRAINING, HELD_OUT = 90 * 10**9, 95 * 10**9  # first seeds of scenes, beyond all other drawings of this project
MEASURES = ("accuracy", "answer_loss", "question_loss")
Units = list[tuple[str, str, float]]
"""(scene, kind of question, value) of every question that was measured."""


@dataclass(frozen=True)
class Setting:
    """What is learned.

    Attributes:
        kinds: of scenes, in turn.
        names: every shape is called by another's name, and conversations are two questions in fixed words, its size and
            the colour "of the star". A fifth, copies of 16, have one question, what shape it is; it alone is asked when
            accuracy is measured. Else: four of the world's questions, all but captions.
    """

    kinds: tuple[str, ...]
    names: bool = False


SETTINGS = {"new names": Setting(("shape",), names=True), "several things": Setting(("pair", "group"))}
ARMS: dict[str, dict[str, Any]] = {
    "untrained": {},
    "answers": {"sq_ratio": 0.0},
    "questions": {"sq_ratio": 0.5},
    "frozen tower": {"sq_ratio": 0.5, "vision_rank": 0},
}
BASELINES = {"questions": "answers", "frozen tower": "questions"}


@dataclass(frozen=True)
class Arguments:
    """Measures every setting, arm and seed."""

    output: Annotated[Path, tyro.conf.arg(help="folder for the cells (JSON) and for table.md")]
    settings: Annotated[tuple[str, ...], tyro.conf.arg(help=f"of {', '.join(SETTINGS)}")] = tuple(SETTINGS)
    arms: Annotated[tuple[str, ...], tyro.conf.arg(help=f"of {', '.join(ARMS)}")] = tuple(ARMS)
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="of training: its scenes, order, first values")] = (0, 1, 2)
    rows: Annotated[int, tyro.conf.arg(help="conversations to learn from")] = 2048
    steps: Annotated[int, tyro.conf.arg(help="of training, of 8 conversations each")] = 320
    scenes: Annotated[int, tyro.conf.arg(help="held out; a multiple of 16")] = 320
    learning_rate: Annotated[float, tyro.conf.arg(help="of the language model; the rest has a tenth of it")] = 4e-3
    quick: Annotated[bool, tyro.conf.arg(help="a few rows and steps: it runs, and shows nothing")] = False


def questions(setting: Setting, seed: int, held_out: bool, named: bool = False) -> tuple[sav_jax.Example, list[QA]]:
    """A scene and what is asked about it; ``named``: only what shape it is."""
    scene = sample_scene(seed, setting.kinds[seed % len(setting.kinds)], held_out=held_out)
    media = sav_jax.Example("-", (draw(scene),), id=str(seed), source=f"drawn scene {seed}")
    if not setting.names:
        return media, [qa for qa in ask(scene, seed, 99) if qa.type != "caption"]
    name = SHAPES[(SHAPES.index(scene.thing.name) + 1) % len(SHAPES)]
    if named:
        return media, [QA("what shape is this?", name, "shape")]
    size = QA("is the shape small or large?", scene.thing.size, "size")
    return media, [size, QA(f"what color is the {name}?", scene.thing.color, "color")]


def conversation(setting: Setting, seed: int, held_out: bool, named: bool = False) -> Chat:
    """Several questions about a scene."""
    media, asked = questions(setting, seed, held_out, named)
    said = [(role, text) for qa in asked[:4] for role, text in (("user", qa.question), ("assistant", qa.answer))]
    return Chat(tuple(Turn(*turn) for turn in said), media)


def training_chats(setting: Setting, rows: int, seed: int) -> list[Chat]:
    """The conversations of a seed."""
    first = TRAINING + seed * 10**6
    chats = [conversation(setting, first + i, False) for i in range(rows)]
    if not setting.names:
        return chats
    named = [conversation(setting, first + rows + i, False, named=True) for i in range(16)]
    return chats + named * max(rows // 64, 1)


def accuracy(lmm: LMM, setting: Setting, scenes: int) -> Units:
    """Every question by itself: whether what is written is the answer."""
    asked = []
    for seed in range(HELD_OUT, HELD_OUT + scenes):
        media, every = questions(setting, seed, True, named=setting.names)
        asked += [(qa, replace(media, question=qa.question)) for qa in every]
    written = sav_jax.generate(lmm, [example for _, example in asked], 4, batch_size=32, progress=False)
    return [
        (example.id or "", qa.type, float(one.text.strip().casefold() == qa.answer))
        for (qa, example), one in zip(asked, written, strict=True)
    ]


@functools.lru_cache(maxsize=2)
def token_loss(module: Any) -> Callable[..., jax.Array]:
    """``(params, LessonBatch) -> [B, R]``: the cross-entropy of every target, nats."""

    @jax.jit
    def losses(params: Any, data: Any) -> jax.Array:
        output: Any = module.apply({"params": params}, data.batch)
        hidden = read_at(output.hidden, data.batch.read_positions)
        logits: Any = module.apply({"params": params}, hidden, method=lambda m, x: m.language_model.logits(x))
        chosen = jnp.take_along_axis(logits, data.targets[:, :, None], axis=-1)[:, :, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    return losses


def turn_losses(lmm: LMM, setting: Setting, scenes: int, asks: bool) -> Units:
    """Nats per token (with the one that ends it) of each turn of held-out conversations: answers to a user's questions,
    or, ``asks``, the questions but the first, which the model asks.
    """
    chats = [conversation(setting, HELD_OUT + i, True) for i in range(scenes)]
    data = ChatData(lmm, chats, form_of(lmm, Recipe()), batch_size=16, steps=scenes // 16, seed=0, sq_ratio=float(asks))
    losses = token_loss(lmm.module)
    units: Units = []
    for step, plan in enumerate(data.plans):
        batch = data[step]
        values = np.asarray(losses(lmm.params, batch))
        for i, (row, _) in enumerate(plan.rows):
            places = np.flatnonzero(batch.weights[i])
            # What is learned in one turn stands together; headers of turns, which are not learned, lie between.
            parts = np.split(values[i, places], np.flatnonzero(np.diff(batch.batch.read_positions[i, places]) > 1) + 1)
            assert len(parts) == (len(chats[row].turns) - 1 if asks else len(chats[row].turns) // 2)
            kept = parts[1::2] if asks else parts
            units += [(chats[row].media.id or "", "", float(part.mean())) for part in kept]
    return sorted(units, key=lambda unit: unit[0])  # turns stay in order


def measure(lmm: LMM, arguments: Arguments, setting: Setting, arm: str, seed: int) -> dict[str, Units]:
    """Train, if the arm does, and measure."""
    if arm != "untrained":
        rate = arguments.learning_rate
        recipe = Recipe(
            learning_rate=rate,
            vision_learning_rate=rate / 10,
            projector_learning_rate=rate / 10,
            steps=arguments.steps,
            optimization=Optimization(batch_size=8, seed=seed, warmup=0.1, checkpoint_every=arguments.steps, keep=1),
            **{"vision_rank": 16, "vision_alpha": 32.0, **ARMS[arm]},
        )
        folder = arguments.output / "training"
        shutil.rmtree(folder, ignore_errors=True)
        lmm = tune(lmm, training_chats(setting, arguments.rows, seed), recipe, folder)
        shutil.rmtree(folder)
    return {
        "accuracy": accuracy(lmm, setting, arguments.scenes),
        "answer_loss": turn_losses(lmm, setting, arguments.scenes, asks=False),
        "question_loss": turn_losses(lmm, setting, arguments.scenes, asks=True),
    }


def cell(lmm: LMM, arguments: Arguments, name: str, arm: str, seed: int) -> dict[str, Units]:
    """What was measured, by now or before."""
    facts = {key: getattr(arguments, key) for key in ("rows", "steps", "scenes", "learning_rate")}
    facts |= {"setting": asdict(SETTINGS[name]), "arm": ARMS[arm], "model": lmm.fingerprint}
    file = arguments.output / name.replace(" ", "-") / arm.replace(" ", "-") / f"{seed}.json"
    if not file.exists():
        found = measure(lmm, arguments, SETTINGS[name], arm, seed)
        write_file(file, (json.dumps({"facts": facts, "units": found}) + "\n").encode())
    content = json.loads(file.read_text())
    if content["facts"] != json.loads(json.dumps(facts)):
        raise UserError(f"{file}: measured with other settings ({content['facts']}); choose another --output")
    return content["units"]


def table(results: Mapping[tuple[str, str], Sequence[Mapping[str, Units]]]) -> str:
    """Means and paired differences. Intervals: resampled scenes, the same for seeds and arms; Student's by seed."""
    lines = [
        "| setting | measured | arm | mean [95 %] | by seed | less | difference [95 %, scenes] | [95 %, seeds] |",
        "|---" * 8 + "|",
    ]
    for (name, arm), cells in results.items():
        base = results.get((name, BASELINES.get(arm, "")), ())
        for measured in MEASURES:
            values, before = ([np.array([v for *_, v in cell[measured]]) for cell in of] for of in (cells, base))
            scenes = [[scene for scene, *_ in cell[measured]] for cell in cells]
            whole = cluster_interval(values, scenes)
            row = [name, measured, arm, f"{whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}]"]
            row += [" ".join(f"{of.mean():.3f}" for of in values), "", "", ""]
            if base:
                ends = paired_bootstrap(before, values, scenes).interval
                row[5:7] = [BASELINES[arm], f"{ends.mean:+.3f} [{ends.low:+.3f}, {ends.high:+.3f}]"]
                by_seed = [float((b - a).mean()) for a, b in zip(before, values, strict=True)]
                if (of_seeds := student_interval(by_seed).ci) is not None:
                    row[7] = f"[{of_seeds[0]:+.3f}, {of_seeds[1]:+.3f}]"
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Arguments) -> None:
    """Measures and writes."""
    if arguments.quick:
        arguments = replace(arguments, rows=16, steps=2, scenes=16)
    if arguments.scenes % 16:
        raise UserError(f"--scenes must be a multiple of 16, not {arguments.scenes}")
    lmm = sav_jax.load("tiny")
    results = {}
    for name in arguments.settings:
        for arm in arguments.arms:
            seeds = arguments.seeds if arm != "untrained" else arguments.seeds[:1]
            results[name, arm] = [cell(lmm, arguments, name, arm, seed) for seed in seeds]
            text = table(results)
            write_file(arguments.output / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
