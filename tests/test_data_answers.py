"""An Answer that some program wrote as text is read as the list that it is, or refused with its row."""

import json

import numpy as np
import pandas as pd
import pytest
from data_files import PANDAS, PRINTED, ROWS, as_csv, csv_of_answers, loaded, refusal, write_splits
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.answers import parse_answer, read_references
from pipeline.data import load_with_note


@pytest.mark.parametrize("spelling", PRINTED)
def test_a_list_that_a_program_wrote_as_text_is_read(tmp_path, spelling):
    rows = [row for row in ROWS if spelling not in PANDAS or not set("'\\\n\t") & set("".join(row["Answer"]))]
    printed = [row | {"Answer": PRINTED[spelling](row["Answer"])} for row in rows]
    assert loaded(write_splits(tmp_path, "train.csv", as_csv(printed))) == rows
    assert len(rows) >= 5


@pytest.mark.parametrize("spelling", PANDAS)
@pytest.mark.parametrize("text", ["a\\b", "c:\\new", "two\nlines", "it's"])
def test_what_pandas_printed_is_read_only_where_that_is_without_doubt(spelling, text):
    with pytest.raises(ValueError, match="looks like a list and cannot be read as one"):
        read_references(PRINTED[spelling]([text, "b"]))


@pytest.mark.parametrize("spelling", [name for name in PRINTED if name not in PANDAS])
def test_every_real_answer_is_read_back_from_every_spelling(tweet_qa, spelling):
    answers = [row["Answer"] for row in json.loads((tweet_qa / "validation.json").read_text())]
    assert len(answers) == 1086
    for texts in answers:
        assert read_references(PRINTED[spelling](texts)) == (texts, 0)


def test_no_real_answer_looks_like_a_list(tweet_qa):
    answers = [
        text
        for split in ("train", "validation")
        for row in json.loads((tweet_qa / f"{split}.json").read_text())
        for text in row["Answer"]
    ]
    assert len(answers) == 12864
    assert [text for text in answers if read_references(text) != ([text], 0)] == []


OTHER_TEXT = """
[laughs]
[sic] he said
[5 stars]
[he] and [she]
[none of them]
[]x
(me)
(me, myself)
('a')
('a' 'b')
("forever" she sang)
"[laughs]"
{{URL}}
{@user@}
<3 you
5
True
none
null
nan, his grandma
array of hope
set (the table)
c (the vitamin)
np. fine
it's
a, b
"""


@pytest.mark.parametrize("text", OTHER_TEXT.strip().split("\n"))
def test_other_text_is_one_answer(text):
    assert read_references(text) == ([text], 0)
    assert parse_answer(text) == [text]


UNREADABLE = [
    "['a', b]",
    "['a', 'b",
    "['a'",
    "['a'] and ['b']",
    "['\\x']",
    "['a' ... 'z']",
    "array(['a', ..., 'z'], dtype=object)",
    "['a', Ellipsis]",
    "[the rockets, rockets]",
    "{the rockets,rockets}",
    "[“a”, “b”]",
    "[‘a’]",
    "('a', b)",
    "{'text': ['a'",
    "{text=[a], answer_start=[5]}",
    "['a'; 'b']",
    "[Decimal('5')]",
    "[Timestamp('2016-02-12'), 'a']",
    "array('a'",
    "np.str_('a'",
    "<map object at 0x7f3a00>",
    "<generator object answers at 0x7f3a00>",
    "0    rockets\n1    the rockets\ndtype: object",
    "0    rockets\nName: Answer, dtype: str",
    "['a', 'b']\nCategories (2, str): ['a', 'b']",
    "[None, b]",
    "c('a', ",
    "OrderedDict([('text', ['a'])])",
    "dict_values(['a', 'b'])",
    'list("a", "b")',
    'shape: (2,)\nSeries: \'\' [str]\n[\n\t"a"\n\t"b"\n]',
    "<pyarrow.ListScalar: ['a']>",
    '[""a"", ""b""]',
]


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_looks_like_a_list_and_is_not_one_is_refused_with_its_row(tmp_path, text):
    message = refusal(write_splits(tmp_path, "train.csv", csv_of_answers("fine", text)))
    assert "train.csv, row 2: 'Answer' looks like a list and cannot be read as one" in message
    assert 'write it as JSON, ["first", "second"]' in message
    # The advice works, also for an answer that is meant like this.
    assert read_references(json.dumps([text])) == ([text], 0)


def test_lists_without_quotes_are_noticed_by_their_brackets(tmp_path):
    shown = [f"[{texts[0]}]" for texts in (["rockets"], ["the moon"], ["two"], ["it is"], ["none"])]
    message = refusal(write_splits(tmp_path, "train.csv", csv_of_answers(*shown)))
    assert "train.csv, row 1: 'Answer' is in square brackets, as in every row" in message
    rows = loaded(write_splits(tmp_path / "some", "train.csv", csv_of_answers(*shown, "and a plain one")))
    assert [row["Answer"] for row in rows[:2]] == [["[rockets]"], ["[the moon]"]]


