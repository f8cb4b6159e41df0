"""Intervals and tests, for the breakdown of a run and the comparison of runs. One bootstrap for the whole project.

scipy is imported by the functions that need it, so that a training script starts faster. Scores may have any unit, and
every result has the same one.
"""

import bisect
import math
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import InputError

RESAMPLES = 10_000


def interval(values, resamples=RESAMPLES):
    """The 95 % bootstrap interval (low, high) of the mean of `values`, with a fixed seed.

    To compare two methods, give each example's difference, so that both are resampled on the same examples: the paired
    bootstrap (Koehn, 2004, https://aclanthology.org/W04-3250). The bounds are percentiles of the resampled means
    (Efron, 1979, https://doi.org/10.1214/aos/1176344552). BCa, scipy's default, corrects a bias and a skew that a mean
    over hundreds of examples hardly has. If all values are equal, both bounds are NaN: resampling them says nothing
    about other examples.
    """
    from scipy import stats

    values = np.asarray(values, float)
    if np.ptp(values) == 0:
        return math.nan, math.nan
    bounds = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 100_000 // len(values)),  # bounds the memory, whatever the number of examples
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return bounds.low, bounds.high


def ratio_interval(values, weights, resamples=RESAMPLES):
    """(ratio, low, high): sum(values) / sum(weights) and its 95 % interval, with a fixed seed, for other examples.

    values, weights: (n,), of examples that are independent, such as a line's loss and its number of tokens. The
    bootstrap-t interval (Hall, 1988, https://doi.org/10.1214/aos/1176350933), whose bounds are not symmetric where the
    values are skewed; the variance in it is the ratio estimator's (Cochran, 1977, Sampling Techniques, chapter 6). On
    60 skewed lines it covers 94 % (tests/test_probe.py); Student's t with that variance covered 91 % there, and the
    percentiles of the resampled ratios 92 %. With two or three examples a bound is infinite: they do not tell.
    """
    values, weights = np.asarray(values, float), np.asarray(weights, float)
    count = len(values)
    squares = np.stack([values, weights, values**2, values * weights, weights**2], axis=1)

    def of(sums):
        """(ratios, their standard errors) from sums of `squares`, (5, resamples)."""
        v, w, vv, vw, ww = sums
        ratio = v / w
        left = vv - 2 * ratio * vw + ratio**2 * ww  # the sum of (value - ratio * weight)**2
        left = np.where(left > 1e-12 * (vv + ratio**2 * ww), left, 0)  # what is left of it after rounding is 0
        return ratio, np.sqrt(left * count / max(1, count - 1)) / w

    ratio, error = of(squares.sum(0))
    if error == 0:
        return float(ratio), float(ratio), float(ratio)
    rng, drawn = np.random.default_rng(0), []
    for start in range(0, resamples, size := max(1, 1_000_000 // count)):  # bounds the memory
        some = min(size, resamples - start)
        rows = rng.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        times = np.bincount(rows.ravel(), minlength=some * count).reshape(some, count)  # each example was drawn
        ratios, errors = of((times @ squares).T)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn.append(np.where(errors + abs(ratios - ratio) > 0, (ratios - ratio) / errors, 0))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975], method="inverted_cdf")
    return float(ratio), float(ratio - high * error), float(ratio - low * error)


def mcnemar(ours, theirs):
    """p of McNemar's exact test, two-sided, that two runs are right equally often.

    ours, theirs: exact match (0 or 1) of each example. Among the examples that only one run gets right, each run should
    have half: a binomial test (McNemar, 1947, https://doi.org/10.1007/BF02295996). Without such examples p is 1.
    """
    from scipy import stats

    ours_alone, theirs_alone = int((ours > theirs).sum()), int((theirs > ours).sum())
    discordant = ours_alone + theirs_alone
    return stats.binomtest(ours_alone, discordant).pvalue if discordant else 1.0


