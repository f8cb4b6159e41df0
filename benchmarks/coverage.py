"""How often intervals cover the true difference, in simulated studies of TweetQA's shape and of the demo's.

    python -m benchmarks.coverage             # about 7 minutes on one core
    python -m benchmarks.coverage --quick     # 200 studies of each setting: half a minute

A study scores a few seeds of two methods on the same rows. Each row's score comes from a hidden value, the sum of
normal effects of the tweet, the row, the method on them, and the seed on the row; the seed's own effect shifts all
rows. A value below 0 scores 0, one above 100 scores 100, which gives zeros and full scores as F1 has them. The hidden
shifts are chosen such that the true difference and the standard deviation between seeds are those of the setting.

The random numbers have fixed seeds: the figures are the same on every machine.
"""

import argparse
import zlib
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from scipy import optimize, special, stats

from benchmarks.report import save
from benchmarks.run import RESULTS, device_name, say
from pipeline.statistics import Estimate, Seeds, costs_at_most, detectable, difference, mean_interval, seeds_needed

STUDIES = 10_000  # of each setting: shares are known to within 0.5 %
RESAMPLES = 1000
CHUNK = 100  # studies in memory at once
TWEET_QA = (82 * [1]) + (500 * [2]) + [4]  # rows of each tweet of TweetQA's validation split: 1,086 rows, 583 tweets
DEMO = (177 * [1]) + (21 * [3])  # of the demo's: 240 rows, 198 tweets
# The hidden value of a row: its standard deviation, and what share of its variance each effect has. The runs of the
# demo have zeros, full scores and correlations between runs (0.8 to 0.9 of a row's F1) like these.
SPREAD = 119.0
SHARES = {"tweet": 0.30, "row": 0.45, "tweet and method": 0.03, "row and method": 0.07, "row and seed": 0.15}
# Standard deviation 1, mean 0; "skewed" has its tail below: now and then a bad seed.
SEED_EFFECTS = {
    "normal": stats.norm(),
    "uniform": stats.uniform(-(3**0.5), 2 * 3**0.5),
    "skewed": stats.expon(-1),
    "heavy-tailed": stats.laplace(0, 0.5**0.5),
}
CANDIDATES = {
    "chosen": "tweets + seeds",
    "noise twice": "tweets + seeds, their noise twice",
    "resampled": "tweets and seeds resampled",
    "tweets": "tweets alone",
    "today": "rows resampled (before)",
}
FORMULAS = {
    "chosen": "over the half widths that it may have (chosen)",
    "noncentral t": "noncentral t",
    "sum of two t": "sum of two t quantiles",
}
COLOURS = {"today": "#D55E00", "resampled": "#E69F00", "chosen": "#0072B2"}  # drawn in this order


@dataclass(frozen=True)
class Method:
    """A method of a simulated study."""

    seeds: int
    seed_sd: float  # of its runs' mean scores, in points
    mean: float  # its true mean score
    seed_effects: str = "normal"

    @property
    def trained(self):
        return self.seed_sd is not None


@dataclass(frozen=True)
class Setting:
    """A kind of study."""

    name: str
    ours: Method
    theirs: Method | None  # None: of the mean of a single method
    rows: tuple = tuple(TWEET_QA)  # of each tweet
    exact: bool = False  # scores like EM: 0 or 100
    target: str = "methods"  # or "runs": the difference that these runs have on all tweets

    @property
    def methods(self):
        return [self.ours] + ([self.theirs] if self.theirs else [])


