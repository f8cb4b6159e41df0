"""The untrained model is a row of a comparison, and held-out rows are the same for all seeds."""

import json
import re
import shutil
from argparse import Namespace

import pandas as pd
import pytest
from conftest import (
    FULL,
    FULL_FIRST,
    LORA,
    SCRIPTS,
    arguments,
    assert_refused_at,
    contents,
    main_of,
    signal_in_evaluation,
)
from safetensors.torch import load_file, save_file

import compare_runs
from helper_functions import load_model_and_tokenizer
from pipeline.data import select_rows
from pipeline.run_folder import read_run

pytestmark = pytest.mark.usefixtures("without_java")
WRITTEN = "breakdown.csv breakdown.png run.json test_answers.json validation_predictions.csv".split()


def base_args(place, folder, *more, model=True):
    given = ["--eval_only", "--save_dir", folder, "--dataset", place / "data", "--sem_model", "none", *more]
    return [str(word) for word in given + (["--model_name", place / "model"] if model else [])]


@pytest.fixture(scope="module")
def base(made_once, place):
    """A folder with the scores of the untrained model, with 4 held-out rows."""

    def make(folder):
        before = contents(place / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", "")
            assert main_of(FULL)(base_args(place, folder / "base", "--holdout", 4)) == 0
        assert contents(place / "model") == before

    return made_once("untrained", make)[0] / "base"


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_the_scores_of_an_untrained_model_come_into_a_new_folder(place, base):
    assert sorted(path.name for path in base.iterdir()) == sorted([*WRITTEN, "holdout_predictions.csv"])
    record = record_of(base)
    model, _ = load_model_and_tokenizer(str(place / "model"))
    assert (record["method"], record["trainable_parameters"]) == ("base", 0)
    assert (record["finished"], record["best_epoch"], record["checkpoint_bytes"]) == (True, None, 0)
    assert record["total_parameters"] == model.num_parameters() and record["answers_per_second"] > 0
    assert record["args"]["model_name"] == str(place / "model") and record["wall_time_seconds"] is None
    frame = pd.read_csv(base / "validation_predictions.csv")
    assert len(frame) == 8 and record["final"]["f1"] == pytest.approx(frame["f1"].mean())
    assert len(record["holdout"]["rows"]) == 4 and record["eval_only"]["holdout"] == 4
    assert len(json.loads((base / "test_answers.json").read_text())) == 4


def test_the_same_folder_is_scored_again_and_with_no_other_model(place, base, standin, tmp_path, capfd):
    folder = shutil.copytree(base, tmp_path / "base")
    assert main_of(FULL)(["--eval_only", "--save_dir", str(folder)]) == 0
    before, after = record_of(base), record_of(folder)
    for name in ("method", "final", "holdout", "content", "prompt", "trainable_parameters", "finished"):
        assert after[name] == before[name], name
    assert after["args"]["model_name"] == before["args"]["model_name"]
    assert main_of(FULL)(["--eval_only", "--save_dir", str(folder), "--final_beams", "1", "--holdout", "0"]) == 0
    assert record_of(folder)["args"]["final_beams"] == 1

    other = shutil.copytree(place / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["shared.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    argv = base_args(place, folder, "--model_name", other, model=False)
    assert_refused_at(capfd, folder, FULL, argv, "has the scores of another model than --model_name")


def test_what_cannot_be_scored_untrained_is_refused(place, base, whole, tmp_path, capfd):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert_refused_at(capfd, other, FULL, base_args(place, other), "contains thesis.txt, which no run has written")
    new = tmp_path / "new"
    assert_refused_at(
        capfd, new, FULL, base_args(place, new, model=False), "this folder does not exist", "--model_name and a new"
    )
    push = base_args(place, new, "--push_to_hub", "me/model")
    assert main_of(FULL)(push) == 2 and not new.exists()
    # The script with an adapter scores checkpoints only, and a base folder is no run to resume or to start over.
    assert_refused_at(capfd, new, LORA, base_args(place, new), "this folder does not exist")
    assert_refused_at(capfd, base, LORA, base_args(place, base), "use tweet_qa_main.py")
    argv = arguments(place, FULL, base)
    assert_refused_at(
        capfd, base, FULL, [*argv, "--resume"], "scores of an untrained model: there is nothing to resume"
    )
    assert_refused_at(capfd, base, FULL, argv, "already has a run")


def test_a_folder_with_a_checkpoint_is_scored_as_that_checkpoint(place, whole, tmp_path):
    folder = shutil.copytree(whole[FULL], tmp_path / "run")
    assert main_of(FULL)(["--eval_only", "--save_dir", str(folder), "--model_name", str(place / "model")]) == 0
    before, after = record_of(whole[FULL]), record_of(folder)
    assert after["method"] == "full" and after["final"] == before["final"] and after["args"] == before["args"]


def test_a_scoring_that_was_stopped_can_be_repeated(place, tmp_path, capsys):
    folder = tmp_path / "base"
    with signal_in_evaluation():
        assert main_of(FULL)(base_args(place, folder)) == 143
    assert record_of(folder)["finished"] is False
    assert compare_runs.main([str(folder), str(folder / "x"), "--out", str(tmp_path / "out")]) == 2
    assert "not finished" in capsys.readouterr().err
    assert main_of(FULL)(base_args(place, folder)) == 0
    assert sorted(path.name for path in folder.iterdir()) == WRITTEN and record_of(folder)["finished"]


# ------------------------------------------------------------------------------------------------------- comparison


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", [True, False])
def test_a_comparison_shows_it_as_a_row(place, whole, tmp_path, capsys, first):
    folder = tmp_path / "base"
    assert main_of(FULL)(base_args(place, folder)) == 0
    record, epochs, examples = read_run(folder)
    assert record["method"] == "base" and len(epochs) == 0 and len(examples) == 8
    runs = [whole[FULL], whole[LORA]]
    runs = [folder, *runs] if first else [*runs, folder]
    assert compare_runs.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("method")
    row = table.loc["untrained model"]
    assert row["trainable_parameters"] == 0 and row["checkpoint_mb"] == 0
    names = ["best_epoch", "train_minutes", "steps_per_sec", "f1_per_mb", "peak_memory_mb"]
    assert row[names].isna().all() and table.drop("untrained model")[names].notna().all(axis=None)
    assert row["f1"] == pytest.approx(100 * record["final"]["f1"])
    said = capsys.readouterr().out
    assert "not measured" in said and "the untrained model's" in said and "nan" not in said
    report = (tmp_path / "out" / "comparison.md").read_text()
    arguments_told = re.findall(r"^\| --(\w+) \|", report.split("## The runs")[1], flags=re.MULTILINE)
    assert "lr" in arguments_told and not {"epochs", "eval_beams", "weight_decay"} & set(arguments_told)


def test_it_is_compared_with_runs_on_other_training_rows_if_they_held_out_the_same(place, base, tmp_path, capsys):
    given = ["--epochs", 1, "--final_beams", 5, "--holdout", 4]
    same, other = tmp_path / "same", tmp_path / "other"
    assert main_of(FULL)(arguments(place, FULL, same, *given, "--max_train_samples", 20, "--seed", 9)) == 0
    record = record_of(shutil.copytree(same, other))
    record["args"]["holdout_seed"], record["holdout"]["rows"] = 1, [0, 1, 2, 3]
    (other / "run.json").write_text(json.dumps(record))
    assert compare_runs.main([str(base), str(same), "--out", str(tmp_path / "out")]) == 0
    assert pd.read_csv(tmp_path / "out" / "comparison.csv")["holdout_f1"].notna().all()
    assert compare_runs.main([str(same), str(other), "--out", str(tmp_path / "no")]) == 2
    assert "trained on different rows, --holdout_seed 42 and 1" in capsys.readouterr().err
    assert compare_runs.main([str(base), str(other), "--out", str(tmp_path / "no")]) == 2
    assert "--holdout set different rows aside" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- held-out rows


def as_older(folder, seed):
    """Change a run folder to what a version without --holdout_seed wrote: the seed had chosen its held-out rows."""
    record = record_of(folder)
    del record["args"]["holdout_seed"]
    record["args"]["seed"] = record["seed"] = seed
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_held_out_rows_do_not_depend_on_the_seed(place):
    given = {"drop_leaked": False, "train_subset": None, "max_train_samples": None, "max_eval_samples": None}
    given |= {"resume": False, "eval_only": False}

    def held_out(seed, holdout_seed):
        args = Namespace(dataset=str(place / "data"), holdout=8, seed=seed, holdout_seed=holdout_seed, **given)
        return select_rows(args).held_out

    assert held_out(1, 42) == held_out(2, 42) != held_out(1, 43)


@pytest.mark.parametrize("script", FULL_FIRST)
def test_a_run_of_an_older_version_is_scored_on_the_rows_that_its_seed_chose(place, tmp_path, capfd, script):
    """Made here with --holdout_seed 7, and then written as a run with --seed 7 was."""
    folder = tmp_path / "run"
    given = ["--epochs", 1, "--final_beams", 1, "--holdout", 6, "--holdout_seed", 7, "--seed", 7]
    with signal_in_evaluation():  # before its epoch is complete
        assert main_of(script)(arguments(place, script, folder, *given)) == 143
    as_older(folder, seed=7)
    given = given[:6] + given[8:]
    assert_refused_at(
        capfd, folder, script, arguments(place, script, folder, *given, "--holdout_seed", 5, "--resume"), "holdout"
    )
    assert main_of(script)(arguments(place, script, folder, *given, "--resume")) == 0
    record = record_of(as_older(folder, seed=7))
    frame = (folder / "holdout_predictions.csv").read_text()
    assert main_of(script)(["--eval_only", "--save_dir", str(folder)]) == 0
    assert record_of(folder)["holdout"] == record["holdout"]
    assert (folder / "holdout_predictions.csv").read_text() == frame
    argv = ["--eval_only", "--save_dir", str(folder), "--holdout_seed", "8"]
    assert_refused_at(capfd, folder, script, argv, "these are not the rows that the run set aside")


def test_seeds_of_an_older_version_that_held_out_different_rows_are_compared_as_before(place, whole, tmp_path, capsys):
    """Two seeds of each method, each with its own held-out rows: a row of each method, paired by seed."""
    folders = []
    for script in SCRIPTS:
        for seed in (1, 2):
            folder = shutil.copytree(whole[script], tmp_path / f"{script}-{seed}")
            record = record_of(as_older(folder, seed))
            record["args"]["holdout"] = 4
            record["holdout"] = {"rows": [seed, 5, 6, 7], "metrics": record["final"]}
            (folder / "run.json").write_text(json.dumps(record))
            folders.append(str(folder))
    assert compare_runs.main([*folders, "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["runs"].tolist() == [2, 2] and table["holdout_f1"].notna().all()
    assert compare_runs.main([*folders[:3], "--out", str(tmp_path / "no")]) == 2
    assert "--holdout set different rows aside" in capsys.readouterr().err


def test_an_older_run_and_a_newer_one_are_one_method_if_nothing_else_differs(whole, tmp_path):
    old = shutil.copytree(whole[FULL], tmp_path / "old")
    record = record_of(as_older(old, seed=3))
    for name in ("optim", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_steps", "label_smoothing_factor"):
        del record["args"][name]
    del record["args"]["train_subset"], record["epochs"], record["train_rows"], record["answers_per_second"]
    (old / "run.json").write_text(json.dumps(record))
    epochs = pd.read_csv(old / "metrics.csv").drop(columns="seconds_since_start")
    epochs.to_csv(old / "metrics.csv", index=False, lineterminator="\n")
    given = [str(whole[FULL]), str(old), str(whole[LORA]), "--out", str(tmp_path / "out")]
    assert compare_runs.main(given) == 0
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["method"].tolist() == ["full fine-tuning", "LoRA"] and table["runs"].tolist() == [2, 1]
