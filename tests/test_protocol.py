"""The protocol: held-out rows share no tweet with training, leaks are counted, and slices are what they say."""

import random
from argparse import Namespace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helper_functions import InputError, load_tweet_qa, question_type, tweet_features
from pipeline.breakdown import WELL_POPULATED, breakdown
from pipeline.data import check_can_hold_out, count_repeats, hold_out, select_rows
from pipeline.text import tweet_key


def rows_about(tweets):
    return [{"Question": f"q{i}?", "Tweet": tweet, "Answer": ["a"], "qid": str(i)} for i, tweet in enumerate(tweets)]


TWEETS = st.lists(st.sampled_from(["a", "A", " a ", "b", "c c", "C  c", "d", "e", "f"]), min_size=2, max_size=40)


@given(TWEETS, st.integers(1, 20), st.integers(0, 3), st.sets(st.sampled_from("abd")))
def test_no_tweet_stands_on_both_sides(tweets, count, seed, taken):
    rows = rows_about(tweets)
    try:
        held = hold_out(rows, count, seed, taken)
    except InputError:
        return
    assert held == sorted(set(held)) and 0 < len(held) <= count and len(held) < len(rows)
    inside = {tweet_key(rows[i]["Tweet"]) for i in held}
    outside = {tweet_key(row["Tweet"]) for i, row in enumerate(rows) if i not in held}
    assert not inside & outside and not inside & taken
    assert held == hold_out(rows, count, seed, taken)


@pytest.mark.parametrize("count", [5, 6, 1000])
def test_a_holdout_of_all_rows_or_more_is_refused(count):
    with pytest.raises(InputError, match=f"--holdout {count}: cannot set that many of 5 training rows aside"):
        hold_out(rows_about("abcde"), count, seed=0, taken={"a"})


def test_a_holdout_for_which_too_few_rows_are_free_is_refused(data_folder):
    """As where the data were split by row: nearly every tweet of train is in validation too."""
    rows = rows_about("abcdefghij" * 2)
    with pytest.raises(InputError, match="--holdout 5: only 4 of 20 training rows are about .* too; give fewer"):
        check_can_hold_out(rows, 5, taken=set("abcdefgh"))
    with pytest.raises(InputError, match="--holdout 5: only 0 of 20 training rows .*; none can be set aside"):
        check_can_hold_out(rows, 5, taken=set("abcdefghij"))
    check_can_hold_out(rows, 4, taken=set("abcdefgh"))
    assert [rows[place]["Tweet"] for place in hold_out(rows, 4, seed=0, taken=set("abcdefgh"))] == list("ijij")
    assert len(hold_out(rows, 3, seed=0, taken=set("abcdefgh"))) == 2  # a tweet's rows are not divided
    folder = data_folder(train=rows, validation=rows[:8])
    with pytest.raises(InputError, match="--holdout 5: only 4 of 20"):
        chosen(folder, holdout=5)
    for again in ("resume", "eval_only"):  # of a run that an older version started
        assert len(chosen(folder, holdout=5, **{again: True}).held_out) == 4


def chosen(tweet_qa, **given):
    defaults = {"dataset": str(tweet_qa), "holdout": 0, "drop_leaked": False, "holdout_seed": 42}
    defaults |= {"resume": False, "eval_only": False}
    return select_rows(
        Namespace(**defaults | {"max_train_samples": None, "train_subset": None, "max_eval_samples": None} | given)
    )


def test_holdout_on_the_real_data(tweet_qa):
    train = load_tweet_qa(str(tweet_qa))["train"]
    rows, numbers = (chosen(tweet_qa, holdout=500).rows, chosen(tweet_qa, holdout=500).held_out)
    assert len(rows["holdout"]) == len(numbers) == 500 and len(rows["train"]) == 10692 - 500
    assert rows["holdout"] == [train[number] for number in numbers]
    keys = {role: {tweet_key(row["Tweet"]) for row in rows[role]} for role in rows}
    assert not keys["holdout"] & (keys["train"] | keys["validation"])
    assert chosen(tweet_qa, holdout=500).held_out == numbers
    others = chosen(tweet_qa, holdout=500, holdout_seed=43).held_out
    assert len(set(others) & set(numbers)) < 100  # another seed chooses other rows


