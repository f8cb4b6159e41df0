"""A fault costs one line and no checkpoint: numbers that are not finite, memory that runs out, a full disk."""

import functools
import json
import os
import re
import resource
import shutil

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import FULL, FULL_FIRST, LORA, SCRIPTS, arguments, assert_same_end, in_evaluation, main_of, signal_at_step
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.checkpoint import load_checkpoint
from pipeline.run_folder import UNRENAMED

pytestmark = pytest.mark.usefixtures("without_java")


def losses_not_finite(monkeypatch, batches):
    """Let the forward pass give a NaN loss for these training batches, counted from 1.

    Two make a step, but for the last step of an epoch, which has the 11th alone.
    """
    from transformers import T5ForConditionalGeneration

    forward, calls = T5ForConditionalGeneration.forward, []

    @functools.wraps(forward)  # generate looks at the names of its arguments
    def spoilt(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training and type(output.logits) is torch.Tensor:  # not one of the memory estimate, which has no memory
            calls.append(1)
            if len(calls) in batches:
                output.logits = output.logits * float("nan")
        return output

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", spoilt)


def test_a_step_that_is_not_finite_is_skipped_and_counted(place, whole, tmp_path, monkeypatch):
    losses_not_finite(monkeypatch, {5, 8})
    with signal_at_step(4):  # the count is resumed as well
        assert main_of(FULL)(arguments(place, FULL, tmp_path / "run")) == 143
    step = torch.load(tmp_path / "run" / "last" / "optimizer.bin", weights_only=True)["state"][0]
    assert step["step"].item() == 2 and all(value.isfinite().all() for value in step.values())
    monkeypatch.undo()
    monkeypatch.setenv("PATH", os.devnull)
    losses_not_finite(monkeypatch, {8})  # the 5th and the 6th step had three
    assert main_of(FULL)(arguments(place, FULL, tmp_path / "run", "--resume")) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["skipped_steps"] == 3
    steps = pd.read_csv(tmp_path / "run" / "train_loss.csv")
    assert steps["step"][steps["loss"].isna()].tolist() == [3, 4, 9]
    expected = pd.read_csv(whole[FULL] / "train_loss.csv")
    assert steps["lr"].tolist() == expected["lr"].tolist()  # the schedule does not wait
    assert steps["loss"][:2].tolist() == expected["loss"][:2].tolist()
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["train_loss"].notna().all()


@pytest.mark.parametrize("script", FULL_FIRST)
def test_ten_steps_that_are_not_finite_stop_the_run(place, tmp_path, monkeypatch, capfd, script):
    losses_not_finite(monkeypatch, range(14, 100))
    folder = tmp_path / "run"
    assert main_of(script)(arguments(place, script, folder, "--save_every", 7)) == 1
    err = capfd.readouterr().err
    rate = pd.DataFrame(json.loads((folder / "last" / "loop.json").read_text())["state"]["step_rows"])["lr"]
    assert re.match("error: loss or gradient was not finite in 10 steps in a row, .* step 17 \\(", err), err
    assert "precision fp32" in err and "learning rate" in err and err.count("\n") == 1
    assert re.search(r" \| --resume .* after step 14\n$", err) and len(rate) == 14
    weights = load_file(folder / "last" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    load_checkpoint(folder, str(place / "model"))


def test_a_learning_rate_that_is_far_too_high_ends_in_one_line(place, tmp_path, capfd):
    folder = tmp_path / "run"
    assert main_of(FULL)(arguments(place, FULL, folder, "--lr", "1e30")) == 1
    err = capfd.readouterr().err
    assert "not finite in 10 steps in a row" in err and err.count("\n") == 1


def memory_for_batches_of(monkeypatch, size):
    """Let the training step run out of memory as CUDA does, with every batch of more than `size` examples."""
    from transformers import T5ForConditionalGeneration

    forward = T5ForConditionalGeneration.forward

    @functools.wraps(forward)
    def limited(self, input_ids=None, **kwargs):
        packed = kwargs.get("packed")  # all rows are one sequence then
        if self.training and (packed.sources.shape[0] if packed else len(input_ids)) > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nGPU 0 has a total of 2 GiB")
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", limited)


def test_memory_that_runs_out_is_named(place, tmp_path, monkeypatch, capfd):
    script = FULL
    with monkeypatch.context() as patch:
        memory_for_batches_of(patch, 3)
        assert main_of(script)(arguments(place, script, tmp_path / "a")) == 1
    err = capfd.readouterr().err
    assert err.startswith(
        "error: out of memory with --batch_size 4: add --auto_batch_size to --resume, or start again (--overwrite) with"
        " a lower --batch_size"
    )
    assert err.count("\n") == 1
    # What the message advises is accepted.
    more = ("--epochs", 1, "--final_beams", 1)
    assert main_of(script)(arguments(place, script, tmp_path / "a", "--resume", "--auto_batch_size")) == 0
    smaller = ("--batch_size", 2, "--grad_accum_steps", 4)
    assert main_of(script)(arguments(place, script, tmp_path / "a", "--overwrite", *smaller, *more)) == 0
    capfd.readouterr()
    memory_for_batches_of(monkeypatch, 0)
    assert main_of(script)(arguments(place, script, tmp_path / "b", "--auto_batch_size")) == 1
    err = capfd.readouterr().err
    assert (
        err.startswith("error: out of memory with --batch_size 1: start again (--overwrite) with a smaller model")
        and err.count("\n") == 1
    )


def test_memory_that_runs_out_in_an_evaluation_is_named(place, tmp_path, capfd):
    script, folder = FULL, tmp_path / "run"

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    with in_evaluation(out_of_memory):
        assert main_of(script)(arguments(place, script, folder, "--save_every", 6, "--auto_batch_size")) == 1
    err = capfd.readouterr().err
    assert re.fullmatch(r"error: out of memory with --eval_batch_size 32: lower it \| --resume .* after step 6\n", err)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_auto_batch_size_trains_as_if_the_smaller_batch_had_been_given(place, tmp_path, monkeypatch, capfd, script):
    """Batches of 4 fit in the first epoch and no longer in the second: even so everything starts anew."""
    more = ("--batch_size", 2, "--grad_accum_steps", 4)
    assert main_of(script)(arguments(place, script, tmp_path / "small", *more)) == 0
    with monkeypatch.context() as patch, in_evaluation(lambda: memory_for_batches_of(patch, 3)):
        assert main_of(script)(arguments(place, script, tmp_path / "auto", "--auto_batch_size", "--save_every", 4)) == 0
    out = capfd.readouterr().out
    assert re.search("^out of memory with a batch of 4: .* with batches of 2, 4 .*step$", out, flags=re.MULTILINE)
    assert_same_end(script, tmp_path / "auto", tmp_path / "small")
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["args"]["batch_size"] == 4


def test_an_odd_batch_is_divided_so_that_the_effective_batch_stays(place, tmp_path, monkeypatch, capfd):
    memory_for_batches_of(monkeypatch, 3)
    script = FULL
    more = ("--batch_size", 9, "--auto_batch_size", "--epochs", 1)
    assert main_of(script)(arguments(place, script, tmp_path / "run", *more)) == 0
    assert re.search("with batches of 3, 6 .*step$", capfd.readouterr().out, flags=re.MULTILINE)


def save_weights(script):
    """(class, name) of what writes the weights of a checkpoint."""
    return (PreTrainedModel if script == FULL else PeftModel), "save_pretrained"


WRITERS = {
    "last/": lambda script: (Accelerator, "save_state"),
    "the checkpoint": save_weights,
    "a table": lambda script: (pd.DataFrame, "to_csv"),
}
FULL_DISKS = [  # what is written when the disk is full, how many bytes still fit in a file, and in which script
    ("last/", 100_000, FULL),
    ("the checkpoint", 2_000, LORA),
]
MORE_FULL_DISKS = [(what, limit, script) for what, limit, _ in FULL_DISKS for script in SCRIPTS for limit in (0, limit)]
MORE_FULL_DISKS += [("a table", 100, FULL), ("a table", 0, LORA)]
FULL_DISKS += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FULL_DISKS if case not in FULL_DISKS]


@pytest.mark.parametrize(("what", "limit", "script"), FULL_DISKS)
def test_a_full_disk_leaves_the_older_checkpoint_whole(place, whole, tmp_path, monkeypatch, capfd, what, limit, script):
    """RLIMIT_FSIZE stands in for the disk: no file may grow beyond it. Afterwards there is room again."""
    folder, (owner, name) = tmp_path / "run", WRITERS[what](script)
    function, calls = getattr(owner, name), []

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
        patch.setattr(owner, name, filled)
        assert main_of(script)(arguments(place, script, folder)) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"error: {folder}") and "cannot be written (" in err and err.count("\n") == 1, err
    assert re.search(r" \| --resume .* after step ", err)
    load_checkpoint(folder, str(place / "model"))
    assert not {path.name for path in folder.iterdir()} & UNRENAMED
    assert main_of(script)(arguments(place, script, folder, "--resume")) == 0
    assert_same_end(script, folder, whole[script])


def test_a_folder_deleted_under_the_run_ends_it_in_one_line(place, tmp_path, capfd):
    script, folder = FULL, tmp_path / "run"
    with in_evaluation(lambda: shutil.rmtree(folder)):
        assert main_of(script)(arguments(place, script, folder)) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"error: {folder}") and "No such file or directory" in err and err.count("\n") == 1
    assert err.endswith(" | there is nothing to resume\n") and not folder.exists()
