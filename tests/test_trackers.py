"""--report_to: the trackers hold what the run folder holds, each step once, and litter neither screen nor place."""

import json
import os
import re
import sqlite3
from pathlib import Path

import accelerate.tracking
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import FULL, FULL_FIRST, LORA, SCRIPTS, at_call, in_evaluation, main_of, run_script
from matplotlib.figure import Figure

TABLES = ("train_loss", "metrics")
STEPS = {"epoch", "loss", "lr", "grad_norm"}  # of train_loss.csv
EPOCHS, STEPS_PER_EPOCH = 2, 3


@pytest.fixture
def arguments(tmp_path, standin, tweet_qa, monkeypatch):
    """Of a run of two epochs of three steps, in the folder `run`, from another folder that is to stay empty."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", os.devnull)  # METEOR takes longer to start than all else here
    given = {"--model_name": standin, "--dataset": tweet_qa, "--sem_model": "none", "--save_dir": tmp_path / "run"}
    given |= {"--max_train_samples": 12, "--max_eval_samples": 8, "--epochs": EPOCHS, "--holdout": 4, "--lr": 1e-2}
    yield [str(word) for pair in given.items() for word in pair] + ["--batch_size", "4"]
    assert os.listdir(tmp_path / "elsewhere") == []


def lines_of(capfd):
    """What a run printed, which must not have anything of the tracker's in it but our own line."""
    out, err = capfd.readouterr()
    assert err == ""
    lines = out.splitlines()
    starts = (
        "data: ",
        "check: ",
        "model: ",
        "memory: ",
        "steps: ",
        "report: ",
        "[epoch ",
        "[final] ",
        "[holdout] ",
        "note: METEOR",
    )
    assert all(line.startswith(starts) for line in lines), out
    return lines


def expected_scalars(folder):
    """{name: {step: value}} that a tracker must hold of a finished run, as the run folder tells it."""
    steps, epochs = (pd.read_csv(folder / f"{name}.csv", float_precision="round_trip") for name in TABLES)
    assert steps["step"].tolist() == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1)) and len(epochs) == EPOCHS
    expected = {f"train/{name}": dict(zip(steps["step"], steps[name], strict=True)) for name in STEPS}
    ends = steps.groupby("epoch")["step"].max()
    for name in epochs.columns[epochs.notna().all()]:
        expected[f"epoch/{name}"] = dict(zip(ends, epochs[name], strict=True))
    run = json.loads((folder / "run.json").read_text())
    for part, metrics in (("final", run["final"]), ("holdout", run["holdout"]["metrics"])):
        measured = {name: value for name, value in metrics.items() if value is not None}
        expected |= {f"{part}/{name}": {ends.max(): value} for name, value in measured.items()}
    assert {"epoch/val_loss", "epoch/f1", "final/f1", "final/bleu1", "holdout/em"} < expected.keys()
    return expected


# ------------------------------------------------------------------------------------------------- TensorBoard


def read_tensorboard(folder):
    """({name: {step: value}}, {image: (step, width, height)}); fails where a step stands twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}
    for name, values in scalars.items():
        assert len(dict(values)) == len(values), (name, values)
    images = {}
    for name in events.Tags()["images"]:
        [image] = events.Images(name)
        images[name] = (image.step, image.width, image.height)
    return {name: dict(values) for name, values in scalars.items()}, images


def assert_tensorboard_holds(folder):
    from PIL import Image

    scalars, images = read_tensorboard(folder / "tensorboard")
    expected = expected_scalars(folder)
    assert scalars.keys() == expected.keys()
    for name, values in expected.items():
        assert scalars[name] == {step: np.float32(value) for step, value in values.items()}, name
    plots = {path.stem: (EPOCHS * STEPS_PER_EPOCH, *Image.open(path).size) for path in folder.glob("*.png")}
    assert images == plots and {"loss_curve", "val_f1_curve", "breakdown"} == plots.keys()


@pytest.mark.parametrize("script", FULL_FIRST)
def test_tensorboard_holds_what_the_folder_holds(tmp_path, arguments, capfd, script):
    folder = tmp_path / "run"
    assert main_of(script)([*arguments, "--report_to", "tensorboard"]) == 0
    assert f"report: tensorboard --logdir {folder}" in lines_of(capfd)
    assert_tensorboard_holds(folder)
    [hparams] = folder.glob("tensorboard/*/hparams.yml")
    hparams = yaml.safe_load(hparams.read_text())
    assert hparams["lr"] == 0.01 and hparams["batch_size"] == 4 and hparams["dataset"] in arguments
    assert hparams["method"] == json.loads((folder / "run.json").read_text())["method"]

    if script == FULL:  # what overwrites the run removes its events too
        assert main_of(script)([*arguments, "--overwrite"]) == 0
        assert not (folder / "tensorboard").exists() and not any(line.startswith("report") for line in lines_of(capfd))


class Killed(BaseException):
    """Stands for a process that ends here."""


def die():
    raise Killed


def test_a_killed_run_goes_on_in_its_tensorboard_with_no_step_twice(tmp_path, arguments, capfd):
    """It dies after the first epoch has been logged, and before that is saved: its last step is done again."""
    folder, main = tmp_path / "run", main_of(LORA)
    given = [*arguments, "--save_every", "2"]
    with at_call(Figure, "savefig", 1, die), pytest.raises(Killed):
        main([*given, "--report_to", "tensorboard"])
    assert set(read_tensorboard(folder / "tensorboard")[0]["train/loss"]) == {1, 2, 3}
    capfd.readouterr()

    # A tracker that cannot write ends the run like a full disk does; what was saved stays.
    (folder / "tensorboard").rename(folder / "aside")
    (folder / "tensorboard").write_text("not a folder")
    assert main([*given, "--report_to", "tensorboard", "--resume"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: --report_to tensorboard failed (FileExistsError: ") and err.count("\n") == 1, err
    assert "; --report_to none " in err and err.endswith(" after step 2\n")
    (folder / "tensorboard").unlink()
    (folder / "aside").rename(folder / "tensorboard")

    assert main([*given, "--report_to", "tensorboard", "--resume"]) == 0
    lines_of(capfd)
    assert_tensorboard_holds(folder)
    assert len(list(folder.glob("tensorboard/*/hparams.yml"))) == 1


# ------------------------------------------------------------------------------------------------------- wandb


def read_wandb(path):
    """(config, {name: {step: value}}, summary) of an offline run's file: LevelDB's log format, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, config, history, summary = path.read_bytes(), 7, b"", {}, {}, {}
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # no room for a head before the block ends
            place += 2**15 - place % 2**15
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            message, record = Record.FromString(record), b""
            for item in message.run.config.update:
                config[item.key] = json.loads(item.value_json)
            for item in message.config.update:
                config[item.key] = json.loads(item.value_json)
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.history.item}
            for name in row.keys() - {"_step", "_runtime", "_timestamp"}:
                history.setdefault(name, {})[row["_step"]] = row[name]
            for item in message.summary.update:
                summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return config, history, summary


