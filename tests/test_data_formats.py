"""Data files as people have them give the same rows in each format, or are refused for their true reason."""

import csv
import json
from argparse import Namespace

import pandas as pd
import pytest
from data_files import (
    COLUMNS,
    GOOD,
    PLAIN,
    ROWS,
    as_csv,
    loaded,
    refusal,
    renamed,
    squad_answers,
    write_splits,
)

from helper_functions import load_tweet_qa
from pipeline.data import load_with_note, select_rows

# ----------------------------------------------------------------------------------------------------------- JSON

FRAME = pd.DataFrame(ROWS)
WRAPPED = {
    "a list": ROWS,
    "data": {"data": ROWS},
    "data and more": {"version": "1.0", "name": "mine", "data": ROWS, "splits": ["train"], "id": 7},
    "rows": {"rows": ROWS},
    "the split": {"train": ROWS},
    "the split in data": {"data": {"train": ROWS}},
    "another name": {"license": "MIT", "tweets": ROWS},
    "the hub's viewer": {
        "features": [{"feature_idx": n, "name": name, "type": {}} for n, name in enumerate(COLUMNS)],
        "rows": [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ROWS)],
        "num_rows_total": len(ROWS),
        "num_rows_per_page": 100,
        "partial": False,
    },
    **{
        f"pandas, {orient}": json.loads(FRAME.to_json(orient=orient))
        for orient in ("columns", "index", "split", "table")
    },
    "pandas, records": json.loads(FRAME.to_json(orient="records")),
    "columns": FRAME.to_dict("list"),
    "columns with an index": FRAME.to_dict("split"),
    "by qid": {row["qid"]: {name: value for name, value in row.items() if name != "qid"} for row in ROWS},
}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.ndjson", "TRAIN.JSON"])
@pytest.mark.parametrize("case", WRAPPED)
def test_json_is_read_whatever_it_is_wrapped_in_and_called(tmp_path, case, name):
    for indent in (None, 1):
        content = json.dumps(WRAPPED[case], indent=indent)
        assert loaded(write_splits(tmp_path, name, content)) == ROWS


def test_json_lines_are_read_whatever_they_are_called(tmp_path):
    for number, name in enumerate(("train.json", "train.jsonl", "train.ndjson")):
        folder = tmp_path / str(number)
        for content in (
            "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
            "\r\n".join(map(json.dumps, ROWS)) + "\r\n\r\n",
            "\n".join(json.dumps(row, indent=2) for row in ROWS),  # as jq writes them
            json.dumps(FRAME.to_json(orient="records")),  # json.dump(frame.to_json())
            json.dumps(FRAME.to_json(orient="records", lines=True)),
        ):
            assert loaded(write_splits(folder, name, content)) == ROWS
        assert loaded(write_splits(folder, name, json.dumps(ROWS[0]))) == ROWS[:1]


REFUSED_JSON = {
    "two splits": (
        {"train": ROWS, "validation": ROWS},
        "has the splits train and validation: write each to a separate file",
    ),
    "another split": ({"dev": ROWS}, "is the train file, and has the split 'dev': rename one of them"),
    "two lists": (
        {"mine": ROWS, "yours": ROWS},
        "is one object, not a list of rows: write a list of objects (it has mine",
    ),
    "nothing": ({}, "is one object, not a list of rows"),
    "no rows": ({"data": []}, "has no rows"),
    "a number": (5, "is one int, not a list of rows"),
    "a list of lists": (
        [list(row.values()) for row in ROWS],
        "row 1 is not an object with the columns Question, Tweet",
    ),
    "columns of two lengths": (
        FRAME.to_dict("list") | {"qid": ["1"]},
        "its columns 'Question' and 'qid' do not have the same rows",
    ),
    "columns of two indexes": (
        json.loads(FRAME.to_json()) | {"Tweet": {"7": "t"}},
        "its columns 'Question' and 'Tweet' do not have the same rows",
    ),
    "a table with a short row": (
        {"columns": ["Question", "Tweet"], "data": [["q"]]},
        "not every row in 'data' has a value for each of its 2 columns",
    ),
    "a cut cell of the viewer": (
        {"rows": [{"row_idx": 0, "row": ROWS[0], "truncated_cells": ["Tweet"]}]},
        "row 1: the viewer cut off ['Tweet']: download the data set's files",
    ),
    "a row with no answer": (
        {"data": [ROWS[0], {"Question": "q", "Tweet": "t", "qid": "1"}]},
        "row 2 has no column 'Answer'",
    ),
}


