"""Intervals and paired tests for results on finite samples of queries.

What is uncertain is which queries were asked. Queries that belong together (the questions of one group, the same
query asked under several seeds) are not independent of each other, so all statistics here resample or sum whole
*clusters*, identified by name across the seeds of a run (Miller, "Adding Error Bars to Evals", arXiv 2411.00640;
Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015). How results differ between draws of
labelled examples is another question, which the standard deviation over seeds answers.

Axes: S seeds, U units (queries or groups of them), C clusters, T kinds of clusters, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_NAN = float("nan")
_BLOCK = 2**20  # numbers of a block of resamples that are held at once: 8 MiB


@dataclass(frozen=True)
class Interval:
    """An estimate and how sure it is.

    Attributes:
      mean: the estimate.
      stderr: its standard error; NaN if it cannot be told (fewer than two clusters).
      low, high: the confidence interval's ends; NaN if they cannot be told.
    """

    mean: float
    stderr: float
    low: float
    high: float

    @property
    def ci(self) -> tuple[float, float] | None:
        """The interval, or None if it cannot be told."""
        return None if np.isnan(self.low) else (self.low, self.high)


@dataclass(frozen=True)
class McNemar:
    """Two answers to each query, right or wrong.

    Attributes:
      only_a, only_b: queries that A alone, that B alone answers rightly.
      p: two-sided probability of a split at least so uneven if both were equally good.
    """

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Difference:
    """B minus A on the same units.

    Attributes:
      interval: of the difference of the means.
      p: two-sided, of no difference.
    """

    interval: Interval
    p: float


def cluster_interval(
    values: Sequence[np.ndarray],
    clusters: Sequence[Sequence[str]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Estimate a mean over units, averaged over seeds.

    The standard error is the analytic clustered one (the sandwich estimator, with C / (C - 1)): free of simulation
    noise, and for one seed and clusters of one unit exactly the sample standard deviation / sqrt(U) that lmms-eval
    reports. The interval is the percentile bootstrap's over clusters, which stays within a bounded metric's bounds.

    Where all C clusters agree (every answer right, or each balanced pair half right) hardly a resample differs, and the
    bootstrap's interval would have no width. That of a 0/1 metric is then the exact one of Clopper and Pearson for the
    share q of clusters that differ from those seen, of which there were none: from (1 - q) mean to (1 - q) mean + q,
    which for a mean of 0 or 1 is the exact binomial interval. Other metrics, whose bounds are not known, have none. The
    standard error stays 0.

    Args:
      values: for each seed, the units' values, float [U].
      clusters: for each seed, the units' cluster names. A name means the same cluster under every seed.
      level: of confidence.
      resamples: B.
      seed: of the resampling; the same arguments give the same interval.

    Raises:
      ValueError: if a seed has no units, or not one name per unit.
    """
    sums, counts = _per_cluster(values, clusters)
    mean = _ratio(sums.sum(0), counts.sum(0))
    total = len(sums)
    if total < 2:
        return Interval(float(mean), _NAN, _NAN, _NAN)
    stderr = _analytic(sums, counts)
    draws = np.concatenate([_ratio(*drawn) for drawn in _resampled(sums, counts, resamples, seed)])
    ends = _percentiles(draws, level)
    if _same(ends):
        ends = _all_alike(float(mean), 0.0, total, level) if _binary(values) else (_NAN, _NAN)
    return Interval(float(mean), stderr, *ends)


