"""Nothing is lost: an interrupted run goes on to the same end, and a fault costs one line and no checkpoint."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import SCRIPTS
from safetensors.torch import load_file, save_file

import helper_functions
import run_folder
import tweet_qa_main
import tweet_qa_main_lora
from helper_functions import load_model_and_tokenizer

MAIN = {"tweet_qa_main.py": tweet_qa_main.main, "tweet_qa_main_lora.py": tweet_qa_main_lora.main}
WEIGHTS = {"tweet_qa_main.py": "model.safetensors", "tweet_qa_main_lora.py": "adapter_model.safetensors"}
# With these F1 rises from epoch to epoch, so that the weights at the end are those of the last step.
METHOD = {
    "tweet_qa_main.py": ["--lr", "5e-4"],
    "tweet_qa_main_lora.py": ["--lr", "1.6e-3", "--target_modules", *"q k v o wi_0 wi_1 wo lm_head".split()],
}
EPOCHS, STEPS = 3, 6  # of each run here, and optimizer steps of an epoch


def make_place(folder, tweet_qa, standin):
    """Put data/ (44 training rows, all with the same answer) and model/, a tiny T5 with dropout, into the folder."""
    rows = [row | {"Answer": ["the rockets won"]} for row in json.loads((tweet_qa / "train.json").read_text())[:56]]
    (folder / "data").mkdir()
    unlabeled = [{name: row[name] for name in ("Question", "Tweet", "qid")} for row in rows[52:]]
    for split, part in {"train": rows[:44], "validation": rows[44:52], "test": unlabeled}.items():
        (folder / "data" / f"{split}.json").write_text(json.dumps(part))
    shutil.copytree(standin, folder / "model")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, tweet_qa, standin):
    return make_place(tmp_path_factory.mktemp("resume"), tweet_qa, standin)


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """METEOR takes longer to start than all else here."""
    monkeypatch.setenv("PATH", os.devnull)


def arguments(place, script, save_dir, *more):
    given = {"--model_name": place / "model", "--dataset": place / "data", "--sem_model": "none", "--epochs": EPOCHS}
    given |= {"--save_dir": save_dir, "--batch_size": 4, "--grad_accum_steps": 2}
    given = {flag: value for flag, value in given.items() if flag not in more}
    return [str(word) for pair in given.items() for word in pair] + METHOD[script] + [str(word) for word in more]


@pytest.fixture(scope="module")
def whole(place):
    """{script: folder} of runs that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.devnull)
        for script in SCRIPTS:
            assert MAIN[script](arguments(place, script, place / f"whole-{script}")) == 0
            assert pd.read_csv(place / f"whole-{script}" / "metrics.csv")["f1"].is_monotonic_increasing, METHOD
            assert json.loads((place / f"whole-{script}" / "run.json").read_text())["best_epoch"] == EPOCHS
    return {script: place / f"whole-{script}" for script in SCRIPTS}


def end_of(script, folder):
    """All that a run ends with, but for what measures time and memory."""
    run = json.loads((folder / "run.json").read_text())
    kept = ("method", "identity", "final", "best_epoch", "skipped_steps", "batch_size_used", "finished")
    timing = ["epoch_seconds", "steps_per_sec", "samples_per_sec", "peak_vram_mb"]
    texts = ("train_loss.csv", "validation_predictions.csv", "breakdown.csv", "test_answers.json")
    return {
        "metrics": pd.read_csv(folder / "metrics.csv").drop(columns=timing).to_csv(),
        "run": {name: run[name] for name in kept},
        "files": sorted(path.name for path in folder.iterdir()),
        **{name: (folder / name).read_text() for name in texts},
    }