# ------------------------------------------------------------------------------------------------ tweets and seeds


@dataclass(frozen=True)
class Seeds:
    """How much the seed moves one method's mean."""

    variance: float  # of the mean of one run, between seeds; 0.0 where a single seed cannot show it
    count: int


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with the variances that make its 95 % interval. In the unit of the scores."""

    mean: float
    tweets: float  # variance due to which tweets were scored; if the interval covers seeds, with infinitely many seeds
    tweet_count: int
    seeds: tuple  # a Seeds of each trained method

    @property
    def covers_seeds(self):
        """False if a trained method has a single seed: the interval is then of these runs, on other tweets."""
        return all(each.count > 1 for each in self.seeds)

    @property
    def covers(self):
        """What the interval covers, in words: "tweets and 3 seeds", "tweets, 3 and 5 seeds", or "tweets"."""
        counts = list(dict.fromkeys(each.count for each in self.seeds))
        if not counts or not self.covers_seeds:
            return "tweets"
        return f"tweets and {counts[0]} seeds" if len(counts) == 1 else f"tweets, {counts[0]} and {counts[1]} seeds"

    @property
    def _parts(self):
        """[(variance of the mean, degrees of freedom)] of tweets and of each method's seeds."""
        seeds = [(each.variance / each.count, each.count - 1) for each in self.seeds if self.covers_seeds]
        return [(self.tweets, self.tweet_count - 1), *seeds]

    @property
    def standard_error(self):
        return math.sqrt(sum(variance for variance, _ in self._parts))

    @property
    def degrees_of_freedom(self):
        """Satterthwaite's (1946, https://doi.org/10.2307/3002019). Without variance, those of the tweets."""
        if self.standard_error == 0:
            return float(self.tweet_count - 1)
        return self.standard_error**4 / sum(variance**2 / freedom for variance, freedom in self._parts)

    @property
    def half_width(self):
        """Of the 95 % interval."""
        return _t(0.975, self.degrees_of_freedom) * self.standard_error

    @property
    def low(self):
        return self.mean - self.half_width

    @property
    def high(self):
        return self.mean + self.half_width

    @property
    def p(self):
        """Of the two-sided t test that the true mean is 0. Below 0.05 exactly where the interval leaves out 0."""
        from scipy import special

        if self.standard_error == 0:
            return float(self.mean == 0)
        return float(2 * special.stdtr(self.degrees_of_freedom, -abs(self.mean) / self.standard_error))


def difference(ours, theirs, clusters, ours_trained=True, theirs_trained=True):
    """The Estimate of how much higher our mean score is than theirs, for other tweets and other seeds.

    ours, theirs: scores, (seeds, rows), of the same rows in the same order; the number of seeds may differ.
    clusters: the tweet of each row, as any hashable value. Rows of one tweet are not independent.
    ours_trained, theirs_trained: False for an untrained model: no seed changes it, and it has one row of scores.

    The variance is the two-way cluster-robust one (Cameron, Gelbach and Miller, 2011,
    https://doi.org/10.1198/jbes.2010.07136): that of the paired differences with tweets as clusters (Liang and Zeger,
    1986, https://doi.org/10.1093/biomet/73.1.13; times G / (G - 1) for G tweets), plus that of each method's seed means
    over its number of seeds, less that of the noise of seed and tweet together, which is in both; where all seed means
    are equal, nothing is subtracted. The interval is Student's with Satterthwaite's degrees of freedom. Rows that are
    all independent and one seed make it the paired t test, rows that are all alike make it Welch's t test of the seed
    means. `benchmarks/coverage.py` compares its coverage with other intervals'.

    If a trained method has a single seed, how much the seed moves it is unknown: the interval covers tweets alone.
    Raises InputError for scores that are not numbers, other numbers of rows, and fewer than two tweets.
    """
    ours, theirs = _checked(ours, clusters, ours_trained), _checked(theirs, clusters, theirs_trained)
    return _estimate([(ours, 1, ours_trained), (theirs, -1, theirs_trained)], clusters)