def resampled_interval(
    compute: Callable[[np.ndarray], float],
    count: int,
    *,
    clusters: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Estimate a number that is no mean over units, such as F1 or AUROC, by the percentile bootstrap.

    Args:
      compute: gives the number of the units at these indices, int [n] with repetitions; NaN where it is not defined
        (AUROC of queries that are all of one class): such resamples count for nothing.
      count: U, number of units, of all seeds together.
      clusters: cluster name of each unit; by default every unit is one of its own.
      seeds: which seed each unit belongs to. ``compute`` is then called with the units of one seed at a time, and the
        estimate is the mean over seeds; clusters are resampled by name jointly over them.
      level: of confidence.
      resamples: B.
      seed: of the resampling.

    Returns:
      The estimate on all units, the resamples' standard deviation as the standard error, and the interval. Without
      standard error and interval if there are fewer than two clusters, the number is undefined in more than half of
      the resamples, or no resample differs (classes that are told apart without an error): they then say nothing.
    """
    names = range(count) if clusters is None else clusters
    _, cluster = np.unique(np.asarray(names), return_inverse=True)
    if len(cluster) != count:
        raise ValueError(f"{len(cluster)} cluster names for {count} units")
    seed_of = np.zeros(count, int) if seeds is None else np.asarray(seeds)
    parts = [np.flatnonzero(seed_of == which) for which in np.unique(seed_of)]

    def averaged(weights: np.ndarray) -> float:
        """The mean over seeds, each unit of a cluster being taken ``weights[cluster]`` times."""
        drawn = [np.repeat(part, weights[cluster[part]]) for part in parts]
        return float(np.mean([compute(indices) if len(indices) else np.nan for indices in drawn]))

    total = int(cluster.max()) + 1
    mean = averaged(np.ones(total, int))
    if total < 2:
        return Interval(mean, _NAN, _NAN, _NAN)
    rng = np.random.default_rng(seed)
    draws = np.array([averaged(np.bincount(rng.integers(0, total, total), minlength=total)) for _ in range(resamples)])
    draws = draws[~np.isnan(draws)]
    if 2 * len(draws) < resamples or _same(ends := _percentiles(draws, level)):
        return Interval(mean, _NAN, _NAN, _NAN)
    return Interval(mean, float(draws.std(ddof=1)), *ends)


def student_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Estimate a mean from a few independent repetitions (results, or paired differences, of seeds): Student's t.

    It takes in what differs between repetitions, which resampling queries does not, and is wide where they are few: of
    three, 2.48 times their standard deviation to each side.

    Args:
      values: of the repetitions.
      level: of confidence.

    Returns:
      Without standard error and interval for fewer than two values; without an interval if all are the same, which says
      nothing of how they vary.
    """
    from scipy.stats import t

    array = np.asarray(values, float)
    number = len(array)
    if number < 2:
        return Interval(float(array.mean()), _NAN, _NAN, _NAN)
    mean, stderr = float(array.mean()), float(array.std(ddof=1) / np.sqrt(number))
    if np.ptp(array) <= 1e-12:
        return Interval(mean, stderr, _NAN, _NAN)
    half = float(t.ppf((1 + level) / 2, number - 1)) * stderr
    return Interval(mean, stderr, mean - half, mean + half)


def mcnemar(a_right: np.ndarray, b_right: np.ndarray) -> McNemar:
    """McNemar's exact test: the queries that only one of the two answers rightly, as tosses of a fair coin.

    Args:
      a_right, b_right: whether A and B answered each query rightly, bool [U]; the queries are independent.
    """
    from scipy.stats import binom

    a, b = np.asarray(a_right, bool), np.asarray(b_right, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.shape} and {b.shape} answers are not pairs")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_a, only_b, min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))))


def paired_bootstrap(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    clusters: Sequence[Sequence[str]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Compare B with A on the same units, resampling clusters jointly over seeds.

    The p-value is the interval's own: twice the share of resamples on the other side of zero (a resample at zero counts
    on both sides), with one added to either count so that it is never zero (Davison and Hinkley, 1997, section 4.2).
    With a handful of clusters it is too small: see :func:`sign_flip_test`. Where no cluster's difference differs from
    the others', the interval of 0/1 values is that of :func:`cluster_interval`, with differences from -1 to 1.

    Args:
      a, b: for each seed, the units' values under A and B, float [U], in the same order.
      clusters: for each seed, the units' cluster names.
      level: of confidence.
      resamples: B; the smallest possible p-value is 2 / (B + 1).
      seed: of the resampling.
    """
    sums, counts = _per_cluster(_differences(a, b), clusters)
    mean = float(_ratio(sums.sum(0), counts.sum(0)))
    if len(sums) < 2:
        return Difference(Interval(mean, _NAN, _NAN, _NAN), 1.0)
    draws = np.concatenate([_ratio(*drawn) for drawn in _resampled(sums, counts, resamples, seed)])
    ends = _percentiles(draws, level)
    if _same(ends):
        ends = _all_alike(mean, -1.0, len(sums), level) if _binary([*a, *b]) else (_NAN, _NAN)
    return Difference(Interval(mean, _analytic(sums, counts), *ends), _other_side(draws))


def paired_resampling(
    difference: Callable[[int, np.ndarray], np.ndarray],
    clusters: Sequence[Sequence[str]],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """As :func:`paired_bootstrap`, for a number that is no mean over units, such as F1 or AUROC.

    Args:
      difference: gives (place of a seed, int [R, U] how often each of its units was drawn) -> B minus A, float [R], NaN
        where that is not defined (AUROC of queries that are all of one class): such resamples count for nothing.
      clusters: for each seed, the units' cluster names.
      level, resamples, seed: as there.

    Returns:
      The difference on all units, the resamples' standard deviation as its standard error, interval and p-value. With
      fewer than two clusters, or a number that is undefined in more than half of the resamples, p is 1, and standard
      error and interval are NaN; the latter also where no resample differs.
    """
    names, cluster = np.unique(np.concatenate([list(of_seed) for of_seed in clusters]), return_inverse=True)
    places = np.split(cluster, np.cumsum([len(of_seed) for of_seed in clusters])[:-1])
    total = len(names)

    def averaged(weights: np.ndarray) -> np.ndarray:
        return np.mean([difference(which, weights[:, at]) for which, at in enumerate(places)], axis=0)

    mean = float(averaged(np.ones((1, total), int))[0])
    unknown = Difference(Interval(mean, _NAN, _NAN, _NAN), 1.0)
    if total < 2:
        return unknown
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(len(cluster), 1))
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    draws = np.concatenate([averaged(rng.multinomial(total, np.full(total, 1 / total), size)) for size in sizes])
    draws = draws[~np.isnan(draws)]
    if 2 * len(draws) < resamples:
        return unknown
    p, ends = _other_side(draws), _percentiles(draws, level)
    if _same(ends):
        return Difference(unknown.interval, p)
    return Difference(Interval(mean, float(draws.std(ddof=1)), *ends), p)


def sign_flip_test(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    clusters: Sequence[Sequence[str]],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """The paired randomisation test: were A and B equally good, either could have given either's answers to a cluster.

    It is McNemar's test where a cluster is one query under one seed, holds for few clusters, where the bootstrap does
    not, and finds small p-values, which a correction for many comparisons needs: beyond what can be counted in
    ``resamples`` random choices of signs, Hoeffding's bound on such sums, 2 exp(-d^2 / (2 sum u^2)), is sharper.

    Args:
      a, b: for each seed, the units' values under A and B, float [U], in the same order.
      clusters: for each seed, the units' cluster names.
      resamples: random choices of signs.
      seed: of them.

    Returns:
      The two-sided p-value of no difference between the means (over seeds of those over units); never too small but for
      chance in the choices of signs.
    """
    sums, counts = _per_cluster(_differences(a, b), clusters)
    parts = (sums / counts.sum(0)).mean(1)  # of the difference, by cluster
    observed = abs(float(parts.sum()))
    sizes, numbers = np.unique(np.abs(parts[parts != 0]), return_counts=True)
    squares = float(numbers @ np.square(sizes))
    if not squares:
        return 1.0
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(sizes))
    extreme = 0
    for start in range(0, resamples, block):
        plus = rng.binomial(numbers, 0.5, size=(min(block, resamples - start), len(sizes)))
        # Sums that are equal by their definition may differ in the last bits.
        extreme += int((np.abs((2 * plus - numbers) @ sizes) >= observed * (1 - 1e-9)).sum())
    return min((1 + extreme) / (1 + resamples), 2 * float(np.exp(-(observed**2) / (2 * squares))), 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that the chance of even one false discovery among them stays at the level.

    Holm's step-down procedure (1979), which assumes nothing about how the comparisons depend on each other.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, floor = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        floor = corrected[i] = max(floor, min(1.0, (len(p_values) - place) * p_values[i]))
    return corrected


def _differences(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> list[np.ndarray]:
    """B minus A, for each seed."""
    for of_a, of_b in zip(a, b, strict=True):
        if np.shape(of_a) != np.shape(of_b):
            raise ValueError(f"{np.shape(of_a)} and {np.shape(of_b)} values are not pairs")
    return [np.asarray(of_b, float) - np.asarray(of_a, float) for of_a, of_b in zip(a, b, strict=True)]


def _per_cluster(values: Sequence[np.ndarray], clusters: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of each cluster's units under each seed, float [C, S] twice."""
    column: dict[str, int] = {}
    places = [[column.setdefault(name, len(column)) for name in names] for names in clusters]
    for of_seed, at in zip(values, places, strict=True):
        if len(of_seed) != len(at) or not at:
            raise ValueError(f"{len(of_seed)} values and {len(at)} cluster names: one name per value, and at least one")
    pairs = list(zip(values, places, strict=True))
    sums = [np.bincount(at, np.asarray(of_seed, float), minlength=len(column)) for of_seed, at in pairs]
    counts = [np.bincount(at, minlength=len(column)).astype(float) for _, at in pairs]
    return np.stack(sums, 1), np.stack(counts, 1)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over seeds of the mean over units, [..., S] twice -> [...]; a seed without units is left out."""
    present = counts > 0
    means = sums / np.where(present, counts, 1)
    return np.where(present, means, 0).sum(-1) / present.sum(-1)


def _analytic(sums: np.ndarray, counts: np.ndarray) -> float:
    """The clustered standard error: the root of C / (C - 1) times the sum of the clusters' squared influences."""
    units, clusters = counts.sum(0), len(sums)
    influence = ((sums - counts * (sums.sum(0) / units)) / units).mean(1)
    return float(np.sqrt(clusters / (clusters - 1) * np.square(influence).sum()))


def _resampled(
    sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw C of the C clusters with replacement, B times; yield sums and counts, [block, S] each.

    Clusters with the same numbers are of one kind, and how often each kind is drawn is multinomial: where there are few
    (right or wrong under three seeds: eight), a resample costs T draws rather than C.
    """
    kinds, kind, sizes = np.unique(
        np.concatenate([sums, counts], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    kind, total, seeds = np.sort(kind, axis=None), len(sums), sums.shape[1]  # sorted: the units' order changes nothing
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(len(kinds), 1))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        if 8 * len(kinds) <= total:  # measured: a multinomial's draw costs as much as about eight integers
            weights = rng.multinomial(total, sizes / total, size=size)
        else:
            drawn = [kind[rng.integers(0, total, total)] for _ in range(size)]
            weights = np.stack([np.bincount(of, minlength=len(kinds)) for of in drawn])
        picked = weights.astype(float) @ kinds
        yield picked[:, :seeds], picked[:, seeds:]


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _other_side(draws: np.ndarray) -> float:
    """Two-sided p-value of resampled differences: see :func:`paired_bootstrap`."""
    fewer = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (1 + fewer) / (1 + len(draws)))


def _same(ends: tuple[float, float]) -> bool:
    """Whether an interval has no width, but for the last bits of its sums: (almost) all resamples agree, all but those
    few, for example, that miss a whole seed.
    """
    return ends[1] - ends[0] <= 1e-12


def _binary(values: Sequence[np.ndarray]) -> bool:
    """Whether all units are 0 or 1."""
    return all(bool(np.isin(of_seed, (0, 1)).all()) for of_seed in values)


def _all_alike(mean: float, lowest: float, trials: int, level: float) -> tuple[float, float]:
    """Ends of the mean of values from ``lowest`` to 1 if all of ``trials`` were ``mean``: at most the share q of others
    (Clopper and Pearson's bound for none seen) may be anywhere.
    """
    q = 1 - ((1 - level) / 2) ** (1 / trials)
    return float(mean - q * (mean - lowest)), float(mean + q * (1 - mean))
