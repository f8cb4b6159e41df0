"""BLEU-1, ROUGE-L and METEOR are TweetQA's own, to 1e-9 an example, and METEOR's Java process never stays behind."""

import json
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
import warnings

import pytest
from conftest import PROJECT

from helper_functions import leaderboard_scores

needs_java = pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java, and there is no java on the PATH")
METRICS = ["bleu1", "rougeL", pytest.param("meteor", marks=needs_java)]


def squad_normalized(text):
    """As in the official script: lower case, no punctuation, no articles, single spaces."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_scores(metric, pairs):
    """A score a (prediction, references) pair, asked of the component one by one, as the official script does."""
    pairs = [(squad_normalized(prediction), [squad_normalized(r) for r in refs]) for prediction, refs in pairs]
    if metric == "bleu1":
        from nltk.translate.bleu_score import sentence_bleu

        return [sentence_bleu([r.split() for r in refs], p.split(), weights=(1, 0, 0, 0)) for p, refs in pairs]
    if metric == "rougeL":
        from pycocoevalcap.rouge.rouge import Rouge as Scorer
    else:
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    scorer = Scorer()
    return [scorer.compute_score({0: refs}, {0: [p]})[0] for p, refs in pairs]


class RecordedPopen(subprocess.Popen):
    """A Popen that remembers every process it has started."""

    started = []

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.started.append(self)


@pytest.fixture
def started(monkeypatch):
    """The processes that are started during the test."""
    monkeypatch.setattr(RecordedPopen, "started", [])
    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)
    return RecordedPopen.started


def is_gone(pid):
    """Whether there is no process of this id left, not even one that waits to be collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


ODD_PAIRS = [
    ("😂", ["😂"]),
    ("😂😂 so cute 😍", ["so cute 😍", "❤️"]),
    ("👩‍👩‍👧 🇺🇸", ["🇺🇸", "👩‍👩‍👧"]),
    ("café — “won” 3–2", ["cafe won 32", "Café “won”"]),
    ("日本語 のみ", ["日本語", "のみ 日本語"]),
    ("!!!", ["???"]),
    ("!!!", ["yes", "..."]),
    ("the", ["the", "a cat"]),
    ("cat", ["..."]),
    ("cat", ["!", "the cat"]),
    ("two\nlines\r\nof\ttext", ["two lines of text", "lines\n\nof"]),
    ("break\u2028here\x85now\x1cplease\x00!", ["break here now please", "break\x0bhere"]),
    ("this ||| that", ["this ||| that ||| other", "|||"]),
    ("SCORE ||| cat ||| cat", ["EVAL ||| 1.0", "EVAL"]),
    ("x" * 20_000, ["x", "x" * 19_999]),
    (" ".join(f"word{i}" for i in range(2000)), ["word1 word7 word1999", "word3"]),
    ("no " * 1000, ["no no yes"]),
    ("no", ["no " * 1000, " ".join(f"word{i}" for i in range(2000))]),
]


