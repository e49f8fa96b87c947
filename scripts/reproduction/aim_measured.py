"""What AIM's claims are judged by: projections trained, tasks asked with and without demonstrations, and costs.

Every seed has a projection of its own (its documents and their order) and demonstrations of its own. Three kinds of
tasks are answered without demonstrations, with real ones in the prompt (``icl``) and with virtual ones (``aim``):

- *unsaid*: the question ("what is it?") does not say whether name, colour, place ... of a thing is meant; the
  demonstrations alone do. Scenes of the kinds that the projection's documents show, and digits, which none shows.
- *asked*: tasks of ``sav-jax eval`` whose question says it all: demonstrations can only disturb.
- *captions*: free text, scored by CIDEr-D.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import sav_jax
from sav_jax.aim import Aim, DemonstrationBank, after_demonstrations, cache_bytes_per_token, load_aim
from sav_jax.eval.methods.icl import draw_balanced, in_turns, with_demonstrations
from sav_jax.eval.metrics import Answers as GivenAnswers
from sav_jax.eval.metrics import Units
from sav_jax.eval.parsing import parse_answer
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import Data, Item, Split, Task, split_task
from sav_jax.extract import plan_prompts
from sav_jax.lmm import LMM
from sav_jax.train.aim import AIM_PRESETS, AimRecipe, train_aim
from sav_jax.train.documents import drawn_documents, drawn_pairs
from scripts.reproduction.rescoring import heads_of
from scripts.reproduction.study import MODELS, Answers, Study
from scripts.reproduction.trained import quiet, trainings

PART = "aim"
QUESTION = "what is it?"
# (what is meant, kinds of scene): of what the projection's documents show, and of digits, which they never do.
SHAPES, LETTERS, DIGITS = ("shape", "shape"), ("glyph", "letter"), ("glyph", "digit")
UNSAID: Mapping[str, tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = {
    "shapes, letters": (
        ("name", (SHAPES, LETTERS)),
        ("category", (SHAPES, LETTERS)),
        ("color", (SHAPES,)),
        ("background", (SHAPES,)),
        ("size", (SHAPES,)),
        ("texture", (SHAPES,)),
        ("place", (SHAPES,)),
    ),
    "digits": (("name", (DIGITS,)), ("color", (DIGITS,)), ("background", (DIGITS,))),
}
ASKED, DESCRIBED = ("drawn-textures", "drawn-glyphs", "drawn-hallucination"), "drawn-captions"
FIRST = 80 * 10**9  # seeds far beyond those of the training's documents
LONGEST = 24  # tokens of a caption
SHOTS = 4  # labelled examples of each class, of which demonstrations are drawn; captions: in all


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
      steps, shots: of the training of a projection; every document is seen once.
      numbers: of demonstrations, on unsaid tasks.
      middle: the number of them in the claims, and on asked tasks and captions.
      queries: per unsaid task.
      others: per asked task, and captions.
      unsaid: tasks of each group, the first of them.
    """

    steps: int = 900
    shots: tuple[int, ...] = (1, 2, 4)
    numbers: tuple[int, ...] = (1, 2, 4, 8)
    middle: int = 4
    queries: int = 30
    others: int = 60
    unsaid: int = 7


FULL = Size()
QUICK = Size(12, (2,), (1, 4), 4, 16, 16, 1)


def asked_of(study: Study) -> tuple[str, ...]:
    """Tasks whose question says it all."""
    return ASKED[:1] if study.quick else ASKED


def size_of(study: Study) -> Size:
    """What a study does."""
    return QUICK if study.quick else FULL


def layer_of(study: Study, model: str) -> int:
    """Whose hidden states are projected: the preset's; of a model of another depth the one that is as far up."""
    preset = AIM_PRESETS["tiny"].layer
    if study.bundled(model):
        return preset
    return round(preset / heads_of(study, MODELS[0])[0] * heads_of(study, model)[0])


def recipe_of(size: Size, seed: int, layer: int) -> AimRecipe:
    """The preset, as long as the study has time for."""
    preset = replace(AIM_PRESETS["tiny"], layer=layer)
    optimization = replace(preset.optimization, seed=seed, keep=1, checkpoint_every=size.steps)
    return replace(preset, steps=size.steps, shots=size.shots, pairs=max(size.shots) + 1, optimization=optimization)


