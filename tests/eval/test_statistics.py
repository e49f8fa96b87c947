"""Intervals and paired tests against SciPy, hand cases, plain loops and simulations."""

from __future__ import annotations

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sav_jax.eval.statistics import (
    Interval,
    cluster_interval,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_resampling,
    resampled_interval,
    sign_flip_test,
    student_interval,
)


def names(count: int) -> list[str]:
    return [f"q{i}" for i in range(count)]


# Intervals


def test_stderr_of_single_queries_is_lmms_evals() -> None:
    right = np.random.default_rng(0).random(150) < 0.8
    interval = cluster_interval([right], [names(150)])
    assert interval.mean == pytest.approx(right.mean(), rel=1e-12)
    # Two ways to the same sum of 150 float64 terms.
    assert interval.stderr == pytest.approx(right.std(ddof=1) / np.sqrt(150), rel=1e-12)


def test_stderr_of_clusters_by_hand() -> None:
    # Influences (sum - 2 x 0.75) / 4 = -1/8 and 1/8; variance 2 / (2 - 1) x 2 / 64 = 1 / 16.
    interval = cluster_interval([np.array([1.0, 0.0, 1.0, 1.0])], [["a", "a", "b", "b"]])
    assert (interval.mean, interval.stderr) == (0.75, 0.25)
    # The four draws of two clusters have the means 0.5, 0.75, 0.75 and 1: both ends are among them.
    assert interval.ci == (0.5, 1.0)


def test_a_query_asked_under_three_seeds_is_one_query() -> None:
    right = (np.random.default_rng(1).random(80) < 0.7).astype(float)
    assert cluster_interval([right] * 3, [names(80)] * 3) == cluster_interval([right], [names(80)])


def test_seeds_weigh_the_same_whatever_their_number_of_queries() -> None:
    interval = cluster_interval([np.ones(10), np.zeros(30)], [names(10), names(30)])
    assert interval.mean == 0.5


def test_a_resample_may_miss_all_queries_of_a_seed() -> None:
    interval = cluster_interval([np.array([1.0]), np.array([0.0, 1.0])], [["a"], ["b", "c"]])
    assert interval.mean == 0.75
    assert interval.ci == (0.0, 1.0)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=2, max_size=30),
    st.randoms(use_true_random=False),
)
def test_order_and_names_change_nothing(units: list[tuple[int, float]], shuffle) -> None:
    def of(pairs: list[tuple[int, float]], prefix: str) -> Interval:
        values = [np.array([value for _, value in pairs])]
        return cluster_interval(values, [[f"{prefix}{name}" for name, _ in pairs]], resamples=50)

    mixed = units.copy()
    shuffle.shuffle(mixed)
    first, second = of(units, "a"), of(mixed, "z")
    # Sums of 30 numbers of at most 1 in another order differ by some 30 x 2^-53; the bootstrap's draws by as much,
    # unless two clusters whose sums differ by that alone change places, which changes as little.
    for field in ("mean", "stderr", "low", "high"):
        np.testing.assert_allclose(getattr(second, field), getattr(first, field), rtol=0, atol=1e-13)


@pytest.mark.parametrize("continuous", [False, True], ids=["few kinds of clusters", "every cluster another"])
def test_the_interval_is_that_of_a_plain_loop(continuous: bool) -> None:
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 4, 120)
    cluster = np.repeat(np.arange(120), sizes)
    chance = rng.beta(2, 1, 120)[cluster]
    values = [chance if continuous else (rng.random(len(cluster)) < chance).astype(float) for _ in range(2)]
    interval = cluster_interval(values, [[str(i) for i in cluster]] * 2)

    members = [np.flatnonzero(cluster == c) for c in range(120)]
    draws = []
    for _ in range(8000):
        picked = np.concatenate([members[c] for c in rng.integers(0, 120, 120)])
        draws.append(np.mean([of_seed[picked].mean() for of_seed in values]))
    # sd of 8,000 draws: 1 / sqrt(2 x 8,000) = 0.8 %, four times that; the analytic one is larger by 1 / (2 x 120).
    assert interval.stderr == pytest.approx(np.std(draws), rel=0.032 + 0.005)
    # A 2.5 % quantile of B normal draws has an error of sqrt(0.025 x 0.975 / B) / 0.0584 = 2.67 / sqrt(B) standard
    # errors: 0.060 for 2,000 and 0.030 for 8,000, 0.067 together; four times that.
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=0.27 * interval.stderr)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=0.27 * interval.stderr)