def settings():
    """Those that are recorded."""
    full = Method(seeds=3, seed_sd=1.5, mean=70)

    def against_full(name, mean=70.0, **changes):
        of_both = {key: changes.pop(key) for key in ("seeds", "seed_sd", "seed_effects") if key in changes}
        theirs = replace(full, **of_both)
        return Setting(name, replace(theirs, mean=mean), theirs, **changes)

    demo = {"rows": tuple(DEMO), "seed_sd": 1.9}
    found = [
        against_full("3 seeds"),
        against_full("3 seeds, 2 lower", mean=68),
        against_full("5 seeds", seeds=5),
        against_full("5 seeds, 2 lower", mean=68, seeds=5),
        *(against_full(f"3 seeds, {kind}", seed_effects=kind) for kind in ("uniform", "heavy-tailed", "skewed")),
        against_full("3 seeds, 2 lower, skewed", mean=68, seed_effects="skewed"),
        against_full("5 seeds, skewed", seeds=5, seed_effects="skewed"),
        against_full("3 seeds that change no mean", seed_sd=0.0),
        against_full("3 seeds, seeds' sd 4", seed_sd=4.0),
        Setting("3 seeds, seeds' sd 2 and 1", replace(full, seed_sd=2.0), replace(full, seed_sd=1.0)),
        Setting("3 seeds, seeds' sd 3 and 0.5", replace(full, seed_sd=3.0), replace(full, seed_sd=0.5)),
        Setting("3 and 5 seeds, 2 lower", replace(full, mean=68), replace(full, seeds=5)),
        Setting("3 seeds and an untrained model, 40 lower", full, Method(1, None, 30)),
        Setting("the mean of 3 seeds", full, None),
        Setting("the mean of 5 seeds", replace(full, seeds=5), None),
        against_full("EM, 3 seeds, 2 lower", mean=68, exact=True),
        against_full("demo, 3 seeds", **demo),
        against_full("demo, 3 seeds, 3 lower", mean=67, **demo),
        against_full("demo, 5 seeds, 3 lower", mean=67, seeds=5, **demo),
        against_full("demo, 3 seeds, skewed", seed_effects="skewed", **demo),
        against_full("1 seed: these runs", seeds=1, target="runs"),
        against_full("1 seed: the methods", seeds=1),
        Setting("1 and 3 seeds: the methods", replace(full, seeds=1), full),
    ]
    return found


# ------------------------------------------------------------------------------------------------------- simulation


def run_mean(shift, exact):
    """The true mean score of a run, over all tweets, whose hidden values have this mean."""
    if exact:
        return 100 * special.ndtr((shift - 50) / SPREAD)

    def above(bound):  # the mean of what is above a bound
        z = (shift - bound) / SPREAD
        return SPREAD * (z * special.ndtr(z) + np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))

    return above(0) - above(100)


def hidden_shifts(method, exact):
    """The hidden shifts of equally probable seeds, from which a study draws: the mean scores that they give have the
    method's mean and standard deviation."""
    effects = SEED_EFFECTS[method.seed_effects].ppf((np.arange(4000) + 0.5) / 4000)

    def wrong(given):
        means = run_mean(given[0] + given[1] * effects, exact)
        return means.mean() - method.mean, means.std() - (method.seed_sd or 0)

    if not method.seed_sd:
        return np.full(1, optimize.brentq(lambda shift: run_mean(shift, exact) - method.mean, -2000, 2000))
    middle, factor = optimize.fsolve(wrong, [method.mean, 2 * method.seed_sd], xtol=1e-10)
    assert np.abs(wrong((middle, factor))).max() < 1e-6, method
    return middle + factor * effects


def simulate(setting, studies, seed=0):
    """Yields (the scores of each method, (studies, seeds, rows); the tweet of each row; the true value of each study)
    for some of the studies at a time."""
    rng = np.random.default_rng([seed, zlib.crc32(setting.name.encode())])  # each setting draws other numbers
    tweets = np.repeat(np.arange(len(setting.rows)), setting.rows)
    shifts = [hidden_shifts(method, setting.exact) for method in setting.methods]

    def effect(share, *shape):
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(SPREAD * SHARES[share] ** 0.5)

    for start in range(0, studies, CHUNK):
        count, rows = min(CHUNK, studies - start), len(tweets)
        shared = effect("tweet", count, len(setting.rows))[:, tweets] + effect("row", count, rows)
        scores, true = [], 0
        for method, given, sign in zip(setting.methods, shifts, (1, -1), strict=False):
            seeds = rng.choice(given, (count, method.seeds))
            hidden = shared + effect("tweet and method", count, len(setting.rows))[:, tweets]
            hidden = (hidden + effect("row and method", count, rows))[:, None]
            hidden = hidden + effect("row and seed", count, method.seeds, rows) + seeds[:, :, None]
            scores.append(100.0 * (hidden > 50) if setting.exact else hidden.clip(0, 100))
            of_runs = run_mean(seeds, setting.exact).mean(1)
            true = true + sign * (of_runs if setting.target == "runs" else np.full(count, method.mean))
        yield scores, tweets, true


# -------------------------------------------------------------------------------------------------------- intervals


def estimate(setting, scores, tweets):
    """The Estimate of one study. scores: (seeds, rows) of each method."""
    if setting.theirs is None:
        return mean_interval(*scores, tweets, trained=setting.ours.trained)
    return difference(*scores, tweets, ours_trained=setting.ours.trained, theirs_trained=setting.theirs.trained)


