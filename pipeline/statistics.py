"""Intervals and tests, for the breakdown of a run and the comparison of runs. One bootstrap for the whole project.

scipy.stats is imported by the functions that need it, so that a training script starts faster.
"""

import numpy as np

RESAMPLES = 10_000


def interval(values, resamples=RESAMPLES):
    """The 95 % bootstrap interval (low, high) of the mean of `values`, with a fixed seed.

    To compare two methods, give each example's difference, so that both are resampled on the same examples: the paired
    bootstrap (Koehn, 2004, https://aclanthology.org/W04-3250). The bounds are percentiles of the resampled means
    (Efron, 1979, https://doi.org/10.1214/aos/1176344552). BCa, scipy's default, corrects a bias and a skew that a mean
    over hundreds of examples hardly has, and is undefined if all values are equal.
    """
    from scipy import stats

    values = np.asarray(values, float)
    if np.ptp(values) == 0:
        return values[0], values[0]
    bounds = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, 100_000 // len(values)),  # bounds the memory, whatever the number of examples
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return bounds.low, bounds.high


def mcnemar(ours, theirs):
    """p of McNemar's exact test, two-sided, that two runs are right equally often.

    ours, theirs: exact match (0 or 1) of each example. Among the examples that only one run gets right, each run should
    have half: a binomial test (McNemar, 1947, https://doi.org/10.1007/BF02295996). Without such examples p is 1.
    """
    from scipy import stats

    ours_alone, theirs_alone = int((ours > theirs).sum()), int((theirs > ours).sum())
    discordant = ours_alone + theirs_alone
    return stats.binomtest(ours_alone, discordant).pvalue if discordant else 1.0