@pytest.mark.parametrize("case", REFUSED_JSON)
def test_json_that_cannot_be_rows_is_refused_for_what_it_is(tmp_path, case):
    content, message = REFUSED_JSON[case]
    line = refusal(write_splits(tmp_path, "train.json", json.dumps(content)))
    assert "train.json" in line and message in line and "not valid JSON" not in line


@pytest.mark.parametrize("handed", ["03_numpy2_answers", "09_json_wrapped"])
def test_the_handed_cases(tweet_qa, handed):
    folder = tweet_qa.parent / "cases" / handed
    if not folder.is_dir():
        pytest.skip("the handed cases are not here")
    splits = load_tweet_qa(str(folder))
    for rows in splits.values():
        texts = [text for row in rows for text in row["Answer"]]
        assert texts and not any("np.str_" in text or text.startswith("[") for text in texts)
    assert splits["train"][0]["Answer"] == ["pie and corn"] and splits["train"][1]["Answer"] == ["Zimby"]


# ------------------------------------------------------------------------------------------------------------ CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "Train.CSV"])
def test_csv_is_read_with_any_delimiter(tmp_path, delimiter, name):
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        content = as_csv(PLAIN, delimiter, quoting=quoting)
        assert loaded(write_splits(tmp_path, name, content)) == ROWS
        for line in (
            f"sep={delimiter}\r\n",
            f"SEP={delimiter}\n",
            f'"sep={delimiter}"\r\n',
            "\ufeffsep=" + delimiter + "\n",
        ):
            assert loaded(write_splits(tmp_path, name, line + content)) == ROWS


def test_csv_of_pandas_and_of_spreadsheets(tmp_path):
    frame = pd.DataFrame(PLAIN)
    assert (
        loaded(write_splits(tmp_path, "train.csv", frame.to_csv())) == ROWS
    )  # with the index, a column without a name
    assert loaded(write_splits(tmp_path, "train.csv", frame.to_csv(index=False, sep=";").encode("utf-8-sig"))) == ROWS
    assert loaded(write_splits(tmp_path, "train.csv", frame.to_csv(index=False, lineterminator="\r\n"))) == ROWS
    empty = "\n".join(line + ";;" for line in ["qid;Question;Tweet;Answer", "1;q;t;a"])  # columns that were emptied
    assert loaded(write_splits(tmp_path, "train.csv", empty))[0]["Tweet"] == "t"
    spaced = 'qid, Question, Tweet, Answer\n1, q, "t, u", a\n'
    assert loaded(write_splits(tmp_path, "train.csv", spaced)) == [
        {"Question": "q", "Tweet": "t, u", "Answer": ["a"], "qid": "1"}
    ]


REFUSED_CSV = {
    "a row that is too long": ("qid;Question;Tweet;Answer\n1;q;t;a\n2;q;t; u;a\n", "row 2 has more or fewer fields"),
    "quote what": ("qid;Question;Tweet;Answer\n1;q;t; u;a\n", "quote fields that contain semicolons"),
    "no header": ("1,q,t,a\n2,q,t,a\n", "row 1 has no column 'Question': it has 1, q, t, a"),
    "a column twice": ("qid,Tweet,Tweet,Question,Answer\n1,a,b,q,a\n", "has the column 'Tweet' twice"),
    "JSON": (GOOD, "is JSON: name it .json"),
    "an empty answer": ("qid;Question;Tweet;Answer\n1;q;t;a\n2;q;t;\n", "row 2: 'Answer' is empty"),
}