def test_the_interval_covers_the_truth_as_often_as_it_says_and_only_if_clustered() -> None:
    rng = np.random.default_rng(3)
    rounds, clustered, naive = 1000, 0, 0
    for _ in range(rounds):
        chance = rng.beta(1, 1, 100)  # four queries of a group share their difficulty; the truth is 0.5
        right = (rng.random((100, 4)) < chance[:, None]).astype(float).ravel()
        groups = np.repeat(np.arange(100), 4)
        low, high = cluster_interval([right], [[str(c) for c in groups]], resamples=400).ci or (1.0, 0.0)
        clustered += low <= 0.5 <= high
        low, high = cluster_interval([right], [names(400)], resamples=400).ci or (1.0, 0.0)
        naive += low <= 0.5 <= high
    # Binomial error of 1,000 rounds: sqrt(0.95 x 0.05 / 1,000) = 0.7 %, four times that is 2.8 %; 1 % on top for
    # percentiles of 400 resamples and 100 clusters.
    assert clustered / rounds == pytest.approx(0.95, abs=0.038)
    # Four queries with correlation 1/3: the variance is (1 + 3 / 3) = 2 times the naive one, so that 1.96 naive
    # standard errors are 1.39 true ones, which cover 83 %.
    assert naive / rounds == pytest.approx(0.83, abs=0.06)


def test_all_right_is_no_certainty() -> None:
    interval = cluster_interval([np.ones(50)] * 2, [names(50)] * 2)
    exact = scipy.stats.binomtest(50, 50).proportion_ci(0.95, "exact")
    assert (interval.mean, interval.stderr, interval.high) == (1, 0, 1)
    assert interval.low == pytest.approx(exact.low, rel=1e-9)  # SciPy inverts the binomial numerically
    interval = cluster_interval([np.zeros(50)], [names(50)], level=0.9)
    assert interval.low == 0
    assert interval.high == pytest.approx(scipy.stats.binomtest(0, 50).proportion_ci(0.9, "exact").high, rel=1e-9)


