"""Which method, or which model, is better: paired tests on identical items.

Two accuracies on the same queries are compared query by query, which sees differences that two intervals side by side
do not. What is compared is accuracy, which every answer has, and the task's own metric where that is another: group by
group where it is a mean over groups, else (AUROC, F1) by computing it anew on resampled queries. Free answers have no
accuracy: what each scores by their task's metric is compared.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from sav_jax.eval.metrics import COMMON, Metric, Units
from sav_jax.eval.statistics import Interval, holm, mcnemar, paired_bootstrap, paired_resampling, sign_flip_test
from sav_jax.eval.stored import Answered, Results, Stored
from sav_jax.eval.tables import aligned

LEVEL, ALPHA = 0.95, 0.05  # of intervals, of verdicts
MCNEMAR, SIGN_FLIPS, BOOTSTRAP = "McNemar", "sign flips", "bootstrap"
ACCURACY = next(metric for metric in COMMON if metric.name == "acc")


@dataclass(frozen=True)
class Paired:
    """A paired test.

    Attributes:
      mean_a, mean_b: the metric, means over the seeds.
      difference: B minus A, and its interval by the paired cluster bootstrap.
      only_a, only_b: answers (units of the metric, of all seeds) that are better under A, under B; for accuracy those
        that only one got right. None of a metric that is no mean.
      items: distinct queries.
      test: where the p-value comes from. Of a mean of 0/1 values: McNemar's exact test for one seed of independent
        units; for several seeds, groups of units or other values its generalisation, which flips the signs of whole
        clusters' differences. Of a metric that is no mean: the bootstrap.
      p: two-sided, of no difference.
      p_bootstrap: the same by the paired cluster bootstrap, which cannot resolve less than 2 / 10,001.
      metric: name of what is compared.
      higher_is_better: of the metric.
    """

    mean_a: float
    mean_b: float
    difference: Interval
    only_a: int | None
    only_b: int | None
    items: int
    test: str
    p: float
    p_bootstrap: float
    metric: str = "acc"
    higher_is_better: bool = True


@dataclass(frozen=True)
class Comparison:
    """A row of the table.

    Attributes:
      task, shots, seeds: on what.
      method_a, method_b: what is compared.
      paired: the test.
      p_corrected: Holm's, for all rows of the table.
      verdict: in plain words.
    """

    task: str
    shots: int
    seeds: tuple[int, ...]
    method_a: str
    method_b: str
    paired: Paired
    p_corrected: float
    verdict: str


@dataclass(frozen=True)
class Compared:
    """A table of comparisons, and what was left out of it and why."""

    a: str
    b: str | None
    baseline: str | None
    rows: tuple[Comparison, ...]
    notes: tuple[str, ...]


def pair(a: Mapping[int, Answered], b: Mapping[int, Answered], metric: Metric = ACCURACY) -> Paired:
    """Test B against A on the same items.

    Args:
      a, b: seed -> answers, the same seeds and, for each seed, the same queries in any order.
      metric: what is compared.

    Raises:
      ValueError: if the items are not the same, or the metric does not apply to the answers.
    """
    a, b = _in_order(a, b)
    units = _units(a, b, metric)
    if units is None:
        pairs = [(a[seed].answers, b[seed].answers) for seed in a]

        def numbers(seed: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            one, other = (metric.resampled(answers, draws) for answers in pairs[seed])
            return one, other

        whole = [numbers(seed, np.ones((1, len(one.items)), int)) for seed, (one, _) in enumerate(pairs)]
        mean_a, mean_b = (float(value) for value in np.mean(whole, axis=0)[:, 0])
        if np.isnan([mean_a, mean_b]).any():
            raise ValueError(f"{metric.name} does not apply")

        def difference(seed: int, draws: np.ndarray) -> np.ndarray:
            of_a, of_b = numbers(seed, draws)
            return of_b - of_a

        result = paired_resampling(difference, [one.clusters for one, _ in pairs], level=LEVEL)
        only_a, only_b, test, p = None, None, BOOTSTRAP, result.p
    else:
        of_a, of_b, clusters = units
        mean_a, mean_b = (float(np.mean([values.mean() for values in of])) for of in (of_a, of_b))
        sign = 1 if metric.higher_is_better else -1
        better = [np.sign(sign * (two - one)) for one, two in zip(of_a, of_b, strict=True)]
        only_a, only_b = (sum(int((of_seed == side).sum()) for of_seed in better) for side in (-1, 1))
        result = paired_bootstrap(of_a, of_b, clusters, level=LEVEL)
        test, p = _test(of_a, of_b, clusters)
    return Paired(
        mean_a=mean_a,
        mean_b=mean_b,
        difference=result.interval,
        only_a=only_a,
        only_b=only_b,
        items=len({query.digest for answered in a.values() for query in answered.queries}),
        test=test,
        p=p,
        p_bootstrap=result.p,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
    )


def paired_p(a: Mapping[int, Answered], b: Mapping[int, Answered], metric: Metric = ACCURACY) -> float | None:
    """The p-value of :func:`pair` alone; None if seeds or items are not the same, or the metric does not apply."""
    if a.keys() != b.keys():
        return None
    try:
        a, b = _in_order(a, b)
        units = _units(a, b, metric)
        return pair(a, b, metric).p if units is None else _test(*units)[1]
    except ValueError:
        return None


def task_metric(results: Results, task: str) -> Metric | None:
    """The metric that a task is judged by; None if this version does not know it."""
    from sav_jax.eval.tasks import TASKS

    name = results.tasks[task].get("metric")
    if results.generative(task):  # whose values are stored with the answers
        return Metric(results.graded(task), "", lambda _: None)
    own = TASKS[task].metrics if task in TASKS else ()
    return next((metric for metric in (*COMMON, *own) if metric.name == name), None)


def _in_order(
    a: Mapping[int, Answered], b: Mapping[int, Answered]
) -> tuple[Mapping[int, Answered], Mapping[int, Answered]]:
    """B's answers in the order of A's queries."""
    ordered = {}
    for seed in a:
        places = _aligned(a[seed], b[seed])
        if places is None:
            raise ValueError(f"seed {seed}: the items are not the same")
        ordered[seed] = b[seed] if (places == np.arange(len(places))).all() else b[seed].take(places)
    return a, ordered


def _units(
    a: Mapping[int, Answered], b: Mapping[int, Answered], metric: Metric
) -> tuple[list[np.ndarray], list[np.ndarray], list[Sequence[str]]] | None:
    """For each seed: the units' values under A and B, float [U] twice, and their clusters; None if it is no mean."""
    if all(of_seed.graded == metric.name for of in (a, b) for of_seed in of.values()):  # as it was counted
        scores = ([of[seed].scores.astype(np.float64) for seed in a] for of in (a, b))
        clusters: list[Sequence[str]] = [[query.cluster for query in of_seed.queries] for of_seed in a.values()]
        return *scores, clusters  # type: ignore[return-value]
    found = [[metric.compute(of[seed].answers) for seed in a] for of in (a, b)]
    if any(value is None for of in found for value in of):
        raise ValueError(f"{metric.name} does not apply")
    units = [[value for value in of if isinstance(value, Units)] for of in found]
    if not units[0]:
        return None
    return [u.values for u in units[0]], [u.values for u in units[1]], [u.clusters for u in units[0]]