def assert_same_end(script, folder, other):
    one, two = end_of(script, folder), end_of(script, other)
    for name in one:
        assert one[name] == two[name], name
    one, two = load_file(folder / WEIGHTS[script]), load_file(other / WEIGHTS[script])
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def signal_when(monkeypatch, owner, name, call, number=signal.SIGTERM):
    """Send this process a signal when `owner.name` is called for the so-manieth time (counted from 1)."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


# ---------------------------------------------------------------------------------------------- the same end


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_stopped_five_times_ends_like_one_that_was_not(place, whole, tmp_path, monkeypatch, capfd, script):
    """In the middle of two epochs, in an evaluation, while saving, and in the final pass; weights are compared."""
    folder = tmp_path / "run"
    stops = [  # where the signal comes, which call of it, the signal, and the step that is the last one then
        (tweet_qa_main, "_all_told_to_stop", 2, signal.SIGTERM, 2),
        (helper_functions, "decode_batch", 1, signal.SIGINT, 6),
        (tweet_qa_main, "_all_told_to_stop", 4, signal.SIGINT, 10),
        (run_folder, "save_last", 1, signal.SIGTERM, 12),
        (tweet_qa_main, "add_leaderboard_scores", 1, signal.SIGTERM, 18),
    ]
    for number, (owner, name, call, sent, step) in enumerate(stops):
        capfd.readouterr()
        with monkeypatch.context() as patch:
            signal_when(patch, owner, name, call, sent)
            code = MAIN[script](arguments(place, script, folder, *["--resume"] * (number > 0)))
        out, err = capfd.readouterr()
        assert code == 128 + sent and err == f"interrupted: --resume goes on after step {step}\n"
        assert json.loads((folder / "last" / "loop.json").read_text())["state"]["step"] == step
    trained = load_file(folder / "last" / "model.safetensors")
    assert MAIN[script](arguments(place, script, folder, "--resume")) == 0
    assert_same_end(script, folder, whole[script])
    # The other runs' weights are those of the end of training, and of LoRA nothing else was saved.
    assert any(torch.equal(weight, load_file(folder / WEIGHTS[script])[name.replace(".default", "")])
               for name, weight in trained.items())  # fmt: skip
    assert all("lora_" in name for name in trained) == (script == "tweet_qa_main_lora.py")


def test_a_run_may_go_on_with_gradient_checkpointing(place, whole, tmp_path, monkeypatch):
    """Where memory ran out, it need not begin again: weights, config and figures at the end are the same."""
    script, folder = "tweet_qa_main.py", tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_when(patch, tweet_qa_main, "_all_told_to_stop", 4)
        assert MAIN[script](arguments(place, script, folder)) == 143
    assert MAIN[script](arguments(place, script, folder, "--resume", "--gradient_checkpointing")) == 0
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
        run_folder.save_last(tmp_path, accelerator, {"state": {"step": step}, "schedule": {}})

    def saved():
        torch.nn.init.constant_(model.weight, -1)
        run_folder.load_last(tmp_path, accelerator, model)
        [step] = model.weight.unique().tolist()
        assert run_folder.read_loop(tmp_path, tweet_qa_main.LoopState)[0].step == step
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


def test_a_signal_while_loading_leaves_everything_as_it_was(place, stopped, tmp_path, monkeypatch, capfd):
    script = "tweet_qa_main.py"
    signal_when(monkeypatch, tweet_qa_main, "load_sem_model", 1)
    assert MAIN[script](arguments(place, script, tmp_path / "run")) == 143
    assert capfd.readouterr().err == "interrupted: there is nothing to resume\n" and not (tmp_path / "run").exists()
    monkeypatch.undo()
    before = contents(stopped[script])
    signal_when(monkeypatch, tweet_qa_main, "load_sem_model", 1, signal.SIGINT)
    assert MAIN[script](arguments(place, script, stopped[script], "--resume")) == 130
    assert capfd.readouterr().err == "interrupted: --resume goes on after step 8\n"
    assert contents(stopped[script]) == before


def test_a_second_ctrl_c_ends_the_process_at_once_and_a_second_sigterm_does_not(monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    with tweet_qa_main.signals_noted():
        tweet_qa_main.STOP.hold = True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert tweet_qa_main.STOP.signal == signal.SIGINT
        with pytest.raises(Ended, match="130"):
            os.kill(os.getpid(), signal.SIGINT)


def run_in_process(script, argv):
    sys.exit(MAIN[script](argv))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_20_random_moments(place, whole, tmp_path, script):
    """SIGKILL of a real process, at random moments and at random moments of a save; each is resumed to the same end.

    The processes are forked from one that has imported the libraries: what they do from then on is the whole run.
    """
    rng = random.Random(script)
    folder = tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tweet_qa_main_lora", "peft", "pandas", "matplotlib.figure", "pyarrow.parquet"])

    def start(*more):
        argv = arguments(place, script, folder, "--save_every", 1, *more)
        process = context.Process(target=run_in_process, args=(script, argv))
        process.start()
        return process

    def names():
        return set(os.listdir(folder)) if folder.exists() else set()

    def wait_for_its_beginning(process):
        while process.is_alive() and "run.json" not in names():
            time.sleep(0.001)
        return time.perf_counter()

    process = start()
    began = wait_for_its_beginning(process)
    process.join()
    assert process.exitcode == 0
    length = time.perf_counter() - began
    shutil.rmtree(folder)

    kills, saving, checkpoints = 0, 0, 0
    while kills < 20:
        process = start()
        until = wait_for_its_beginning(process) + rng.random() * length
        in_save = rng.random() < 0.5
        while process.is_alive():
            if time.perf_counter() > until and (not in_save or names() & run_folder.UNRENAMED):
                process.kill()
            time.sleep(0.001)
        if process.exitcode == -signal.SIGKILL:  # else it came to its end before
            kills += 1
            left = names()
            saving += bool(left & (run_folder.UNRENAMED | {".old-last"}))
            if WEIGHTS[script] in left:
                run_folder.load_checkpoint(folder, str(place / "model"))
                checkpoints += 1
            process = start("--resume")
            process.join()
            assert process.exitcode == 0
            assert_same_end(script, folder, whole[script])
            print(f"kill {kills}: {sorted(left)}")
        shutil.rmtree(folder)
    print(f"{script}: {kills} kills, {saving} of them in a save, {checkpoints} with a best checkpoint")
    assert saving >= 3 and checkpoints >= 3


# ------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def stopped(place):
    """{script: folder} of runs that were stopped after 8 steps, the second of epoch 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.devnull)
        for script in SCRIPTS:
            with patch.context() as inner:
                signal_when(inner, tweet_qa_main, "_all_told_to_stop", 8)
                assert MAIN[script](arguments(place, script, place / f"stopped-{script}")) == 143
    return {script: place / f"stopped-{script}" for script in SCRIPTS}


