"""The same model, data set or similarity model under another path is the same thing, for --resume and a comparison."""

import json
import os
import shutil

import pandas as pd
import pytest
from conftest import FULL, LORA, PROJECT, run_script

SMALL = ("--max_train_samples", 32, "--max_eval_samples", 12, "--epochs", 2)


@pytest.fixture(scope="module")
def moved(tmp_path_factory, minilm):
    """A folder with two runs of each script on the same things: under their own paths, and by links and copies."""
    folder = tmp_path_factory.mktemp("moved")
    os.symlink(minilm, folder / "similarity")
    shutil.copytree(PROJECT / "demo" / "tweets", folder / "copied" / "rows")
    shutil.copytree(PROJECT / "demo" / "tiny-t5", folder / "t5")
    first = (PROJECT / "demo" / "tiny-t5", PROJECT / "demo" / "tweets", minilm)
    second = (folder / "t5", folder / "copied" / "rows", folder / "similarity")
    for name, things in {"first": first, "second": second}.items():
        for script, method in ((FULL, "full"), (LORA, "lora")):
            given = zip(("--model_name", "--dataset", "--sem_model"), things, strict=True)
            words = [word for pair in given for word in pair]
            seed = {"first": 1, "second": 2}[name]
            done = run_script(script, *words, *SMALL, "--seed", seed, "--save_dir", folder / f"{name}-{method}")
            assert done.returncode == 0, done.stderr
    return folder


def test_runs_on_the_same_things_are_runs_of_one_method(moved, tmp_path):
    runs = [moved / f"{name}-{method}" for name in ("first", "second") for method in ("full", "lora")]
    done = run_script("compare_runs.py", *runs, "--out", tmp_path / "comparison")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "comparison" / "comparison.csv")
    assert list(table["method"]) == ["full fine-tuning", "LoRA"] and list(table["runs"]) == [2, 2]


def test_a_run_is_resumed_on_the_same_things_elsewhere(moved, tmp_path):
    run = shutil.copytree(moved / "first-full", tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"finished": False, "final": None}))
    things = (moved / "t5", moved / "copied" / "rows", moved / "similarity")
    words = [w for pair in zip(("--model_name", "--dataset", "--sem_model"), things, strict=True) for w in pair]
    done = run_script(FULL, *words, *SMALL, "--seed", 1, "--save_dir", run, "--resume")
    assert done.returncode == 0 and "[final]" in done.stdout, done.stderr


@pytest.mark.parametrize("what", ["dataset", "sem_model"])
def test_another_thing_under_the_same_name_is_told(moved, tmp_path, minilm, what):
    """A data set or similarity model whose content has changed, though its path has not."""
    rows = shutil.copytree(PROJECT / "demo" / "tweets", tmp_path / "rows")
    similarity = shutil.copytree(minilm, tmp_path / "similarity")
    words = ["--model_name", PROJECT / "demo" / "tiny-t5", "--dataset", rows, "--sem_model", similarity, *SMALL]
    for folder in ("one", "two"):
        done = run_script(FULL, *words, "--seed", 1, "--save_dir", tmp_path / folder)
        assert done.returncode == 0, done.stderr
        train = json.loads((rows / "train.json").read_text())
        if what == "dataset":
            (rows / "train.json").write_text(json.dumps(train[1:]))
        else:
            change_weights(similarity)
    done = run_script("compare_runs.py", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "comparison")
    said = "different data sets" if what == "dataset" else "scored differently"
    assert (
        done.returncode == 2
        and said in done.stderr
        and f"--{what} {words[words.index('--' + what) + 1]}" in done.stderr
    )


def change_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] * 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