def projection(study: Study, lmm: LMM, model: str, seed: int) -> Aim:
    """The projection of a seed: trained, unless it is there."""
    # Of other weights another run, whose folder a training would refuse.
    mark = "" if study.bundled(model) else f"-{lmm.fingerprint[:8]}"
    size, folder = size_of(study), study.output / PART / model / f"projection-{seed}{mark}"
    recipe = recipe_of(size, seed, layer_of(study, model))
    documents = recipe.steps * recipe.optimization.batch_size
    recipe = recipe.resolved(documents)
    record = folder / "trained.json"
    facts = json.loads(json.dumps([recipe.facts(), lmm.fingerprint]))
    if not record.exists() or json.loads(record.read_text()) != facts:
        study.say(f"training {folder}")
        with quiet():
            train_aim(lmm, drawn_documents(documents, recipe.pairs, seed), recipe, folder, progress=False)
        record.write_text(json.dumps(facts) + "\n")
    return load_aim(folder)


def make_task(meant: str, kinds: Sequence[tuple[str, str]], queries: int, number: int) -> Task:
    """Scenes of which the same is meant; labels that are too rare are left out."""
    first = FIRST + number * 10**8
    pool = drawn_pairs(meant, kinds, 800, first, QUESTION, held_out=True)
    asked = drawn_pairs(meant, kinds, queries, first + 10**7, QUESTION, held_out=True)
    counts = Counter(pair.label for pair in pool)
    kept = {label for label, count in counts.items() if count >= SHOTS} & {pair.label for pair in asked}
    pool, asked = (tuple(pair for pair in pairs if pair.label in kept) for pairs in (pool, asked))
    name = f"unsaid-{'-'.join(category for _, category in kinds)}-{meant}"
    return Task(
        name,
        f"{meant}, which the question does not say",
        lambda _: Data(tuple(map(Item, pool)), tuple(map(Item, asked))),
        # What is written counts as it stands: no list of answers tells "red" from "star".
        parse=lambda text, _: text.strip().casefold(),
    )


def unsaid_tasks(size: Size) -> dict[str, list[Task]]:
    """Group -> tasks whose question does not say what is meant."""
    return {
        group: [
            make_task(meant, kinds, size.queries, 10 * i + j) for j, (meant, kinds) in enumerate(rows[: size.unsaid])
        ]
        for i, (group, rows) in enumerate(UNSAID.items())
    }


LAYOUTS = {"icl": with_demonstrations, "icl-none": with_demonstrations, "icl-turns": in_turns}

Cell = dict[str, dict[str, Any]]
"""Method -> task -> {"values", "clusters", "facts"}: what queries scored, and what their prompts cost."""


def answered(
    lmm: LMM,
    tasks: Sequence[Task],
    methods: Sequence[str],
    number: int,
    seed: int,
    bank: DemonstrationBank | None,
    size: Size,
) -> Cell:
    """What is scored, query by query, after the demonstrations that ``sav-jax eval`` chooses, and what prompts cost.

    Args:
      lmm: the model.
      tasks: what is asked.
      methods: "zero-shot", "icl", "icl-turns", "aim", as there; "icl-none": the layout of "icl" without demonstrations.
        All that is written is read as there.
      number: of demonstrations.
      seed: of support, queries and demonstrations.
      bank: of virtual tokens, for "aim".
      size: how many queries.
    """
    cell: Cell = {}
    splits = [split_task(task, task.load(Path()), SHOTS, seed, size.others) for task in tasks]
    for method in methods:
        asked: list[list[sav_jax.Example]] = []
        for task, split in zip(tasks, splits, strict=True):
            targets = np.array([0 if task.generative else split.labels.index(item.label) for item in split.support])
            chosen = [split.support[row] for row in draw_balanced(targets, number, np.random.default_rng(seed))]
            queries = [item.example for item in split.queries]
            if method in LAYOUTS:
                shown = [] if method == "icl-none" else chosen
                queries = [LAYOUTS[method](task, shown, query) for query in queries]
            elif method == "aim":
                assert bank is not None
                tokens = bank.get([replace(item.example, label=task.answer(item.label)) for item in chosen])
                queries = [after_demonstrations(query, tokens, bank.aim.layout) for query in queries]
            asked.append(queries)
        every = [query for queries in asked for query in queries]
        prompts = plan_prompts(lmm, every)
        longest = LONGEST if any(task.generative for task in tasks) else 4
        texts = iter(sav_jax.generate(lmm, every, longest, batch_size=10, progress=False, prompts=prompts))
        lengths = iter(prompts)
        cell[method] = {}
        for task, split in zip(tasks, splits, strict=True):
            predictions = [read_answer(task, split, item, next(texts).text) for item in split.queries]
            tokens_each = float(np.mean([len(next(lengths).token_ids) for _ in split.queries]))
            given = GivenAnswers(split.queries, split.labels, tuple(predictions), corpus=split.corpus)
            (metric,) = [metric for metric in task.all_metrics if metric.name == task.metric]
            units = metric.compute(given)
            assert isinstance(units, Units)
            cell[method][task.name] = {
                "values": [float(value) for value in units.values],
                "clusters": list(given.clusters),
                "facts": {"prompt_tokens": tokens_each, "cache_bytes": tokens_each * cache_bytes_per_token(lmm)},
            }
    return cell