def _test(a: Sequence[np.ndarray], b: Sequence[np.ndarray], clusters: Sequence[Sequence[str]]) -> tuple[str, float]:
    # Units of one group, and one query under several seeds, are no independent tosses of McNemar's coin.
    alone = len(clusters) == 1 and len(set(clusters[0])) == len(clusters[0])
    if alone and all(np.isin(values, (0, 1)).all() for values in (a[0], b[0])):
        return MCNEMAR, mcnemar(a[0], b[0]).p
    return SIGN_FLIPS, sign_flip_test(a, b, clusters)


def _aligned(a: Answered, b: Answered) -> np.ndarray | None:
    """Where B has each of A's items, int [Q]; None if the items are not the same. Items that are asked twice pair up
    in order.
    """
    places: dict[str, list[int]] = {}
    for place, query in enumerate(b.queries):
        places.setdefault(query.digest, []).append(place)
    for found in places.values():
        found.reverse()
    taken = [places[query.digest].pop() for query in a.queries if places.get(query.digest)]
    return np.array(taken, int) if len(taken) == len(a.queries) == len(b.queries) else None


def compare(a: Results, b: Results | None, *, baseline: str | None = None, methods: Sequence[str] = ()) -> Compared:
    """Compare all methods of one folder with a baseline method, or the methods of two folders with each other, in
    accuracy and, where a task is judged by another metric, in that.

    Args:
      a: the first folder.
      b: the second; None to compare the methods of the first with each other, which needs a baseline.
      baseline: the method that all others are compared with; of ``a``. With two folders and no baseline each method is
        compared with itself.
      methods: compare only these; all if empty.

    Raises:
      UserError: if the folders do not hold the same items, or nothing that could be compared.
    """
    other = a if b is None else b
    there = list(dict.fromkeys(run.method for run in other.runs))
    if b is None and baseline is None:
        raise UserError(
            f"{a.folder}: one folder: say with --baseline which method to compare the others with "
            f"(there are: {', '.join(there)})"
        )
    names = list(dict.fromkeys(run.method for run in a.runs))
    for option, asked, known, where in (
        *([("--baseline", baseline, names, a)] if baseline is not None else []),
        *(("--methods", name, there, other) for name in methods),
        *(("--methods", name, names, a) for name in methods if baseline is None),
    ):
        if asked not in known:
            raise UserError(f"{where.folder}: no method is called {asked!r} ({option}); there are: {', '.join(known)}")
    notes: list[_Note] = []
    found = []
    for run_b in other.runs:
        if (methods and run_b.method not in methods) or (b is None and run_b.method == baseline):
            continue
        if (answers := _matched(a, other, run_b, baseline or run_b.method, notes)) is None:
            continue
        metric = task_metric(other, run_b.task)
        if other.generative(run_b.task) and metric is not None:
            found.append((run_b, pair(*answers, metric), tuple(answers[0])))
            continue
        found.append((run_b, pair(*answers), tuple(answers[0])))
        name = other.tasks[run_b.task].get("metric", "acc")
        if name == ACCURACY.name:
            continue
        try:
            if metric is None:
                raise ValueError(f"{name} is not known")
            found.append((run_b, pair(*answers, metric), tuple(answers[0])))
        except ValueError:
            notes.append(_Note(f"{name} cannot be compared, accuracy alone is", _title(run_b), run_b.method))
    if baseline is None:
        there_too = {(run.task, run.shots, run.method) for run in other.runs}
        notes += [
            _Note(f"only in {a.folder}", _title(run), run.method)
            for run in a.runs
            if run.method in (methods or names) and (run.task, run.shots, run.method) not in there_too
        ]
    if not found:
        raise UserError(f"nothing to compare: {'; '.join(_grouped(notes)) or 'no other method was run'}")
    corrected = holm([paired.p for _, paired, _ in found])
    rows = tuple(
        Comparison(
            task=run.task,
            shots=run.shots,
            seeds=seeds,
            method_a=baseline or run.method,
            method_b=run.method,
            paired=paired,
            p_corrected=p,
            verdict=verdict(paired, p, *((baseline, run.method) if b is None and baseline else ("A", "B"))),
        )
        for (run, paired, seeds), p in zip(found, corrected, strict=True)
    )
    titles = [f"{results.folder} (model: {results.model})" for results in (a, b) if results is not None]
    return Compared(titles[0], titles[1] if b is not None else None, baseline, rows, _grouped(notes))


