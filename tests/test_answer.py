"""`answer()` takes what a notebook has, or says what it takes; a tweet too long never costs the end of the prompt."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import helper_functions
from helper_functions import (
    InputError,
    TweetQADataset,
    answer,
    build_prompt,
    load_model_and_tokenizer,
    load_tweet_qa,
    tokenize_prompts,
)

QUESTIONS = ["who won?", "where is it?", "how many?"]
TWEETS = ["The Rockets won again! @nba", "Now open in Zimby (@zimby)", "We were 300 people, or more"]
SHORT = {"beams": 1, "max_target_len": 8}


@pytest.fixture(scope="module")
def model(standin):
    return load_model_and_tokenizer(str(standin))[0]


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """The answer to each question about each tweet, asked one by one: expected[question, tweet]."""
    found = {(q, t): answer(model, tokenizer, "cpu", q, t, **SHORT) for q in QUESTIONS for t in TWEETS}
    assert len(set(found.values())) > 5  # a model that always says the same would prove nothing
    return found


def columns_of_datasets(texts):
    import datasets

    return datasets.Dataset.from_dict({"text": texts})["text"]


KINDS = {
    "a list": list,
    "a tuple": tuple,
    "a Series": pd.Series,
    "a Series with an index of its own": lambda texts: pd.Series(texts, index=[7, 7, "x"]),
    "a Series of objects": lambda texts: pd.Series(texts, dtype=object),
    "a categorical Series": lambda texts: pd.Series(texts, dtype="category"),
    "a column": lambda texts: pd.DataFrame({"text": texts})["text"],
    "an Index": pd.Index,
    "an array": np.array,
    "an array of objects": lambda texts: np.array(texts, dtype=object),
    "an array of numpy's strings": lambda texts: np.array(texts, dtype=np.dtypes.StringDType()),
    "an array of pandas": lambda texts: pd.array(texts, dtype="string"),
    "a list of numpy's scalars": lambda texts: [np.str_(text) for text in texts],
    "a column of datasets": columns_of_datasets,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_notebook_has_is_taken(model, tokenizer, expected, kind):
    make = KINDS[kind]
    pairs = [expected[pair] for pair in zip(QUESTIONS, TWEETS, strict=True)]
    assert answer(model, tokenizer, "cpu", make(QUESTIONS), make(TWEETS), **SHORT) == pairs
    assert answer(model, tokenizer, "cpu", QUESTIONS, make(TWEETS), **SHORT, batch_size=2) == pairs
    about_each = [expected[QUESTIONS[1], tweet] for tweet in TWEETS]
    assert answer(model, tokenizer, "cpu", QUESTIONS[1], make(TWEETS), **SHORT) == about_each
    of_one = [expected[question, TWEETS[2]] for question in QUESTIONS]
    assert answer(model, tokenizer, "cpu", make(QUESTIONS), TWEETS[2], **SHORT) == of_one


def test_one_text_gives_one_answer_and_a_list_a_list(model, tokenizer, expected):
    first = expected[QUESTIONS[0], TWEETS[0]]
    assert answer(model, tokenizer, "cpu", np.str_(QUESTIONS[0]), TWEETS[0], **SHORT) == first
    for question, tweet in (([QUESTIONS[0]], TWEETS[0]), (QUESTIONS[0], [TWEETS[0]]), ([QUESTIONS[0]], (TWEETS[0],))):
        assert answer(model, tokenizer, torch.device("cpu"), question, tweet, **SHORT) == [first]
    text, score = answer(model, tokenizer, "cpu", QUESTIONS[0], TWEETS[0], **SHORT, return_score=True)
    texts, scores = answer(model, tokenizer, "cpu", QUESTIONS[0], TWEETS[:1], **SHORT, return_score=True)
    assert ([text], [score]) == (texts, pytest.approx(scores)) and isinstance(score, float) and score < 0


def test_answers_and_scores_are_in_the_order_of_the_questions(model, tokenizer, rows):
    """They are computed in order of length."""
    questions, tweets = [row["Question"] for row in rows], [row["Tweet"] for row in rows]
    for beams in (1, 3):
        options = SHORT | {"beams": beams, "return_score": True}
        texts, scores = answer(model, tokenizer, "cpu", questions, tweets, **options, batch_size=7)
        alone = [answer(model, tokenizer, "cpu", *pair, **options) for pair in zip(questions, tweets, strict=True)]
        assert texts == [text for text, _ in alone] and len(set(texts)) > 10
        assert scores == pytest.approx([score for _, score in alone], abs=1e-4)


@pytest.mark.parametrize("empty", [[], (), pd.Series([], dtype=str), np.array([], dtype=str)])
def test_nothing_asked_is_nothing_answered(model, tokenizer, empty):
    assert answer(model, tokenizer, "cpu", empty, empty) == []
    assert answer(model, tokenizer, "cpu", "who?", empty) == answer(model, tokenizer, "cpu", empty, "tweet") == []
    assert answer(model, tokenizer, "cpu", empty, empty, return_score=True) == ([], [])


FRAME = pd.DataFrame({"q": QUESTIONS, "t": TWEETS})
OTHER_TYPES = {
    "a DataFrame": (FRAME[["t"]], "not DataFrame: give one of its columns"),
    "a dict": ({"t": TWEETS}, "not dict"),
    "a dict's values": ({"t": TWEETS[0]}.values(), "not dict_values"),
    "a set": (set(TWEETS), "not set"),
    "a generator": ((text for text in TWEETS), "not generator"),
    "a map": (map(str, TWEETS), "not map"),
    "bytes": (TWEETS[0].encode(), "not bytes"),
    "a bytearray": (bytearray(b"a tweet"), "not bytearray"),
    "None": (None, "not NoneType"),
    "NaN": (float("nan"), "not float"),
    "a number": (5, "not int"),
    "a table of numpy": (FRAME[["t"]].to_numpy(), "not ndarray with 2 dimensions"),
    "an array of no dimension": (np.array("a tweet"), "not ndarray with 0 dimensions"),
}


@pytest.mark.parametrize("case", OTHER_TYPES)
def test_another_type_is_refused_with_what_is_taken(model, tokenizer, case):
    value, message = OTHER_TYPES[case]
    for question, tweet, name in ((QUESTIONS, value, "tweet"), (value, TWEETS, "question"), ("who?", value, "tweet")):
        with pytest.raises(TypeError) as caught:
            answer(model, tokenizer, "cpu", question, tweet)
        taken = "must be a string, or a list, tuple, Series or one-dimensional array of strings, "
        assert str(caught.value) == f"{name} {taken}{message}"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "is missing (None): it must be a string"),
        (float("nan"), "is missing (nan): it must be a string"),
        (np.float64("nan"), "is missing (nan): it must be a string"),
        (pd.NA, "is missing (<NA>): it must be a string"),
        (pd.NaT, "is missing (NaT): it must be a string"),
        (5, "is int: it must be a string"),
        (b"a tweet", "is bytes: it must be a string"),
        (["a tweet"], "is list: it must be a string"),
    ],
)
def test_an_entry_that_is_missing_or_no_text_is_named_with_its_position(model, tokenizer, entry, message):
    with pytest.raises(TypeError) as caught:
        answer(model, tokenizer, "cpu", QUESTIONS, [*TWEETS[:2], entry])
    assert str(caught.value) == f"tweet at position 2 {message}"
    with pytest.raises(TypeError) as caught:
        answer(model, tokenizer, "cpu", [entry, *QUESTIONS[:2]], "a tweet")
    assert str(caught.value) == f"question at position 0 {message}"
    if entry is None or pd.api.types.is_scalar(entry) and pd.isna(entry):
        with pytest.raises(TypeError, match="tweet at position 1 is missing"):
            answer(model, tokenizer, "cpu", "who?", pd.Series([TWEETS[0], entry, "x"], dtype="string"))


@pytest.mark.parametrize("text", ["\ud83d", "well \ude80 done", "\ud83d and \ude80"])
def test_an_unpaired_surrogate_is_named_with_its_position_as_the_data_s_are(model, tokenizer, tmp_path, text):
    with pytest.raises(ValueError) as caught:
        answer(model, tokenizer, "cpu", QUESTIONS, [TWEETS[0], text, TWEETS[2]])
    problem = "contains an unpaired surrogate, which is not a valid character: fix the text"
    assert str(caught.value) == f"tweet at position 1 {problem}"
    with pytest.raises(ValueError, match=f"^question {problem}$"):
        answer(model, tokenizer, "cpu", text, TWEETS)
    row = {"Question": "q", "Tweet": text, "Answer": ["a"], "qid": "1"}
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match=f"row 1: 'Tweet' {problem}$"):
        load_tweet_qa(str(tmp_path))


@pytest.mark.parametrize("name", ["beams", "batch_size", "max_target_len", "max_input_len"])
@pytest.mark.parametrize("value", [0, -1, np.int64(0), False])
def test_options_below_1_are_refused(model, tokenizer, name, value):
    for tweet in (TWEETS, []):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1, not {value}$"):
            answer(model, tokenizer, "cpu", "who?", tweet, **{name: value})
    for value in (1.5, "2", None):
        with pytest.raises(TypeError, match=f"^{name} must be a whole number, not {value!r}$"):
            answer(model, tokenizer, "cpu", "who?", TWEETS, **{name: value})


def test_lists_of_different_lengths_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="^2 questions, but 3 tweets: the lists must have the same length$"):
        answer(model, tokenizer, "cpu", QUESTIONS[:2], TWEETS)
    with pytest.raises(ValueError, match="^1 questions, but 3 tweets"):  # a list of one is not repeated, a string is
        answer(model, tokenizer, "cpu", QUESTIONS[:1], pd.Series(TWEETS))


# ------------------------------------------------------------------------------------------- prompts that are too long


def old_ids(tokenizer, prompts):
    """How prompts became tokens before their tweets were shortened."""
    parts = [prompts[start : start + 1000] for start in range(0, len(prompts), 1000)]
    return [ids for part in parts for ids in tokenizer(text=part, truncation=True, max_length=256).input_ids]


@pytest.mark.parametrize("which", ["flan-t5-small's", "the demo's"])
def test_every_real_prompt_has_the_tokens_it_had(tweet_qa, tokenizer, which):
    if which == "the demo's":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            helper_functions.Path(helper_functions.__file__).parent / "demo" / "tiny-t5"
        )
    rows = [row for rows in load_tweet_qa(str(tweet_qa)).values() for row in rows]
    ids, cut = tokenize_prompts(tokenizer, 256, [(row["Question"], row["Tweet"]) for row in rows])
    assert cut == 0 and len(ids) == 13757
    assert ids == old_ids(tokenizer, [build_prompt(row["Question"], row["Tweet"]) for row in rows])


TEMPLATES = {
    "the project's": helper_functions.PROMPT,
    "the tweet first": "tweet: {tweet} | question: {question} | answer in a few words:",
    "the tweet last": "Answer the question.\nQuestion: {question}\nTweet: {tweet}",
    "the tweet twice": "{tweet} -- {question} -- again: {tweet} -- answer:",
    "with braces": "{{context}} {tweet} {{question}} {question} {{end}}",
    "glued": "<{question}><{tweet}>the answer is",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("limit", [40, 64])
def test_a_long_tweet_loses_words_at_its_end_and_the_prompt_nothing(monkeypatch, tokenizer, rows, template, limit):
    monkeypatch.setattr(helper_functions, "PROMPT", TEMPLATES[template])
    data = TweetQADataset(rows, tokenizer, max_input_len=limit)
    whole = TweetQADataset(rows, tokenizer, max_input_len=10_000)
    assert data.cut_inputs == sum(len(ids) > limit for ids in whole.input_ids) > 3 and whole.cut_inputs == 0
    for row, ids, all_ids in zip(rows, data.input_ids, whole.input_ids, strict=True):
        if len(all_ids) <= limit:
            assert ids == all_ids
            continue
        assert len(ids) <= limit and ids[-1] == tokenizer.eos_token_id
        words, starts = row["Tweet"].split(), []
        end = 0
        for word in words:
            end = row["Tweet"].index(word, end) + len(word)
            starts.append(row["Tweet"][:end])
        fitting = [s for s in ["", *starts] if len(tokenizer(build_prompt(row["Question"], s)).input_ids) <= limit]
        # As many words as fit, and of a word of over 20 characters perhaps its beginning.
        kept = tokenizer(build_prompt(row["Question"], fitting[-1])).input_ids
        assert ids == kept or (len(ids) > len(kept) and max(map(len, words)) > 20)


def test_a_prompt_as_long_as_allowed_is_not_cut(tokenizer):
    question, tweet = QUESTIONS[0], "one two three four five six seven eight nine ten"
    ids = tokenizer(build_prompt(question, tweet)).input_ids
    assert tokenize_prompts(tokenizer, len(ids), [(question, tweet)]) == ([ids], 0)
    shorter, cut = tokenize_prompts(tokenizer, len(ids) - 1, [(question, tweet)])
    assert cut == 1 and shorter == [tokenizer(build_prompt(question, tweet.removesuffix(" ten"))).input_ids]


def test_texts_without_blanks_and_long_questions_are_cut_too(tokenizer):
    end = tokenizer("\nAnswer:").input_ids
    pairs = [
        ("who?", "x" * 100_000),
        ("who?", "abc/" * 5_000),
        ("why " * 500, "a short tweet"),
        ("y" * 9_000, TWEETS[0]),
    ]
    ids, cut = tokenize_prompts(tokenizer, 64, pairs)
    assert cut == 4 and all(40 < len(one) <= 64 and one[-len(end) :] == end for one in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith("Question: who? Tweet: xxx")
    asked = tokenizer.decode(ids[2], skip_special_tokens=True)
    assert asked.startswith("Question: why why") and asked.endswith("why Tweet: Answer:")
    with pytest.raises(ValueError, match="^max_input_len 5 is too small: a prompt has 7 tokens besides its texts$"):
        tokenize_prompts(tokenizer, 5, pairs)


def test_answer_cuts_as_training_does_and_says_so_once(model, tokenizer, rows):
    questions, tweets = [row["Question"] for row in rows], [row["Tweet"] for row in rows]
    cut = TweetQADataset(rows, tokenizer, max_input_len=48).cut_inputs
    assert 0 < cut < 40
    with pytest.warns(UserWarning) as caught:
        answers = answer(model, tokenizer, "cpu", questions, tweets, **SHORT, max_input_len=48, batch_size=3)
    said = f"{cut} of 40 prompts were cut to 48 tokens (max_input_len): words at the end of the tweet were left out"
    assert [str(warning.message) for warning in caught] == [said]
    assert caught[0].filename == __file__  # the notebook's line, not one of the project's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = answer(model, tokenizer, "cpu", questions, tweets, **SHORT)
        # A tweet that is longer than what was cut of it gives the same answer.
        data = TweetQADataset(rows, tokenizer, max_input_len=48)
        uncut = [
            n
            for n, row in enumerate(rows)
            if data.input_ids[n] == tokenizer(build_prompt(row["Question"], row["Tweet"])).input_ids
        ]
        assert len(uncut) == 40 - cut and [answers[n] for n in uncut] == [whole[n] for n in uncut]
    long = "We won the cup, again! " + "la " * 400
    with pytest.warns(UserWarning, match="^1 of 1 prompts were cut to 256 tokens"):
        one = answer(model, tokenizer, "cpu", "who won?", long, **SHORT)
    with pytest.warns(UserWarning, match="^2 of 3 prompts"):
        three = answer(model, tokenizer, "cpu", "who won?", [long, "we did", long + "!"], **SHORT)
    assert three == [one, answer(model, tokenizer, "cpu", "who won?", "we did", **SHORT), one]


def test_training_counts_and_cuts_the_same(tokenizer):
    row = {"Question": "who won?", "Tweet": "la " * 400, "Answer": ["we"], "qid": "1"}
    data = TweetQADataset([row, row | {"Tweet": "short"}], tokenizer)
    assert data.cut_inputs == 1 and len(data.input_ids[0]) == 256
    assert tokenizer.decode(data.input_ids[0], skip_special_tokens=True).endswith("la la Answer:")