def test_leaks_are_counted_and_dropped(tweet_qa):
    whole = chosen(tweet_qa).rows
    assert chosen(tweet_qa).note == (
        "check: 46 training rows repeat | the tweets of 6 validation and 1 test rows are also in train"
    )
    dropped, note = chosen(tweet_qa, drop_leaked=True).rows, chosen(tweet_qa, drop_leaked=True).note
    others = {tweet_key(row["Tweet"]) for role in ("validation", "test") for row in whole[role]}
    leaked = [row for row in whole["train"] if tweet_key(row["Tweet"]) in others]
    assert dropped["train"] == [row for row in whole["train"] if row not in leaked] and leaked
    assert note.endswith(f"({len(leaked)} training rows dropped)")


def test_repeats_are_the_same_question_and_answer_about_the_same_tweet():
    row = {"Question": "Who?", "Tweet": "A b", "Answer": ["x"], "qid": "1"}
    again = {"Question": "who?", "Tweet": "a  B", "Answer": ["x", "y"], "qid": "2"}
    assert count_repeats([row, again, row | {"Answer": ["z"]}, row | {"Question": "Where?"}]) == 1


def frame_of(rows, f1):
    frame = pd.DataFrame(
        {
            "question": [row["Question"] for row in rows],
            "tweet": [row["Tweet"] for row in rows],
            "references": [row["Answer"] for row in rows],
            "em": [float(value == 1) for value in f1],
            "f1": f1,
            "sem_sim": f1,
            "question_type": [question_type(row["Question"]) for row in rows],
        }
    )
    return frame.join(pd.DataFrame([tweet_features(row["Tweet"]) for row in rows]))


def test_the_breakdown_counts_each_example_once_a_feature(tweet_qa):
    rows = load_tweet_qa(str(tweet_qa))["validation"]
    rng = random.Random(0)
    f1 = [rng.choice([0.0, 0.5, 1.0]) if question_type(row["Question"]) != "who" else 0.1 for row in rows]
    table = breakdown(frame_of(rows, f1))
    assert (table.groupby("feature")["count"].sum() == len(rows)).all()
    assert set(table["feature"]) == {
        "question",
        "answer length",
        "span",
        "hashtag",
        "handle",
        "number",
        "emoji",
        "url",
    }
    first = table.iloc[0]
    assert (first["feature"], first["value"], first["f1"]) == ("question", "who", pytest.approx(0.1))
    large = table[table["count"] >= WELL_POPULATED]
    assert table["count"].iloc[: len(large)].min() >= WELL_POPULATED  # small slices come last
    assert large["f1"].is_monotonic_increasing
    known = table[table["f1_low"].notna()]  # the others' examples have one score
    assert (known["f1_low"] <= known["f1"] + 1e-12).all() and (known["f1"] <= known["f1_high"] + 1e-12).all()
    assert 15 < len(known) < len(table)
    what = table[(table["feature"] == "question") & (table["value"] == "what")].iloc[0]
    values = pd.Series([v for v, row in zip(f1, rows, strict=True) if question_type(row["Question"]) == "what"])
    half_width = 1.96 * values.std() / len(values) ** 0.5  # the normal approximation, good for hundreds of values
    assert what["f1_high"] - what["f1"] == pytest.approx(half_width, rel=0.15)
    assert what["f1"] - what["f1_low"] == pytest.approx(half_width, rel=0.15)


def test_a_literal_span_is_found_word_for_word():
    tweets = ["The Red Car, again!", "The redcar", "so sad", "a bus"]
    rows = [row | {"Answer": ["nothing", "red car"]} for row in rows_about(tweets)]
    table = breakdown(frame_of(rows, [0.0, 1.0, 1.0, 1.0])).set_index("value")
    assert table.loc["answer in the tweet", "count"] == 1 and table.loc["answer in the tweet", "f1"] == 0
    assert table.loc["answer not in the tweet", "count"] == 3
