"""The table of metrics: what each one is called in files, on the console and in texts.

metrics.csv, the console, the model card, the curves, the breakdown and the comparison of runs all read it. The
functions that compute the metrics are in `helper_functions.py`: a new metric needs a function there, a line in
`evaluate`, and a line here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric with one value for each example; a split's value is the mean over its examples."""

    name: str  # of the mean, in metrics.csv, run.json and comparison.csv
    title: str  # on the console, in tables and in texts
    column: str = ""  # of the values in the predictions files, if it is not the name
    each_epoch: bool = True  # False: `leaderboard_scores` computes it, in the final evaluation only
    on_epoch_line: bool = False  # whether the console shows it after each epoch; the final line shows every metric
    lowest: float = 0.0  # its smallest possible value; the largest is 1
    curve: str = ""  # the picture of its values over the epochs in the run folder, without ".png"; "": none
    axis: str = ""  # the label of that picture's axis
    form: str = "{:.4f}"  # how the console and the model card print it
    form_of_100: str = "{:.1f}"  # how a comparison prints it, out of 100

    def __post_init__(self):
        object.__setattr__(self, "column", self.column or self.name)


METRICS = (
    Metric("f1", "F1", on_epoch_line=True, curve="val_f1_curve", axis="token F1"),
    Metric("em", "EM"),
    Metric(
        *("avg_sem_sim", "avg_sem_sim", "sem_sim"),
        on_epoch_line=True,
        lowest=-1.0,
        curve="val_sem_sim_curve",
        axis="semantic similarity (mean cosine)",
    ),
    Metric("bleu1", "BLEU-1", each_epoch=False),
    Metric("rougeL", "ROUGE-L", each_epoch=False),
    Metric("meteor", "METEOR", each_epoch=False),
)
EACH_EPOCH = tuple(metric for metric in METRICS if metric.each_epoch)


def printed(values):
    """[(title, text)] of the metrics in `values` ({name: number or None}), in the order in which they are printed:
    those of the epoch's line first."""
    in_order = sorted(METRICS, key=lambda metric: not metric.on_epoch_line)
    pairs = [("val_loss", "{:.4f}", values["val_loss"])]
    pairs += [(metric.title, metric.form, values[metric.name]) for metric in in_order if metric.name in values]
    return [(title, "n/a" if value is None else form.format(value)) for title, form, value in pairs]


def metrics_line(values, final=False):
    """The metrics as one line for the console: "val_loss=1.2345 F1=0.5000 avg_sem_sim=0.6000".

    values: {name: number or None}. final: whether to show every metric in place of those of the epoch's line.
    """
    after_epochs = {"val_loss", *(metric.title for metric in METRICS if metric.on_epoch_line)}
    return " ".join(f"{title}={text}" for title, text in printed(values) if final or title in after_epochs)
