"""Intervals of tweets and seeds, power, several tests, the best of n tries: each beside an independent calculation."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks import coverage
from pipeline.errors import InputError
from pipeline.statistics import (
    Estimate,
    Seeds,
    costs_at_most,
    detectable,
    difference,
    expected_maximum,
    holm,
    interval,
    mean_interval,
    seeds_needed,
)

SETTINGS = {setting.name: setting for setting in coverage.settings()}
THREE_SEEDS = Estimate(-1.0, 0.45, 583, (Seeds(2.6, 3), Seeds(2.2, 3)))


def scores_of(seed, seeds=3, rows=60):
    return np.random.default_rng(seed).choice([0, 40, 50, 100], (seeds, rows)).astype(float)


# ------------------------------------------------------------------------------------------------- what it is made of


def test_with_independent_rows_and_one_seed_it_is_the_paired_t_test():
    ours, theirs = scores_of(0, seeds=1), scores_of(1, seeds=1)
    found, right = difference(ours, theirs, range(60)), stats.ttest_rel(ours[0], theirs[0])
    assert (found.mean, found.p) == pytest.approx(((ours - theirs).mean(), right.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(right.confidence_interval()))
    assert found.degrees_of_freedom == pytest.approx(59) and found.covers == "tweets" and not found.covers_seeds


def test_seeds_whose_means_are_equal_by_chance_do_not_make_an_interval_without_width():
    """Right and wrong answers, two seeds of each method: what is left of the variance without the noise can be 0."""
    rng, shown = np.random.default_rng(0), []
    for _ in range(8000):
        hard = rng.random(40)
        ours, theirs = ((rng.random((2, 40)) < hard).astype(float) for _ in range(2))  # the same method twice
        found = difference(ours, theirs, range(40))
        assert found.standard_error > 0 or (ours.mean(0) - theirs.mean(0)).std() < 1e-9
        if all(each.variance == 0 for each in found.seeds):
            shown.append(found.p < 0.05)
    assert len(shown) > 60 and np.mean(shown) < 0.12  # 5 % of them, and no more than chance adds


def test_with_rows_that_are_all_alike_it_is_welchs_t_test_of_the_seeds():
    ours, theirs = np.array([70.0, 71.5, 69.0]), np.array([72.0, 74.5, 77.0, 73.0, 71.0])
    found = difference(np.tile(ours[:, None], 40), np.tile(theirs[:, None], 40), range(40))
    right = stats.ttest_ind(ours, theirs, equal_var=False)
    assert (found.p, found.degrees_of_freedom) == pytest.approx((right.pvalue, right.df))
    assert (found.low, found.high) == pytest.approx(tuple(right.confidence_interval()))
    assert found.covers == "tweets, 3 and 5 seeds" and found.covers_seeds


def two_way(ours, theirs, clusters):
    """The variance by Cameron, Gelbach and Miller's inclusion and exclusion, in loops: tweets + seeds - both."""
    apart = (ours.mean(0) - theirs.mean(0)) - (ours.mean() - theirs.mean())
    groups = [[row for row, each in enumerate(clusters) if each == key] for key in dict.fromkeys(clusters)]
    factor, rows = len(groups) / (len(groups) - 1), len(clusters)
    tweets = factor * sum(sum(apart[row] for row in group) ** 2 for group in groups) / rows**2
    seeds = both = 0
    for scores in (ours, theirs):
        count, means = len(scores), [line.mean() for line in scores]
        seeds += sum((each - scores.mean()) ** 2 for each in means) / (count - 1) / count
        for line, mean in zip(scores, means, strict=True):
            left = [line[row] - mean - scores[:, row].mean() + scores.mean() for row in range(rows)]
            each = factor * sum(sum(left[row] for row in group) ** 2 for group in groups) / rows**2
            both += each / (count - 1) / count
    return tweets, seeds, both


def test_the_variance_is_the_two_way_cluster_robust_one():
    clusters = [f"tweet {row * 2 // 3}" for row in range(60)]
    shared = scores_of(9, 1)
    ours, theirs = (scores_of(0, 3) + shared) / 2, (scores_of(1, 4) + 3 * shared) / 4 + [[0], [3], [5], [1]]
    tweets, seeds, both = two_way(ours, theirs, clusters)
    found = difference(ours, theirs, clusters)
    assert found.tweets == pytest.approx(tweets - both) and found.standard_error**2 == pytest.approx(
        tweets + seeds - both
    )
    parts = [(found.tweets, 39), (ours.mean(1).var(ddof=1) / 3, 2), (theirs.mean(1).var(ddof=1) / 4, 3)]
    freedom = sum(variance for variance, _ in parts) ** 2 / sum(variance**2 / each for variance, each in parts)
    assert found.degrees_of_freedom == pytest.approx(freedom)
    bound = stats.t.ppf(0.975, freedom) * math.sqrt(tweets + seeds - both)
    assert (found.low, found.high) == pytest.approx((found.mean - bound, found.mean + bound))
    shuffled = np.random.default_rng(0).permutation(60)  # the order of rows and seeds does not matter
    again = difference(ours[::-1, shuffled], theirs[:, shuffled], [clusters[row] for row in shuffled])
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    swapped = difference(theirs, ours, clusters)
    assert (swapped.low, swapped.high, swapped.p) == pytest.approx((-found.high, -found.low, found.p))


