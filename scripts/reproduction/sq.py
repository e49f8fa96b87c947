"""SQ-LLaVA's ablation table (arXiv 2403.11299) in miniature: learning to ask, prototypes, updates of the vision tower.

The setting is made so that questions say what answers do not. Every shape goes by another's name. Conversations ask for
a shape's size and then "what color is the star?": its new name stands only in the second question. Sixteen pictures
more, copied until they are a fifth of the rows, are asked "what shape is this?", the one question that counts: exact
answers on held-out scenes. All else is equal between arms, seed by seed: scenes, steps, order, first values.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sav_jax
from sav_jax.eval.tasks import find_tasks
from sav_jax.lmm import LMM
from sav_jax.models.decoder import read_at
from sav_jax.prototypes import takes_prototypes, with_prototype_extractor
from sav_jax.train.chats import Chat, Turn
from sav_jax.train.data import ChatData
from sav_jax.train.optimizer import Optimization
from sav_jax.train.recipes import Recipe
from sav_jax.train.tune import form_of, tune
from sav_jax.world.questions import QA
from sav_jax.world.scene import draw, sample_scene
from sav_jax.world.shapes import SHAPES
from scripts.reproduction import aim_measured
from scripts.reproduction.aim_measured import answered
from scripts.reproduction.study import Answers, Finding, Study, Table, finding, untested
from scripts.reproduction.trained import mean, over_both, quiet, trainings

PART = "sq"
TRAINING, HELD_OUT = 90 * 10**9, 95 * 10**9  # first seeds of scenes, beyond all other drawings of this project
MEASURES = ("accuracy", "answer_loss", "question_loss")
Units = list[tuple[str, float]]
"""(scene, value) of everything that was measured."""


@dataclass(frozen=True)
class Arm:
    """What is in a training.

    Attributes:
      questions: half of those after the first are learned, too (SQ-LLaVA); else answers alone.
      prototypes: a fresh extractor in front of the projector's two layers, in Qwen-VLs of the merger.
      vision: low-rank updates of the tower.
    """

    questions: bool = True
    prototypes: bool = False
    vision: bool = True

    @property
    def name(self) -> str:
        """Of its file, such as "questions-vision"."""
        return "-".join(field for field, there in dataclasses.asdict(self).items() if there) or "none"


# (what a row is about, the arm with it, the arm without)
CLAIMS = (
    ("questions", "Learning to ask teaches what answers alone do not", Arm(), Arm(questions=False)),
    ("vision LoRA", "Low-rank updates of the vision tower help", Arm(), Arm(vision=False)),
    ("prototypes", "The prototype extractor helps", Arm(prototypes=True), Arm()),
)


PLAIN = Arm(questions=False, vision=False)
"""None of the parts: instruction tuning of the language model and the projector."""
TOGETHER = "All parts together beat plain tuning"
CAPTIONS = "Tuned with all parts, a model captions better than after plain tuning"

REASONS = {
    CLAIMS[0][1]: "Trainings gain unlike amounts (see by seed): with three of them the interval is wide.",
    CLAIMS[1][1]: "The tower of these models was trained on this very world and sees what is asked; the paper's is "
    "CLIP's.",
    CLAIMS[2][1]: "A fresh extractor changes what the language model has learned to read; the paper's has a stage of "
    "training of its own before.",
    CAPTIONS: "Neither training has a caption in it (see the table for what is left of them); the paper's learn from "
    "hundreds of thousands of conversations, descriptions among them.",
}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
      rows: conversations to learn from, before the named pictures' copies.
      steps: of training, of 8 conversations each.
      scenes: held out; a multiple of 16.
      learning_rate: of the language model's updates; the rest has a tenth of it.
      num_prototypes: of a picture's 16 tokens or more.
    """

    rows: int = 2048
    steps: int = 320
    scenes: int = 320
    learning_rate: float = 4e-3
    num_prototypes: int = 8


FULL = Size()
QUICK = Size(rows=48, steps=6, scenes=32)


def size_of(study: Study) -> Size:
    """What a study does."""
    return QUICK if study.quick else FULL


def scene_of(seed: int, held_out: bool, named: bool) -> tuple[sav_jax.Example, list[QA]]:
    """A shape and what is asked about it; ``named``: only what shape it is."""
    scene = sample_scene(seed, "shape", held_out=held_out)
    media = sav_jax.Example("-", (draw(scene),), id=str(seed), source=f"drawn scene {seed}")
    name = SHAPES[(SHAPES.index(scene.thing.name) + 1) % len(SHAPES)]
    if named:
        return media, [QA("what shape is this?", name, "shape")]
    size = QA("is the shape small or large?", scene.thing.size, "size")
    return media, [size, QA(f"what color is the {name}?", scene.thing.color, "color")]


def conversation(seed: int, held_out: bool, named: bool = False) -> Chat:
    """One or two questions about a shape."""
    media, asked = scene_of(seed, held_out, named)
    said = [(role, text) for qa in asked for role, text in (("user", qa.question), ("assistant", qa.answer))]
    return Chat(tuple(Turn(*turn) for turn in said), media)


