"""Loading: every form of the data gives the same rows, and what is wrong is named with its file and row."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helper_functions import InputError, TweetQADataset, build_collate_fn, build_prompt, load_tweet_qa
from pipeline.answers import parse_answer

ROW = {"Question": "who won?", "Tweet": "The Rockets, again! 🚀", "Answer": ["rockets", "the rockets"], "qid": "a1"}


def test_the_real_files_load_whole(tweet_qa):
    splits = load_tweet_qa(str(tweet_qa))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 10692, "validation": 1086, "test": 1979}
    assert all(len(row["Answer"]) == 2 for row in splits["validation"])
    assert all(row["Answer"] == [] for row in splits["test"])
    raw = json.loads((tweet_qa / "validation.json").read_text())
    assert splits["validation"] == [{key: row[key] for key in ("Question", "Tweet", "Answer", "qid")} for row in raw]


@pytest.mark.parametrize("form", ["json", "jsonl", "json lines named .json", "csv", "csv by pandas", "parquet", "dev"])
def test_every_form_gives_the_same_rows(tmp_path, tweet_qa, form):
    raw = json.loads((tweet_qa / "validation.json").read_text())[:200]
    expected = [{key: row[key] for key in ("Question", "Tweet", "Answer", "qid")} for row in raw]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in raw)
    (tmp_path / "train.json").write_text(json.dumps([ROW]))
    if form == "json":
        (tmp_path / "validation.json").write_text(json.dumps(raw))
    elif form == "dev":
        (tmp_path / "dev.json").write_text(json.dumps(raw))
    elif form == "jsonl":
        (tmp_path / "validation.jsonl").write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    elif form == "json lines named .json":
        (tmp_path / "validation.json").write_text(lines, encoding="utf-8")
    elif form == "csv":
        with open(tmp_path / "validation.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["qid", "Tweet", "Question", "Answer"])
            writer.writeheader()
            writer.writerows(row | {"Answer": json.dumps(row["Answer"])} for row in raw)
    elif form == "csv by pandas":  # arrays, as a Parquet file gives them, are printed by numpy: ['a' 'b']
        frame = pd.DataFrame(raw)
        frame["Answer"] = [np.array(answers) for answers in frame["Answer"]]
        frame.to_csv(tmp_path / "validation.csv", index=False)
    else:
        pd.DataFrame(raw).to_parquet(tmp_path / "validation.parquet")
    assert load_tweet_qa(str(tmp_path))["validation"] == expected


@given(st.lists(st.text().filter(str.strip), min_size=1))
def test_a_list_written_as_text_is_read_back(references):
    assert parse_answer(json.dumps(references)) == references
    assert parse_answer(str(references)) == references


@pytest.mark.parametrize("text", ["[sic]", "it's", "[]x", "a, b", "5"])
def test_other_text_is_one_reference(text):
    assert parse_answer(text) == [text]


def test_a_string_and_a_number_as_qid_are_taken(data_folder):
    folder = data_folder(train=[ROW | {"Answer": "rockets"}], validation=[ROW | {"qid": 7}])
    splits = load_tweet_qa(str(folder))
    assert splits["train"][0]["Answer"] == ["rockets"]
    assert splits["validation"][0]["qid"] == "7"


def test_long_and_strange_text_passes_through_unchanged(data_folder, tokenizer):
    texts = ["x" * 1_000_000, "a\x00b", "line\u2028separator", "ㅤ\u200d🏳️‍🌈", 'quote " and , comma\nnew line']
    rows = [ROW | {"Tweet": text} for text in texts]
    loaded = load_tweet_qa(str(data_folder(train=rows, validation=rows)))["train"]
    assert [row["Tweet"] for row in loaded] == texts
    assert len(TweetQADataset(loaded, tokenizer)) == len(texts)


BAD_ROWS = {
    "a missing column": ({"Question": "q", "Answer": ["a"], "qid": "1"}, "row 2 has no column 'Tweet'"),
    "a row that is no object": (["q", "t"], "row 2 is not an object"),
    "a question that is null": (ROW | {"Question": None}, "row 2: 'Question' must be text, not empty (null)"),
    "a tweet that is a list": (ROW | {"Tweet": ["t"]}, "row 2: 'Tweet' must be text, not list"),
    "a blank tweet": (ROW | {"Tweet": " \n"}, "row 2: 'Tweet' is empty"),
    "half a surrogate pair": (ROW | {"Tweet": "\ud83d"}, "row 2: 'Tweet' contains an unpaired surrogate"),
    "no answer": (ROW | {"Answer": []}, "row 2: 'Answer' is empty"),
    "an empty answer": (ROW | {"Answer": ""}, "row 2: 'Answer' is empty"),
    "an answer that is null": (ROW | {"Answer": None}, "row 2: 'Answer' is empty"),
    "an answer that is a number": (ROW | {"Answer": 5}, "row 2: 'Answer' must be text or a list of texts, not int"),
    "a nested answer": (ROW | {"Answer": [["a"]]}, "row 2: 'Answer' must be text, not list"),
    "a qid that is null": (ROW | {"qid": None}, "row 2: 'qid' must be text"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(data_folder, case):
    row, message = BAD_ROWS[case]
    with pytest.raises(InputError) as caught:
        load_tweet_qa(str(data_folder(train=[ROW, row], validation=[ROW])))
    assert message in str(caught.value) and "train.json" in str(caught.value) and "\n" not in str(caught.value)


BAD_FILES = {
    "cut-off JSON": ("train.json", b'[{"Question": "q"', "is not valid JSON"),
    "cut-off JSON Lines": ("train.jsonl", b'{"Question": "q', "row 1 is not valid JSON"),
    "an empty JSON file": ("train.json", b"", "is not valid JSON"),
    "an empty list": ("train.json", b"[]", "has no rows"),
    "an empty CSV file": ("train.csv", b"", "has no rows"),
    "Latin-1": ("train.json", '[{"Tweet": "caf\u00e9"}]'.encode("latin-1"), "is not UTF-8 text"),
    "a CSV row that is too long": (
        "train.csv",
        b"qid,Question,Tweet,Answer\n1,q,t,a\n2,q,t, with a comma,a\n",
        "row 2 has more or fewer fields than the header's 4",
    ),
    "a CSV row that is too short": ("train.csv", b"qid,Question,Tweet,Answer\n1,q,t\n", "row 1 has more or fewer"),
    "an open quote in a CSV": ("train.csv", b'qid,Question,Tweet,Answer\n1,q,"t,a\n', "row 1 is not valid CSV"),
    "a Parquet file that is none": ("train.parquet", b"PAR0", "cannot be read"),
    "very deep JSON": ("train.json", b"[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named(data_folder, case):
    name, content, message = BAD_FILES[case]
    folder = data_folder(validation=[ROW])
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tweet_qa(str(folder))
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_ambiguous_files_are_named(data_folder, tmp_path):
    folder = data_folder(train=[ROW])
    with pytest.raises(InputError, match=r"has no validation file: add validation\.\(json\|jsonl\|csv\|parquet\)"):
        load_tweet_qa(str(folder))
    (folder / "validation.csv").mkdir()
    with pytest.raises(InputError, match="validation.csv is not a file"):
        load_tweet_qa(str(folder))
    (folder / "dev.json").write_text("[]")
    with pytest.raises(InputError, match="validation.csv and dev.json for one split"):
        load_tweet_qa(str(folder))
    with pytest.raises(InputError, match="does not exist"):
        load_tweet_qa(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="is a file, not a folder"):
        load_tweet_qa(str(folder / "train.json"))


def test_examples_and_batches(tokenizer, rows):
    data = TweetQADataset(rows, tokenizer)
    item = data[3]
    prompt = build_prompt(rows[3]["Question"], rows[3]["Tweet"])
    assert prompt == f"Question: {rows[3]['Question']}\nTweet: {rows[3]['Tweet']}\nAnswer:"
    assert item["input_ids"] == tokenizer(prompt).input_ids
    assert item["labels"] == tokenizer(rows[3]["Answer"][0]).input_ids
    items = [data[i] for i in (3, 0, 7)]
    batch = build_collate_fn(tokenizer)(items)
    assert batch["index"].tolist() == [3, 0, 7]
    for i, item in enumerate(items):
        length, target_length = len(item["input_ids"]), len(item["labels"])
        assert batch["input_ids"][i].tolist()[:length] == item["input_ids"]
        assert batch["attention_mask"][i].sum() == length
        assert batch["labels"][i].tolist()[:target_length] == item["labels"]
        assert set(batch["labels"][i].tolist()[target_length:]) <= {-100}
    assert batch["input_ids"].shape[1] == max(len(item["input_ids"]) for item in items)
    assert build_collate_fn(tokenizer, pad_to_multiple_of=8)(items)["input_ids"].shape[1] % 8 == 0


def test_what_is_too_long_is_cut_and_counted(tokenizer, rows):
    data = TweetQADataset(rows, tokenizer, max_input_len=40, max_target_len=4)
    assert max(map(len, data.input_ids)) == 40 and max(map(len, data.labels)) == 4
    assert all(ids[-1] == tokenizer.eos_token_id for ids in data.input_ids + data.labels)
    whole = TweetQADataset(rows, tokenizer)
    assert data.cut_inputs == sum(len(ids) > 40 for ids in whole.input_ids) > 0
    assert data.cut_targets == sum(len(ids) > 4 for ids in whole.labels) > 0
    assert whole.cut_inputs == whole.cut_targets == 0
