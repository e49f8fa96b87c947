"""What the page shows of one task: its numbers, its pictures and its hardest queries."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sav_jax._storage import lies_in
from sav_jax.errors import UserError
from sav_jax.eval.report.confidence import reliability_figure, risk_figure, sureness
from sav_jax.eval.report.drawing import Figure
from sav_jax.eval.report.heatmaps import confusion_counts, confusion_figure, confusions, head_figures
from sav_jax.eval.report.table import Table
from sav_jax.eval.report.words import chunks, metric_description, metric_name, one_line, per_class, percent, scale
from sav_jax.eval.stored import Answered, Results, Stored

_MOST_CARDS = 8
_MOST_HEAD_MAPS = 3
_MOST_COLUMNS = 6
_MOST_ANSWERS, _MOST_REFERENCES = 12, 3


@dataclass(frozen=True)
class Grid:
    """A table: a title, column heads with explanations ("" for none), and rows of a name and cells."""

    title: str
    heads: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Vote:
    """How many heads vote for a label, and what share of all heads that is."""

    label: str
    count: int
    share: float
    right: bool
    given: bool


@dataclass(frozen=True)
class Card:
    """A query that the heads disagree on. ``images`` are data addresses."""

    query: str
    question: str
    target: str
    prediction: str
    votes: tuple[Vote, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A task of a results folder.

    Attributes:
      title, description, source, prompt, labels: of the task.
      counts: labelled examples and queries in words.
      shots: what the pictures are of.
      grids: all metrics, one table per number of shots, and the subsets.
      heads, confusion, confidence: pictures.
      mistakes: the most frequent confusions.
      cards: the queries the heads disagree on most.
      written: free answers, from the worst to the best; None if answers are labels.
      note: why something is missing, "" if nothing is.
    """

    title: str
    description: str
    source: str
    prompt: str
    labels: tuple[str, ...]
    counts: str
    shots: str
    grids: tuple[Grid, ...]
    heads: tuple[Figure, ...]
    confusion: tuple[Figure, ...]
    confidence: tuple[Figure, ...]
    mistakes: tuple[tuple[str, str, int, float], ...]
    cards: tuple[Card, ...]
    written: Grid | None
    note: str

    @property
    def figures(self) -> tuple[Figure, ...]:
        return (*self.heads, *self.confusion, *self.confidence)


def make_section(results: Results, table: Table, source: int, task: str, key: str, *, number: int) -> Section:
    """Gather what the page shows of a task.

    Args:
      results: its folder.
      table: of all results.
      source: the folder's place in the table.
      task: its name.
      key: of the number of shots that pictures show.
      number: of the section, for the names of files.
    """
    facts, free = results.tasks[task], results.generative(task)
    labels = facts["labels"]
    place = {row.method: i for i, row in enumerate(row for row in table.rows if row.source == source)}
    runs = sorted((run for run in results.runs if run.task == task), key=lambda run: (run.shots, place[run.method]))
    shown = [run for run in runs if run.key == key]
    best = _best_first(shown, results)

    files = [f"figure_{number}_heads_{i}.svg" for i in range(_MOST_HEAD_MAPS)]
    heads = head_figures(results, key, place, len(labels), files)
    confusion: list[Figure] = []
    confidence: list[Figure] = []
    mistakes: list[tuple[str, str, int, float]] = []
    written, note = None, ""
    if results.has_answers(key):
        answers: dict[str, list[Answered]] = {}
        for (method, _), answered in results.answers(key).items():
            answers.setdefault(method, []).append(answered)
        ranked = [run for run in best if run.method in answers]
        if ranked and free:
            written = _written(ranked[0].method, answers[ranked[0].method][0], results.graded(task))
        elif ranked:
            counts = confusion_counts(answers[ranked[0].method], labels)
            file = f"figure_{number}_confusion.svg"
            confusion.append(confusion_figure(counts, labels, ranked[0].method, file))
            mistakes = confusions(counts, labels)
        sure = {run.method: found for run in ranked if (found := sureness(answers[run.method], labels)) is not None}
        if sure:
            errors = {run.method: _mean(run, "ece") for run in ranked}
            confidence.append(reliability_figure(sure, errors, f"figure_{number}_reliability.svg"))
            confidence.append(risk_figure(sure, f"figure_{number}_risk.svg"))
    else:
        missing = "examples of them" if free else "pictures of confusions and confidence"
        note = f"Single answers were not written (--log-samples): {missing} are left out."

    return Section(
        title=task if len(table.sources) == 1 else f"{task} ({table.sources[source]})",
        description=_text(facts, "description"),
        source=_text(facts, "source"),
        prompt=_text(facts, "prompt"),
        labels=tuple(labels),
        counts=_counts(results, key),
        shots=per_class(shown[0].shots, free),
        grids=_grids(runs, results),
        heads=tuple(heads),
        confusion=tuple(confusion),
        confidence=tuple(confidence),
        mistakes=tuple(mistakes),
        cards=_cards(results, key),
        written=written,
        note=note,
    )


def _written(method: str, answered: Answered, metric: str) -> Grid:
    """Answers at even steps from the worst to the best."""
    order = np.argsort(answered.scores, kind="stable")
    places = np.unique(np.linspace(0, len(order) - 1, min(len(order), _MOST_ANSWERS)).round().astype(int))
    rows = []
    for place in order[places].tolist():
        query = answered.queries[place]
        known = Counter(query.references)  # people often agree
        references = "; ".join(f"{text} ({n})" if n > 1 else text for text, n in known.most_common(_MOST_REFERENCES))
        more = len(known) - _MOST_REFERENCES
        cells = (
            one_line(query.question),
            answered.predictions[place] or "(none)",
            references + (f"; and {more} more" if more > 0 else ""),
            percent(answered.scores[place]),
        )
        rows.append((query.id, cells))
    title = f"Answers of {method} under the first seed, from the worst to the best at even steps"
    heads = (
        ("question", ""),
        ("answer", ""),
        ("references", ""),
        (f"{metric_name(metric)} {scale(metric)}", ""),
    )
    return Grid(title, heads, tuple(rows))