@pytest.mark.parametrize("case", REFUSED_CSV)
def test_csv_that_cannot_be_read_is_refused_for_its_reason(tmp_path, case):
    content, message = REFUSED_CSV[case]
    line = refusal(write_splits(tmp_path, "train.csv", content))
    assert "train.csv" in line and message in line


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.json", "train.jsonl"])
def test_encodings_with_a_mark_or_without_doubt_are_read(tmp_path, encoding, name):
    text = as_csv(PLAIN, "\t") if name.endswith("sv") else json.dumps(ROWS, ensure_ascii=False)
    assert loaded(write_splits(tmp_path, name, text.encode(encoding))) == ROWS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (as_csv(PLAIN).encode("cp1252", "replace") + "é".encode("cp1252"), "is not UTF-8 text"),
        (b"\xff\xfe" + b"\x00\xd8" * 3, "is not UTF-16 text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "is a Git LFS pointer, not the data"),
        (b"PK\x03\x04 and so on", "is an Excel or ZIP file: save it as CSV"),
        (b"\x1f\x8b\x08 and so on", "is compressed: unpack it"),
        (b"<!DOCTYPE html><html>", "is a web page, not the data"),
        (b"PAR1", "is a Parquet file: name it .parquet"),
    ],
)
def test_other_content_is_refused_for_what_it_is(tmp_path, content, message):
    for name in ("train.csv", "train.json"):
        line = refusal(write_splits(tmp_path / name, name, content))
        assert f"{name} {message}" in line
    if b"git-lfs" in content:
        line = refusal(write_splits(tmp_path / "parquet", "train-00000-of-00001.parquet", content))
        assert f"train-00000-of-00001.parquet {message}: run git lfs pull" in line


# --------------------------------------------------------------------------------------------------------- columns


def nested_squad(rows):
    """SQuAD's own files: a list of articles of paragraphs, each with its questions."""

    def questions(rows):
        for row in rows:
            answers = [{"text": text, "answer_start": 3} for text in row["Answer"]]
            yield {"question": row["Question"], "id": row["qid"], "answers": answers, "is_impossible": False}

    paragraphs = [{"context": row["Tweet"], "qas": list(questions([row]))} for row in rows]
    articles = [{"title": "one", "paragraphs": paragraphs[:3]}, {"title": "two", "paragraphs": paragraphs[3:]}]
    return {"version": "v2.0", "data": articles}


NUMBERED = [row | {"qid": str(n)} for n, row in enumerate(ROWS, start=1)]
COLUMN_CASES = {
    "lower case": (
        renamed(ROWS, ["question", "tweet", "answer", "qid"]),
        ROWS,
        "Question = question, Tweet = tweet, Answer = answer, qid = qid",
    ),
    "upper case, blanks and a mark": (
        renamed(ROWS, ["\ufeffQUESTION", " Tweet ", "ANSWER\n", "QID"]),
        ROWS,
        "Question = \ufeffQUESTION, Tweet = Tweet, Answer = ANSWER, qid = QID",
    ),
    "SQuAD": (
        renamed(ROWS, ["question", "context", "answers", "id"], squad_answers),
        ROWS,
        "Question = question, Tweet = context, Answer = answers, qid = id",
    ),
    "SQuAD, nested": (nested_squad(ROWS), ROWS, "Question = question, Tweet = context, Answer = answers, qid = id"),
    "one paragraph a line": (
        [
            {
                "context": row["Tweet"],
                "qas": [{"question": row["Question"], "qid": row["qid"], "answers": row["Answer"]}],
            }
            for row in ROWS
        ],
        ROWS,
        "Question = question, Tweet = context, Answer = answers, qid = qid",
    ),
    "lmqg": (
        [
            row | {"paragraph_question": "x", "sentence": "y"}
            for row in renamed(ROWS, ["question", "paragraph", "answer", None], lambda texts: texts[0])
        ],
        [row | {"Answer": row["Answer"][:1]} for row in NUMBERED],
        "Question = question, Tweet = paragraph, Answer = answer, qid = the row's number",
    ),
    "lmqg with context": (
        renamed(ROWS, ["question", "context", "answer", None]),
        NUMBERED,
        "Question = question, Tweet = context, Answer = answer, qid = the row's number",
    ),
    "no qid": (
        renamed(ROWS, ["Question", "Tweet", "Answer", None]),
        NUMBERED,
        "Question = Question, Tweet = Tweet, Answer = Answer, qid = the row's number",
    ),
    "other columns too": (
        [row | {"id": "no", "context": "no", "answers": "no", "question": "no"} for row in ROWS],
        ROWS,
        None,
    ),
}


@pytest.mark.parametrize("case", COLUMN_CASES)
def test_columns_of_other_data_sets_are_taken_and_one_line_says_how(tmp_path, case):
    content, expected, how = COLUMN_CASES[case]
    splits, note = load_with_note(str(write_splits(tmp_path, "train.json", json.dumps(content), json.dumps(ROWS))))
    assert splits["train"] == expected
    assert note == (how and f"columns of train: {how}")