@pytest.fixture(scope="module")
def scored(tweet_qa):
    """(pairs, scores, processes): odd strings and all of the validation split twice, and our scores, in one pass.

    The pass runs under a language with decimal commas, which METEOR by itself does not survive.
    """
    rng = random.Random(0)
    pairs = list(ODD_PAIRS)
    for row in json.loads((tweet_qa / "validation.json").read_text()):
        pairs.append((" ".join(row["Tweet"].split()[:3]), row["Answer"]))
        words = [word for word in row["Answer"][-1].split() if rng.random() < 0.8] + rng.sample(row["Tweet"].split(), 1)
        rng.shuffle(words)
        pairs.append((" ".join(words), row["Answer"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedPopen, "started", [])
        patch.setattr(subprocess, "Popen", RecordedPopen)
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        scores = leaderboard_scores([p for p, _ in pairs], [refs for _, refs in pairs])
        assert os.environ["JAVA_TOOL_OPTIONS"] == "-Duser.language=de -Duser.country=DE"
        return pairs, scores, RecordedPopen.started


@pytest.mark.filterwarnings("ignore::UserWarning")  # nltk warns of each answer without a common bigram
@pytest.mark.parametrize("metric", METRICS)
def test_every_score_is_the_official_components_own(scored, metric):
    pairs, scores, _ = scored
    assert len(pairs) == len(ODD_PAIRS) + 2 * 1086
    assert scores[metric] == pytest.approx(official_scores(metric, pairs), abs=1e-9, rel=0)
    assert all(type(score) is float and 0.0 <= score <= 1.0 for score in scores[metric])
    assert len(set(scores[metric])) > 20  # the comparison is not one of zeros


@needs_java
def test_one_java_process_serves_a_whole_pass_and_is_gone_afterwards(scored):
    _, _, processes = scored
    assert [process.args[0] for process in processes] == ["java"]
    assert is_gone(processes[0].pid)


@needs_java
def test_the_java_process_is_gone_after_an_exception(started, capfd):
    outcome = []

    def score():
        try:
            leaderboard_scores(["half of a surrogate pair \ud800"], [["cat"]])
        except UnicodeEncodeError:
            outcome.append("raised")

    # In a thread: pycocoevalcap's own clean-up would wait for ever here.
    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    thread.join(30)
    assert outcome == ["raised"] and not thread.is_alive()
    assert len(started) == 1 and is_gone(started[0].pid)
    assert capfd.readouterr() == ("", "")


INTERRUPTED_PASS = """
import signal, subprocess
from helper_functions import leaderboard_scores

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)

subprocess.Popen = Popen
signal.signal(signal.SIGINT, signal.default_int_handler)
leaderboard_scores(["cat"] * 20000, [["cat"]] * 20000)
"""


@needs_java
def test_the_java_process_is_gone_after_ctrl_c():
    def start():
        command = [sys.executable, "-c", INTERRUPTED_PASS]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=PROJECT, start_new_session=True, **pipes)

    # A terminal sends Ctrl-C to Java too, a notebook's stop button does not. Both at once, as importing takes seconds.
    passes = [(start(), os.killpg), (start(), os.kill)]
    try:
        for process, send in passes:
            java = int(process.stdout.readline())
            time.sleep(1)
            assert not is_gone(java)
            send(process.pid, signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            assert is_gone(java)
            assert process.returncode == -signal.SIGINT and errors.strip().endswith("KeyboardInterrupt")
            assert "Exception ignored" not in errors
    finally:
        for process, _ in passes:
            process.kill()


def java_on_path(folder, monkeypatch, script):
    """Make `script` the only `java` that is found; without one there is no java at all."""
    if script:
        (folder / "java").write_text(script)
        (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "script",
    [None, "#!/bin/sh\necho 'Unable to locate a Java Runtime.' >&2\nexit 1\n", "#!/bin/sh\nread line\necho oops\n"],
    ids=["no java", "a java that does not start", "a java that stops midway"],
)
def test_without_a_java_that_runs_only_meteor_is_left_out(tmp_path, monkeypatch, capfd, script):
    java_on_path(tmp_path, monkeypatch, script)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = leaderboard_scores(["the red car", "no"] * 50, [["Red car!"], ["a dog", "cats"]] * 50)
    assert scores == {"bleu1": [1.0, 0.0] * 50, "rougeL": [1.0, 0.0] * 50}
    assert capfd.readouterr() == ("", "")


@needs_java
def test_blank_predictions_score_0_whatever_the_references(started):
    # pycocoevalcap's ROUGE-L of nothing against nothing would be 1.
    scores = leaderboard_scores(["", " ", "\n\t"], [["cat"], ["..."], ["the", "x"]])
    assert scores == {"bleu1": [0.0] * 3, "rougeL": [0.0] * 3, "meteor": [0.0] * 3}
    assert leaderboard_scores([], []) == {"bleu1": [], "rougeL": [], "meteor": []}
    assert not started  # nothing to ask METEOR


def test_predictions_and_references_that_do_not_fit_are_refused(started):
    with pytest.raises(ValueError, match="2 predictions, but references for 1"):
        leaderboard_scores(["a", "b"], [["a"]])
    for references in ("cat", []):
        with pytest.raises(ValueError, match="list of at least one string"):
            leaderboard_scores(["cat"], [references])
    assert not started
