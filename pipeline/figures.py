"""The pictures of a run: curves over the epochs, and the breakdown.

matplotlib and pandas are imported when a picture is drawn: they take a second.
"""

from pathlib import Path

from pipeline.breakdown import WELL_POPULATED, breakdown
from pipeline.metrics import METRICS
from pipeline.run_folder import write_table, writing

TRAIN_COLOUR, VALIDATION_COLOUR = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, safe for colour-blind readers


def write_epochs(folder, epochs, steps):
    """Write metrics.csv (epochs: a list of dicts), train_loss.csv (steps: a list of dicts) and the curves of both."""
    write_table(Path(folder, "metrics.csv"), epochs)
    write_table(Path(folder, "train_loss.csv"), steps)
    draw_curves(folder, epochs, steps)


def write_breakdown(folder, frame, overall):
    """Write breakdown.csv and breakdown.png of a frame of `evaluate`. overall: its F1."""
    table = breakdown(frame)
    write_table(Path(folder, "breakdown.csv"), table)
    draw_breakdown(Path(folder, "breakdown.png"), table, overall)


def draw_curves(folder, epochs, steps):
    """Draw loss_curve.png and a curve of each metric of the table that has one and was measured.

    epochs: the rows of metrics.csv so far. steps: the rows of train_loss.csv so far.
    """
    import pandas as pd

    folder = Path(folder)
    last_steps = {row["epoch"]: row["step"] for row in steps}  # the step at which each epoch ended
    figure, axes = _new_axes("Loss", "optimizer step", "cross entropy of a target token (nats)")
    x, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    axes.plot(x, losses, color=TRAIN_COLOUR, alpha=0.3, linewidth=0.8, label="training, each step")
    window = max(1, len(losses) // 30)  # wide enough to be smooth, narrow enough not to lag behind
    mean = pd.Series(losses).rolling(window, min_periods=1).mean()
    axes.plot(x, mean, color=TRAIN_COLOUR, linewidth=1.8, label=f"training, mean of {window}" if window > 1 else None)
    axes.plot(
        [last_steps[row["epoch"]] for row in epochs],
        [row["val_loss"] for row in epochs],
        color=VALIDATION_COLOUR,
        marker="o",
        label="validation",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, folder / "loss_curve.png")
    for metric in METRICS:
        if metric.curve and epochs[-1][metric.name] is not None:
            _draw_metric(folder / f"{metric.curve}.png", epochs, metric)


def _draw_metric(path, epochs, metric):
    figure, axes = _new_axes(f"Validation {metric.title}", "epoch", metric.axis)
    x, y = [row["epoch"] for row in epochs], [row[metric.name] for row in epochs]
    axes.plot(x, y, color=VALIDATION_COLOUR, marker="o")
    best = max(range(len(y)), key=y.__getitem__)
    axes.annotate(f"best {y[best]:.3f}", (x[best], y[best]), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_xlim(min(x) - 0.5, max(x) + 0.5)
    low, high = min(y), max(y)
    room = 0.15 * (high - low) or 0.05
    axes.set_ylim(low - room if low < 0 else max(0, low - room), high + room)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def _new_axes(title, x_label, y_label):
    from matplotlib.figure import Figure  # without pyplot: no windows, and no state that outlives the drawing

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path):
    with writing(path) as beside:
        figure.savefig(beside, format="png")


def draw_breakdown(path, table, overall):
    """Draw a breakdown: F1 of each slice with its interval, in the table's order; the `overall` F1 as a dashed line."""
    figure, axes = _new_axes("F1 by slice of the validation split, 95 % intervals", "token F1", "")
    figure.set_size_inches(7.5, 1.4 + 0.27 * len(table))
    places = range(len(table))
    for place, row in zip(places, table.to_dict("records"), strict=True):
        colour = VALIDATION_COLOUR if row["count"] >= WELL_POPULATED else "#999999"
        axes.plot([row["f1_low"], row["f1_high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(row["f1"], place, "o", color=colour)
    axes.axvline(overall, color=TRAIN_COLOUR, linestyle="--", linewidth=1.2, zorder=0)
    side = {"ha": "left", "xytext": (5, 0)} if overall < 0.7 else {"ha": "right", "xytext": (-5, 0)}
    text = f"all examples: {overall:.3f}"
    axes.annotate(text, (overall, -0.8), color=TRAIN_COLOUR, va="center", textcoords="offset points", **side)
    names = [
        f"{row['feature']}: {row['value']}" if row["feature"] in ("question", "answer length") else row["value"]
        for row in table.to_dict("records")
    ]
    axes.set_yticks(places, [f"{name} ({n})" for name, n in zip(names, table["count"], strict=True)])
    axes.set_ylim(len(table) - 0.4, -1.2)  # the worst on top
    axes.set_xlim(-0.02, 1.02)
    if (table["count"] < WELL_POPULATED).any():
        axes.set_xlabel(f"token F1 (grey: fewer than {WELL_POPULATED} examples)")
    _save(figure, path)