def test_a_run_prints_how_the_columns_were_taken(tmp_path):
    other = json.dumps(renamed(ROWS, ["question", "context", "answers", "id"], squad_answers))
    folder = write_splits(tmp_path, "train.json", other, other)
    (folder / "test.json").write_text(json.dumps(renamed(ROWS, ["question", "context", None, "id"])))
    everything = {"holdout": 0, "train_subset": None, "max_train_samples": None, "max_eval_samples": None}
    args = Namespace(dataset=str(folder), drop_leaked=False, **everything)
    selected = select_rows(args)
    assert selected.rows["train"] == selected.rows["validation"] == ROWS
    assert selected.rows["test"] == [row | {"Answer": []} for row in ROWS]
    first, second = selected.note.split("\n")
    assert first == (
        "note: columns of train and validation: Question = question, Tweet = context, Answer = answers, qid = id"
        " | columns of test: Question = question, Tweet = context, qid = id"
    )
    assert second.startswith("check: ")
    usual = write_splits(tmp_path / "usual", "train.json", json.dumps(ROWS), json.dumps(ROWS))
    (usual / "test.json").write_text(json.dumps([row | {"Answer": []} for row in ROWS]))
    args.dataset = str(usual)
    assert select_rows(args).note == second
    assert select_rows(args).sha256 == selected.sha256  # the same rows, in other files


def test_csv_takes_the_columns_too(tmp_path):
    rows = renamed(ROWS, ["question", "context", "answers", "id"], lambda texts: str(squad_answers(texts)))
    for delimiter in ",;\t|":
        content = as_csv(rows, delimiter, columns=["id", "title", "context", "question", "answers"])
        assert loaded(write_splits(tmp_path, "train.csv", content)) == ROWS


REFUSED_COLUMNS = {
    "two for one": (
        ["question", "context", "answer", "id"],
        {"paragraph": "p"},
        "has the columns 'context' and 'paragraph'",
    ),
    "two cases": (["question", "tweet", "answer", "id"], {"TWEET": "p"}, "has the columns 'TWEET' and 'tweet'"),
    "two answers": (["question", "tweet", "answer", "id"], {"answers": "p"}, "has the columns 'answer' and 'answers'"),
    "no tweet": (
        ["question", "text", "answer", "id"],
        {},
        "row 1 has no column 'Tweet': it has question, text, answer, id",
    ),
    "no answer": (["question", "tweet", None, "id"], {}, "row 1 has no column 'Answer': it has question, tweet, id"),
}


@pytest.mark.parametrize("case", REFUSED_COLUMNS)
def test_columns_that_could_be_two_things_are_refused(tmp_path, case):
    names, more, message = REFUSED_COLUMNS[case]
    rows = [row | more for row in renamed(ROWS, names)]
    line = refusal(write_splits(tmp_path, "train.json", json.dumps(rows)))
    assert "train.json" in line and message in line


@pytest.mark.parametrize("column", ["Question", "Tweet"])
@pytest.mark.parametrize("word", ["nan", "None", "<NA>"])
def test_a_missing_text_written_as_a_word_is_refused(tmp_path, column, word):
    line = refusal(write_splits(tmp_path, "train.csv", as_csv([*PLAIN[:3], PLAIN[3] | {column: word}])))
    assert f"train.csv, row 4: {column!r} is {word}, as pandas writes a missing value" in line


def test_a_row_without_a_column_that_others_have_is_named(tmp_path):
    rows = renamed(ROWS, ["question", "context", "answers", "id"])
    for gone in ("question", "context", "answers", "id"):
        broken = [*rows[:2], {key: value for key, value in rows[2].items() if key != gone}]
        line = refusal(write_splits(tmp_path, "train.json", json.dumps(broken)))
        assert f"train.json, row 3 has no column {gone!r}" in line
    line = refusal(write_splits(tmp_path, "train.json", json.dumps([*rows[:2], rows[2] | {"context": None}])))
    assert "train.json, row 3: 'context' must be text, not empty (null)" in line
    line = refusal(write_splits(tmp_path, "train.json", json.dumps([rows[0] | {"context": "\ud83d"}])))
    assert "train.json, row 1: 'context' contains an unpaired surrogate" in line