# numpy itself drops a zero byte at the end of a text.
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(str.strip),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_comes_back_from_every_print(texts):
    for spelling in ("Python", "JSON", "numpy's str of objects", "numpy's repr of objects", "numpy 2's scalars"):
        assert parse_answer(PRINTED[spelling](texts)) == texts


@given(st.text(st.sampled_from("[](){}'\",:= \\\nabcnprtuxy.0-<>")) | st.text(st.characters()))
@example("{['a']: 'b'}")
@example("{('a', 'b'): ['c']}")
@example("[" * 100_000)
@example("np.str_(" * 10_000)
def test_any_text_is_read_or_refused(text):
    try:
        references, _ = read_references(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(references, list)


@pytest.mark.parametrize("missing", ["None", "nan", "null", "NaN", "<NA>", "''", '""', "' '"])
@pytest.mark.parametrize("first", [True, False])
def test_missing_references_are_left_out_and_counted(tmp_path, missing, first):
    texts = [missing, "'rockets'"] if first else ["'rockets'", missing]
    for spelled in (f"[{', '.join(texts)}]", f"array([{', '.join(texts)}], dtype=object)", f"[{' '.join(texts)}]"):
        folder = write_splits(tmp_path, "train.csv", csv_of_answers("fine", spelled))
        splits, note = load_with_note(str(folder))
        assert [row["Answer"] for row in splits["train"]] == [["fine"], ["rockets"]]
        assert note == "1 missing references were left out"
    message = refusal(write_splits(tmp_path, "train.csv", csv_of_answers("fine", f"[{missing}]")))
    assert "train.csv, row 2: 'Answer' is empty: at least one reference answer is needed" in message


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "NaT", "<NA>"])
def test_a_missing_answer_written_as_a_word_is_refused_with_its_row(tmp_path, word):
    folder = write_splits(tmp_path, "train.csv", csv_of_answers("fine", word))
    assert f"train.csv, row 2: 'Answer' is {word}, as pandas writes a missing value" in refusal(folder)
    write_splits(tmp_path, "train.csv", csv_of_answers("fine", json.dumps([word])))  # as the message says
    assert loaded(tmp_path)[1]["Answer"] == [word]
    write_splits(tmp_path, "test.csv", csv_of_answers(word))
    assert loaded(tmp_path, "test")[0]["Answer"] == []


WRONG_ANSWERS = {
    "a number": (5, "must be text or a list of texts, not int"),
    "a truth value": (True, "must be text or a list of texts, not bool"),
    "numbers": ([5, 6], "must be text, not int"),
    "numbers as text": ("[5, 6]", "must be text, not int"),
    "numpy's numbers": ("[np.int64(5)]", "must be text, not int"),
    "a truth value among texts": ("['a', True]", "must be text, not bool"),
    "bytes": ("[b'a']", "must be text, not bytes"),
    "a list of lists": ([["a"], ["b"]], "must be text, not list"),
    "a list of lists as text": ("[['a' 'b']]", "must be text, not list"),
    "a list as text in a list": (["['a', 'b']"], "has a list inside a list"),
    "an object without text": ({"answer": "a"}, "is an object without 'text': it has ['answer']"),
    "a dict as text": ("{'a': 'b'}", "is an object without 'text': it has ['a']"),
    "SQuAD 2's question without an answer": ({"text": [], "answer_start": []}, "is empty: at least one reference"),
    "NaN": (float("nan"), "is empty: at least one reference answer is needed"),
    "nothing": ([None, float("nan"), ""], "is empty: at least one reference answer is needed"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_an_answer_of_another_type_is_refused_with_its_row(tmp_path, case):
    answer, message = WRONG_ANSWERS[case]
    folder = write_splits(tmp_path, "train.json", json.dumps([ROWS[0], ROWS[1], ROWS[0] | {"Answer": answer}]))
    assert f"train.json, row 3: 'Answer' {message}" in refusal(folder)


def test_what_parquet_holds_is_read(tmp_path):
    """Lists, arrays, structs, lists of structs and texts; and a number as an id."""
    kinds = {
        "lists": [row["Answer"] for row in ROWS],
        "arrays": [np.array(row["Answer"], dtype=object) for row in ROWS],
        "structs": [{"text": row["Answer"], "answer_start": [1] * len(row["Answer"])} for row in ROWS],
        "lists of structs": [[{"text": text, "answer_start": 1} for text in row["Answer"]] for row in ROWS],
        "printed": [str(np.array(row["Answer"])) for row in ROWS],
    }
    for kind, answers in kinds.items():
        folder = write_splits(tmp_path / kind, "unused", "")
        pd.DataFrame(ROWS).assign(Answer=answers, qid=range(len(ROWS))).to_parquet(folder / "train.parquet")
        assert loaded(folder) == [row | {"qid": str(n)} for n, row in enumerate(ROWS)]
    frame = pd.DataFrame(ROWS).assign(Answer=[["a"], None, *kinds["lists"][2:]])
    frame.to_parquet(folder / "train.parquet")
    assert "train.parquet, row 2: 'Answer' is empty" in refusal(folder)
