"""What a run writes is whole at any moment: an interruption leaves the older file or checkpoint, or the newer one."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_folders import write_run

from helper_functions import PROMPT, InputError, load_model_and_tokenizer
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.run_folder import begin, describe_run, is_finished, read_run_json, run_record, write_table, writing


class Killed(BaseException):
    """Stands for a process that ends here."""


def interrupt_after(monkeypatch, renames):
    """Let os.replace work so many times, then end the process."""
    left, replace = [renames], os.replace

    def counted(*paths):
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)


def test_an_interrupted_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "metrics.csv"
    write_table(path, [{"epoch": 1, "f1": 0.1 + 0.2}])
    before = path.read_bytes()
    with pytest.raises(Killed), writing(path) as beside:
        beside.write_text("epoch,f1\n1,0.")
        raise Killed
    assert path.read_bytes() == before == b"epoch,f1\n1,0.30000000000000004\n"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_overwriting_that_is_killed_does_not_leave_a_finished_run(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    record = read_run_json(folder) | {"finished": False, "run_id": "new"}
    unlink = Path.unlink

    def killed(path, **options):
        if path.name == "metrics.csv":
            raise Killed
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            begin(folder, record)
    assert not is_finished(read_run_json(folder)) and read_run_json(folder)["run_id"] == "new"
    begin(folder, record)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_an_interrupted_save_leaves_a_whole_checkpoint_or_none(tmp_path, monkeypatch, standin):
    model, tokenizer = load_model_and_tokenizer(str(standin))
    folder = tmp_path / "run"
    folder.mkdir()
    args = {"model_name": str(standin), "dataset": "data", "save_dir": str(folder), "seed": 0, "final_beams": 5}
    setup = SimpleNamespace(
        args=SimpleNamespace(**args), content={}, accelerator=SimpleNamespace(device=torch.device("cpu"))
    )
    record = run_record(describe_run(setup, "full", model, PROMPT))

    def save(value, renames=1000):
        with torch.no_grad():
            model.encoder.final_layer_norm.weight.fill_(value)
        with monkeypatch.context() as patch:
            interrupt_after(patch, renames)
            save_checkpoint(folder, model, tokenizer, record)

    def loaded():
        return load_checkpoint(folder)[0].encoder.final_layer_norm.weight[0].item()

    for renames in range(6):  # card in its place, then config, generation config, tokenizer and its config, weights
        with pytest.raises(Killed):
            save(1.0, renames)
        with pytest.raises(InputError):
            loaded()
    save(1.0)
    assert loaded() == 1.0 and not list(folder.glob(".tmp*"))
    for renames in range(6):
        with pytest.raises(Killed):
            save(2.0, renames)
        assert loaded() == 1.0
    save(2.0)
    assert loaded() == 2.0
