"""Where a model fails: its scores by kind of question, answer length and what the tweet contains.

The final evaluation writes it as breakdown.csv; `figures.py` draws it.
"""

from pipeline.metrics import EACH_EPOCH
from pipeline.statistics import interval
from pipeline.text import normalize_answer

WELL_POPULATED = 20  # with fewer examples, a slice's interval is too wide to tell it from the others
WITH_INTERVAL = ("em", "f1")  # columns whose interval is given too


def breakdown(frame):
    """The scores of slices of the examples.

    frame: a frame of `evaluate`. Returns a DataFrame with one row per slice: feature, value, count, the mean of each
    metric, for em and f1 with the bounds of the 95 % interval (em_low, em_high, ...), NaN where all examples have the
    same score. The slice with the worst F1 comes first; slices of fewer than WELL_POPULATED examples come after all
    others, in the same order.
    """
    import pandas as pd

    slices = {"question": frame["question_type"], "answer length": _answer_lengths(frame)}
    slices["span"] = _is_in_tweet(frame).map({True: "answer in the tweet", False: "answer not in the tweet"})
    for name in ("hashtag", "handle", "url", "number", "emoji"):
        slices[name] = frame[f"has_{name}"].map({True: f"with {name}", False: f"without {name}"})
    columns = dict.fromkeys([*WITH_INTERVAL, *(metric.column for metric in EACH_EPOCH)])
    rows = []
    for feature, values in slices.items():
        if values.nunique() == 1:  # there is nothing to compare it with
            continue
        for value, part in frame.groupby(values):
            row = {"feature": feature, "value": value, "count": len(part)}
            for column in columns:
                row[column] = part[column].mean()
                if column in WITH_INTERVAL:
                    row[f"{column}_low"], row[f"{column}_high"] = interval(part[column], resamples=2000)
            rows.append(row)
    bounds = {column: [f"{column}_low", f"{column}_high"] for column in WITH_INTERVAL}
    names = [name for column in columns for name in (column, *bounds.get(column, []))]
    table = pd.DataFrame(rows, columns=["feature", "value", "count", *names])
    small = table["count"] < WELL_POPULATED
    return (
        table.assign(small=small).sort_values(["small", "f1", "feature"]).drop(columns="small").reset_index(drop=True)
    )


def _answer_lengths(frame):
    """The number of words in each example's first reference, in four classes."""
    import pandas as pd

    words = frame["references"].map(lambda references: len(references[0].split()))
    return pd.cut(words, [0, 1, 2, 5, 10**9], labels=["1 word", "2 words", "3-5 words", "6+ words"]).astype(str)


def _is_in_tweet(frame):
    """Whether one of the references is in the tweet, word for word after normalization."""

    def is_in_tweet(row):
        tweet = f" {normalize_answer(row['tweet'])} "
        return any(f" {normalize_answer(reference)} " in tweet for reference in row["references"])

    return frame[["tweet", "references"]].apply(is_in_tweet, axis=1)
