"""Scores agree with an implementation that is not the project's own, and keep their promises at the edges."""

import gc
import json
import math
import random
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from helper_functions import (
    exact_match,
    load_sem_model,
    normalize_answer,
    question_type,
    semantic_similarity,
    token_f1,
    tweet_features,
)

# Articles, punctuation and case are what normalization is about, so random text is made to be full of them.
WORDS = st.sampled_from("a an the The cat Cat cat. sat sat! on #mat @mat 7 7. ? ... it's its 🙂 é A.N —".split())
TEXT = st.one_of(st.text(), st.lists(WORDS).map(" ".join))


def torchmetrics_scores(prediction, references):
    scores = squad(
        [{"prediction_text": prediction, "id": "1"}],
        [{"answers": {"answer_start": [0] * len(references), "text": references}, "id": "1"}],
    )
    return float(scores["exact_match"]) / 100, float(scores["f1"]) / 100


def assert_agrees(prediction, references):
    em, f1 = torchmetrics_scores(prediction, references)
    assert exact_match(prediction, references) == em
    assert token_f1(prediction, references) == pytest.approx(f1, abs=1e-6)


@given(TEXT.filter(str.strip), st.lists(TEXT, min_size=1, max_size=3))
def test_em_and_f1_agree_with_torchmetrics_on_random_text(prediction, references):
    assert_agrees(prediction, references)


def test_em_and_f1_agree_with_torchmetrics_on_tweetqa(tweet_qa):
    rng = random.Random(0)
    rows = json.loads((tweet_qa / "validation.json").read_text())
    for row in rows:
        words = row["Answer"][0].split()
        rng.shuffle(words)
        for prediction in (" ".join(row["Tweet"].split()[:3]), " ".join(words), rng.choice(rows)["Answer"][1]):
            assert_agrees(prediction, row["Answer"])


@given(st.lists(TEXT, min_size=1, max_size=3), st.sampled_from(["", " ", "\n\t"]))
def test_a_blank_prediction_scores_0(references, prediction):
    assert exact_match(prediction, references) == token_f1(prediction, references) == 0.0


@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_scores_lie_in_0_to_1_and_more_references_never_hurt(prediction, references):
    em, f1 = exact_match(prediction, references), token_f1(prediction, references)
    assert 0.0 <= em <= f1 <= 1.0
    assert token_f1(prediction, [*references, prediction + " x"]) >= f1


def test_the_best_reference_counts():
    assert token_f1("the red car", ["a blue bus", "Red car!"]) == 1.0
    assert token_f1("red red bus", ["red bus"]) == pytest.approx(0.8)  # P = 2/3, R = 1
    assert exact_match("Cat.", ["dog", "the cat"]) == 1.0


@pytest.mark.parametrize("references", ["cat", []])
def test_references_that_are_no_list_are_refused(references):
    for metric in (exact_match, token_f1):
        with pytest.raises(ValueError, match="list of at least one string"):
            metric("cat", references)


@given(TEXT)
def test_normalizing_twice_changes_nothing(text):
    # Taking out punctuation and articles at once can join pieces to a new article, but not here: words stay apart.
    once = normalize_answer(text)
    assert once == " ".join(once.split()) and not set(once.split()) & {"a", "an", "the"}


class CountingModel:
    """The real similarity model, with a count of what it is asked to encode."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def encode(self, texts, **options):
        self.calls.append(list(texts))
        return self.model.encode(texts, **options)


@pytest.fixture(scope="module")
def sem_model(minilm):
    return load_sem_model(str(minilm), "cpu")


def test_similarity_is_the_best_cosine_of_the_real_model(sem_model):
    predictions = ["a dog", "", "the president", "a dog", "  "]
    references = [["a cat", "a puppy"], ["x"], ["the president"], ["a dog", "x"], ["x"]]
    scores = semantic_similarity(sem_model, predictions, references)
    vectors = {text: sem_model.encode(text) for text in ("a dog", "a cat", "a puppy")}

    def cosine(a, b):
        return float(vectors[a] @ vectors[b]) / math.hypot(*vectors[a]) / math.hypot(*vectors[b])

    assert scores[0] == pytest.approx(max(cosine("a dog", "a cat"), cosine("a dog", "a puppy")), abs=1e-5)
    assert scores[2] == pytest.approx(1.0, abs=1e-5) and scores[3] == pytest.approx(1.0, abs=1e-5)
    assert scores[1] == scores[4] == 0.0
    assert all(-1.0 <= score <= 1.0 for score in scores)


def test_similarity_encodes_each_distinct_text_once(sem_model):
    counting = CountingModel(sem_model)
    semantic_similarity(counting, ["a", "b", "a", ""], [["x", "y"], ["x"], ["y"], ["never asked for"]])
    assert counting.calls == [["a", "b"], ["never asked for", "x", "y"]]
    # After the next epoch the references are the same, in whatever order.
    semantic_similarity(counting, ["", "c", "c", "b"], [["never asked for", "x"], ["y"], ["x"], ["x"]])
    assert counting.calls[2:] == [["b", "c"]]
    assert semantic_similarity(counting, ["", " "], [["x"], ["x"]]) == [0.0, 0.0] and len(counting.calls) == 3
    with pytest.raises(ValueError, match="2 predictions, but references for 1"):
        semantic_similarity(sem_model, ["a", "b"], [["a"]])


def test_the_similarity_model_of_one_seed_is_released_when_the_next_one_loads_its_own(minilm):
    """On a GPU its memory would count as that of the later runs."""
    model = load_sem_model(str(minilm), "cpu")
    assert semantic_similarity(model, ["a"], [["a"]]) == [pytest.approx(1.0, abs=1e-5)]
    former = weakref.ref(model)
    del model
    load_sem_model(str(minilm), "cpu")
    gc.collect()
    assert former() is None


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What is it?", "what"),
        ("who's there", "who"),
        ("whos there", "who"),
        ("Who’s there", "who"),
        ("to whom was it sent?", "who"),
        ("whose car is it?", "whose"),
        ("in which city did they play", "which"),
        ("how many goals", "how"),
        ("according to the tweet, where is he?", "where"),
        ("is it raining?", "other"),
        ("", "other"),
        ("this is it", "other"),
    ],
)
def test_question_types(question, kind):
    assert question_type(question) == kind


@pytest.mark.parametrize(
    ("tweet", "features"),
    [
        ("plain words — and “quotes”, a.b@mail.com? c#", set()),
        ("#Gold at last", {"hashtag"}),
        (".@team wins", {"handle"}),
        ("see https://t.co/a1#b @", {"url"}),
        ("pic.twitter.com/abc123", {"url"}),
        ("won 3 of them", {"number"}),
        ("love ❤️ it", {"emoji"}),
        ("flag 🇺🇸", {"emoji"}),
        ("Acme™ © 日本語", set()),
        ("🚀 #Go2 @nasa www.nasa.gov", {"emoji", "hashtag", "number", "handle", "url"}),
    ],
)
def test_tweet_features(tweet, features):
    assert {name.removeprefix("has_") for name, there in tweet_features(tweet).items() if there} == features
