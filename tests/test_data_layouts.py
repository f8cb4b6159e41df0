"""Names and folders of data files, as the hub, `datasets` and people leave them; and 300 layouts drawn at random."""

import csv
import io
import itertools
import json
import random

import pandas as pd
import pytest
from data_files import (
    COLUMNS,
    GOOD,
    PANDAS,
    PLAIN,
    PRINTED,
    ROWS,
    as_csv,
    loaded,
    parquet,
    refusal,
    renamed,
    squad_answers,
    write_splits,
)

from helper_functions import load_tweet_qa
from pipeline.data import load_with_note
from pipeline.read_data import SPLIT_NAMES

# -------------------------------------------------------------------------------------------------- names, folders


@pytest.mark.parametrize("name", SPLIT_NAMES["validation"])
@pytest.mark.parametrize("ending", ["json", "CSV", "parquet"])
def test_the_names_of_the_validation_split(tmp_path, name, ending):
    if ending == "parquet":
        parquet(ROWS, tmp_path / f"{name}.parquet")
    else:
        (tmp_path / f"{name.title()}.{ending}").write_text(as_csv(PLAIN) if ending == "CSV" else json.dumps(ROWS))
    (tmp_path / "train.json").write_text(GOOD)
    assert loaded(tmp_path, "validation") == ROWS


