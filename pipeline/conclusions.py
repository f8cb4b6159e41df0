"""What may be concluded from a comparison of methods, and the sentences that say it.

Used by `compare_runs.py` and by the report of a study. The statistics are those of `statistics.py`: every interval is
that of `difference` or `mean_interval`, with tweets as clusters and the seeds that were run.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.compared import Measured, Row
from pipeline.markdown import p_value, percent, points, signed, times
from pipeline.metrics import EACH_EPOCH
from pipeline.statistics import costs_at_most, detectable, difference, holm, mean_interval, seeds_needed

LEVEL = 0.05  # a difference counts as shown if its p, adjusted for the number of pairs, is below this
POWER = 0.8
COST_TITLES = {"checkpoint_mb": "checkpoint", "train_minutes": "time", "peak_memory_mb": "memory"}


@dataclass(frozen=True)
class Pair:
    """Two methods, compared."""

    ours: Row  # of which the sentences speak: the one with fewer trained parameters
    theirs: Row  # what it is compared with; an untrained model is always this one
    measured: Measured
    differences: dict  # {metric's column: the Estimate of ours minus theirs}, of the metrics that were measured
    p: dict  # {metric's column: p of the difference, adjusted for the number of pairs by Holm's method}
    count: int  # pairs of the report

    @property
    def shown(self):
        """Whether a difference in F1 is shown."""
        return self.p["f1"] < LEVEL

    @property
    def at_most(self):
        """What ours costs at most, in F1; 0 where it costs nothing."""
        return max(0.0, costs_at_most(self.differences["f1"]))


def in_order(one, other):
    """(ours, theirs) of two Rows: ours has fewer trained parameters or else is the later one, "LoRA against full"."""
    if not (one.trained and other.trained):
        return (one, other) if one.trained else (other, one)
    return (one, other) if one.parameters < other.parameters else (other, one)


def compare_rows(pairs, measured):
    """A Pair for each (ours, theirs) of Rows, with p values that are adjusted for their number.

    measured: the `Measured` of each pair. Holm's method is applied to each metric by itself.
    """
    columns = [metric.column for metric in EACH_EPOCH]
    results = []
    for (ours, theirs), rows in zip(pairs, measured, strict=True):
        scores = {column: (ours.scores(rows.split, column), theirs.scores(rows.split, column)) for column in columns}
        results.append(
            {
                column: difference(*two, rows.tweets, ours.trained, theirs.trained)
                for column, two in scores.items()
                if np.isfinite(two[0]).all() and np.isfinite(two[1]).all()
            }
        )
    adjusted = [{} for _ in results]
    for column in columns:
        with_it = [number for number, each in enumerate(results) if column in each]
        for number, p in zip(with_it, holm([results[number][column].p for number in with_it]), strict=True):
            adjusted[number][column] = float(p)
    return [
        Pair(*pair, rows, each, p, len(pairs))
        for pair, rows, each, p in zip(pairs, measured, results, adjusted, strict=True)
    ]


def estimate(row, measured, column="f1"):
    """The Estimate of a Row's mean on the rows that measure it."""
    return mean_interval(row.scores(measured.split, column), measured.tweets, row.trained)


def base_of(rows, *trained):
    """The Row of the untrained model that all these Rows were trained from, or None."""
    models = {row.runs[0].model for row in trained}
    return next((row for row in rows if not row.trained and {row.runs[0].model} == models), None)


# ------------------------------------------------------------------------------------------------------ sentences


def sentences(pair, base=None, margin=None):
    """What a Pair shows, as a list of sentences, and no more than its interval and p allow.

    base: the Row of the untrained model, if there is one. margin: a loss of up to so many points of F1 counts as none.
    """
    if not pair.theirs.trained:
        return [_gain(pair)]
    said = [*_cost(pair), *_of_one_seed(pair), *_of_margin(pair, margin), _kept(pair, base), _savings(pair)]
    return [_capital(text) for text in said if text]


def _cost(pair):
    """Who is better in F1, what it costs at most, and whether that is more than noise."""
    ours, theirs, result = pair.ours.described, pair.theirs.label, pair.differences["f1"]
    our_f1, their_f1 = (_mean(row, pair.measured) for row in (pair.ours, pair.theirs))
    if result.mean == 0 == result.standard_error:
        apart = [row.scores(pair.measured.split).mean(0) for row in (pair.ours, pair.theirs)]
        each = "row" if np.allclose(*apart) else "tweet"
        return [f"{ours} and {theirs} have the same F1 on every {each}, {points(our_f1)} on average ({result.covers})."]
    if pair.shown and result.mean > 0:
        return [
            f"{ours} is better than {theirs}, {points(our_f1)} against {points(their_f1)} F1: by {points(result.mean)}"
            f" ({_interval(result)}, {result.covers}; {_p(pair)})."
        ]
    most = f"{ours} costs at most {points(pair.at_most)} F1 of {theirs}'s {points(their_f1)} (95 %, {result.covers})."
    if pair.shown:
        return [most, f"It is worse by {points(-result.mean)} F1 ({_interval(result, loss=True)}; {_p(pair)})."]
    return [most, f"The difference of {signed(result.mean)} F1 is within noise ({_interval(result)}; {_p(pair)})."]


