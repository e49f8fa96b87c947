"""What the parts share: intervals over seeds and queries; which seeds are trainings."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sav_jax.eval.statistics import Interval, student_interval
from scripts.reproduction.study import Answers, Difference, Study, difference


def trainings(study: Study) -> tuple[int, ...]:
    """The first three of its seeds: each is a training of its own."""
    return study.seeds[:3]


def over_both(better: Mapping[str, Answers], worse: Mapping[str, Answers], margin: float = 0.0) -> Difference:
    """How far ``better`` is ahead, in points, where every seed is a training, or a draw of examples, of its own.

    The interval has the ends of two: Student's of the seeds' differences, with queries as they are, and the bootstrap's
    over queries, with seeds as they are. It is never narrower than either.

    Args:
      better, worse: task -> answers; the same queries, seed by seed.
      margin: in points, added.
    """
    queries = difference(better, worse, margin)
    return hull(queries, by_seed(better, worse, margin))


def carried(better: Mapping[str, Answers], worse: Mapping[str, Answers]) -> str:
    """What is left of a mean over three tasks or more without the one that is furthest ahead, where that is less than
    half of it.
    """
    ahead = {task: better[task].mean - worse[task].mean for task in better}
    most = max(ahead, key=lambda task: ahead[task])
    if len(ahead) < 3:
        return ""
    others = [{task: of for task, of in side.items() if task != most} for side in (better, worse)]
    rest = over_both(others[0], others[1])
    if rest.mean >= np.mean(list(ahead.values())) / 2:
        return ""
    told = f"the mean of the others is {rest.mean:+.1f} [{rest.low:.1f}, {rest.high:.1f}]."
    return f"On `{most}` the difference is {ahead[most]:+.1f}; {told}"


def by_seed(better: Mapping[str, Answers], worse: Mapping[str, Answers], margin: float = 0.0) -> list[float]:
    """The difference under each seed, in points plus ``margin``: the mean over tasks."""
    seeds = range(len(next(iter(better.values())).values))
    pairs = [(better[task], worse[task]) for task in better]
    return [margin + 100 * float(np.mean([a.values[s].mean() - b.values[s].mean() for a, b in pairs])) for s in seeds]


def hull(queries: Difference, seeds: Sequence[float]) -> Difference:
    """The interval over queries, widened to Student's of the seeds' values."""
    student = student_interval(seeds)
    ends = [ci for ci in (queries.ci, student.ci) if ci is not None]
    if not ends:
        return queries
    return replace(queries, low=min(low for low, _ in ends), high=max(high for _, high in ends))


def of_seeds(values: Sequence[float]) -> Interval:
    """Student's interval of a few measurements; that of no width where all are the same, as counts are."""
    found = student_interval(values)
    if found.ci is None and len(set(values)) == 1:
        return Interval(found.mean, 0.0, found.mean, found.mean)
    return found


def mean(answers: Mapping[str, Answers]) -> float:
    """Over tasks, in %."""
    return float(np.mean([of.mean for of in answers.values()]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What evaluations print is kept from the terminal, but for the text that goes with an error."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            yield
    except BaseException:
        sys.stderr.write(told.getvalue())
        raise
