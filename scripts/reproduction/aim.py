"""AIM's claims (arXiv 2406.07588): demonstrations as virtual tokens, made by the frozen model and a trained projection.

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
from sav_jax.eval.methods.icl import draw_balanced, with_demonstrations
from sav_jax.eval.metrics import Answers as GivenAnswers
from sav_jax.eval.metrics import Units
from sav_jax.eval.parsing import parse_answer
from sav_jax.eval.statistics import Interval
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import Data, Item, Split, Task, split_task
from sav_jax.extract import plan_prompts
from sav_jax.lmm import LMM
from sav_jax.train.aim import AIM_PRESETS, AimRecipe, train_aim
from sav_jax.train.documents import drawn_documents, drawn_pairs
from scripts.reproduction.study import Answers, Finding, Study, Table, finding
from scripts.reproduction.trained import by_seed, mean, of_seeds, over_both, quiet, trainings

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
CAPTIONS = {
    "reproduction-aim": "Tasks whose question does not say what is meant, by number of demonstrations: accuracy "
    "(bars: lowest and highest of the seeds), tokens of a prompt, memory of its keys and values, and time to read it."
}
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

    steps: int = 150
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


def recipe_of(size: Size, seed: int) -> AimRecipe:
    """The preset, as long as the study has time for."""
    preset = AIM_PRESETS["tiny"]
    optimization = replace(preset.optimization, seed=seed, keep=1, checkpoint_every=size.steps)
    return replace(preset, steps=size.steps, shots=size.shots, pairs=max(size.shots) + 1, optimization=optimization)


def projection(study: Study, lmm: LMM, model: str, seed: int) -> Aim:
    """The projection of a seed: trained, unless it is there."""
    size, folder = size_of(study), study.output / PART / model / f"projection-{seed}"
    recipe = recipe_of(size, seed)
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


Cell = dict[str, dict[str, Any]]
"""Method -> task -> {"values", "clusters", "facts"}: what queries scored, and what their prompts cost."""


def answered(
    lmm: LMM, tasks: Sequence[Task], methods: Sequence[str], number: int, seed: int, bank: DemonstrationBank, size: Size
) -> Cell:
    """What is scored, query by query, after the demonstrations that ``sav-jax eval`` chooses, and what prompts cost.

    Args:
      lmm: the model.
      tasks: what is asked.
      methods: "zero-shot", "icl", "aim", as there; all that is written is read as there.
      number: of demonstrations.
      seed: of support, queries and demonstrations.
      bank: of virtual tokens.
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
            if method == "icl":
                queries = [with_demonstrations(task, chosen, query) for query in queries]
            elif method == "aim":
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
      costs: see :func:`costs`.
    """

    unsaid: Mapping[str, list[str]]
    without: Cell
    cells: Mapping[int, list[Cell]]
    others: list[Cell]
    costs: Mapping[str, Any]

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
            loaded[model] = sav_jax.load(model)
        return loaded[model]

    def cell(tasks: Sequence[Task], number: int, seed: int, *methods: str) -> Callable[[], Cell]:
        def compute() -> Cell:
            bank = DemonstrationBank(lmm(), projection(study, lmm(), model, seed))
            return answered(lmm(), tasks, methods, number, seed, bank, size)

        return compute

    facts = dataclasses.asdict(size) | {"recipe": recipe_of(size, 0).facts(), "shots_of_classes": SHOTS}
    first, middle = trainings(study)[0], size.middle
    without = study.kept(f"{PART}/{model}/without", cell(every, 1, first, "zero-shot"), **facts)
    cells: dict[int, list[Cell]] = {number: [] for number in size.numbers}
    others: list[Cell] = []
    for seed in trainings(study):
        name = f"{PART}/{model}/seed-{seed}"
        for number in size.numbers:
            one = study.kept(f"{name}-demonstrations-{number}", cell(every, number, seed, "icl", "aim"), **facts)
            cells[number].append(one)
        both = [
            study.kept(f"{name}-{what}", cell(tasks, middle, seed, "zero-shot", "icl", "aim"), **facts)
            for what, tasks in (("asked", asked), ("captions", captions))
        ]
        others.append({method: of | both[1][method] for method, of in both[0].items()})
    spent = study.kept(
        f"{PART}/{model}/costs",
        lambda: costs(lmm(), projection(study, lmm(), model, first), every[0], size, folder / "bank"),
        **facts,
    )
    groups = {group: [task.name for task in tasks] for group, tasks in unsaid.items()}
    return Measured(groups, without, cells, others, spent)


def costs(lmm: LMM, aim: Aim, task: Task, size: Size, folder: Path) -> dict[str, Any]:
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
    bank = DemonstrationBank(lmm, aim)

    def prompts(method: str, number: int, asked: Sequence[sav_jax.Example]) -> list[sav_jax.Example]:
        shown = data.pool[:number]
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
    shown = [item.example for item in data.pool[:most]]
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


def measure(study: Study) -> list[Finding]:
    """All rows of AIM."""
    return [row for model in study.models for row in rows_of(study, model, measured(study, model))]


def rows_of(study: Study, model: str, found: Measured) -> list[Finding]:
    """The rows of a model."""
    size, seeds = size_of(study), len(trainings(study))
    middle, least, most = size.middle, min(size.numbers), max(size.numbers)
    drawn, digits = found.unsaid.values()
    trained = f"{seeds} projections of {size.steps} steps each, with loss still falling; demonstrations of their own"
    images = "it saw prompts of two images in training" if model == "tiny" else "it saw one image a prompt in training"

    def row(
        claim: str, source: str, setting: str, interval: Interval, values: Mapping[str, float], note: str = ""
    ) -> Finding:
        return finding(
            PART,
            interval,
            claim=claim,
            source=f"AIM, {source}",
            model=model,
            setting=setting,
            values=dict(values),
            seeds=seeds,
            note=note,
        )

    def answers(tasks: Sequence[str], *methods: str, number: int = middle) -> list[dict[str, Answers]]:
        return [found.answers(tasks, method, number) for method in methods]

    rows = []
    for tasks, what, unit in (
        (asked_of(study), f"{', '.join(asked_of(study))}: accuracy", "accuracy"),
        ((DESCRIBED,), f"{DESCRIBED}: CIDEr-D times 100", "CIDEr"),
    ):
        none, icl, aim = answers(tasks, "zero-shot", "icl", "aim")
        values = {"zero-shot": mean(none), "icl": mean(icl), "aim": mean(aim)}
        kind = "captions" if unit == "CIDEr" else "questions"
        setting = f"{what}, {middle} demonstrations"
        rows += [
            row(
                f"Demonstrations in the prompt degrade a single-image model ({kind})",
                "section 1",
                setting,
                over_both(none, icl),
                {name: values[name] for name in ("zero-shot", "icl")},
                f"{model}: {images}",
            ),
            row(
                f"Fused tokens repair what demonstrations in the prompt break ({kind})",
                "sections 3 and 4",
                setting,
                over_both(aim, icl),
                values,
                trained,
            ),
            row(
                f"Fused tokens are better than no demonstrations ({kind})",
                "section 4",
                setting,
                over_both(aim, none),
                values,
                "the question says all that must be known; no document of the training is of this kind",
            ),
        ]
    for names, kind in ((drawn, "the projection was trained on this kind"), (digits, "digits, new to the projection")):
        none, icl, aim = answers(names, "zero-shot", "icl", "aim")
        values = {"zero-shot": mean(none), "icl": mean(icl), "aim": mean(aim)}
        setting = f"{len(names)} tasks whose question does not say what is meant, {middle} demonstrations"
        rows += [
            row(
                f"Fused tokens teach what only demonstrations say: better than none ({kind})",
                "section 4",
                setting,
                over_both(aim, none),
                values,
                trained,
            ),
            row(
                f"Fused tokens teach what only demonstrations say: better than these in the prompt ({kind})",
                "section 4",
                setting,
                over_both(aim, icl),
                values,
                trained,
            ),
        ]
    every = [*drawn, *digits]
    (few,), (many,) = answers(every, "aim", number=least), answers(every, "aim", number=most)
    rows.append(
        row(
            "More demonstrations help fused tokens",
            "figure 1",
            f"{len(every)} tasks whose question does not say what is meant, {most} against {least} demonstrations",
            over_both(many, few),
            {f"{least} demonstrations": mean(few), f"{most} demonstrations": mean(many)},
        )
    )
    return [*rows, *cost_rows(found, row, every, most)]


def cost_rows(found: Measured, row: Callable[..., Finding], every: Sequence[str], most: int) -> list[Finding]:
    """What demonstrations cost."""
    memory = {method: found.fact(every, method, most, "cache_bytes") for method in ("icl", "aim")}
    saved = [100 * (1 - a / i) for a, i in zip(memory["aim"], memory["icl"], strict=True)]
    spent = found.costs
    seconds = {method: spent["seconds"][method][str(most)] for method in ("icl", "aim")}
    faster = [100 * (1 - a / i) for a, i in zip(seconds["aim"], seconds["icl"], strict=True)]
    few, many = (spent["tokens"]["aim"][str(n)] for n in (min(map(int, spent["tokens"]["aim"])), most))
    each = (many - few) / (most - min(map(int, spent["tokens"]["aim"])))
    first, second, kept = spent["passes"]
    again = 100.0 * (1 - (second + kept) / (2 * first))
    return [
        row(
            "Fused tokens need less memory than demonstrations in the prompt",
            "figure 1",
            f"keys and values of a prompt with {most} demonstrations, less than of real ones, in %",
            of_seeds(saved),
            {f"{method}, kB": float(np.mean(of)) / 1000 for method, of in memory.items()},
            f"a demonstration adds {each:.1f} tokens, its text has {spent['text_tokens']:.1f}; the others separate",
        ),
        row(
            "Fused tokens make queries faster than demonstrations in the prompt",
            "figure 1",
            f"reading a prompt with {most} demonstrations, one at a time, less time than with real ones, in %",
            of_seeds(faster),
            {f"{method}, ms": 1000 * float(np.median(of)) for method, of in seconds.items()},
            f"interval over {len(faster)} repetitions, methods taking turns",
        ),
        row(
            "A bank reads demonstrations once, whatever is asked later",
            "section 3",
            f"passes over {most} demonstrations that a second set of queries, and another process, spare, in %",
            of_seeds([again, again]),
            {"passes, first queries": float(first), "second queries": float(second), "bank from disk": float(kept)},
            "a count, which no seed changes",
        ),
    ]


def tables(study: Study) -> list[Table]:
    """Accuracy and costs by number of demonstrations, and by task."""
    size = size_of(study)
    by_number, by_task = [], []
    for model in study.models:
        found = measured(study, model)
        for group, tasks in found.unsaid.items():
            none = found.answers(tasks, "zero-shot", size.middle)
            by_number.append((model, group, "0", f"{mean(none):.1f}", "", "", "", "", "", ""))
            for number in size.numbers:
                icl, aim = (found.answers(tasks, method, number) for method in ("icl", "aim"))
                cost = [
                    f"{np.mean(found.fact(tasks, method, number, name)) / unit:.0f}"
                    for name, unit in (("prompt_tokens", 1), ("cache_bytes", 1000))
                    for method in ("icl", "aim")
                ]
                less = f"{_shown(over_both(aim, icl))}", f"{_shown(over_both(aim, none))}"
                scores = f"{mean(icl):.1f}", f"{mean(aim):.1f}"
                by_number.append(
                    (model, group, str(number), "", *scores, *less, " / ".join(cost[:2]), " / ".join(cost[2:]))
                )
        names = [*(name for tasks in found.unsaid.values() for name in tasks), *asked_of(study), DESCRIBED]
        for name in names:
            of_task = [f"{mean(found.answers([name], m, size.middle)):.1f}" for m in ("zero-shot", "icl", "aim")]
            by_task.append((model, name, *of_task))
    head = "model", "scenes", "demonstrations"
    return [
        Table(
            "AIM by number of demonstrations, on tasks whose question does not say what is meant",
            (
                *head,
                "zero-shot",
                "icl",
                "aim",
                "aim - icl",
                "aim - zero-shot",
                "tokens, icl / aim",
                "cache, kB, icl / aim",
            ),
            tuple(by_number),
            "Accuracy in %; brackets: 95 % over queries and over seeds, the wider of the two at either end.",
        ),
        Table(
            f"AIM by task, {size.middle} demonstrations",
            ("model", "task", "zero-shot", "icl", "aim"),
            tuple(by_task),
            "Accuracy in %; of captions CIDEr-D times 100.",
        ),
    ]


def _shown(interval: Interval) -> str:
    return f"{interval.mean:+.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def plots(study: Study) -> list[Path]:
    """Accuracy, tokens, memory and time against the number of demonstrations."""
    from sav_jax.eval.report.drawing import line_style, new_figure, styled

    size = size_of(study)
    path = study.pages / "reproduction-aim.svg"
    with styled():
        drawing = new_figure(10.0, 2.9 * len(study.models))
        axes = drawing.subplots(len(study.models), 4, squeeze=False)
        for line, model in zip(axes, study.models, strict=True):
            found = measured(study, model)
            tasks = [name for of in found.unsaid.values() for name in of]
            numbers = list(size.numbers)
            for place, method in enumerate(("icl", "aim")):
                style = line_style(place)
                of = [found.answers(tasks, method, number) for number in numbers]
                scores = [mean(one) for one in of]
                seeds = [by_seed(one, {task: _nothing(a) for task, a in one.items()}) for one in of]
                spread = np.array(
                    [[s - min(of_seed), max(of_seed) - s] for s, of_seed in zip(scores, seeds, strict=True)]
                )
                line[0].errorbar(numbers, scores, yerr=np.maximum(spread.T, 0), capsize=2, label=method, **style)
                tokens = [np.mean(found.fact(tasks, method, number, "prompt_tokens")) for number in numbers]
                memory = [np.mean(found.fact(tasks, method, number, "cache_bytes")) / 1000 for number in numbers]
                times = [1000 * np.median(found.costs["seconds"][method][str(number)]) for number in numbers]
                for axis, values in zip(line[1:], (tokens, memory, times), strict=True):
                    axis.plot(numbers, values, **style)
            none = mean(found.answers(tasks, "zero-shot", size.middle))
            line[0].axhline(none, color="0.5", linestyle=":", label="zero-shot")
            for axis, what in zip(
                line, ("accuracy, %", "tokens of a prompt", "cache, kB", "ms per query"), strict=True
            ):
                axis.set(title=what, xlabel="demonstrations", xticks=numbers)
                axis.set_ylim(bottom=0)
            line[0].set_ylabel(model)
            line[0].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, metadata={"Date": None})
    return [path]


def _nothing(answers: Answers) -> Answers:
    return Answers(tuple(np.zeros_like(values) for values in answers.values), answers.clusters)