def assert_refused(capfd, folder, script, argv, *messages):
    before = contents(folder)
    capfd.readouterr()
    assert MAIN[script](argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "steps:" not in out and "[" not in out  # at most what was given is described
    for message in messages:
        assert message in err
    assert contents(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_over_a_former_one_is_refused(place, whole, stopped, capfd, script):
    for folder in (whole[script], stopped[script]):
        assert_refused(capfd, folder, script, arguments(place, script, folder), "--resume", "--overwrite")


OTHER_ARGUMENTS = {
    "--lr": "--lr 0.5 (was ",
    "--seed": "--seed 7 (was 42)",
    "--epochs": "--epochs 4 (was 3)",
    "--batch_size": "--batch_size 8 (was 4)",
    "--grad_accum_steps": "--grad_accum_steps 1 (was 2)",
    "--max_input_len": "--max_input_len 99 (was 256)",
    "--max_target_len": "--max_target_len 9 (was 32)",
    "--max_train_samples": "--max_train_samples 40 (was None)",
    "--max_eval_samples": "--max_eval_samples 4 (was None)",
    "--holdout": "--holdout 4 (was 0)",
    "--eval_beams": "--eval_beams 2 (was 1)",
    "--final_beams": "--final_beams 2 (was 5)",
    "--patience": "--patience 1 (was 0)",
    "--precision": "--precision bf16 (was auto)",
}


@pytest.mark.parametrize("flag", OTHER_ARGUMENTS)
def test_resuming_with_an_argument_that_changes_the_result_is_refused(place, stopped, capfd, flag):
    script, message = "tweet_qa_main.py", OTHER_ARGUMENTS[flag]
    argv = arguments(place, script, stopped[script], flag, message.split()[1], "--resume")
    assert_refused(capfd, stopped[script], script, argv, message)


def test_resuming_with_another_shape_method_model_or_data_is_refused(place, stopped, tmp_path, capfd):
    def refused(script, more, *messages, folder=None):
        folder = folder or stopped[script]
        assert_refused(capfd, folder, script, arguments(place, script, folder, "--resume", *more), *messages)

    full, lora = SCRIPTS
    refused(lora, ["--lora_r", 4, "--lora_alpha", 8], "--lora_r 4 (was 8)", "--lora_alpha 8 (was 32)")
    refused(lora, ["--target_modules", "q"], "--target_modules q (was q k v o wi_0 wi_1 wo lm_head)")
    refused(lora, [], "holds a run of tweet_qa_main.py", folder=stopped[full])

    model = shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["shared.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for script in SCRIPTS:
        refused(script, ["--model_name", model], "began with other weights (--model_name)")

    data = shutil.copytree(place / "data", tmp_path / "data")
    rows = json.loads((data / "train.json").read_text())
    rows[3]["Tweet"] += "!"
    (data / "train.json").write_text(json.dumps(rows))
    refused(full, ["--dataset", data], "began with other train rows (--dataset)")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", place / "data"):
        refused(full, [], "holds no run to resume (no run.json)", folder=folder)
    refused(full, ["--overwrite"], "--eval_only, --resume and --overwrite exclude each other")


def test_what_changes_no_result_may_be_given_anew(place, whole, stopped, tmp_path):
    """Also a copy of the data in another place. The batches of the evaluation sum in another order, a little."""
    script = "tweet_qa_main_lora.py"
    folder = shutil.copytree(stopped[script], tmp_path / "run")
    data = shutil.copytree(place / "data", tmp_path / "data")
    more = ("--dataset", data, "--eval_batch_size", 3, "--save_every", 2, "--auto_batch_size")
    assert MAIN[script](arguments(place, script, folder, "--resume", *more)) == 0
    one, two = (load_file(where / WEIGHTS[script]) for where in (folder, whole[script]))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (folder / "train_loss.csv").read_text() == (whole[script] / "train_loss.csv").read_text()


def test_a_finished_run_is_left_as_it_is(place, whole, capfd):
    folder = whole["tweet_qa_main.py"]
    before = contents(folder)
    assert MAIN["tweet_qa_main.py"](arguments(place, "tweet_qa_main.py", folder, "--resume")) == 0
    assert capfd.readouterr().out.endswith("holds this run, finished: there is nothing to resume\n")
    assert contents(folder) == before


class Forged:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("forged",)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("script", [SCRIPTS[1], pytest.param(SCRIPTS[0], marks=pytest.mark.slow)])
def test_a_damaged_folder_is_not_resumed(place, stopped, tmp_path, monkeypatch, capfd, script):
    """What accelerate saved may have come from a stranger: nothing of it is unpickled but tensors and numbers."""
    monkeypatch.chdir(tmp_path)

    def refused(message, damage, *more):
        folder = shutil.copytree(stopped[script], tmp_path / "run")
        damage(folder)
        assert_refused(capfd, folder, script, arguments(place, script, folder, "--resume", *more), message)
        assert not (tmp_path / "forged").exists()
        shutil.rmtree(folder)

    def pickled(name):
        return lambda folder: (folder / "last" / name).write_bytes(pickle.dumps(Forged()))

    def saved(name):
        return lambda folder: torch.save({"state": Forged()}, folder / "last" / name)

    def loop(**changes):
        def change(folder):
            path = folder / "last" / "loop.json"
            held = json.loads(path.read_text())
            path.write_text(json.dumps(held | {"state": held["state"] | changes}))

        return change

    again = "--overwrite starts the run again"
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "loop.json"):
        refused(again, lambda folder, name=name: cut_off(folder / "last" / name))
        refused(again, lambda folder, name=name: (folder / "last" / name).unlink())
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        refused(again, pickled(name))
        refused(again, saved(name))
    refused(again, lambda folder: (folder / "last" / "model.safetensors").rename(folder / "last" / "pytorch_model.bin"))
    refused(again, loop(step="1"))
    refused(again, loop(other=1))
    weights = load_file(stopped[script] / "last" / "model.safetensors")
    name = next(iter(weights))
    other = weights | {name: weights[name][:1]}
    for wrong in (other, {"x": weights[name]}):
        message = "its weights are not those that this model trains"
        refused(message, lambda folder, wrong=wrong: save_file(wrong, folder / "last" / "model.safetensors"))

    refused("cannot be loaded", lambda folder: cut_off(folder / WEIGHTS[script]))
    refused("cannot be loaded", lambda folder: (folder / WEIGHTS[script]).unlink())
    refused("its tokenizer files are missing", lambda folder: (folder / "tokenizer.json").unlink())
    refused("run.json cannot be read", lambda folder: (folder / "run.json").write_text("{"))
    refused("run.json cannot be read", lambda folder: (folder / "run.json").write_text('{"args": 1, "method": "full"}'))


@pytest.mark.parametrize("flag", ["--eval_only", "--resume"])
def test_adapters_that_do_not_fit_are_named(place, stopped, tmp_path, flan_t5_files, capfd, flag):
    """A foreign adapter, one of another kind, one for a base of another shape, and pickled or half-missing weights."""
    script = "tweet_qa_main_lora.py"

    def refused(message, damage):
        folder = shutil.copytree(stopped[script], tmp_path / "run")
        damage(folder)
        assert_refused(capfd, folder, script, arguments(place, script, folder, flag), message)
        shutil.rmtree(folder)

    def config(**changes):
        def change(folder):
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def weights(change):
        def write(folder):
            save_file(change(load_file(folder / WEIGHTS[script])), folder / WEIGHTS[script])

        return write

    def pickled(folder):
        torch.save(load_file(folder / WEIGHTS[script]), folder / "adapter_model.bin")
        (folder / WEIGHTS[script]).unlink()

    refused("the adapter in this folder cannot be loaded", lambda folder: cut_off(folder / WEIGHTS[script]))
    refused("(it has no adapter_model.safetensors)", pickled)
    refused("its tokenizer files are missing", lambda folder: (folder / "tokenizer.json").unlink())
    refused("of type IA3, not LORA", config(peft_type="IA3"))
    refused("the adapter in this folder cannot be loaded", config(peft_type="NO_SUCH"))
    refused("the adapter in this folder cannot be loaded", config(target_modules=["query", "value"]))
    refused("the adapter in this folder cannot be loaded", config(r=3))
    refused("the weights of its adapter do not fit", config(target_modules=["q", "v"]))
    refused("the weights of its adapter do not fit", weights(lambda held: dict(list(held.items())[2:])))
    refused("the weights of its adapter do not fit", weights(lambda held: {f"x.{name}": t for name, t in held.items()}))
    refused(
        "the adapter in this folder cannot be loaded",
        weights(lambda held: {n: t[:, :3].clone() for n, t in held.items()}),
    )


def test_an_adapter_is_not_evaluated_on_another_base(place, whole, tmp_path, capfd):
    script = "tweet_qa_main_lora.py"
    model = shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    argv = arguments(place, script, whole[script], "--eval_only", "--model_name", model)
    assert_refused(capfd, whole[script], script, argv, f"its adapter was trained on another base than {model}")


# ------------------------------------------------------------------------------------------------ overwriting


def test_overwriting_waits_for_good_input_and_removes_only_what_a_run_wrote(place, whole, tmp_path, capfd):
    full, lora = SCRIPTS
    folder = shutil.copytree(whole[lora], tmp_path / "run")
    (folder / "notes.txt").write_text("do not lose me")
    (folder / "last").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "model.safetensors").write_text("do not lose me either")

    def refused(message, *more):
        assert_refused(capfd, folder, full, arguments(place, full, folder, "--overwrite", *more), message)

    refused("does not exist", "--dataset", "./nowhere")
    refused("there is no such folder", "--model_name", "./nowhere")
    refused("no sentence-transformers folder", "--sem_model", "./nowhere")
    refused("which --overwrite would remove", "--model_name", folder / "mine")
    assert MAIN[full](arguments(place, full, folder, "--overwrite")) == 0
    assert (folder / "notes.txt").read_text() == "do not lose me"
    assert (folder / "mine" / "model.safetensors").read_text() == "do not lose me either"
    (folder / "notes.txt").unlink()
    shutil.rmtree(folder / "mine")
    assert_same_end(full, folder, whole[full])  # also the list of files: nothing of the adapter is left

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    argv = arguments(place, full, other, "--overwrite")
    assert_refused(capfd, other, full, argv, "holds other files")


# ------------------------------------------------------------------------------------------------------ faults


def losses_not_finite(monkeypatch, batches):
    """Let the forward pass give a NaN loss for these training batches, counted from 1.

    Two make a step, but for the last step of an epoch, which has the 11th alone.
    """
    from transformers import T5ForConditionalGeneration

    forward, calls = T5ForConditionalGeneration.forward, []

    @functools.wraps(forward)  # generate looks at the names of its arguments
    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training and type(output.loss) is torch.Tensor:  # not one of the memory estimate, which has no memory
            calls.append(1)
            if len(calls) in batches:
                output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", spoilt)


def test_a_step_that_is_not_finite_is_skipped_and_counted(place, whole, tmp_path, monkeypatch):
    full = "tweet_qa_main.py"
    losses_not_finite(monkeypatch, {5, 8})
    with monkeypatch.context() as patch:  # the count is resumed as well
        signal_when(patch, tweet_qa_main, "_all_told_to_stop", 4)
        assert MAIN[full](arguments(place, full, tmp_path / "run")) == 143
    step = torch.load(tmp_path / "run" / "last" / "optimizer.bin", weights_only=True)["state"][0]
    assert step["step"].item() == 2 and all(value.isfinite().all() for value in step.values())
    monkeypatch.undo()
    monkeypatch.setenv("PATH", os.devnull)
    losses_not_finite(monkeypatch, {8})  # the 5th and the 6th step had three
    assert MAIN[full](arguments(place, full, tmp_path / "run", "--resume")) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["skipped_steps"] == 3
    steps = pd.read_csv(tmp_path / "run" / "train_loss.csv")
    assert steps["step"][steps["loss"].isna()].tolist() == [3, 4, 9]
    expected = pd.read_csv(whole[full] / "train_loss.csv")
    assert steps["lr"].tolist() == expected["lr"].tolist()  # the schedule does not wait
    assert steps["loss"][:2].tolist() == expected["loss"][:2].tolist()
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["train_loss"].notna().all()


@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_steps_that_are_not_finite_stop_the_run(place, tmp_path, monkeypatch, capfd, script):
    losses_not_finite(monkeypatch, range(14, 100))
    folder = tmp_path / "run"
    assert MAIN[script](arguments(place, script, folder, "--save_every", 7)) == 1
    err = capfd.readouterr().err
    rate = pd.DataFrame(json.loads((folder / "last" / "loop.json").read_text())["state"]["step_rows"])["lr"]
    assert err.startswith("error: loss or gradient was not finite in 10 steps in a row, the last of them step 17 (")
    assert "precision fp32" in err and "learning rate" in err and err.count("\n") == 1
    assert err.endswith(" | --resume goes on after step 14\n") and len(rate) == 14
    weights = load_file(folder / "last" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    run_folder.load_checkpoint(folder, str(place / "model"))


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(place, tmp_path, capfd):
    folder = tmp_path / "run"
    assert MAIN["tweet_qa_main.py"](arguments(place, "tweet_qa_main.py", folder, "--lr", "1e30")) == 1
    err = capfd.readouterr().err
    assert "not finite in 10 steps in a row" in err and err.count("\n") == 1


def memory_for_batches_of(monkeypatch, size):
    """Let the training step run out of memory as CUDA does, with every batch of more than `size` examples."""
    from transformers import T5ForConditionalGeneration

    forward = T5ForConditionalGeneration.forward

    @functools.wraps(forward)
    def limited(self, input_ids=None, **kwargs):
        if self.training and len(input_ids) > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nGPU 0 has a total of 2 GiB")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", limited)


def test_memory_that_runs_out_is_named(place, tmp_path, monkeypatch, capfd):
    script = "tweet_qa_main.py"
    memory_for_batches_of(monkeypatch, 3)
    assert MAIN[script](arguments(place, script, tmp_path / "a")) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: out of memory with --batch_size 4: add --auto_batch_size, or lower --batch_size")
    assert err.count("\n") == 1
    memory_for_batches_of(monkeypatch, 0)
    assert MAIN[script](arguments(place, script, tmp_path / "b", "--auto_batch_size")) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: out of memory with --batch_size 1: give a smaller model") and err.count("\n") == 1


def test_memory_that_runs_out_in_an_evaluation_is_named(place, tmp_path, monkeypatch, capfd):
    script, folder = "tweet_qa_main.py", tmp_path / "run"

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(tweet_qa_main, "evaluate", out_of_memory)
        assert MAIN[script](arguments(place, script, folder, "--save_every", 6, "--auto_batch_size")) == 1
    err = capfd.readouterr().err
    assert err == "error: out of memory with --eval_batch_size 32: lower it | --resume goes on after step 6\n"


@pytest.mark.parametrize("script", [SCRIPTS[1], pytest.param(SCRIPTS[0], marks=pytest.mark.slow)])
def test_auto_batch_size_trains_as_if_the_smaller_batch_had_been_given(place, tmp_path, monkeypatch, capfd, script):
    """Batches of 4 fit in the first epoch and no longer in the second: even so everything starts anew."""
    more = ("--batch_size", 2, "--grad_accum_steps", 4)
    assert MAIN[script](arguments(place, script, tmp_path / "small", *more)) == 0
    with monkeypatch.context() as patch:
        evaluate = tweet_qa_main.evaluate

        def fill_memory(*args, **kwargs):
            memory_for_batches_of(patch, 3)
            return evaluate(*args, **kwargs)

        patch.setattr(tweet_qa_main, "evaluate", fill_memory)
        assert MAIN[script](arguments(place, script, tmp_path / "auto", "--auto_batch_size", "--save_every", 4)) == 0
    out = capfd.readouterr().out
    assert "out of memory with a batch of 4: starting again with batches of 2, 4 a step\n" in out
    assert_same_end(script, tmp_path / "auto", tmp_path / "small")
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["args"]["batch_size"] == 4


def test_an_odd_batch_is_divided_so_that_the_effective_batch_stays(place, tmp_path, monkeypatch, capfd):
    memory_for_batches_of(monkeypatch, 3)
    script = "tweet_qa_main.py"
    more = ("--batch_size", 9, "--auto_batch_size", "--epochs", 1)
    assert MAIN[script](arguments(place, script, tmp_path / "run", *more)) == 0
    assert "starting again with batches of 3, 6 a step" in capfd.readouterr().out


FULL_DISKS = [  # what is written when the disk is full, how many bytes still fit in a file, and in which script
    ("save_last", 100_000, "tweet_qa_main.py"),
    ("save_checkpoint", 2_000, "tweet_qa_main_lora.py"),
]
MORE_FULL_DISKS = [(what, limit, script) for what, limit, _ in FULL_DISKS for script in SCRIPTS for limit in (0, limit)]
MORE_FULL_DISKS += [("write_table", 100, "tweet_qa_main.py"), ("write_table", 0, "tweet_qa_main_lora.py")]
FULL_DISKS += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FULL_DISKS if case not in FULL_DISKS]