def _best_first(runs: Sequence[Stored], results: Results) -> list[Stored]:
    """By the task's metric; runs of another metric last."""

    def rank(run: Stored) -> tuple[bool, float]:
        metric = results.tasks[run.task].get("metric", run.metric)
        sign = -1 if results.higher_is_better(run.key, run.metric) else 1
        return run.metric != metric, sign * run.primary.mean

    return sorted(runs, key=rank)


def _grids(runs: Sequence[Stored], results: Results) -> tuple[Grid, ...]:
    """Every metric of every method, one table per key, and one for the subsets of each key that has some."""
    grids = []
    for key in dict.fromkeys(run.key for run in runs):
        of_key = [run for run in runs if run.key == key]
        names = list(dict.fromkeys(name for run in of_key for name in run.metrics))
        heads = [
            (f"{metric_name(name)} {'↑' if results.higher_is_better(key, name) else '↓'}", metric_description(name))
            for name in names
        ]
        heads.append(("time (s)", "seconds of the method itself, all seeds together, without the model's passes"))
        cells = [[_number(run, name) for name in names] for run in of_key]
        for row, run in zip(cells, of_key, strict=True):
            row.append("" if run.seconds is None else f"{run.seconds:.1f}")
        free = results.generative(of_key[0].task)
        grids += _in_parts(f"All metrics, {per_class(of_key[0].shots, free)}", heads, of_key, cells)
    for key in dict.fromkeys(run.key for run in runs):
        of_key = [run for run in runs if run.key == key and run.subsets]
        if of_key:
            subsets = list(dict.fromkeys(subset for run in of_key for subset in run.subsets))
            cells = [[_of_subset(run, subset) for subset in subsets] for run in of_key]
            told = per_class(of_key[0].shots, results.generative(of_key[0].task))
            title = f"Parts of the data, {told}: {metric_name(of_key[0].metric)} {scale(of_key[0].metric)}"
            grids += _in_parts(title, [(subset, "") for subset in subsets], of_key, cells)
    return tuple(grids)


def _in_parts(
    title: str, heads: Sequence[tuple[str, str]], runs: Sequence[Stored], cells: Sequence[Sequence[str]]
) -> list[Grid]:
    """Tables that fit on a page."""
    grids = []
    for places in chunks(range(len(heads)), _MOST_COLUMNS):
        rows = [(run.method, tuple(row[i] for i in places)) for run, row in zip(runs, cells, strict=True)]
        name = title if places[0] == 0 else f"{title}, continued"
        grids.append(Grid(name, tuple(heads[i] for i in places), tuple(rows)))
    return grids


def _number(run: Stored, metric: str) -> str:
    if metric not in run.metrics:
        return ""
    estimate = run.metrics[metric]
    return f"{estimate.mean:.3f}" + ("" if estimate.sd is None else f" ± {estimate.sd:.3f}")


def _of_subset(run: Stored, subset: str) -> str:
    value = run.subsets.get(subset, {}).get(run.metric)
    return "" if value is None else percent(value)


def _mean(run: Stored, metric: str) -> float | None:
    return run.metrics[metric].mean if metric in run.metrics else None


def _text(facts: Mapping[str, Any], name: str) -> str:
    return str(facts.get(name) or "")


def _counts(results: Results, key: str) -> str:
    splits = [of for of in dict(results.part("splits", key)).values() if isinstance(of, dict)]
    words = []
    for name, word in (("support", "labelled examples"), ("queries", "queries")):
        numbers = sorted({of[name] for of in splits if isinstance(of.get(name), int)})
        if numbers:
            words.append(f"{numbers[0]}{f' to {numbers[-1]}' if len(numbers) > 1 else ''} {word}")
    return ", ".join(words) + (" for each seed" if len(splits) > 1 else "")


def _cards(results: Results, key: str) -> tuple[Card, ...]:
    entries = results.part("disagreements", key)
    cards = []
    for place, entry in enumerate(list(entries)[:_MOST_CARDS]):
        where = f'{results.file}: field "sav_jax.disagreements.{key}[{place}]"'
        try:
            target, prediction = str(entry["target"]), str(entry["prediction"])
            votes = {str(label): int(count) for label, count in entry["votes"].items()}
            names = [str(name) for name in entry.get("images") or []]
            query = f"query {entry['doc_id']} of seed {entry['seed']}"
            question = str(entry["question"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{where} lacks a query's question, target, prediction or votes") from None
        total = max(sum(votes.values()), 1)
        order = sorted(votes.items(), key=lambda pair: -pair[1])[:6]
        bars = [Vote(label, count, count / total, label == target, label == prediction) for label, count in order]
        images = tuple(_picture(results, name, where) for name in names)
        cards.append(Card(query, question, target, prediction, tuple(bars), images))
    return tuple(cards)


def _picture(results: Results, name: str, where: str) -> str:
    """A small PNG of the results folder as a data address."""
    file = results.folder / name
    if not lies_in(file, results.folder):
        raise UserError(f"{where}: the picture {name!r} is outside the results folder")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {where} shows it") from None
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"{file}: is no PNG picture")
    return data_address(content, "image/png")


def data_address(content: bytes, kind: str) -> str:
    """A file inside a page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