def analytic(setting, scores, tweets):
    """{candidate: Estimate} of one study, of the intervals that need no resampling."""
    chosen = estimate(setting, scores, tweets)
    mean_of_seeds = [each.mean(0, keepdims=True) for each in scores]
    tweets_alone = estimate(setting, mean_of_seeds, tweets)  # of single seeds, so that it does not cover them
    return {"chosen": chosen, "noise twice": replace(chosen, tweets=tweets_alone.tweets), "tweets": tweets_alone}


def resampled(scores, tweets, rng):
    """{candidate: (bounds, studies)} of percentile intervals, the same draws for all studies at once.

    today: rows are drawn, of the mean over seeds. resampled: tweets, and seeds of each method, are drawn independently
    (the pigeonhole bootstrap: Owen, 2007, https://doi.org/10.1214/07-AOAS122).
    """
    rows, count = len(tweets), tweets.max() + 1
    signs = (1, -1)[: len(scores)]
    differences = sum(sign * each.mean(1) for sign, each in zip(signs, scores, strict=True))
    drawn_rows = rng.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).astype(np.float32)
    by_row = drawn_rows @ differences.T.astype(np.float32) / rows
    drawn = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float32)
    sizes = drawn @ np.bincount(tweets).astype(np.float32)
    starts = np.flatnonzero(np.diff(tweets, prepend=-1))
    by_tweet = 0
    for sign, each in zip(signs, scores, strict=True):
        studies, seeds, _ = each.shape
        sums = np.add.reduceat(each.astype(np.float32), starts, axis=2).reshape(-1, count)
        means = (drawn @ sums.T / sizes[:, None]).reshape(RESAMPLES, studies, seeds)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
        by_tweet = by_tweet + sign * np.einsum("rsk,rk->rs", means, weights)
    return {
        "today": np.quantile(by_row, [0.025, 0.975], axis=0),
        "resampled": np.quantile(by_tweet, [0.025, 0.975], axis=0),
    }


def coverage(setting, studies, candidates=tuple(CANDIDATES)):
    """Of a setting: {"covered": {candidate: share of the studies}, "half width": …, "at most": share of the studies
    whose true loss is larger than they say it is at most, "estimate": the Estimate with the mean variances}."""
    bounds, truths, chosen = {name: [] for name in candidates}, [], []
    rng = np.random.default_rng(1)
    for scores, tweets, true in simulate(setting, studies):
        truths.append(true)
        some = [analytic(setting, each, tweets) for each in zip(*scores, strict=True)]
        chosen += [each["chosen"] for each in some]
        found = {name: np.array([(each[name].low, each[name].high) for each in some]).T for name in some[0]}
        if {"today", "resampled"} & set(candidates):
            found |= resampled(scores, tweets, rng)
        for name, collected in bounds.items():
            collected.append(found[name])
    true = np.concatenate(truths)
    bounds = {name: np.concatenate(each, axis=1) for name, each in bounds.items()}
    return {
        "covered": {name: float(((low <= true) & (true <= high)).mean()) for name, (low, high) in bounds.items()},
        "half width": {name: float((high - low).mean() / 2) for name, (low, high) in bounds.items()},
        "at most": float(np.mean([costs_at_most(each) for each in chosen] < -true)),
        "estimate": expected(chosen),
    }


def expected(estimates):
    """The Estimate whose variances are the means over many studies: the true ones, as nearly as they are known."""
    first = estimates[0]
    seeds = [
        Seeds(float(np.mean([each.seeds[place].variance for each in estimates])), kind.count)
        for place, kind in enumerate(first.seeds)
    ]
    tweets = float(np.mean([each.tweets for each in estimates]))
    return Estimate(float(np.mean([each.mean for each in estimates])), tweets, first.tweet_count, tuple(seeds))


# ------------------------------------------------------------------------------------------------------------ power


def with_loss(setting, loss):
    return replace(setting, ours=replace(setting.ours, mean=setting.theirs.mean - loss))


def estimates(setting, studies, seed):
    return [
        estimate(setting, each, tweets)
        for scores, tweets, _ in simulate(setting, studies, seed)
        for each in zip(*scores, strict=True)
    ]


def shown(setting, loss, studies):
    """The share of the studies that show a true loss: their interval lies below 0."""
    return float(np.mean([each.high < 0 for each in estimates(with_loss(setting, loss), studies, seed=2)]))


def half_width(setting, seeds, studies):
    """The mean half width of the interval with another number of seeds."""
    changed = replace(setting, **{name: replace(getattr(setting, name), seeds=seeds) for name in ("ours", "theirs")})
    return float(np.mean([each.half_width for each in estimates(changed, studies, seed=3)]))


