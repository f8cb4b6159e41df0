"""Nothing is lost: an interrupted run goes on to the same end."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import (
    EPOCHS,
    FULL,
    LORA,
    LORA_FIRST,
    PROJECT,
    SCRIPTS,
    STEPS,
    WEIGHTS,
    arguments,
    assert_refused_at,
    assert_same_end,
    at_call,
    contents,
    main_of,
    signal_at_step,
    signal_in_evaluation,
    start_script,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helper_functions import load_model_and_tokenizer
from pipeline.checkpoint import load_checkpoint
from pipeline.resume import load_last, read_loop, save_last
from pipeline.run_folder import UNRENAMED

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.mark.parametrize("script", LORA_FIRST)
def test_a_run_stopped_five_times_ends_like_one_that_was_not(place, whole, tmp_path, monkeypatch, capfd, script):
    """In the middle of two epochs, in an evaluation, while saving, and in the final pass; weights are compared."""
    folder = tmp_path / "run"

    def while_saving():
        return at_call(Accelerator, "save_state", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    def metrics_are_complete():
        return (folder / "metrics.csv").exists() and len(pd.read_csv(folder / "metrics.csv")) == EPOCHS

    stops = [  # when the signal comes, which one, and the step that is the last one then
        (lambda: signal_at_step(2, signal.SIGTERM), signal.SIGTERM, 2),
        (lambda: signal_in_evaluation(signal.SIGINT), signal.SIGINT, 6),
        (lambda: signal_at_step(4, signal.SIGINT), signal.SIGINT, 10),
        (while_saving, signal.SIGTERM, 12),
        (lambda: signal_in_evaluation(signal.SIGTERM, since=metrics_are_complete), signal.SIGTERM, 18),
    ]
    for number, (moment, sent, step) in enumerate(stops):
        capfd.readouterr()
        with moment():
            code = main_of(script)(arguments(place, script, folder, *["--resume"] * (number > 0)))
        out, err = capfd.readouterr()
        assert code == 128 + sent and err.startswith("interrupted: ") and err.count("\n") == 1, err
        assert "--resume" in err and f"after step {step}\n" in err
        assert json.loads((folder / "last" / "loop.json").read_text())["state"]["step"] == step
    trained = load_file(folder / "last" / "model.safetensors")
    loop = json.loads((folder / "last" / "loop.json").read_text())
    assert loop["state"]["peak_ram_mb"] > 100
    loop["state"]["peak_ram_mb"] = 1e6  # as if the former process had taken more
    (folder / "last" / "loop.json").write_text(json.dumps(loop))
    assert main_of(script)(arguments(place, script, folder, "--resume")) == 0
    assert json.loads((folder / "run.json").read_text())["peak_ram_mb"] == 1e6
    assert_same_end(script, folder, whole[script])
    # The other runs' weights are those of the end of training, and of LoRA nothing else was saved.
    assert any(torch.equal(weight, load_file(folder / WEIGHTS[script])[name.replace(".default", "")])
               for name, weight in trained.items())  # fmt: skip
    assert all("lora_" in name for name in trained) == (script == LORA)


def test_a_run_may_go_on_with_gradient_checkpointing(place, whole, tmp_path, monkeypatch):
    """Where memory ran out, it need not begin again: weights, config and figures at the end are the same."""
    script, folder = FULL, tmp_path / "run"
    with signal_at_step(4):
        assert main_of(script)(arguments(place, script, folder)) == 143
    assert main_of(script)(arguments(place, script, folder, "--resume", "--gradient_checkpointing")) == 0
    assert_same_end(script, folder, whole[script])
    assert (folder / "config.json").read_bytes() == (whole[script] / "config.json").read_bytes()
    assert json.loads((folder / "run.json").read_text())["args"]["gradient_checkpointing"]


def test_an_interrupted_save_leaves_a_whole_last_folder(tmp_path, monkeypatch):
    """The older one or the newer one, whichever of its renames and removals comes last."""

    class Killed(BaseException):
        pass

    def end_after(patch, allowed):
        left = [allowed]
        for owner, name in ((Path, "rename"), (shutil, "rmtree"), (Path, "mkdir"), (Path, "write_text")):
            function = getattr(owner, name)

            def counted(*args, function=function, **kwargs):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return function(*args, **kwargs)

            patch.setattr(owner, name, counted)

    accelerator = Accelerator()
    model = torch.nn.Linear(2, 2)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def save(step):
        torch.nn.init.constant_(model.weight, step)
        save_last(tmp_path, accelerator, {"state": {"step": step}, "schedule": {}})

    def saved():
        torch.nn.init.constant_(model.weight, -1)
        load_last(tmp_path, accelerator, model)
        [step] = model.weight.unique().tolist()
        assert read_loop(tmp_path).state.step == step
        return step

    ends = []
    save(0)
    for step in range(1, 12):
        before = saved()
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            end_after(patch, step)
            save(step)
        ends.append(saved())
        assert ends[-1] in (before, step)
    assert 0 in ends[:3] and ends[-1] == 11  # among them are kills before and after the newer one took its place


def test_a_signal_while_loading_leaves_everything_as_it_was(place, stopped, tmp_path, capfd):
    script = FULL

    def main(folder, number, *more):
        with at_call(AutoTokenizer, "from_pretrained", 1, lambda: os.kill(os.getpid(), number)):
            return main_of(script)(arguments(place, script, folder, *more))

    assert main(tmp_path / "run", signal.SIGTERM) == 143
    assert capfd.readouterr().err == "interrupted: there is nothing to resume\n" and not (tmp_path / "run").exists()
    before = contents(stopped[script])
    assert main(stopped[script], signal.SIGINT, "--resume") == 130
    err = capfd.readouterr().err
    assert err.startswith("interrupted: ") and err.endswith("after step 8\n") and contents(stopped[script]) == before


def test_a_second_ctrl_c_ends_the_process_at_once_and_a_second_sigterm_does_not():
    """In a process of its own, which says after each signal that it is still there."""
    code = """