def verdict(paired: Paired, p_corrected: float, a: str, b: str) -> str:
    """What a comparison says, in plain words."""
    if paired.only_a == paired.only_b == 0:
        return "the same answers are right"
    if p_corrected >= ALPHA or paired.difference.mean == 0:
        return "no clear difference"
    better, worse = (b, a) if (paired.difference.mean > 0) == paired.higher_is_better else (a, b)
    return f"{better} is better than {worse}"


def _matched(
    a: Results, b: Results, run_b: Stored, method_a: str, notes: list[_Note]
) -> tuple[dict[int, Answered], dict[int, Answered]] | None:
    """The answers of both sides, seed by seed; None, with a note, if one side has none."""
    run_a = a.run(run_b.task, run_b.shots, method_a)
    title = _title(run_b)
    if run_a is None:
        notes.append(_Note(f"only in {b.folder}" if a is not b else f"{method_a} was not run", title, run_b.method))
        return None
    all_a, all_b = a.answers(run_a.key), b.answers(run_b.key)
    seeds = [seed for seed in run_a.seeds if seed in run_b.seeds]
    if not seeds:
        notes.append(_Note("no seed in common", title, run_b.method))
        return None
    if len(seeds) < max(len(run_a.seeds), len(run_b.seeds)):
        notes.append(_Note(f"only seeds {', '.join(map(str, seeds))} are in both", title, run_b.method))
    answers: tuple[dict[int, Answered], dict[int, Answered]] = ({}, {})
    for results, method, whole, of_side in ((a, method_a, all_a, answers[0]), (b, run_b.method, all_b, answers[1])):
        for seed in seeds:
            if (method, seed) not in whole:
                notes.append(_Note(f"no single answers in {results.folder}", title, method))
                return None
            of_side[seed] = whole[method, seed]
    for seed in seeds:
        if _aligned(answers[0][seed], answers[1][seed]) is None:
            raise UserError(_mismatch(a, b, run_b, seed, answers[0][seed], answers[1][seed]))
    return answers


