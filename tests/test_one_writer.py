"""One folder has one writer: a second one is refused in a line before it touches anything; a killed one holds none."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import FULL, PROJECT, contents, run_script, start_script

from pipeline import lock
from pipeline.errors import InputError, RunError
from pipeline.run_folder import writing

SMALL = ("--model_name", "demo/tiny-t5", "--dataset", "demo/tweets", "--sem_model", "none", "--max_train_samples", 48)
SMALL += ("--max_eval_samples", 24, "--lr", "1e-3")
HOLDS = "import sys, time; from pipeline.lock import only_writer\n"
HOLDS += "with only_writer(sys.argv[1]): print(1, flush=True); time.sleep(60)"


def demo(*more):
    """The arguments of a small run on the demo's data, with paths that hold from any folder."""
    given = [PROJECT / word if str(word).startswith("demo/") else word for word in SMALL]
    return [*given, *more]


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "run"], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()


def wait_for(path, script, timeout=120):
    end = time.monotonic() + timeout
    while not path.exists():
        assert script.is_running() and time.monotonic() < end, script.said("stderr")
        time.sleep(0.02)


def test_of_two_runs_started_together_one_ends_and_the_other_is_refused(tmp_path):
    folder = tmp_path / "same"
    runs = [
        start_script(FULL, *demo("--epochs", 2, "--save_dir", folder, "--seed", 1)),
        start_script(FULL, *demo("--epochs", 2, "--save_dir", folder, "--seed", 2, "--batch_size", 4)),
    ]
    done = [run.wait() for run in runs]
    assert sorted(each.returncode for each in done) == [0, 2]
    refused = next(each for each in done if each.returncode == 2)
    winner = done.index(next(each for each in done if each.returncode == 0))
    assert refused.stdout == "" and refused.stderr.count("\n") == 1
    assert f"--save_dir {folder} is in use: process {runs[winner].pid} on " in refused.stderr
    assert json.loads((folder / "run.json").read_text())["seed"] == winner + 1
    assert not (folder / lock.LOCK).exists()


def files_of(alive, folder):
    """The names of what a run has written, at a moment when it is not replacing last/, but for files that it is about
    to rename."""
    names = set()
    while "last/loop.json" not in names:
        assert alive.is_running()
        alive.send(signal.SIGSTOP)  # so that its files stay as they are for a moment; its lock is fresh
        if psutil.Process(alive.pid).status() == psutil.STATUS_STOPPED:
            names = {name for name in contents(folder) if not name.startswith((".tmp-", ".old-", lock.LOCK))}
        alive.send(signal.SIGCONT)
        time.sleep(0.01)
    return names


@pytest.mark.parametrize("flag", ["--resume", "--overwrite", "--eval_only"])
def test_a_living_run_is_neither_resumed_nor_replaced_nor_scored(tmp_path, flag):
    folder = tmp_path / "run"
    alive = start_script(FULL, *demo("--epochs", 200, "--save_dir", folder))
    try:
        wait_for(folder / "last" / "loop.json", alive)
        before = files_of(alive, folder)
        done = run_script(FULL, *demo("--epochs", 200, "--save_dir", folder, flag))
        assert done.returncode == 2 and f"process {alive.pid} on " in done.stderr, done.stderr
        assert alive.is_running() and before <= files_of(alive, folder) and "run.json" in before
    finally:
        alive.send(signal.SIGKILL)
    # A run that was killed holds nothing: the folder can be resumed at once.
    alive.wait()
    started = time.monotonic()
    with lock.only_writer(folder):
        assert time.monotonic() - started < lock.LEASE / 2


def test_a_comparison_does_not_write_where_another_process_writes(tmp_path, finished_runs, holder):
    runs = [finished_runs / "full", finished_runs / "lora"]
    done = run_script("compare_runs.py", *runs, "--out", tmp_path / "run")
    assert done.returncode == 2 and f"--out {tmp_path / 'run'} is in use: process {holder.pid} on " in done.stderr
    assert os.listdir(tmp_path / "run") == [lock.LOCK]


def test_a_folder_that_stays_empty_is_removed_again(tmp_path):
    with lock.only_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []
    done = run_script(FULL, *demo("--save_dir", tmp_path / "a" / "b"), "--dataset", tmp_path / "missing")
    assert done.returncode == 2 and os.listdir(tmp_path) == []


def test_the_lock_of_a_process_on_another_machine_holds_while_it_is_touched(tmp_path, monkeypatch):
    """The other machine is played by a lock file with its name: what matters is whether somebody touches it."""
    monkeypatch.setattr(lock, "LEASE", 4.0)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.5)
    path = tmp_path / "run" / lock.LOCK
    path.parent.mkdir()
    foreign = "filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=aa\nduration=4.0\nsince=2026-01-02 03:04:05+00:00\n"
    path.write_text(foreign)
    toucher = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.3)", path]
    )
    try:
        said = "process 1 on elsewhere has been writing to it since 2026-01-02 03:04:05"
        with pytest.raises(InputError, match=said), lock.only_writer(path.parent):
            pass
        assert path.read_text() == foreign
    finally:
        toucher.kill()
        toucher.wait()
    started = time.monotonic()
    with lock.only_writer(path.parent):  # nobody touches it any more: its process is gone
        assert 3.5 < time.monotonic() - started < 30
        assert "host=elsewhere" not in path.read_text()


def test_a_process_that_loses_its_lock_writes_nothing_more(tmp_path, monkeypatch):
    """As when it was suspended for so long that another process took the folder over."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    folder = tmp_path / "run"
    with lock.only_writer(folder):
        with writing(folder / "metrics.csv") as beside:
            beside.write_text("ours")
        (folder / lock.LOCK).unlink()
        (folder / lock.LOCK).write_text("filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=aa\nduration=60.0\n")
        end = time.monotonic() + 30
        while folder not in lock._lost and time.monotonic() < end:
            time.sleep(0.05)
        with pytest.raises(RunError, match="lock was removed or taken over"), writing(folder / "metrics.csv") as beside:
            beside.write_text("theirs")
    assert (folder / "metrics.csv").read_text() == "ours"