import os, signal
from pipeline import interrupts
with interrupts.handled(), interrupts.deferred():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        print(number.name, flush=True)
        os.kill(os.getpid(), number)
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.split() == ["SIGINT", "SIGTERM", "SIGTERM", "SIGINT"] and done.returncode == 130, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_10_random_moments(place, whole, tmp_path, script):
    """SIGKILL of a real process, at random moments and at random moments of a save; each is resumed to the same end.

    The processes are forked from one that has imported the libraries: what they do from then on is the whole run.
    """
    rng = random.Random(script)
    folder = tmp_path / "run"

    def start(*more):
        return start_script(script, *arguments(place, script, folder, "--save_every", 1, *more))

    def names():
        return set(os.listdir(folder)) if folder.exists() else set()

    def wait_for_its_beginning(process):
        while process.is_running() and "run.json" not in names():
            time.sleep(0.001)
        return time.perf_counter()

    process = start()
    began = wait_for_its_beginning(process)
    assert process.wait().returncode == 0
    length = time.perf_counter() - began
    shutil.rmtree(folder)

    kills, saving, checkpoints = 0, 0, 0
    while kills < 10:
        process = start()
        until = wait_for_its_beginning(process) + rng.random() * length
        in_save = rng.random() < 0.5
        while process.is_running():
            if time.perf_counter() > until and (not in_save or names() & UNRENAMED):
                process.send(signal.SIGKILL)
            time.sleep(0.001)
        if process.wait().returncode == -signal.SIGKILL:  # else it came to its end before
            kills += 1
            left = names()
            saving += bool(left & (UNRENAMED | {".old-last"}))
            if WEIGHTS[script] in left:
                load_checkpoint(folder, str(place / "model"))
                checkpoints += 1
            done = start("--resume").wait()
            assert done.returncode == 0, done.stderr
            assert_same_end(script, folder, whole[script])
            print(f"kill {kills}: {sorted(left)}")
        shutil.rmtree(folder)
    print(f"{script}: {kills} kills, {saving} of them in a save, {checkpoints} with a best checkpoint")
    assert saving >= 3 and checkpoints >= 3


# ------------------------------------------------------------------------------------------------------ --seeds


@pytest.mark.slow
def test_seeds_run_one_after_the_other_past_those_that_are_finished(place, tmp_path, monkeypatch, capfd):
    script, folder = LORA, tmp_path / "runs"
    argv = arguments(place, script, folder, "--epochs", 1, "--seeds", 1, 2)
    with signal_at_step(STEPS + 3):
        assert main_of(script)(argv) == 143
    err = capfd.readouterr().err
    assert err.startswith("interrupted: ") and err.endswith("after step 3\n") and err.count("\n") == 1
    assert not (folder / "seed_1" / "last").exists() and (folder / "seed_2" / "last").exists()
    before = contents(folder / "seed_1")
    assert main_of(script)(argv) == 0
    out = capfd.readouterr().out
    first = out.splitlines()[0]
    assert first.startswith(f"{folder / 'seed_1'} has ") and first.endswith("finished: there is nothing to resume")
    assert "resumed after step 3" in out and contents(folder / "seed_1") == before
    assert main_of(script)(arguments(place, script, tmp_path / "alone", "--seed", 2, "--epochs", 1)) == 0
    assert_same_end(script, folder / "seed_2", tmp_path / "alone")
    assert json.loads((folder / "seed_2" / "run.json").read_text())["seed"] == 2

    def refused(message, *more):
        assert_refused_at(capfd, folder, script, arguments(place, script, folder, *more), message)

    refused("--epochs 9 (was 1)", "--seeds", 3, 1, "--epochs", 9)
    refused("--seeds 4 4: each seed can be run only once", "--seeds", 4, 4)
    refused("--seeds cannot be combined with --eval_only or --overwrite", "--seeds", 1, 3, "--eval_only")
    refused("--seeds cannot be combined with --eval_only or --overwrite", "--seeds", 1, 3, "--overwrite")
    argv = arguments(place, script, folder / "seed_1", "--seeds", 5)
    assert_refused_at(capfd, folder, script, argv, "seed_1 is itself a run")


def test_the_standin_keeps_dropout(place):
    """Without it a resumed run would end the same though its random generators had not been restored."""
    assert load_model_and_tokenizer(str(place / "model"))[0].config.dropout_rate > 0