@dataclass(frozen=True)
class _Note:
    """Why a method on a task is not, or only in part, in the table."""

    reason: str
    title: str
    method: str


def _grouped(notes: Sequence[_Note]) -> tuple[str, ...]:
    """One line for all methods and tasks that share a reason."""
    titles: dict[tuple[str, str], dict[str, None]] = {}
    for note in notes:
        titles.setdefault((note.reason, note.method), {})[note.title] = None
    methods: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, method), of in titles.items():
        methods.setdefault((reason, tuple(of)), []).append(method)
    return tuple(f"{', '.join(names)}: {reason} ({'; '.join(of)})" for (reason, of), names in methods.items())


def _title(run: Stored) -> str:
    return f"{run.task}, {run.shots} shots"


def _mismatch(a: Results, b: Results, run: Stored, seed: int, of_a: Answered, of_b: Answered) -> str:
    """Say that the items differ, how many, and why as far as that can be seen."""
    counts = [Counter(query.digest for query in of.queries) for of in (of_a, of_b)]
    missing = [sum((counts[i] - counts[1 - i]).values()) for i in (0, 1)]
    reasons = []
    cards = [results.tasks[run.task] for results in (a, b)]
    for name, word in (("version", "versions"), ("labels", "class lists"), ("prompt", "prompts")):
        values = [card.get(name) for card in cards]
        if values[0] != values[1]:
            shown = f" ({values[0]} and {values[1]})" if name == "version" else ""
            reasons.append(f"their {word} differ{shown}")
    known = {query.id: query for query in of_a.queries if query.digest not in counts[1]}
    twins = [(known[query.id], query) for query in of_b.queries if query.digest not in counts[0] and query.id in known]
    if twins:
        parts = {
            "question": sum(one.question != two.question for one, two in twins),
            "label": sum(one.target != two.target for one, two in twins),
            "image": sum((one.question, one.target) == (two.question, two.target) for one, two in twins),
        }
        told = ", ".join(f"{count} in the {part}" for part, count in parts.items() if count)
        reasons.append(f"{len(twins)} items of the same id differ: {told}")
    return (
        f"task {_title(run)}, seed {seed}: the items are not the same: {missing[0]} of {len(of_a.queries)} in "
        f"{a.folder} are missing in {b.folder}, {missing[1]} of {len(of_b.queries)} the other way round"
        + ("; " + "; ".join(reasons) if reasons else "; were both run with the same data, --limit and --seeds?")
    )


