"""Rows and writers of data files, for the tests of how data is read."""

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest

from helper_functions import InputError, load_tweet_qa

COLUMNS = ("Question", "Tweet", "Answer", "qid")
TEXTS = [
    ["rockets", "the rockets"],
    ["it's", 'it "is"'],
    ["[laughs]"],
    ["236k (236,000)", "236,000; or 1|2"],
    ["29"],
    ["a\\b", "c:\\new", "tab\there"],
    ["🚀 日本語", "naïve café"],
    ["two\nlines"],
    ["'st. thomas', 'santa claus' and 'cheese pasta'.", '"b" and "s".'],
    ["none", "(me)", "{{URL}}"],
]
ROWS = [
    {
        "Question": f"who, or: what; is |{n}|?",
        "Tweet": f'"Tweet" {n},\tby\n@user{n}; 🇺🇸 #1',
        "Answer": a,
        "qid": f"q{n}",
    }
    for n, a in enumerate(TEXTS)
]
GOOD = json.dumps(ROWS[:2])


def write_splits(folder, name, content, other=GOOD):
    """A data folder whose train file is the one given, beside a good validation file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if other is not None:
        (folder / "validation.json").write_text(other)
    return folder


def loaded(folder, split="train"):
    return load_tweet_qa(str(folder))[split]


def refusal(folder):
    """The one line with which a data folder is refused."""
    with pytest.raises(InputError) as caught:
        load_tweet_qa(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_csv(rows, delimiter=",", columns=COLUMNS, quoting=csv.QUOTE_MINIMAL):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, delimiter=delimiter, quoting=quoting, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def csv_of_answers(*answers):
    return as_csv([ROWS[0] | {"Answer": answer} for answer in answers])


PLAIN = [row | {"Answer": json.dumps(row["Answer"])} for row in ROWS]


def parquet(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)


def renamed(rows, names, answer=lambda texts: texts):
    """Rows with other names of their columns; a name of None leaves the column out."""
    names = dict(zip(COLUMNS, names, strict=True))
    return [
        {names[key]: answer(value) if key == "Answer" else value for key, value in row.items() if names[key]}
        for row in rows
    ]


def squad_answers(texts):
    return {"text": texts, "answer_start": [3] * len(texts)}


# How programs write a list of references into a text.
PRINTED = {
    "Python": str,
    "a tuple": lambda texts: str(tuple(texts)),
    "JSON": json.dumps,
    "JSON in Unicode": lambda texts: json.dumps(texts, ensure_ascii=False),
    "JSON over several lines": lambda texts: json.dumps(texts, indent=2),
    "JSON in JSON": lambda texts: json.dumps(json.dumps(texts)),
    "numpy's str": lambda texts: str(np.array(texts)),
    "numpy's str of objects": lambda texts: str(np.array(texts, dtype=object)),
    "numpy's repr": lambda texts: repr(np.array(texts)),
    "numpy's repr of objects": lambda texts: repr(np.array(texts, dtype=object)),
    "numpy 2's scalars": lambda texts: str([np.str_(text) for text in texts]),
    "numpy 1's scalars": lambda texts: str([str(np.str_(text)) for text in texts]),
    "numpy's scalars, long": lambda texts: "[" + ", ".join(f"numpy.str_({text!r})" for text in texts) + "]",
    "numpy's string type": lambda texts: repr(np.array(texts, dtype=np.dtypes.StringDType())),
    "pandas' strings": lambda texts: str(pd.array(texts, dtype="string")),
    "pandas' older strings": lambda texts: str(pd.array(texts, dtype=pd.StringDtype("python"))),
    "a pandas index": lambda texts: str(pd.Index(texts, dtype=object)),
    "Python 2": lambda texts: "[" + ", ".join(f"u{text!r}" for text in texts) + "]",
    "SQuAD's answers": lambda texts: str({"text": texts, "answer_start": [3] * len(texts)}),
    "SQuAD's answers by pandas": lambda texts: str(
        {"answer_start": np.array([3] * len(texts), dtype=np.int32), "text": np.array(texts, dtype=object)}
    ),
    "SQuAD's answers, one by one": lambda texts: json.dumps([{"text": text, "answer_start": 3} for text in texts]),
    "R": lambda texts: f"c({', '.join(json.dumps(text, ensure_ascii=False) for text in texts)})",
}


PANDAS = ("pandas' strings", "pandas' older strings", "a pandas index")  # print a text as it is between quotes