def _gain(pair):
    """What training gained over the untrained model."""
    ours, result = pair.ours.label, pair.differences["f1"]
    base = f"the untrained model's {points(_mean(pair.theirs, pair.measured))}"
    inside = f"({_interval(result)}, {result.covers}; {_p(pair)})"
    if not pair.shown:
        text = f"{ours}: the difference of {signed(result.mean)} F1 from {base} is within noise {inside}."
    else:
        text = f"{ours} {'gains' if result.mean > 0 else 'loses'} {points(abs(result.mean))} F1"
        text += f" {'over' if result.mean > 0 else 'against'} {base} {inside}."
    return _capital(text)


def _kept(pair, base):
    """Which share of what training gained is kept; "" without an untrained model."""
    if base is None:
        return ""
    ours, theirs, start = (_mean(row, pair.measured) for row in (pair.ours, pair.theirs, base))
    given = [row.scores(pair.measured.split) for row in (pair.theirs, base)]
    gain = difference(*given, pair.measured.tweets, True, False)
    if gain.mean <= 0 or gain.p >= LEVEL:
        said = f"{pair.theirs.label} is not shown to be better than the untrained model ({points(start)} F1)"
        return f"How much of training's gain is kept cannot be said: {said}."
    what = f"of the {points(theirs - start)} F1 that training gained over the untrained model"
    share = (ours - start) / (theirs - start)
    return f"{pair.ours.label} keeps {percent(share) if share > 0 else 'none'} {what}."


def _savings(pair):
    """What ours needs of theirs: parameters, disk, time, memory."""
    ours, theirs = pair.ours, pair.theirs
    ratios = {}
    for name, title in COST_TITLES.items():
        one, other = ours.mean(name), theirs.mean(name)
        if one is not None and other:
            ratios[title] = one / other
    runs = [run.record for row in (ours, theirs) for run in row.runs]
    other_machine = len({run["device"] for run in runs}) > 1
    if other_machine or len({bool(run["peak_vram_mb"]) for run in runs}) > 1:
        ratios = {title: ratio for title, ratio in ratios.items() if title == "checkpoint"}
    needs = [f"{percent(ours.parameters / theirs.parameters)} of the trained parameters"]
    needs += [f"{percent(ratio)} of the checkpoint" for title, ratio in ratios.items() if title == "checkpoint"]
    needs += [f"{times(ratio)} of the {title}" for title, ratio in ratios.items() if title != "checkpoint"]
    text = f"It needs {', '.join(needs[:-1])} and {needs[-1]}." if len(needs) > 1 else f"It needs {needs[0]}."
    return text + (" Time and memory were measured on different devices." if other_machine else "")


def _of_margin(pair, margin):
    """Whether the cost is within the margin; if that is not shown, what this comparison can show."""
    result = pair.differences["f1"]
    if margin is not None and pair.at_most <= margin:
        return [f"The cost is within the margin of {margin:g} F1."] if not (pair.shown and result.mean > 0) else []
    if margin is not None and pair.shown and -result.high > margin:
        return [f"The cost is more than the margin of {margin:g} F1."]
    if (margin is None and pair.shown) or not result.standard_error:
        return []
    smallest = points(detectable(result, POWER))
    power = f"With these rows and seeds, a true difference of {smallest} F1 is shown in {percent(POWER)} of studies."
    if margin is None:
        return [power]
    said = [f"Whether the cost is within the margin of {margin:g} F1 is not shown.", power]
    if not result.covers_seeds:
        return said
    needed = seeds_needed(result, margin, POWER)
    if needed is None:
        return [*said, f"More seeds would not bring that down to {margin:g}; more rows might."]
    if needed > max(each.count for each in result.seeds):
        return [*said, f"To bring that down to {margin:g}, about {needed} seeds of each method are needed."]
    return [*said, "The loss is close to the margin."]


def _of_one_seed(pair):
    """That the interval says nothing about other seeds, if it does not."""
    result = pair.differences["f1"]
    if result.covers_seeds:
        return []
    if all(each.count == 1 for each in result.seeds):
        return ["With one seed, the interval covers which tweets were asked, and not which seed was drawn."]
    return ["As one method has one seed, the interval covers which tweets were asked, and not which seeds were drawn."]


def notes(pairs):
    """How to read the intervals and p values of these Pairs."""
    said = [
        "The 95 % intervals cover which tweets were asked and, where each method has several seeds, which seeds were"
        " drawn. With one seed they cover tweets alone."
    ]
    if len(pairs) > 1:
        said += [
            f"The p values are adjusted for the {len(pairs)} pairs of this report (Holm), the intervals are not."
            f" A difference counts as shown if its adjusted p is below {LEVEL}."
        ]
    return " ".join(said)


def interval_text(result):
    """The bounds of an Estimate."""
    return f"{points(result.low)} to {points(result.high)}"


def _interval(result, loss=False):
    bounds = f"{points(-result.high)} to {points(-result.low)}" if loss else interval_text(result)
    return f"95 % interval {bounds}"


def _p(pair):
    return f"{'adjusted ' if pair.count > 1 else ''}{p_value(pair.p['f1'])}"


def _mean(row, measured):
    return float(row.scores(measured.split).mean())


def _capital(text):
    return text[0].upper() + text[1:]