def read_answer(task: Task, split: Split, item: Item, text: str) -> str:
    """As ``sav-jax eval`` reads what was written."""
    if task.parse is not None:
        return task.parse(text, item) or ""
    if task.generative:
        return text.strip()
    return parse_answer(text, {label: task.answer(label) for label in item.offered or split.labels}) or ""


@dataclass(frozen=True)
class Measured:
    """All that was measured of a model.

    Attributes:
      unsaid: group -> names of its tasks.
      without: the cell of unsaid tasks without demonstrations.
      cells: number of demonstrations -> a cell of unsaid tasks for each seed.
      others: a cell of asked tasks and captions for each seed.
      costs: see :func:`costs`, of each seed.
    """

    unsaid: Mapping[str, list[str]]
    without: Cell
    cells: Mapping[int, list[Cell]]
    others: list[Cell]
    costs: list[dict[str, Any]]

    def answers(self, tasks: Sequence[str], method: str, number: int) -> dict[str, Answers]:
        """Task -> what was scored under each seed, by unsaid tasks with so many demonstrations."""
        if tasks[0] in self.others[0][method]:
            cells = self.others
        elif method == "zero-shot":  # which no seed changes
            cells = [self.without] * len(self.others)
        else:
            cells = self.cells[number]
        return {
            task: Answers(
                tuple(np.array(cell[method][task]["values"]) for cell in cells),
                tuple(tuple(cell[method][task]["clusters"]) for cell in cells),
            )
            for task in tasks
        }

    def fact(self, tasks: Sequence[str], method: str, number: int, name: str) -> list[float]:
        """The mean over tasks of a cost, for each seed."""
        return [float(np.mean([cell[method][task]["facts"][name] for task in tasks])) for cell in self.cells[number]]