# The table


def table(compared: Compared) -> str:
    """The comparisons as Markdown that also reads as plain text."""
    sides = ["method"] if compared.baseline is None else ["method A", "method B"]
    head = ["task", "shots", *sides, "metric", "A", "B", "B - A", "95 % interval", "p", "p (Holm)", "items", "seeds"]
    rows = []
    for row in compared.rows:
        paired = row.paired
        ci = paired.difference.ci
        rows.append(
            [
                row.task,
                str(row.shots),
                *[row.method_a, row.method_b][-len(sides) :],
                paired.metric,
                f"{100 * paired.mean_a:.1f}",
                f"{100 * paired.mean_b:.1f}",
                f"{100 * paired.difference.mean:+.1f}",
                "" if ci is None else f"{100 * ci[0]:+.1f} to {100 * ci[1]:+.1f}",
                p_value(paired.p),
                p_value(row.p_corrected),
                str(paired.items),
                str(len(row.seeds)),
                row.verdict,
            ]
        )
    text = {0, *range(2, 3 + len(sides)), len(head)}
    tests = {
        MCNEMAR: "McNemar's exact test",
        SIGN_FLIPS: "paired randomisation test (signs of whole queries or groups flipped, jointly over seeds)",
        BOOTSTRAP: "paired bootstrap, which resolves no less than 0.0002, where a metric is no mean",
    }
    used = [told for name, told in tests.items() if any(row.paired.test == name for row in compared.rows)]
    return "\n".join(
        [
            *(
                [f"A: {compared.baseline}, B: each other method, both in {compared.a}"]
                if compared.b is None
                else [f"A: {compared.a}", f"B: {compared.b}"]
            ),
            "",
            aligned([*head, "verdict"], rows, text),
            "",
            f"A, B: accuracy (acc), or the task's own metric, in %{_cider(compared)}; B - A: in percentage points, "
            "with its interval by paired bootstrap of queries or their groups. p: "
            f"{' or '.join(used)}, two-sided; p (Holm): corrected for {len(rows)} comparison{'s' * (len(rows) > 1)}. "
            f"'Better' means p (Holm) below {ALPHA}.",
            *(f"note: {note}" for note in compared.notes),
        ]
    )


def _cider(compared: Compared) -> str:
    return " (cider: CIDEr-D times 100)" if any(row.paired.metric == "cider" for row in compared.rows) else ""


def p_value(p: float) -> str:
    """To two digits, tiny ones as a bound."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def compare_json(compared: Compared) -> bytes:
    """The comparisons for programs; metrics and differences are shares, not percent."""
    rows: list[dict[str, Any]] = []
    for row in compared.rows:
        content = dataclasses.asdict(row)
        paired = content.pop("paired")
        interval = paired.pop("difference")
        ci = row.paired.difference.ci
        paired["difference"] = interval["mean"]
        paired["stderr"] = None if ci is None else interval["stderr"]
        paired["ci"] = ci
        rows.append({**content, **paired})
    content = {
        "a": compared.a,
        "b": compared.b,
        "baseline": compared.baseline,
        "level": LEVEL,
        "comparisons": rows,
        "notes": compared.notes,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