@pytest.mark.parametrize(("what", "limit", "script"), FULL_DISKS)
def test_a_full_disk_leaves_the_older_checkpoint_whole(place, whole, tmp_path, monkeypatch, capfd, what, limit, script):
    """RLIMIT_FSIZE stands in for the disk: no file may grow beyond it. Afterwards there is room again."""
    folder, function, calls = tmp_path / "run", getattr(run_folder, what), []

    def filled(*args, **kwargs):
        calls.append(what)
        if len(calls) < 3:
            return function(*args, **kwargs)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, what, filled)
        assert MAIN[script](arguments(place, script, folder)) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"error: {folder}") and "cannot be written (" in err and err.count("\n") == 1, err
    assert " | --resume goes on after step " in err
    run_folder.load_checkpoint(folder, str(place / "model"))
    assert not {path.name for path in folder.iterdir()} & run_folder.UNRENAMED
    assert MAIN[script](arguments(place, script, folder, "--resume")) == 0
    assert_same_end(script, folder, whole[script])


def test_a_folder_deleted_under_the_run_ends_it_in_one_line(place, tmp_path, monkeypatch, capfd):
    script, folder, evaluate = "tweet_qa_main.py", tmp_path / "run", tweet_qa_main.evaluate

    def delete(*args, **kwargs):
        shutil.rmtree(folder)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(tweet_qa_main, "evaluate", delete)
    assert MAIN[script](arguments(place, script, folder)) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"error: {folder}") and "No such file or directory" in err and err.count("\n") == 1
    assert err.endswith(" | there is nothing to resume\n") and not folder.exists()