def test_rows_of_one_tweet_do_not_count_as_several():
    ours, theirs = scores_of(0), scores_of(1)
    once, twice = (
        difference(*(np.repeat(each, k, 1) for each in (ours, theirs)), np.repeat(range(60), k)) for k in (1, 2)
    )
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_an_untrained_model_has_no_seeds_and_a_single_run_of_a_trained_one_hides_its():
    ours, theirs = scores_of(0), scores_of(1, seeds=1)
    untrained = difference(ours, theirs, range(60), theirs_trained=False)
    assert untrained.covers == "tweets and 3 seeds" and [each.count for each in untrained.seeds] == [3]
    single = difference(ours, theirs, range(60))
    assert single.covers == "tweets" and not single.covers_seeds
    assert single.half_width == pytest.approx(difference(ours.mean(0), theirs, range(60)).half_width)
    with pytest.raises(InputError, match="scored once, not with 3 seeds"):
        difference(ours, theirs, range(60), ours_trained=False)


def test_one_methods_mean_is_its_difference_from_a_model_that_scores_nothing():
    scores, clusters = scores_of(0), np.arange(60) // 2
    nothing = difference(scores, np.zeros((1, 60)), clusters, theirs_trained=False)
    assert mean_interval(scores, clusters) == nothing
    assert nothing.low < scores.mean() < nothing.high


def test_equal_scores_have_no_interval_around_them():
    scores = scores_of(0) / 3  # thirds, whose sums are rounded
    same = difference(scores, scores[::-1], range(60))
    assert same.mean == 0 and same.low <= 0 <= same.high and same.p == 1
    alike = np.tile(scores[0], (5, 1))
    nothing = difference(alike[:3], alike, range(60))
    assert (nothing.mean, nothing.low, nothing.high, nothing.p, detectable(nothing)) == (0, 0, 0, 1, 0)
    assert seeds_needed(nothing, 0.1) == 2
    shifted = difference(alike[:3] + 2.5, alike, range(60))
    assert (shifted.low, shifted.high, shifted.p) == (pytest.approx(2.5), pytest.approx(2.5), 0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_without_an_interval_are_refused(wrong):
    ours, theirs = scores_of(0), scores_of(1)
    with pytest.raises(InputError, match="at least two tweets"):
        difference(ours, theirs, ["the same"] * 60)
    with pytest.raises(InputError, match="do not fit the tweets of 59 rows"):
        difference(ours, theirs, range(59))
    ours[1, 7] = wrong
    with pytest.raises(InputError, match="not a number"):
        difference(ours, theirs, range(60))


# ----------------------------------------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("name", ["3 seeds, 2 lower", "5 seeds", "demo, 3 seeds, skewed"])
def test_the_interval_covers_the_true_difference_and_the_former_one_does_not(name):
    """The whole record is benchmarks/results/coverage.md."""
    found = coverage.coverage(SETTINGS[name], 400, candidates=("chosen", "today"))
    assert 0.92 <= found["covered"]["chosen"] <= 0.98
    assert found["covered"]["today"] < 0.9
    assert 0.005 <= found["at most"] <= 0.05  # one-sided: 2.5 %


def test_the_recorded_coverage_is_what_it_is_chosen_for():
    """93 to 97 % with 3 seeds or more, but for the worst case: one method's 3 seeds make nearly all of the variance."""
    found = json.loads((coverage.RESULTS / "coverage.json").read_text())
    assert found["studies"] >= 2000 and list(found["settings"]) == list(SETTINGS)
    for name, each in found["settings"].items():
        if not name.startswith("1 "):
            worst = name == "3 seeds, seeds' sd 3 and 0.5"
            assert (0.915 if worst else 0.93) <= each["covered"]["chosen"] <= 0.97, name
    for each in found["power"].values():
        assert each["detectable"]["chosen"]["shown"] == pytest.approx(0.8, abs=0.025)


def test_simulated_studies_have_the_true_values_that_they_name():
    setting = SETTINGS["3 seeds, 2 lower, skewed"]
    means = np.concatenate([[each.mean(2) for each in scores] for scores, _, _ in coverage.simulate(setting, 400)], 1)
    assert means.mean((1, 2)) == pytest.approx([68, 70], abs=0.25)
    assert (means[0] - means[1]).mean() == pytest.approx(-2, abs=0.25)
    scores, tweets, _ = next(coverage.simulate(setting, 1))
    assert scores[0].shape == (1, 3, 1086) and len(set(tweets)) == 583
    assert 0.1 < (scores[0] == 0).mean() < 0.3 and 0.3 < (scores[0] == 100).mean() < 0.7


def test_the_former_interval_in_the_record_is_the_bootstrap_that_compare_runs_had():
    scores, tweets, _ = next(coverage.simulate(SETTINGS["3 seeds"], 2))
    low, high = coverage.resampled(scores, tweets, np.random.default_rng(0))["today"]
    for study in range(2):
        right = interval(scores[0][study].mean(0) - scores[1][study].mean(0), resamples=4000)
        assert (low[study], high[study]) == pytest.approx(right, abs=0.2 * (right[1] - right[0]) / 4)


# ---------------------------------------------------------------------------------------------------- power, at most


@pytest.mark.parametrize(
    "result", [THREE_SEEDS, replace(THREE_SEEDS, seeds=(Seeds(2.6, 5),)), replace(THREE_SEEDS, seeds=())]
)
def test_the_detectable_difference_is_shown_in_80_percent_of_studies(result):
    """By brute force: studies drawn from the normal model, with variances that are chi-squared."""
    rng, studies, true = np.random.default_rng(0), 4000, detectable(result)
    drawn = [
        Seeds(each.variance * rng.chisquare(each.count - 1, studies) / (each.count - 1), each.count)
        for each in result.seeds
    ]
    tweets = result.tweets * rng.chisquare(582, studies) / 582
    means = true + result.standard_error * rng.standard_normal(studies)
    shown = []
    for study in range(studies):
        seeds = tuple(Seeds(each.variance[study], each.count) for each in drawn)
        shown.append(Estimate(means[study], tweets[study], 583, seeds).low > 0)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.02)


