"""Promises about demo/: its files come from its generator, no name leaks, and learning on it works."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import pandas as pd
import pytest
from conftest import PROJECT, run_script

sys.path.insert(0, str(PROJECT / "demo"))
import make_tweets
import pretrain
import pretraining_text

from helper_functions import load_tweet_qa, normalize_answer, question_type

TWEETS = PROJECT / "demo" / "tweets"
CHECKPOINT = PROJECT / "demo" / "tiny-t5"


@pytest.fixture(scope="module")
def splits():
    return load_tweet_qa(str(TWEETS))


def test_the_tweets_are_what_their_generator_writes(tmp_path):
    make_tweets.write_tweets(tmp_path / "tweets", seed=0)
    for split in ("train", "validation", "test"):
        assert (tmp_path / "tweets" / f"{split}.json").read_bytes() == (TWEETS / f"{split}.json").read_bytes()
    assert len(list(TWEETS.iterdir())) == 3


def test_no_name_of_validation_or_test_stands_in_train(splits):
    train = " ".join(" ".join([row["Question"], row["Tweet"], *row["Answer"]]) for row in splits["train"]).lower()
    train_words = set(re.findall(r"[^\W_]+", train))
    glued = " ".join(re.findall(r"[@#]\w+", train))  # names stand in handles and hashtags without spaces
    names = make_tweets.split_names(make_tweets.read("words.json")["entities"], random.Random(0))
    unseen = {name.lower() for split in ("validation", "test") for kind in names[split].values() for name in kind}
    handwritten = " ".join(entry["tweet"] for entry in make_tweets.read("handwritten.json"))
    # In the hand-written rows a name is a capital letter that no sentence begins with.
    unseen |= {name.lower() for name in re.findall(r"(?<=[a-z,@] )@?([A-Z][a-z]{4,})", handwritten)}
    unseen -= set("saturday tuesday october january".split())
    assert len(unseen) > 150
    assert sorted(unseen & train_words) == []
    assert not {name for name in unseen if name in glued and len(name) > 4}


def test_the_sample_is_like_tweet_qa(splits):
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 960, "validation": 240, "test": 100}
    assert all(len(row["Answer"]) == 2 for row in splits["validation"])
    asked = Counter(question_type(row["Question"]) for row in splits["validation"])
    assert all(asked[word] >= 3 for word in ("what", "who", "how", "where", "why", "which", "when", "whose"))
    handwritten = {entry["tweet"] for entry in make_tweets.read("handwritten.json")}
    assert sum(row["Tweet"] in handwritten for row in splits["validation"]) >= 60
    for rows in splits.values():  # abstractive, as TweetQA is, but less so
        spans = [normalize_answer(row["Answer"][0]) in normalize_answer(row["Tweet"]) for row in rows]
        assert 0.03 < 1 - sum(spans) / len(rows) < 0.4
    assert len({row["qid"] for rows in splits.values() for row in rows}) == 1300


@pytest.mark.slow
def test_pretraining_runs_and_learns(tmp_path):
    """Each command on a few steps: tokenizer, model, all stages, log and curve; and the loss falls."""
    pretrain.main(["tokenizer", "--out", str(tmp_path / "tokenizer")])
    made, shipped = (json.loads((p / "tokenizer.json").read_text()) for p in (tmp_path / "tokenizer", CHECKPOINT))
    pieces, expected = ({piece for piece, _ in each["model"]["vocab"]} for each in (made, shipped))
    assert len(pieces) == 2000 and len(pieces & expected) >= 1990  # ties may fall otherwise, see make_tokenizer
    pretrain.main(["model", "--out", str(tmp_path / "tiny"), "--steps", "12"])
    log = pd.read_csv(tmp_path / "tiny" / "pretraining_log.csv")
    assert log["step"].tolist() == list(range(3, 49, 3))
    assert log["stage"].tolist() == [stage for stage in (1, 2, 3, 4) for _ in range(4)]
    assert log["loss"][3] < log["loss"][0] - 0.5
    assert (tmp_path / "tiny" / "pretraining_loss.png").stat().st_size > 5000
    shipped, made = (json.loads((folder / "config.json").read_text()) for folder in (CHECKPOINT, tmp_path / "tiny"))
    assert made == shipped
    assert (tmp_path / "tiny" / "tokenizer.json").read_bytes() == (CHECKPOINT / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".tmp*"))


def test_pretraining_never_reads_a_name_of_the_sample():
    names = make_tweets.split_names(make_tweets.read("words.json")["entities"], random.Random(0))
    known = {name.lower() for part in names.values() for kind in ("first", "last", "place") for name in part[kind]}
    text = pretraining_text.PretrainingText(random.Random(1), stage=2)
    read = {word for _ in range(1000) for word in re.findall(r"\w+", " ".join(text.draw(0)).lower())}
    assert len(known) > 150 and len(read) > 3000
    assert not known & read


def test_the_checkpoint_is_small_and_untied():
    from safetensors import safe_open

    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 10_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["feed_forward_proj"] == "gated-gelu"
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert not (weights.get_tensor("lm_head.weight") == weights.get_tensor("shared.weight")).all()


def test_before_training_the_checkpoint_cannot_do_the_task(tmp_path, minilm):
    folder = tmp_path / "tiny-t5"
    shutil.copytree(CHECKPOINT, folder)
    arguments = ("--dataset", TWEETS, "--sem_model", "none", "--final_beams", 1, "--eval_only", "--save_dir", folder)
    done = run_script("tweet_qa_main.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run.json").read_text())["final"]["f1"] < 0.25


def demo_commands():
    """The two training commands of `make demo`, as make would run them: {run folder's name: command}."""
    listed = subprocess.run(["make", "-n", "demo"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.replace("\\\n", " ").splitlines() if "tweet_qa_main" in line]
    return {re.search(r"demo/runs/(\w+)", line)[1]: line for line in lines}


@pytest.mark.slow
def test_full_fine_tuning_and_lora_reach_what_the_demo_promises(tmp_path):
    runs = {}
    for name, command in demo_commands().items():
        command = command.replace(".venv/bin/python", sys.executable).replace("demo/runs", str(tmp_path))
        done = subprocess.run(command, shell=True, cwd=PROJECT, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        shown = [line for line in done.stdout.splitlines() if line.startswith("[epoch")]
        runs[name] = json.loads((tmp_path / name / "run.json").read_text())
        assert len(shown) == 2 * runs[name]["args"]["epochs"]
        assert not re.search("warning|deprecated", done.stdout + done.stderr, flags=re.IGNORECASE)
    assert set(runs) == {"full", "lora"}
    assert runs["full"]["final"]["f1"] >= 0.75
    assert runs["lora"]["final"]["f1"] >= 0.55
    assert runs["lora"]["trainable_parameters"] < 0.15 * runs["lora"]["total_parameters"]