# ------------------------------------------------------------------------------------------------------ --seeds


def test_seeds_run_one_after_the_other_past_those_that_are_finished(place, tmp_path, monkeypatch, capfd):
    script, folder = "tweet_qa_main_lora.py", tmp_path / "runs"
    argv = arguments(place, script, folder, "--epochs", 1, "--seeds", 1, 2)
    with monkeypatch.context() as patch:
        signal_when(patch, tweet_qa_main, "_all_told_to_stop", STEPS + 3)
        assert MAIN[script](argv) == 143
    assert capfd.readouterr().err == "interrupted: --resume goes on after step 3\n"
    assert not (folder / "seed_1" / "last").exists() and (folder / "seed_2" / "last").exists()
    before = contents(folder / "seed_1")
    assert MAIN[script](argv) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"{folder / 'seed_1'} holds this run, finished: there is nothing to resume\n")
    assert "resumed after step 3" in out and contents(folder / "seed_1") == before
    assert MAIN[script](arguments(place, script, tmp_path / "alone", "--seed", 2, "--epochs", 1)) == 0
    assert_same_end(script, folder / "seed_2", tmp_path / "alone")
    assert json.loads((folder / "seed_2" / "run.json").read_text())["seed"] == 2

    def refused(message, *more):
        assert_refused(capfd, folder, script, arguments(place, script, folder, *more), message)

    refused("seed_1 holds a run that would end otherwise with --epochs 9 (was 1)", "--seeds", 3, 1, "--epochs", 9)
    refused("--seeds 4 4: each seed can be run only once", "--seeds", 4, 4)
    refused("--seeds goes with neither --eval_only nor --overwrite", "--seeds", 1, 3, "--eval_only")
    refused("--seeds goes with neither --eval_only nor --overwrite", "--seeds", 1, 3, "--overwrite")
    argv = arguments(place, script, folder / "seed_1", "--seeds", 5)
    assert_refused(capfd, folder, script, argv, "holds a run of its own: give --seeds another folder")


def test_the_standin_keeps_dropout(place):
    """Without it a resumed run would end the same though its random generators had not been restored."""
    assert load_model_and_tokenizer(str(place / "model"))[0].config.dropout_rate > 0