def test_with_tweets_alone_the_detectable_difference_is_the_noncentral_ts():
    result = difference(scores_of(0, 1, 12), scores_of(1, 1, 12), range(12))
    for power in (0.5, 0.8, 0.95):
        shown = stats.nct.sf(stats.t.ppf(0.975, 11), 11, detectable(result, power) / result.standard_error)
        assert shown == pytest.approx(power, abs=0.002)


def test_as_many_seeds_as_are_needed_make_the_interval_narrow_enough():
    setting = SETTINGS["3 seeds"]
    true = coverage.expected(coverage.estimates(setting, 300, seed=5))
    needed = seeds_needed(true, margin=2.5)
    assert coverage.half_width(setting, needed, 300) < 2.55 and coverage.half_width(setting, needed - 1, 300) > 2.45
    assert seeds_needed(true, margin=2.5, power=0.8) > needed
    tweets_alone = stats.t.ppf(0.975, 582) * math.sqrt(true.tweets)
    assert seeds_needed(true, 0.99 * tweets_alone) is None
    assert seeds_needed(true, 1.1 * tweets_alone) > 10
    assert seeds_needed(true, 100) == 2


def test_seeds_needed_cannot_be_said_without_the_seeds_variance():
    for seeds in ((), (Seeds(0.0, 1), Seeds(2.0, 3))):
        with pytest.raises(InputError, match="without two seeds"):
            seeds_needed(replace(THREE_SEEDS, seeds=seeds), 2)


def test_it_costs_at_most_the_upper_end_of_the_loss():
    result = difference(scores_of(0), scores_of(1), range(60))
    loss = difference(scores_of(1), scores_of(0), range(60))
    assert costs_at_most(result) == -result.low == pytest.approx(loss.high)


# ---------------------------------------------------------------------------------------------------- several results


def test_holm_is_the_hand_calculation():
    # 0.005 * 4, 0.01 * 3, then 0.03 * 2 = 0.06, which 0.04 * 1 must not fall below
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1] and holm([0.03]).tolist() == [0.03] and holm([]).tolist() == []
    with pytest.raises(InputError):
        holm([0.1, np.nan])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferronis(p_values):
    """An independent definition: the largest Bonferroni p value of all sets that the test is in."""
    places = range(len(p_values))
    sets = [set(each) for size in range(1, len(p_values) + 1) for each in itertools.combinations(places, size)]
    for place, adjusted in enumerate(holm(p_values)):
        closed = max(min(1, len(each) * min(p_values[other] for other in each)) for each in sets if place in each)
        assert adjusted == pytest.approx(closed)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.data())
def test_the_expected_maximum_is_the_mean_over_all_sets_of_n_tries(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    brute_force = np.mean([max(each) for each in itertools.combinations(scores, n)])
    assert expected_maximum(scores, n) == pytest.approx(brute_force, abs=1e-9)


def test_the_expected_maximum_of_more_tries_than_there_are_is_refused():
    for scores, n in (([1.0, 2.0], 3), ([1.0, 2.0], 0), ([1.0, np.nan], 1), ([], 1)):
        with pytest.raises(InputError, match="cannot be told"):
            expected_maximum(scores, n)