@pytest.fixture
def wandb_offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def test_wandb_holds_what_the_folder_holds_for_each_seed_a_run(tmp_path, arguments, capfd, wandb_offline):
    assert main_of(FULL)([*arguments, "--report_to", "wandb", "--seeds", "1", "2"]) == 0
    lines_of(capfd)
    for seed in (1, 2):
        folder = tmp_path / "run" / f"seed_{seed}"
        [path] = folder.glob("wandb/offline-run-*/*.wandb")
        config, history, summary = read_wandb(path)
        assert config["seed"] == seed and config["lr"] == 0.01 and config["method"] == "full"
        plots = {name: history.pop(name) for name in ("loss_curve", "val_f1_curve", "breakdown")}
        assert history == expected_scalars(folder)
        assert all(set(images) == {EPOCHS * STEPS_PER_EPOCH} for images in plots.values())
        for name in plots:
            [image] = path.parent.glob(f"files/media/images/{name}_*.png")
            assert image.read_bytes().startswith(b"\x89PNG")
        final = json.loads((folder / "run.json").read_text())["final"]
        assert summary["final/f1"] == final["f1"] and summary["final/bleu1"] == final["bleu1"]


def test_a_resumed_run_is_the_same_run_to_wandb(tmp_path, arguments, capfd, wandb_offline):
    folder = tmp_path / "run"

    def is_trained():
        return (folder / "metrics.csv").exists() and len(pd.read_csv(folder / "metrics.csv")) == EPOCHS

    with in_evaluation(die, since=is_trained), pytest.raises(Killed):
        main_of(FULL)([*arguments, "--report_to", "wandb"])
    assert main_of(FULL)([*arguments, "--report_to", "wandb", "--resume"]) == 0
    first, second = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name  # the name is the run's id, by which `wandb sync` puts the two together
    before, after = read_wandb(first)[1], read_wandb(second)[1]
    assert set(before["train/loss"]) == set(range(1, 7)) and "train/loss" not in after and "final/f1" in after


def test_wandb_without_an_account_is_refused(tmp_path, arguments):
    without = {name: None for name in os.environ if name.startswith("WANDB_")} | {"HOME": str(tmp_path / "home")}
    done = run_script(FULL, *arguments, "--report_to", "wandb", environ=without, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert re.fullmatch(r"error: --report_to wandb: .* `wandb login` .* WANDB_MODE=offline\n", done.stderr)


# ----------------------------------------------------------------------------------------------------- trackio


def test_trackio_holds_what_the_folder_holds(tmp_path, arguments, capfd, monkeypatch):
    utils = pytest.importorskip("trackio.utils", reason="trackio wants an older Pillow than the one here")
    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    folder = tmp_path / "run"
    assert main_of(FULL)([*arguments, "--report_to", "trackio"]) == 0
    assert "report: trackio show --project tweet_qa" in lines_of(capfd)
    history = {}
    with sqlite3.connect(tmp_path / "trackio" / "tweet_qa.db") as base:
        for name, step, values in base.execute("SELECT run_name, step, metrics FROM metrics"):
            assert name == "run"
            for key, value in json.loads(values).items():
                assert step not in history.setdefault(key, {})
                history[key][step] = value
        [[config]] = base.execute("SELECT config FROM configs")
    assert history == expected_scalars(folder)
    assert json.loads(config)["lr"] == 0.01


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, arguments, capfd, monkeypatch, script, name):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])  # what accelerate found when it was imported
    assert main_of(script)([*arguments, "--report_to", name]) == 2
    message = f"error: --report_to {name} needs a library that is not installed: pip install {name}\n"
    assert capfd.readouterr() == ("", message) and not Path(tmp_path / "run").exists()
