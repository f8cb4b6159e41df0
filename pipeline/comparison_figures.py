"""The pictures of a comparison of runs, and those of a study.

Each method has one colour and one marker in all of them. Legends are beside the axes, never over the data. matplotlib
is imported when a picture is drawn.
"""

import math
from itertools import pairwise

from pipeline.conclusions import estimate
from pipeline.errors import InputError
from pipeline.statistics import mean_interval

# Okabe and Ito's palette, safe for colour-blind readers, and a marker for each colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "os^Dv<>"
OF_BASE = "#666666"  # an untrained model is a grey line
F1_AXIS = "F1 (out of 100)"


def style(number):
    """{"color", "marker"} of the method of this number: 49 different ones."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
    }


def line_style(number):
    """The same for a method that is drawn as a line: methods that share a colour differ in the dashes too."""
    return style(number) | {"linestyle": ["-", "--", ":"][number // len(COLOURS) % 3]}


# ------------------------------------------------------------------------------------------------------ comparison


def draw_comparison(path, rows, measured):
    """Draw comparison.png: F1 by epoch of each run, F1 against cost, and F1 by kind of question.

    rows: of `compared.Row`. measured: the rows that F1 is of, but for the first picture.
    """
    figure_type, formatter, no_labels = _matplotlib()
    examples = rows[0].runs[0].examples[measured.split]
    kinds = examples["question_type"].value_counts()
    height = max(5, 1.6 + 0.17 * len(kinds) * (len(rows) + 1))
    figure = figure_type(figsize=(14, height), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)
    by_epoch, by_cost, by_kind = figure.subplots(1, 3)
    for number, row in enumerate(rows):
        point, result = style(number), estimate(row, measured)
        line = {"color": point["color"], "alpha": 0.5, "linewidth": 2}
        for run in row.runs:
            by_epoch.plot(run.epochs["epoch"], 100 * run.epochs["f1"], alpha=1 / len(row.runs) ** 0.5, **point)
        x = row.parameters * 1.08 ** sum(other.parameters == row.parameters for other in rows[:number])  # side by side
        if row.parameters:
            by_cost.plot([x, x], [result.low, result.high], **line)
            by_cost.plot(x, result.mean, linestyle="none", markersize=9, label=row.label, **point)
        else:  # an untrained model has no place on a logarithmic axis
            by_cost.axhline(result.mean, linestyle="--", color=point["color"])
            by_cost.plot([], [], linestyle="--", label=row.label, **point)
        scores = row.scores(measured.split)
        for place, kind in enumerate(kinds.index):
            chosen = (examples["question_type"] == kind).to_numpy()
            y = place + 0.55 * ((number + 0.5) / len(rows) - 0.5)
            tweets = [tweet for tweet, is_chosen in zip(measured.tweets, chosen, strict=True) if is_chosen]
            if len(set(tweets)) > 1:
                part = mean_interval(scores[:, chosen], tweets, row.trained)
                by_kind.plot([max(0, part.low), min(100, part.high)], [y, y], **line)
            by_kind.plot(scores[:, chosen].mean(), y, **point)
    title = measured.title.capitalize()
    by_epoch.set(title="Validation F1 after each epoch", xlabel="epoch", ylabel=F1_AXIS)
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_cost.set(title=f"{title} F1 against cost", xlabel="trained parameters", ylabel=f"{F1_AXIS}, 95 % interval")
    _parameters_axis(by_cost, [row.parameters for row in rows], formatter, no_labels)
    by_kind.set(title=f"{title} F1 by kind of question", xlabel=f"{F1_AXIS}, 95 % interval", xlim=(-2, 102))
    by_kind.set_yticks(range(len(kinds)), [f"{kind} ({count})" for kind, count in kinds.items()])
    by_kind.invert_yaxis()  # the most frequent on top
    for axes in (by_epoch, by_cost, by_kind):
        _plain(axes)
    columns = 190 // (max(len(row.label) for row in rows) + 10)  # as many labels as fit beside each other
    figure.legend(loc="outside upper center", ncols=max(1, min(columns, len(rows))), frameon=False)
    figure.savefig(path, format="png")


# ----------------------------------------------------------------------------------------------------------- study


def draw_rates(path, methods, seed):
    """Draw validation F1 against the learning rate, one line per method, its best rate ringed.

    methods: [(label, number of its style, {rate: F1, or None if it diverged}, best rate or None)]. seed: of these runs.
    """
    figure, axes = _one(f"Validation F1 at each learning rate (seed {seed})", "learning rate", F1_AXIS)
    axes.set_xscale("log")
    for label, number, tried, best in methods:
        rates = sorted(rate for rate, f1 in tried.items() if f1 is not None)
        told = f"{label}: best {best:g}" if best is not None else label
        axes.plot(rates, [tried[rate] for rate in rates], label=told, linewidth=1.8, markersize=6, **line_style(number))
        if best is not None:
            ring = {"markersize": 15, "markerfacecolor": "none", "markeredgewidth": 2, "linestyle": "none"}
            axes.plot(best, tried[best], "o", color=style(number)["color"], **ring)
        for rate in tried.keys() - set(rates):
            axes.plot(rate, 0, "x", color=style(number)["color"], markersize=10, clip_on=False)
    if any(None in tried.values() for _, _, tried, _ in methods):
        axes.set_xlabel("learning rate (x: the run diverged)")
    _rate_ticks(axes, [rate for _, _, tried, _ in methods for rate in tried])
    _save(figure, path)


def draw_axis(path, axis, title, lines, others, base):
    """Draw F1 with its interval against an axis of the plan.

    title: of the rows that F1 is of. lines: [(label, number of its style, {value: Estimate})]. others: [(label, number,
    Estimate)] of methods that do not have this axis. base: the Estimate of the untrained model, or None.
    """
    figure, axes = _one(f"{title.capitalize()} F1 by {axis}", axis, f"{F1_AXIS}, 95 % interval")
    values = list(dict.fromkeys(value for _, _, found in lines for value in found))
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numeric else values
    logarithmic = numeric and values[0] > 0 and values[-1] >= 4 * values[0]
    places = {value: value if numeric else place for place, value in enumerate(values)}
    if logarithmic:
        axes.set_xscale("log")
    # The intervals of two methods are drawn beside each other.
    nearest = min((after / before for before, after in pairwise(values)), default=2) if logarithmic else 2
    apart = min((after - before for before, after in pairwise(sorted(places.values()))), default=1)
    for place, (label, number, found) in enumerate(lines):
        shift = 0.08 * (place - (len(lines) - 1) / 2) / max(1, len(lines) - 1)
        known = [value for value in values if value in found]
        x = [places[value] * nearest**shift if logarithmic else places[value] + apart * shift for value in known]
        _points(axes, x, [found[value] for value in known], label, number, join=True)
    for label, number, result in others:
        axes.axhline(result.mean, color=style(number)["color"], linewidth=1.8, label=label)
        axes.axhspan(result.low, result.high, color=style(number)["color"], alpha=0.12, linewidth=0)
    _base_line(axes, base)
    axes.set_xticks(list(places.values()), [f"{value:g}" if numeric else _typed(value) for value in values])
    axes.minorticks_off()
    _save(figure, path)


def draw_minutes(path, methods):
    """Draw validation F1 after each epoch against the minutes since a run's start, one line per run.

    methods: [(label, number of its style, [(minutes, F1) of each run])].
    """
    figure, axes = _one("Validation F1 while training", "minutes since the start of the run", F1_AXIS)
    for label, number, runs in methods:
        for place, (minutes, f1) in enumerate(runs):
            known = {"label": label} if place == 0 else {}
            alpha = 0.9 if len(runs) == 1 else 0.6
            axes.plot(minutes, f1, linewidth=1.5, markersize=5, alpha=alpha, **known, **line_style(number))
    axes.set_xlim(left=0)
    _save(figure, path)


def draw_parameters(path, title, methods, base):
    """Draw F1 with its interval against the trained parameters, and the frontier: what no method with fewer parameters
    reaches. methods: [(label, number of its style, parameters, Estimate)]. base: as in `draw_axis`."""
    name = f"{title.capitalize()} F1 against trained parameters"
    figure, axes = _one(name, "trained parameters", f"{F1_AXIS}, 95 % interval")
    _, formatter, no_labels = _matplotlib()
    shown, best = [], float("-inf")
    for _, _, parameters, result in sorted(methods, key=lambda each: (each[2], -each[3].mean)):
        if result.mean > best:
            best = result.mean
            shown.append((parameters, result.mean))
    if len(shown) > 1:
        axes.plot(*zip(*shown, strict=True), drawstyle="steps-post", color="#999999", label="frontier", zorder=1)
    for place, (label, number, parameters, result) in enumerate(methods):
        x = parameters * 1.06 ** sum(other[2] == parameters for other in methods[:place])  # side by side
        _points(axes, [x], [result], label, number, join=False)
    _base_line(axes, base)
    _parameters_axis(axes, [each[2] for each in methods], formatter, no_labels)
    _save(figure, path)


def draw_forgetting(path, methods, base):
    """Draw validation F1 against the change in the probe's loss: a point per epoch, the means of a method's seeds
    joined in the order of the epochs, and each seed as a thin line.

    methods: [(label, number of its style, [(changes in nats, F1) of each run])]. base: F1 of the untrained model, whose
    change is 0, or None.
    """
    x_label = "change in the probe's loss of a target token (nats): more is forgotten to the right"
    title = "Learning against forgetting\na point is an epoch, the last one large; thin lines are seeds"
    figure, axes = _one(title, x_label, f"validation {F1_AXIS}")
    axes.axvline(0, color=OF_BASE, linewidth=0.8, zorder=0)
    for label, number, runs in methods:
        shown = line_style(number)
        epochs = min(len(f1) for _, f1 in runs)  # that every seed has: some may have stopped before others
        if len(runs) > 1:
            for changes, f1 in runs:
                axes.plot(changes, f1, color=shown["color"], linestyle=shown["linestyle"], linewidth=0.8, alpha=0.35)
        mean = [sum(each[which][:epochs] for each in runs) / len(runs) for which in (0, 1)]
        axes.plot(*mean, label=label, linewidth=1.8, markersize=5, **shown)
        axes.plot(mean[0][-1], mean[1][-1], markersize=10, linestyle="none", **style(number))
    if base is not None:
        axes.plot(0, base, "X", color=OF_BASE, markersize=10, linestyle="none", label="untrained model")
    axes.margins(0.05)
    _save(figure, path)


# ------------------------------------------------------------------------------------------------------------ parts


def _matplotlib():
    from matplotlib.figure import Figure  # without pyplot: no windows, no state that outlives the drawing
    from matplotlib.ticker import EngFormatter, NullFormatter

    return Figure, EngFormatter, NullFormatter


def _one(title, x_label, y_label):
    """A figure with one set of axes."""
    figure = _matplotlib()[0](figsize=(8, 5.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    _plain(axes)
    return figure, axes


def _plain(axes):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _points(axes, x, results, label, number, join):
    """Points with their intervals, joined by a line or not."""
    colour = style(number)["color"]
    for place, result in zip(x, results, strict=True):
        axes.plot([place, place], [result.low, result.high], color=colour, linewidth=2.5, alpha=0.5)
    line = line_style(number) if join else style(number) | {"linestyle": "none"}
    axes.plot(x, [result.mean for result in results], label=label, linewidth=1.5, markersize=8, **line)


def _base_line(axes, base):
    if base is not None:
        axes.axhline(base.mean, linestyle="--", color=OF_BASE, linewidth=1.5, label="untrained model")


def _parameters_axis(axes, parameters, formatter, no_labels):
    """A logarithmic axis of parameters, with room beside the outermost methods."""
    trained = [each for each in parameters if each] or [1]
    axes.set_xscale("log")
    axes.set_xlim(min(trained) / 5, max(trained) * 5)
    axes.xaxis.set_major_formatter(formatter())
    axes.xaxis.set_minor_formatter(no_labels())  # within one decade it would label every tick


def _rate_ticks(axes, tried):
    """Label those of the rates that do not touch each other, first the ones that most methods tried."""
    rates = sorted(set(tried), key=lambda rate: (-tried.count(rate), rate))
    apart = 0.08 * math.log(max(rates) / min(rates))
    labelled = []
    for rate in rates:
        if all(abs(math.log(rate / other)) >= apart for other in labelled):
            labelled.append(rate)
    axes.set_xticks(labelled, [f"{rate:.2g}" for rate in labelled])
    axes.minorticks_off()
    if len(rates) == 1:
        axes.set_xlim(rates[0] / 3, rates[0] * 3)


def _typed(value):
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _save(figure, path):
    """Write the figure, with its legend below the axes, as many labels side by side as fit."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    if not labels:
        raise InputError("a picture without data")
    longest = max(map(len, labels))
    columns = max(1, min(len(labels), 88 // (longest + 8)))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    height = figure.get_figheight() + 0.22 * max(0, -(-len(labels) // columns) - 2)
    figure.set_figheight(height)
    figure.savefig(path, format="png")