def power(setting, true, studies, margins=(2.0, 2.5, 3.0)):
    """What `detectable` and `seeds_needed` say, given the true variances, beside brute force. true: the Estimate of
    the setting, without a difference."""
    # Scores vary more where they are lower: the variances are those of studies with about the loss that can be shown.
    of_loss = expected(estimates(with_loss(setting, detectable(true)), studies, seed=1))
    bound, other = special.stdtrit(of_loss.degrees_of_freedom, [0.975, 0.8])
    noncentral = optimize.brentq(
        lambda each: stats.nct.sf(bound, of_loss.degrees_of_freedom, each) - 0.8, 0, 10 * bound
    )
    formulas = {
        "chosen": detectable(of_loss),
        "noncentral t": noncentral * of_loss.standard_error,
        "sum of two t": (bound + other) * of_loss.standard_error,
    }
    found = {"detectable": {}, "seeds": []}
    for name, loss in formulas.items():
        found["detectable"][name] = {"difference": float(loss), "shown": shown(setting, float(loss), studies)}
    for margin in margins:
        needed = seeds_needed(true, margin)
        each = {"margin": margin, "seeds": needed, "half width": None, "with one less": None}
        if needed and needed <= 40:
            each["half width"] = half_width(setting, needed, studies)
            each["with one less"] = half_width(setting, needed - 1, studies) if needed > 2 else None
        found["seeds"].append(each)
    return found


# ----------------------------------------------------------------------------------------------------------- record


def table(found):
    """The Markdown tables of what was found."""
    heads = [f"{title} (%)" for title in CANDIDATES.values()]
    lines = [
        f"| {found['studies']:,} studies each, {found['date']} | {' | '.join(heads)} | beyond “at most” (%) |",
        "| --- |" + " --- |" * (len(heads) + 1),
    ]
    for name, each in found["settings"].items():
        shares = [each["covered"][candidate] for candidate in CANDIDATES] + [each["at most"]]
        lines.append(f"| {name} | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |")
    lines += ["", "| true difference that 80 % of studies show | points | studies that showed it (%) |"]
    lines.append("| --- | --- | --- |")
    for name, each in found["power"].items():
        for formula, figures in each["detectable"].items():
            lines.append(
                f"| {name}: {FORMULAS[formula]} | {figures['difference']:.2f} | {100 * figures['shown']:.1f} |"
            )
    lines += [
        "",
        "| half width at most a margin | margin | seeds needed | half width, simulated | with one seed less |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, each in found["power"].items():
        for row in each["seeds"]:
            widths = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("half width", "with one less")]
            lines.append(f"| {name} | {row['margin']:.1f} | {row['seeds'] or 'none'} | {' | '.join(widths)} |")
    return "\n".join(lines) + "\n"


def draw(found, path):
    """The coverage of three candidates in each setting."""
    from matplotlib.figure import Figure

    names = list(found["settings"])
    figure = Figure(figsize=(9, 0.28 * len(names) + 1.4), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="studies whose 95 % interval covers the true value (%)")
    axes.axvspan(93, 97, color="#000000", alpha=0.1, lw=0, label="93 to 97 %")
    for (candidate, colour), marker in zip(COLOURS.items(), "Dso", strict=True):
        shares = [100 * found["settings"][name]["covered"][candidate] for name in names]
        axes.plot(shares, range(len(names)), marker, color=colour, label=CANDIDATES[candidate], clip_on=False)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 studies each, whose shares are rough")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written (default: %(default)s)")
    options = parser.parse_args(argv)
    studies = 200 if options.quick else STUDIES
    found = {"device": device_name("cpu"), "date": date.today().isoformat(), "studies": studies}
    found |= {"resamples": RESAMPLES, "hidden": {"spread": SPREAD, **SHARES}, "settings": {}, "power": {}}
    for setting in settings():
        each = coverage(setting, studies)
        say(f"{setting.name}: " + ", ".join(f"{name} {100 * x:.1f}" for name, x in each["covered"].items()))
        described = asdict(setting) | {"rows": sum(setting.rows), "tweets": len(setting.rows)}
        found["settings"][setting.name] = each | {"setting": described, "estimate": asdict(each["estimate"])}
        if setting.name in ("3 seeds", "5 seeds", "demo, 3 seeds"):
            found["power"][setting.name] = power(setting, each["estimate"], studies)
    base = options.out / ("coverage-quick" if options.quick else "coverage")
    for path in save(found, base, table, draw):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