def mean_interval(scores, clusters, trained=True):
    """The Estimate of one method's mean score. The arguments and the variance are those of `difference`."""
    return _estimate([(_checked(scores, clusters, trained), 1, trained)], clusters)


def costs_at_most(result):
    """The upper end of the 95 % interval of what ours loses, in points that are positive for a loss.

    result: the Estimate of ours minus theirs. A true loss is larger than this in 2.5 % of studies. Where it is at most
    a margin, ours is not inferior by more than the margin: the usual test of non-inferiority, at 2.5 % one-sided
    (Piaggio et al., 2012, https://doi.org/10.1001/jama.2012.87802). Negative where ours is better for certain.
    """
    return -result.low


def detectable(result, power=0.8):
    """The smallest true difference that a study like this one shows, its interval leaving out 0, with this power.

    The estimated variances are taken for the true ones. How narrow the interval of such a study turns out depends on
    how the few seeds fall, so that the power is the mean over the half widths it may have. With tweets alone, this is
    the noncentral t distribution's answer (Cohen, 1988, Statistical Power Analysis for the Behavioral Sciences, 2.2);
    with Satterthwaite's degrees of freedom put into that, 3 seeds would show it in 74 % of studies, not 80 %
    (`benchmarks/coverage.py`). In the unit of the scores; 0.0 without any variance.
    """
    from scipy import optimize, special

    error, widths = result.standard_error, _half_widths(result)
    if error == 0:
        return 0.0
    # Beyond the upper end it is shown for certain, below the lower one in less than half of the studies.
    return optimize.brentq(
        lambda true: special.ndtr((true - widths) / error).mean() - power, -10 * error, widths.max() + 10 * error
    )


def seeds_needed(result, margin, power=None, most=1000):
    """The smallest number of seeds, 2 or more, with which each trained method's runs make the interval narrow enough.

    Narrow enough: half its expected width is at most the margin or, given a power, `detectable` is. The estimated
    variances are taken for the true ones, so that the answer is as rough as they are. None if `most` seeds are not
    enough, as where tweets alone exceed the margin. Raises InputError unless the interval covers seeds.
    """
    if not result.seeds or not result.covers_seeds:
        raise InputError("how many seeds are needed cannot be said without two seeds of each trained method")

    def narrow(count):
        planned = replace(result, seeds=tuple(replace(each, count=count) for each in result.seeds))
        return (detectable(planned, power) if power else _half_widths(planned).mean()) <= margin

    # Every number is too small, up to the first that is enough.
    needed = bisect.bisect_left(range(most + 1), True, lo=2, key=narrow)
    return needed if needed <= most else None


def _half_widths(result):
    """Equally probable half widths of the interval in studies whose true variances are this result's.

    An estimated variance is distributed like the true one times chi-squared over its degrees of freedom; each takes 32
    such values, and the interval is that of each combination.
    """
    from scipy import special

    tails = (np.arange(32) + 0.5) / 32
    parts = [(variance, freedom) for variance, freedom in result._parts if variance]
    drawn = [variance * special.chdtri(freedom, tails) / freedom for variance, freedom in parts]
    drawn = [each.ravel() for each in np.meshgrid(*drawn)] if drawn else [np.zeros(1)]
    total = sum(drawn)
    squares = sum(each**2 / freedom for each, (_, freedom) in zip(drawn, parts, strict=True)) if parts else 1
    return special.stdtrit(np.maximum(total**2 / squares, 1), 0.975) * np.sqrt(total)


def _checked(scores, clusters, trained):
    """The scores as floats, (seeds, rows). Raises InputError as `difference` does."""
    scores = np.atleast_2d(np.asarray(scores, float))
    if scores.ndim != 2 or scores.shape[1] != len(clusters):
        raise InputError(f"scores of shape {scores.shape} do not fit the tweets of {len(clusters)} rows")
    if not np.isfinite(scores).all():
        raise InputError("a score is not a number: the interval would not be one either")
    if not trained and len(scores) > 1:
        raise InputError(f"an untrained model is scored once, not with {len(scores)} seeds")
    return scores