def hub_layout(folder):
    for number in (1, 0, 2):
        parquet(ROWS[number * 4 : number * 4 + 4], folder / "data" / f"train-0000{number}-of-00003.parquet")
    parquet(ROWS[:3], folder / "data" / "validation-00000-of-00001-a09b74b3ef9c3b56.parquet")
    parquet(ROWS[3:5], folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")


def converted_layout(folder):  # refs/convert/parquet
    for number in range(11):
        parquet(ROWS[number : number + 1] or ROWS[:0], folder / "default" / "train" / f"{number:04}.parquet")
    parquet(ROWS[:3], folder / "default" / "validation" / "0000.parquet")
    parquet(ROWS[3:5], folder / "default" / "test" / "0000.parquet")


def saved_layout(folder):
    import datasets

    parts = {"train": ROWS, "validation": ROWS[:3], "test": ROWS[3:5]}
    datasets.disable_progress_bars()
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    whole.save_to_disk(folder, num_shards={"train": 4, "validation": 1, "test": 2})


def cache_layout(folder):
    place = folder / "datasets--me--tweets" / "snapshots" / "0a1b2c"
    hub_layout(place)
    (folder / "datasets--me--tweets" / "refs").mkdir()


def numbered_layout(folder):
    for number in range(11):  # train2 comes before train10
        folder.joinpath("train").mkdir(exist_ok=True)
        (folder / "train" / f"part{number}.jsonl").write_text("\n".join(map(json.dumps, ROWS[number : number + 1])))
    (folder / "val").mkdir()
    (folder / "val" / "part0.csv").write_text(as_csv(PLAIN[:3]))
    (folder / "test").mkdir()
    (folder / "test" / "test.json").write_text(json.dumps(ROWS[3:5]))


def prefixed_layout(folder):
    (folder / "tweetqa_train.json").write_text(json.dumps(ROWS))
    (folder / "tweetqa-dev-v1.1.json").write_text(json.dumps(ROWS[:3]))
    (folder / "my.test.jsonl").write_text("\n".join(map(json.dumps, ROWS[3:5])))


def spark_layout(folder):
    for split, parts in {"train": 3, "validation": 1, "test": 1}.items():
        rows = {"train": ROWS, "validation": ROWS[:3], "test": ROWS[3:5]}[split]
        for n in range(parts):
            name = f"part-{n:05}-6a3f0c1e-c000.snappy.parquet"
            parquet(rows[n * 4 : n * 4 + 4], folder / f"{split}.parquet" / name)
        (folder / f"{split}.parquet" / "_SUCCESS").touch()
    (folder / "._train.parquet").write_bytes(b"of a Mac")


def feather_layout(folder):
    pd.DataFrame(ROWS).to_feather(folder / "train.arrow")  # the file format of Arrow; save_to_disk writes its stream
    pd.DataFrame(ROWS[:3]).to_feather(folder / "validation.arrow")
    pd.DataFrame(ROWS[3:5]).to_feather(folder / "test.arrow")


LAYOUTS = [hub_layout, converted_layout, saved_layout, cache_layout, numbered_layout, prefixed_layout]
LAYOUTS += [spark_layout, feather_layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_hub_and_datasets_leave_is_read(tmp_path, layout):
    layout(tmp_path)
    splits = load_tweet_qa(str(tmp_path))
    assert splits["train"] == ROWS and splits["validation"] == ROWS[:3] and splits["test"] == ROWS[3:5]


def test_the_row_of_a_shard_is_named_with_its_file(tmp_path):
    hub_layout(tmp_path)
    parquet([ROWS[0], ROWS[1] | {"Tweet": ""}], tmp_path / "data" / "train-00001-of-00003.parquet")
    assert "data/train-00001-of-00003.parquet, row 2: 'Tweet' is empty" in refusal(tmp_path)
    (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
    assert "has train-00000-of-00003.parquet, but not shard 1 of 3: add it" in refusal(tmp_path)


TWICE = {
    ("train.json", "train.csv"): "has train.json and train.csv for one split: remove all but one",
    ("train.json", "Train.JSON"): "for one split: remove all but one",
    ("train.json", "training.tsv"): "has train.json and training.tsv for one split",
    ("train.json", "train-00000-of-00001.json"): "has train-00000-of-00001.json and train.json for one split",
    ("train.json", "train/0000.json"): "has train/0000.json and train.json for one split",
    ("a/train.json", "b/train.json"): "has a/train.json and b/train.json for one split",
    ("train/one.json", "train/two.json"): "has one.json and two.json for one split",
    ("train/train.json", "train/train.csv"): "has train.csv and train.json for one split",
    ("train-v1.1.json", "train-v2.0.json"): "has train-v1.1.json and train-v2.0.json for one split",
}


@pytest.mark.parametrize("names", TWICE)
def test_two_files_for_one_split_are_refused_with_both_names(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(GOOD)
    assert TWICE[names] in refusal(tmp_path)


def test_a_file_with_the_split_s_name_alone_comes_before_all_others(tmp_path):
    """So that a folder that was read before other names were keeps its rows."""
    folder = write_splits(tmp_path, "train.json", json.dumps(ROWS))
    for other in ("old/train.json", "train_old.json", "pre_train.json", "unit-test.json", "validation_predictions.csv"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("{")
    assert {split: len(rows) for split, rows in load_tweet_qa(str(folder)).items()} == {"train": 10, "validation": 2}


def test_what_is_missing_is_named(tmp_path):
    folder = write_splits(tmp_path / "x", "train.xlsx", b"PK\x03\x04")
    assert (
        "has no train file: add train.(json|jsonl|csv|parquet) (train.xlsx is of a type that is not read)"
        in refusal(folder)
    )
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert "it is one split, saved with save_to_disk: save a DatasetDict" in refusal(tmp_path / "one")
    saved_layout(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    assert "train/state.json cannot be read" in refusal(tmp_path / "saved")
    saved_layout(tmp_path / "short")
    (tmp_path / "short" / "train" / "data-00002-of-00004.arrow").unlink()
    assert "data-00002-of-00004.arrow is not a file" in refusal(tmp_path / "short")
    (tmp_path / "short" / "train" / "data-00002-of-00004.arrow").write_bytes(b"cut")
    assert "data-00002-of-00004.arrow cannot be read" in refusal(tmp_path / "short")


# ------------------------------------------------------------------------------------------------- a random sweep

SWEEP_ROWS = [row | {"qid": f"{row['qid']}-{copy}"} for copy in (0, 1) for row in ROWS]
NAMES = [
    ["Question", "Tweet", "Answer", "qid"],
    ["question", "tweet", "answer", "qid"],
    ["QUESTION", "TWEET", "ANSWER", "QID"],
    ["Question ", "Tweet", " Answer", "Qid"],
    ["question", "context", "answers", "id"],
    ["question", "paragraph", "answer", "id"],
    ["question", "context", "answers", None],
]
BAD_SPELLINGS = {
    "unquoted": (lambda texts: f"[{', '.join(texts)}]", "looks like a list|must be text, not int|in square brackets"),
    "cut off": (lambda texts: str(texts)[:-2], "looks like a list"),
    "summarized": (lambda texts: f"['{texts[0][:3]}' ... 'z']".replace("it's", "it"), "looks like a list"),
    "missing": (lambda texts: "nan", "as pandas writes a missing value"),
    "all missing": (lambda texts: "[nan, None]", "is empty: at least one"),
}
TEXT_SPELLINGS = {name: spell for name, spell in PRINTED.items() if name not in PANDAS}
TEXT_SPELLINGS["with a missing one"] = lambda texts: str([*texts, None])
VALUE_SPELLINGS = {
    "a list": list,
    "SQuAD": squad_answers,
    "SQuAD, one by one": lambda texts: [{"text": text, "answer_start": 1} for text in texts],
}


def random_file(rng, rows, names, split):
    """(ending, content) of a file with these rows, in a format drawn at random."""
    ending = rng.choice(["json", "json", "jsonl", "ndjson", "csv", "csv", "tsv", "parquet"])
    text = ending in ("csv", "tsv") or rng.random() < 0.3
    spell = rng.choice(list((TEXT_SPELLINGS if text else VALUE_SPELLINGS).values()))
    rows = renamed(rows, names, spell)
    columns = [name for name in names if name]
    rng.shuffle(columns)
    if ending == "parquet":
        file = io.BytesIO()
        pd.DataFrame(rows, columns=columns).to_parquet(file)
        return ending, file.getvalue()
    encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"])
    if ending in ("csv", "tsv"):
        delimiter = rng.choice(",;\t|")
        start = f"sep={delimiter}\n" if rng.random() < 0.2 else ""
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        return ending, (start + as_csv(rows, delimiter, columns, quoting)).encode(encoding)
    frame = pd.DataFrame(rows)
    wrapped = rng.choice(
        [
            lambda: json.dumps(rows, ensure_ascii=rng.random() < 0.5),
            lambda: "\n".join(json.dumps(row, indent=rng.choice([None, 1])) for row in rows),
            lambda: json.dumps({rng.choice(["data", "rows", "examples", split]): rows, "version": 1}, indent=1),
            lambda: json.dumps({"rows": [{"row_idx": n, "row": row} for n, row in enumerate(rows)], "features": []}),
            lambda: frame.to_json(orient=rng.choice(["columns", "split", "records", "table"])),
            lambda: json.dumps(frame.to_dict("list")),
        ]
    )
    return ending, wrapped().encode(encoding)


def write_layout(rng, folder, rows, names):
    """Write train and validation of the same rows in a random layout."""
    place = folder / rng.choice([".", ".", "data", "default", "a/b"])
    for split in ("train", "validation"):
        name = rng.choice(SPLIT_NAMES[split])
        shards = rng.choice([0, 0, 1, 3])
        inside = rng.random() < 0.3
        cuts = [0, *sorted(rng.sample(range(1, len(rows)), max(shards, 1) - 1)), len(rows)]
        ending = None
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            new_ending, content = random_file(rng, rows[start:stop], names, split)
            while ending not in (None, new_ending):  # the shards of a split have one format
                new_ending, content = random_file(rng, rows[start:stop], names, split)
            ending = new_ending
            stem = f"{name}-{number:05}-of-{shards:05}" if shards else name
            path = place / name / f"{stem}.{ending}" if inside else place / f"{stem}.{ending}"
            if rng.random() < 0.1 and shards == 0:
                path = path.with_name(path.name.upper())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@pytest.mark.slow
def test_300_random_layouts_and_spellings_give_the_same_rows_or_the_right_refusal(tmp_path):
    refused = 0
    for seed in range(300):
        rng = random.Random(seed)
        names = rng.choice(NAMES)
        expected = SWEEP_ROWS if names[3] else [row | {"qid": str(n)} for n, row in enumerate(SWEEP_ROWS, start=1)]
        folder = tmp_path / str(seed)
        write_layout(rng, folder, SWEEP_ROWS, names)
        splits, note = load_with_note(str(folder))
        assert splits == {"train": expected, "validation": expected}, seed
        assert (names == list(COLUMNS)) == ("columns of" not in (note or "")), seed
        if seed % 3 == 0:  # the same, with one wrong row
            spell, message = rng.choice(list(BAD_SPELLINGS.values()))
            for path in [path for path in folder.rglob("*") if path.is_file()]:
                path.unlink()
            number = rng.randrange(20)
            rows = renamed(SWEEP_ROWS, COLUMNS, lambda texts: json.dumps(texts))
            rows[number]["Answer"] = spell(SWEEP_ROWS[number]["Answer"] * 2)
            write_splits(folder, "train.tsv", as_csv(rows, rng.choice(",;\t|")))
            line = refusal(folder)
            assert f"train.tsv, row {number + 1}: 'Answer' " in line, (seed, line)
            assert any(part in line for part in message.split("|")), (seed, line)
            refused += 1
    assert refused == 100