def measured(study: Study, model: str) -> Measured:
    """Train and answer whatever was not before."""
    size, folder = size_of(study), study.output / PART / model
    unsaid = unsaid_tasks(size)
    every = [task for tasks in unsaid.values() for task in tasks]
    asked, captions = find_tasks(",".join(asked_of(study))), find_tasks(DESCRIBED)
    loaded: dict[str, LMM] = {}

    def lmm() -> LMM:
        if not loaded:
            loaded[model] = study.load(model)
        return loaded[model]

    def cell(tasks: Sequence[Task], number: int, seed: int, *methods: str) -> Callable[[], Cell]:
        def compute() -> Cell:
            bank = DemonstrationBank(lmm(), projection(study, lmm(), model, seed))
            return answered(lmm(), tasks, methods, number, seed, bank, size)

        return compute

    facts = dataclasses.asdict(size) | {
        "recipe": recipe_of(size, 0, layer_of(study, model)).facts(),
        "shots_of_classes": SHOTS,
    }
    first, middle = trainings(study)[0], size.middle
    without = study.kept(f"{PART}/{model}/without", cell(every, 1, first, "zero-shot"), **facts)
    cells: dict[int, list[Cell]] = {number: [] for number in size.numbers}
    others: list[Cell] = []
    for seed in trainings(study):
        name = f"{PART}/{model}/seed-{seed}"
        for number in size.numbers:
            one = study.kept(f"{name}-demonstrations-{number}", cell(every, number, seed, "icl", "aim"), **facts)
            if number == middle:  # the layout that these models know, and that of "icl" without demonstrations
                further = cell(every, number, seed, "icl-turns", "icl-none")
                one |= study.kept(f"{name}-layouts-{number}", further, **facts)
            cells[number].append(one)
        both = [
            study.kept(f"{name}-{what}", cell(tasks, middle, seed, "zero-shot", "icl", "aim"), **facts)
            for what, tasks in (("asked", asked), ("captions", captions))
        ]
        layouts = [
            study.kept(f"{name}-layouts-{what}", cell(tasks, middle, seed, "icl-turns", "icl-none"), **facts)
            for what, tasks in (("asked", asked), ("captions", captions))
        ]
        others.append(
            {
                method: of_asked | captioned[method]
                for of, captioned in (both, layouts)
                for method, of_asked in of.items()
            }
        )

    def spent(seed: int) -> Callable[[], dict[str, Any]]:
        return lambda: costs(
            lmm(), projection(study, lmm(), model, seed), every[0], seed, size, folder / f"bank-{seed}"
        )

    spents = [study.kept(f"{PART}/{model}/costs-{seed}", spent(seed), **facts) for seed in trainings(study)]
    groups = {group: [task.name for task in tasks] for group, tasks in unsaid.items()}
    return Measured(groups, without, cells, others, spents)


def costs(lmm: LMM, aim: Aim, task: Task, seed: int, size: Size, folder: Path) -> dict[str, Any]:
    """Time, tokens, and passes over demonstrations.

    Returns:
      ``seconds``: method -> number of demonstrations -> seconds for reading a query's prompt up to the first token of
      its answer, one for each repetition, methods taking turns; ``tokens``: of a demonstration, of its text, and of
      prompts with 0, 1 demonstration; ``passes``: over demonstrations for a first, a second set of queries and one
      with a bank that was kept on disk.
    """
    data = task.load(Path())
    assert data.queries is not None
    queries = [item.example for item in data.queries[:20]]
    again = [item.example for item in data.queries[20:40]]
    drawn = [data.pool[row] for row in np.random.default_rng(seed).permutation(len(data.pool))[: max(size.numbers)]]
    bank = DemonstrationBank(lmm, aim)

    def prompts(method: str, number: int, asked: Sequence[sav_jax.Example]) -> list[sav_jax.Example]:
        shown = drawn[:number]
        if method == "icl":
            return [with_demonstrations(task, shown, query) for query in asked]
        tokens = bank.get([item.example for item in shown])
        return [after_demonstrations(query, tokens, aim.layout) for query in asked]

    seconds: dict[str, dict[int, list[float]]] = {method: {n: [] for n in size.numbers} for method in ("icl", "aim")}
    for repetition in range(6):
        for number in size.numbers:
            for method, of in seconds.items():
                examples = prompts(method, number, queries)
                start = time.perf_counter()
                sav_jax.next_token_logits(lmm, examples, batch_size=1, progress=False)
                if repetition:  # the first compiles
                    of[number].append((time.perf_counter() - start) / len(examples))
    lengths = {
        method: {
            n: float(np.mean([len(p.token_ids) for p in plan_prompts(lmm, prompts(method, n, queries))]))
            for n in size.numbers
        }
        for method in seconds
    }
    most = max(size.numbers)
    fresh = DemonstrationBank(lmm, aim)
    shown = [item.example for item in drawn[:most]]
    passes = []
    for _ in (queries, again):  # what stands before them is the same
        before = fresh.passes
        fresh.get(shown)
        passes.append(fresh.passes - before)
    fresh.save(folder)
    kept = DemonstrationBank(lmm, aim)
    kept.load(folder)
    kept.get(shown)
    text = [len(values.values) for values in fresh.get(shown)]
    return {
        "seconds": {method: {str(n): values for n, values in of.items()} for method, of in seconds.items()},
        "tokens": {method: {str(n): value for n, value in of.items()} for method, of in lengths.items()},
        "text_tokens": float(np.mean(text)),
        "passes": [*passes, kept.passes],
        "demonstrations": most,
        "queries": len(queries),
        "bytes_per_token": cache_bytes_per_token(lmm),
    }
