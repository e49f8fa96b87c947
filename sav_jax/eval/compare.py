"""Which method, or which model, is better: paired tests on identical items.

Two accuracies on the same queries are compared query by query, which sees differences that two intervals side by side
do not. What is compared is accuracy, which every answer has.
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
from sav_jax.eval.statistics import Interval, holm, mcnemar, paired_bootstrap, sign_flip_test
from sav_jax.eval.stored import Answered, Results, Stored

LEVEL, ALPHA = 0.95, 0.05  # of intervals, of verdicts
MCNEMAR, SIGN_FLIPS = "McNemar", "sign flips"


@dataclass(frozen=True)
class Paired:
    """A paired test.

    Attributes:
      mean_a, mean_b: accuracies, means over the seeds.
      difference: B minus A, and its interval by the paired cluster bootstrap.
      only_a, only_b: answers (query and seed) that A alone, that B alone got right.
      items: distinct queries.
      test: where the p-value comes from: McNemar's exact test for one seed of independent queries; for several seeds
        or groups of queries its generalisation, which flips the signs of whole clusters' differences.
      p: two-sided, of no difference.
      p_bootstrap: the same by the paired cluster bootstrap, which cannot resolve less than 2 / 10,001.
    """

    mean_a: float
    mean_b: float
    difference: Interval
    only_a: int
    only_b: int
    items: int
    test: str
    p: float
    p_bootstrap: float


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


def pair(a: Mapping[int, Answered], b: Mapping[int, Answered]) -> Paired:
    """Test B against A on the same items.

    Args:
      a, b: seed -> answers, the same seeds and, for each seed, the same queries in any order.

    Raises:
      ValueError: if the items are not the same.
    """
    right_a, right_b, clusters = _pairs(a, b)
    counted = [mcnemar(*rights) for rights in zip(right_a, right_b, strict=True)]
    result = paired_bootstrap(right_a, right_b, clusters, level=LEVEL)
    test, p = _test(right_a, right_b, clusters)
    return Paired(
        mean_a=float(np.mean([right.mean() for right in right_a])),
        mean_b=float(np.mean([right.mean() for right in right_b])),
        difference=result.interval,
        only_a=sum(seed.only_a for seed in counted),
        only_b=sum(seed.only_b for seed in counted),
        items=len({query.digest for answered in a.values() for query in answered.queries}),
        test=test,
        p=p,
        p_bootstrap=result.p,
    )


def paired_p(a: Mapping[int, Answered], b: Mapping[int, Answered]) -> float | None:
    """The p-value of :func:`pair` alone; None if the seeds or the items are not the same."""
    if a.keys() != b.keys():
        return None
    try:
        return _test(*_pairs(a, b))[1]
    except ValueError:
        return None


def _pairs(
    a: Mapping[int, Answered], b: Mapping[int, Answered]
) -> tuple[list[np.ndarray], list[np.ndarray], list[list[str]]]:
    """For each seed: whether A and B are right, bool [Q] twice, and the queries' clusters."""
    right_a, right_b, clusters = [], [], []
    for seed in a:
        places = _aligned(a[seed], b[seed])
        if places is None:
            raise ValueError(f"seed {seed}: the items are not the same")
        right_a.append(a[seed].right)
        right_b.append(b[seed].right[places])
        clusters.append([query.cluster for query in a[seed].queries])
    return right_a, right_b, clusters


def _test(right_a: list[np.ndarray], right_b: list[np.ndarray], clusters: list[list[str]]) -> tuple[str, float]:
    # Queries of one group, and one query under several seeds, are no independent tosses of McNemar's coin.
    if len(clusters) == 1 and len(set(clusters[0])) == len(clusters[0]):
        return MCNEMAR, mcnemar(right_a[0], right_b[0]).p
    return SIGN_FLIPS, sign_flip_test(right_a, right_b, clusters)


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
    """Compare all methods of one folder with a baseline method, or the methods of two folders with each other.

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
        if (answers := _matched(a, other, run_b, baseline or run_b.method, notes)) is not None:
            found.append((run_b, pair(*answers), tuple(answers[0])))
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
    if not paired.only_a + paired.only_b:
        return "the same answers are right"
    if p_corrected >= ALPHA or paired.difference.mean == 0:
        return "no clear difference"
    better, worse = (b, a) if paired.difference.mean > 0 else (a, b)
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
    head = ["task", "shots", *sides, "acc A", "acc B", "B - A", "95 % interval", "p", "p (Holm)", "items", "seeds"]
    rows = []
    for row in compared.rows:
        paired = row.paired
        ci = paired.difference.ci
        rows.append(
            [
                row.task,
                str(row.shots),
                *[row.method_a, row.method_b][-len(sides) :],
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
    text = {0, *range(2, 2 + len(sides)), len(head)}
    tests = {
        MCNEMAR: "McNemar's exact test",
        SIGN_FLIPS: "paired randomisation test (signs of whole queries or groups flipped, jointly over seeds)",
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
            _aligned_table([*head, "verdict"], rows, text),
            "",
            "acc: accuracy in %; B - A: in percentage points, with its interval by paired bootstrap of queries. p: "
            f"{' or '.join(used)}, two-sided; p (Holm): corrected for {len(rows)} comparison{'s' * (len(rows) > 1)}. "
            f"'Better' means p (Holm) below {ALPHA}.",
            *(f"note: {note}" for note in compared.notes),
        ]
    )


def p_value(p: float) -> str:
    """To two digits, tiny ones as a bound."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _aligned_table(head: Sequence[str], rows: Sequence[Sequence[str]], text: set[int]) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if i in text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (head, rule, *rows)
    )


def compare_json(compared: Compared) -> bytes:
    """The comparisons for programs; accuracies and differences are shares, not percent."""
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
        "metric": "acc",
        "level": LEVEL,
        "comparisons": rows,
        "notes": compared.notes,
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