def training_chats(rows: int, seed: int) -> list[Chat]:
    """The conversations of a seed."""
    first = TRAINING + seed * 10**6
    chats = [conversation(first + i, False) for i in range(rows)]
    named = [conversation(first + rows + i, False, named=True) for i in range(16)]
    return chats + named * max(rows // 64, 1)


def accuracy(lmm: LMM, scenes: int) -> Units:
    """Whether what is written is the new name."""
    asked = []
    for seed in range(HELD_OUT, HELD_OUT + scenes):
        media, (qa,) = scene_of(seed, True, named=True)
        asked.append((qa, replace(media, question=qa.question)))
    written = sav_jax.generate(lmm, [example for _, example in asked], 4, batch_size=32, progress=False)
    return [
        (example.id or "", float(one.text.strip().casefold() == qa.answer))
        for (qa, example), one in zip(asked, written, strict=True)
    ]


@functools.lru_cache(maxsize=4)
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


def turn_losses(lmm: LMM, scenes: int, asks: bool) -> Units:
    """Nats per token (with the one that ends it) of each turn of held-out conversations: answers to a user's questions,
    or, ``asks``, the questions but the first, which the model asks.
    """
    chats = [conversation(HELD_OUT + i, True) for i in range(scenes)]
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
            units += [(chats[row].media.id or "", float(part.mean())) for part in kept]
    return sorted(units, key=lambda unit: unit[0])  # turns stay in order


def recipe_of(size: Size, arm: Arm, seed: int) -> Recipe:
    """The training of an arm."""
    rate = size.learning_rate
    return Recipe(
        learning_rate=rate,
        vision_rank=16 if arm.vision else 0,
        vision_alpha=32.0,
        vision_learning_rate=rate / 10,
        projector_learning_rate=rate / 10,
        steps=size.steps,
        sq_ratio=0.5 if arm.questions else 0.0,
        optimization=Optimization(batch_size=8, seed=seed, warmup=0.1, checkpoint_every=size.steps, keep=1),
    )


def captions(study: Study, lmm: LMM) -> dict[str, Units]:
    """CIDEr-D of what it writes about held-out pictures that it is asked to describe."""
    size = aim_measured.size_of(study)
    (task,) = find_tasks(aim_measured.DESCRIBED)
    of = answered(lmm, [task], ("zero-shot",), 0, 0, None, size)["zero-shot"][task.name]
    return {"captions": list(zip(of["clusters"], of["values"], strict=True))}


def cell(
    study: Study, load: Callable[[], LMM], model: str, arm: Arm, seed: int, captioned: bool = False
) -> dict[str, Units]:
    """What a trained model was measured to do, now or before; ``captioned``: its captions, too."""
    size = size_of(study)

    def compute() -> dict[str, Units]:
        lmm = load()
        if arm.prototypes:
            lmm = with_prototype_extractor(lmm, seed, num_prototypes=size.num_prototypes, form="paper")
        folder = study.output / PART / model / "training"
        shutil.rmtree(folder, ignore_errors=True)
        with quiet():
            lmm = tune(lmm, training_chats(size.rows, seed), recipe_of(size, arm, seed), folder, progress=False)
        shutil.rmtree(folder)
        return measured(lmm, size) | (captions(study, lmm) if captioned else {})

    facts = dataclasses.asdict(size) | {"recipe": recipe_of(size, arm, seed).facts(), "prototypes": arm.prototypes}
    name = f"{'captions-' if captioned else ''}{arm.name}-{seed}"
    return study.kept(f"{PART}/{model}/{name}", compute, **facts)


def measured(lmm: LMM, size: Size) -> dict[str, Units]:
    """Accuracy and losses on held-out scenes."""
    return {
        "accuracy": accuracy(lmm, size.scenes),
        "answer_loss": turn_losses(lmm, size.scenes, asks=False),
        "question_loss": turn_losses(lmm, size.scenes, asks=True),
    }


@dataclass(frozen=True)
class Cells:
    """What was measured of a model.

    Attributes:
      arms: arm (None: before training) -> what was measured under each seed; captions, too, before training, of all
        parts and of none of them.
    """

    arms: Mapping[Arm | None, Sequence[Mapping[str, Units]]]

    @property
    def whole(self) -> Arm:
        """All parts."""
        return Arm(prototypes=any(arm is not None and arm.prototypes for arm in self.arms))


def cells(study: Study, model: str) -> Cells:
    """All arms that a model's layout has, seed by seed."""
    size = size_of(study)

    @functools.cache
    def load() -> LMM:
        return study.load(model)

    fits = study.kept(f"{PART}/{model}/takes-prototypes", lambda: takes_prototypes(load()))
    before = study.kept(f"{PART}/{model}/untrained", lambda: measured(load(), size), **dataclasses.asdict(size))
    before |= study.kept(f"{PART}/{model}/captions-untrained", lambda: captions(study, load()))
    found: dict[Arm | None, list[dict[str, Units]]] = {None: [before]}
    for arm in dict.fromkeys([*(arm for *_, with_it, without in CLAIMS for arm in (with_it, without)), PLAIN]):
        if fits or not arm.prototypes:
            told = arm in (Arm(prototypes=fits), PLAIN)
            seeds = trainings(study)[: 1 if study.quick else None]
            found[arm] = [cell(study, load, model, arm, seed, told) for seed in seeds]
    return Cells(found)


def answers(of: Sequence[Mapping[str, Units]], what: str) -> dict[str, Answers]:
    """What was measured under each seed, by scene."""
    values = tuple(np.array([value for _, value in one[what]]) for one in of)
    return {what: Answers(values, tuple(tuple(scene for scene, _ in one[what]) for one in of))}


def measure(study: Study) -> list[Finding]:
    """All rows of SQ-LLaVA."""
    return [row for model in study.models for row in rows_of(study, model, cells(study, model))]


def rows_of(study: Study, model: str, found: Cells) -> list[Finding]:
    """The rows of a model."""
    size = size_of(study)
    setting = f"new names of shapes, {size.scenes} held-out scenes; {size.steps} steps of 8 conversations"

    def row(claim: str, names: Sequence[str], better: Any, worse: Any, what: str = "accuracy", **rest: Any) -> Finding:
        known: dict[str, Any] = {"part": PART, "claim": claim, "source": "SQ-LLaVA, ablation table", "model": model}
        one, other = answers(better, what), answers(worse, what)
        values = dict(zip(names, (mean(one), mean(other)), strict=True))
        return finding(
            **{**known, "setting": setting, "values": values, "seeds": len(better)}
            | rest
            | {"interval": over_both(one, other)}
        )

    def losses(*arms: Sequence[Mapping[str, Units]]) -> str:
        one, other = (answers(of, "answer_loss")["answer_loss"].mean / 100 for of in arms)
        return f"loss of answers in conversations {one:.3f} and {other:.3f} nats per token"

    rows = []
    for part, claim, with_it, without in CLAIMS:
        if with_it not in found.arms:
            known: dict[str, Any] = {"claim": claim, "source": "SQ-LLaVA, ablation table", "model": model}
            rows.append(untested(PART, "the layout has no place for a prototype extractor", setting=setting, **known))
            continue
        better, worse = found.arms[with_it], found.arms[without]
        note = losses(better, worse)
        note += "; favourable by design: only questions hold the new names" if part == "questions" else ""
        rows.append(row(claim, (f"with {part}", f"without {part}"), better, worse, note=note))
    better, worse = found.arms[found.whole], found.arms[PLAIN]
    names = ("all parts", "none")
    note = f"{_parts(found.whole)}; {losses(better, worse)}"
    rows.append(row(TOGETHER, names, better, worse, note=note, source="SQ-LLaVA, main table"))
    rows.append(
        row(
            CAPTIONS,
            names,
            better,
            worse,
            "captions",
            setting=f"{aim_measured.DESCRIBED}, CIDEr-D times 100, after the same trainings",
            note=f"before them {mean(answers(found.arms[None], 'captions')):.1f}",
            source="SQ-LLaVA, section on captions",
        )
    )
    return rows


def _parts(arm: Arm) -> str:
    there = [name for name, field in zip(PARTS, dataclasses.astuple(arm), strict=True) if field]
    return f"all parts that the layout has: {', '.join(there)}"


PARTS = "questions", "prototypes", "vision LoRA"


def tables(study: Study) -> list[Table]:
    """The ablation table: every arm."""
    rows = []
    for model in study.models:
        found = cells(study, model)
        for arm, of in found.arms.items():
            by_seed = ", ".join(f"{100 * value.mean():.1f}" for value in answers(of, "accuracy")["accuracy"].values)
            losses = [f"{answers(of, what)[what].mean / 100:.3f}" for what in MEASURES[1:]]
            parts = ["no training"] * 3 if arm is None else [("-", "yes")[x] for x in dataclasses.astuple(arm)]
            cider = f"{mean(answers(of, 'captions')):.1f}" if "captions" in of[0] else ""
            rows.append((model, *parts, f"{mean(answers(of, 'accuracy')):.1f}", by_seed, *losses, cider))
    head = ("model", *PARTS, "accuracy of new names, %", "by seed")
    return [
        Table(
            "SQ-LLaVA: what each part adds",
            (*head, "loss of answers", "loss of questions", "captions"),
            tuple(rows),
            "Losses in nats per token; captions of `drawn-captions`, CIDEr-D times 100, where they were asked for. "
            "Language model and projector train in every arm. In the Qwen-VL layout, of which the paper has none, the "
            "extractor stands in front of the merger of patches. On one machine an arm and a seed give the same bits "
            "again; on another, whose rounding differs, a seed ends some points elsewhere, as another seed would. Kept "
            "arms may come from several machines.",
        )
    ]