def _estimate(methods, clusters):
    """The Estimate of the sum of the methods' means. methods: [(scores, sign, trained)]."""
    number = {}
    codes = np.array([number.setdefault(cluster, len(number)) for cluster in clusters])
    if len(number) < 2:
        raise InputError("an interval needs the scores of at least two tweets")
    rows = sum(sign * scores.mean(0) for scores, sign, _ in methods)
    # What is left of equal scores after rounding is not variance.
    rounding = 1e-9 * max(np.abs(scores).max() for scores, _, _ in methods)

    def unless_rounding(variance):
        return float(variance) if variance > rounding**2 else 0.0

    seeds = [scores for scores, _, trained in methods if trained]
    (tweets,), noise = _clustered(rows[None], codes), 0
    if all(len(scores) > 1 for scores in seeds):
        for scores in seeds:
            apart = scores - scores.mean(0)
            noise += _clustered(apart, codes).sum() / (len(scores) - 1) / len(scores)
    means, mean = [scores.mean(1) for scores in seeds], float(rows.mean())
    between = tuple(Seeds(unless_rounding(each.var(ddof=1) if len(each) > 1 else 0), len(each)) for each in means)
    # The noise is in the variance of the seed means too. Two seeds of each method can have equal means by chance: then
    # it would be subtracted where nothing has added it, and the interval would have nearly no width, or none.
    noise = noise if any(each.variance for each in between) else 0
    return Estimate(
        mean=mean if abs(mean) > rounding else 0.0,
        tweets=unless_rounding(tweets - noise),
        tweet_count=len(number),
        seeds=between,
    )


def _clustered(values, codes):
    """The cluster-robust variance of the mean of each line of values, (lines, rows). codes: the cluster of each row."""
    count = codes.max() + 1
    apart = values - values.mean(1, keepdims=True)
    sums = np.stack([np.bincount(codes, line, count) for line in apart])
    return count / (count - 1) * (sums**2).sum(1) / values.shape[1] ** 2


def _t(probability, freedom):
    """Student's t below which a value lies with this probability."""
    from scipy import special

    return float(special.stdtrit(freedom, probability))


# ------------------------------------------------------------------------------------------------- several results


def holm(p_values):
    """The p values adjusted for being several, in their order: one below 0.05 counts as if it had been the only one.

    Holm's step-down method (1979, https://www.jstor.org/stable/4615733): the smallest of m is multiplied by m, the next
    one by m - 1, and so on; none gets smaller than one before it, or larger than 1. The probability of any false
    finding stays below the level, whatever the dependence between the tests. Raises InputError for NaN.
    """
    p_values = np.asarray(p_values, float)
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise InputError(f"p values lie between 0 and 1: {p_values.tolist()}")
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)))
    return adjusted


def expected_maximum(scores, n):
    """The best score to be expected of n tries, from the scores of as many tries or more.

    What Dodge et al. (2019, https://aclanthology.org/D19-1224) propose to report, as the mean over all sets of n of
    the scores, without replacement: unbiased (Tang et al., 2020, https://aclanthology.org/2020.acl-main.246). The k-th
    smallest of B scores is the largest of C(k - 1, n - 1) of the C(B, n) sets. Raises InputError for NaN, or unless
    n is 1 to B.
    """
    scores = np.sort(np.asarray(scores, float))
    if not np.isfinite(scores).all() or not 1 <= n <= len(scores):
        raise InputError(f"the best of {n} tries cannot be told from the scores {scores.tolist()}")
    sets = math.comb(len(scores), n)
    return float(sum(math.comb(k, n - 1) / sets * score for k, score in enumerate(scores)))