def test_clusters_that_agree_are_no_certainty() -> None:
    """Balanced pairs that are half right each: the exact bound on the share of others, none of 20 being one."""
    right, pairs = np.tile([1.0, 0.0], 20), [str(i // 2) for i in range(40)]
    interval = cluster_interval([right], [pairs])
    others = scipy.stats.binomtest(0, 20).proportion_ci(0.95, "exact").high
    assert (interval.mean, interval.stderr) == (0.5, 0)
    assert interval.low == pytest.approx(0.5 * (1 - others), rel=1e-9)  # all of these wrong
    assert interval.high == pytest.approx(0.5 + 0.5 * others, rel=1e-9)  # all of them right
    # Were one pair in ten otherwise, 20 pairs that agree would be seen with probability 0.9^20 = 12 %: it is inside.
    assert interval.low < 0.45 < 0.55 < interval.high
    # Nor are resamples that miss a whole seed (of 5 pictures some do) a reason to be certain: every picture has four
    # right of six under one seed, five under the other.
    asked = [names(8)[:3], [names(8)[i] for i in (2, 6, 7)]]
    values = [np.tile([1.0] * right + [0.0] * (6 - right), 3) for right in (4, 5)]
    few = cluster_interval(values, [np.repeat(of_seed, 6).tolist() for of_seed in asked])
    assert few.mean == pytest.approx(0.75)
    others = scipy.stats.binomtest(0, 5).proportion_ci(0.95, "exact").high  # five pictures in all
    assert few.ci == pytest.approx((0.75 * (1 - others), 0.75 + 0.25 * others), rel=1e-9)
    # What has no known bounds has no interval then.
    assert cluster_interval([np.full(40, 0.7)], [names(40)]).ci is None
    assert resampled_interval(lambda i: 1.0, 40).ci is None


def test_differences_that_agree_are_no_certainty() -> None:
    others = scipy.stats.binomtest(0, 30).proportion_ci(0.95, "exact").high
    same = paired_bootstrap([np.ones(30)], [np.ones(30)], [names(30)])
    assert same.interval.ci == pytest.approx((-others, others), rel=1e-9)
    assert same.p == 1
    better = paired_bootstrap([np.zeros(30)], [np.ones(30)], [names(30)])
    assert better.interval.ci == pytest.approx((1 - 2 * others, 1), rel=1e-9)
    assert paired_bootstrap([np.full(30, 0.2)], [np.full(30, 0.7)], [names(30)]).interval.ci is None


def test_one_cluster_tells_nothing_about_the_spread() -> None:
    for interval, mean in (
        (cluster_interval([np.array([1.0, 0.0])], [["a", "a"]]), 0.5),
        (resampled_interval(lambda i: float(len(i)), 1), 1.0),
        (paired_bootstrap([np.zeros(3)], [np.ones(3)], [["a"] * 3]).interval, 1.0),
    ):
        assert interval.mean == mean
        assert np.isnan([interval.stderr, interval.low, interval.high]).all()
        assert interval.ci is None


def test_values_and_names_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 values and 1 cluster names"):
        cluster_interval([np.zeros(2)], [["a"]])
    with pytest.raises(ValueError, match="0 values"):
        cluster_interval([np.zeros(0)], [[]])
    with pytest.raises(ValueError, match="not pairs"):
        paired_bootstrap([np.zeros(2)], [np.zeros(3)], [["a", "b"]])
    with pytest.raises(ValueError, match="not pairs"):
        mcnemar(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="1 cluster names for 2 units"):
        resampled_interval(lambda i: 0.0, 2, clusters=["a"])


def test_ten_thousand_units_take_about_a_second() -> None:
    values = [np.random.default_rng(4).random(10_000) for _ in range(3)]
    start = time.process_time()
    cluster_interval(values, [names(10_000)] * 3)
    # 2,000 x 10,000 random integers and their counts: 0.3 s measured. A loop over units in Python would take 10 s.
    assert time.process_time() - start < 3


def test_resampling_an_index_array_gives_what_resampling_a_mean_does() -> None:
    rng = np.random.default_rng(5)
    values, cluster = rng.random(90), [str(i // 2) for i in range(90)]
    mean = cluster_interval([values[:60], values[60:]], [cluster[:60], cluster[60:]])
    numbers = [0] * 60 + [1] * 30
    other = resampled_interval(lambda i: float(values[i].mean()), 90, clusters=cluster, seeds=numbers, resamples=4000)
    assert other.mean == pytest.approx(mean.mean, rel=1e-12)
    # 4,000 resamples: sd within 1 / sqrt(8,000) = 1.1 %, four times that, and 1 / (2 x 45) between the two estimators.
    assert other.stderr == pytest.approx(mean.stderr, rel=0.045 + 0.012)
    # Quantiles as above, of 2,000 and 4,000 resamples: 0.060 and 0.042, 0.073 together; four times that.
    assert other.low == pytest.approx(mean.low, abs=0.3 * mean.stderr)


def test_resamples_without_a_number_count_for_nothing() -> None:
    classes = np.array([0, 1] + [1] * 8)
    interval = resampled_interval(lambda i: float(classes[i].mean()) if np.ptp(classes[i]) else np.nan, 10)
    assert interval.mean == 0.9
    assert interval.high <= 0.9, "no resample of one class only is among them"
    rare = resampled_interval(lambda i: 1.0 if len(np.unique(i)) == 10 else np.nan, 10)  # 10! / 10^10 = 0.04 % of them
    assert rare.mean == 1
    assert rare.ci is None


# Paired tests


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.3, 0.5, 0.45]
    found = student_interval(values)
    sem = scipy.stats.sem(values)
    np.testing.assert_allclose([found.mean, found.stderr], [np.mean(values), sem])
    np.testing.assert_allclose([found.low, found.high], scipy.stats.t.interval(0.95, 2, np.mean(values), sem))
    assert student_interval([0.3]).ci is None
    assert student_interval([0.3, 0.3]).ci is None
    # Three draws of a normal number: an interval that says 95 % holds the mean so often (standard error 0.7 %).
    draws = np.random.default_rng(0).normal(size=(1000, 3))
    held = [low < 0 < high for low, high in (student_interval(row).ci or (0.0, 0.0) for row in draws)]
    assert 0.92 < np.mean(held) < 0.98


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (5, 0), (3, 9), (9, 3), (20, 20), (40, 71)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * 7 + [False] * 2)
    b = np.array([False] * only_a + [True] * only_b + [True] * 7 + [False] * 2)
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    exact = scipy.stats.binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert result.p == pytest.approx(exact, rel=1e-9)  # sums of binomial terms, in two libraries' orders


def test_paired_bootstrap_by_hand() -> None:
    # B is right wherever A is, and on 4 of 10 queries more. No resample is below zero, and 0.6^10 = 0.6 % are at zero.
    a, b = np.repeat([0.0, 1.0], [6, 4]), np.repeat([0.0, 1.0], [2, 8])
    result = paired_bootstrap([a], [b], [names(10)])
    assert result.interval.mean == pytest.approx(0.4, abs=1e-15)
    assert result.interval.ci == pytest.approx((0.1, 0.7), abs=1e-12)  # the quantiles of a binomial (10, 0.4) / 10
    # Twice 60.5 expected resamples of 10,000, whose spread is sqrt(60.5) = 7.8; four times that.
    assert result.p == pytest.approx(2 * 0.6**10, abs=2 * 32 / 10_000)
    assert paired_bootstrap([a], [a], [names(10)]).p == 1


def test_resampling_a_number_gives_what_resampling_a_mean_does() -> None:
    rng = np.random.default_rng(8)
    a, b = ([rng.random(60), rng.random(40)] for _ in range(2))
    clusters = [[str(i // 2) for i in range(60)], [str(i) for i in range(40)]]

    def difference(seed: int, draws: np.ndarray) -> np.ndarray:
        return draws @ (b[seed] - a[seed]) / draws.sum(axis=1)

    mean, other = paired_bootstrap(a, b, clusters), paired_resampling(difference, clusters, seed=1)
    assert other.interval.mean == pytest.approx(mean.interval.mean, rel=1e-12)
    # The spread of 10,000 resamples: 1 / sqrt(20,000) = 0.7 %, four times that; 1 / (2 x 40) between estimators.
    assert other.interval.stderr == pytest.approx(mean.interval.stderr, rel=0.028 + 0.0125)
    # Quantiles of 10,000 resamples, 2.67 / 100 standard errors each: sqrt(2) times that, four times.
    for one, two in ((mean.interval.low, other.interval.low), (mean.interval.high, other.interval.high)):
        assert one == pytest.approx(two, abs=0.15 * mean.interval.stderr)
    # Twice a share of about p / 2 of 10,000 resamples, twice: four spreads.
    assert other.p == pytest.approx(mean.p, abs=4 * 2 * np.sqrt(2 * mean.p / 2 / 10_000))


def test_resamples_without_a_difference_count_for_nothing() -> None:
    positive = np.array([1] + [0] * 9)  # in 0.9^10 = 35 % of the resamples there is no positive

    def difference(seed: int, draws: np.ndarray) -> np.ndarray:
        return np.where(draws @ positive > 0, 0.25 + 0.01 * draws[:, 1], np.nan)

    result = paired_resampling(difference, [names(10)])
    assert result.interval.mean == pytest.approx(0.26, rel=1e-12)
    assert result.interval.low == 0.25
    # All that count are above zero: p is 2 / (1 + their number).
    assert 2 / result.p - 1 == pytest.approx(6513, abs=4 * np.sqrt(10_000 * 0.65 * 0.35))
    rare = paired_resampling(lambda _, draws: np.where((draws == 1).all(axis=1), 0.5, np.nan), [names(10)])
    assert (rare.interval.mean, rare.interval.ci, rare.p) == (0.5, None, 1.0)
    assert paired_resampling(lambda _, draws: draws[:, 0] / 2, [["a"] * 3]).interval.ci is None


def test_paired_bootstrap_turns_with_its_arguments() -> None:
    rng = np.random.default_rng(6)
    a, b = ([rng.random(40).round(), rng.random(30).round()] for _ in range(2))
    one = paired_bootstrap(a, b, [names(40), names(30)], resamples=20_000)
    other = paired_bootstrap(b, a, [names(40), names(30)], resamples=20_000)
    assert other.interval.mean == -one.interval.mean
    assert other.interval.stderr == pytest.approx(one.interval.stderr, rel=1e-12)
    # Quantiles of 20,000 resamples: 2.67 / sqrt(20,000) = 0.019, times sqrt(2); four times that, and half of one step
    # of 1/80 in either.
    assert other.interval.high == pytest.approx(-one.interval.low, abs=0.11 * one.interval.stderr + 1 / 80)


def test_a_difference_is_found_in_one_of_twenty_where_there_is_none() -> None:
    rng = np.random.default_rng(7)
    p_values = []
    for _ in range(600):
        right = rng.random((2, 2, 150)) < rng.random(150)  # methods, seeds, queries, which differ in difficulty
        a, b = right.astype(float)
        pair = (list(a), list(b), [names(150)] * 2)
        p_values.append((paired_bootstrap(*pair, resamples=600).p, sign_flip_test(*pair, resamples=600)))
    found = np.mean(np.array(p_values) < 0.05, axis=0)
    # Binomial error of 600 rounds at 5 %: 0.9 %; four times that. Ties make the tests a little conservative.
    assert np.all((found >= 0.014) & (found <= 0.086)), found


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 0), (5, 12), (30, 21)])
def test_flipping_signs_of_single_queries_is_mcnemars_test(only_a: int, only_b: int) -> None:
    a = np.repeat([1.0, 0.0, 1.0], [only_a, only_b, 10])
    b = np.repeat([0.0, 1.0, 1.0], [only_a, only_b, 10])
    exact = mcnemar(a == 1, b == 1).p
    p = sign_flip_test([a], [b], [names(len(a))], resamples=20_000)
    # The binomial spread of 20,000 random choices, four times; and the one that is added to the count.
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_flipping_signs_takes_a_cluster_under_all_seeds_as_one() -> None:
    # Three groups, all better under B, under two seeds: 2 of 2^3 choices of signs are as extreme, not 2 of 2^12.
    a, b, groups = [np.zeros(6)] * 2, [np.ones(6)] * 2, [["a", "a", "b", "b", "c", "c"]] * 2
    # 0.25, with the spread sqrt(0.25 x 0.75 / 10,000) = 0.43 %; four times that.
    assert sign_flip_test(a, b, groups) == pytest.approx(0.25, abs=0.018)


def test_flipping_signs_finds_p_values_that_survive_many_comparisons() -> None:
    a, b = np.repeat([1.0, 0.0], [20, 180]), np.repeat([0.0, 1.0], [20, 180])
    p = sign_flip_test([a], [b], [names(200)])
    # Hoeffding: d = 160/200, sum of squares 200/200^2: 2 exp(-160^2 / (2 x 200)); the exact one is smaller.
    assert p == pytest.approx(2 * np.exp(-64), rel=1e-9)
    assert mcnemar(a == 1, b == 1).p < p


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 1))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], level: float) -> None:
    rejected = set()
    for step, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] * (len(p_values) - step) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= level} == (
        rejected if level < 1 else set(range(len(p_values)))
    )
