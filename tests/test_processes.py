"""Several processes under `accelerate launch` do what one does: each example once, the same figures, one voice."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import AT_START, FULL, FULL_FIRST, LORA, PROJECT, SERVERS, Script, run_script
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helper_functions import LABEL_PAD, InputError, answer, eval_loader, train_loader
from pipeline.devices import counted_batches, sharding

TIMES = ("epoch_seconds", "steps_per_sec", "samples_per_sec", "seconds_since_start")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_launcher(script, *arguments, processes=2, sharded=False, machines=(), port=None, **environ):
    """Start a script under `accelerate launch`. Without Java, whose start takes longer than the rest.

    machines: what tells the launcher of several machines; that there is one, if not given.
    """
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", processes]
    launcher += ["--main_process_port", port or free_port(), *(machines or ("--num_machines", 1))]
    if sharded:
        launcher += ["--config_file", PROJECT / "benchmarks" / "fsdp2.yaml"]
    else:
        launcher += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    argv = map(str, (*launcher, PROJECT / "tests" / "forked.py", PROJECT / script, *arguments))
    return Script([*argv], AT_START | {"PATH": os.devnull, "FORK_SERVER": SERVERS[0].address, **environ})


def launch(script, *arguments, **options):
    """What `run_script` does, under `accelerate launch`."""
    return start_launcher(script, *arguments, **options).wait()


def wait_until(happened, running):
    """Wait until something has happened, as long as a Script is running."""
    while not happened():
        assert running.is_running(), running.said("stderr")
        time.sleep(0.005)


@pytest.fixture(scope="module")
def calm_demo(made_once):
    """The demo's model without dropout, which differs from process to process."""

    def make(folder):
        shutil.copytree(PROJECT / "demo" / "tiny-t5", folder / "model")
        config = json.loads((folder / "model" / "config.json").read_text())
        (folder / "model" / "config.json").write_text(json.dumps(config | {"dropout_rate": 0.0}))

    return made_once("calm-demo", make)[0] / "model"


def arguments(script, calm_demo, **others):
    """Those of a small run: 45 rows, which neither batches of 4 nor steps of 8 divide."""
    given = {"model_name": calm_demo, "dataset": PROJECT / "demo" / "tweets", "sem_model": "none", "lr": 1e-3}
    given |= {"max_train_samples": 45, "max_eval_samples": 37, "epochs": 2, "eval_batch_size": 8}
    given |= {"probe": PROJECT / "probes" / "demo.jsonl", **others}
    if script == LORA:
        given |= {"lora_dropout": 0, "lr": 3e-3}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module", params=FULL_FIRST)
def both(request, made_once, calm_demo):
    """(script, its run in two processes with batches of 4, its run in one process with batches of 8)."""
    script = request.param

    def make(folder):
        two = launch(script, *arguments(script, calm_demo, batch_size=4, save_dir=folder / "two"))
        one = run_script(script, *arguments(script, calm_demo, batch_size=8, save_dir=folder / "one"))
        assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
        return vars(two), vars(one)

    folder, (two, one) = made_once(f"both-{script}", make)
    two, one = (subprocess.CompletedProcess(**done) for done in (two, one))
    return script, (folder / "two", two), (folder / "one", one)


def table(path):
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_two_processes_learn_what_one_does_with_twice_the_batch(both):
    _, (two, _), (one, _) = both
    steps = [table(folder / "train_loss.csv") for folder in (two, one)]
    assert len(steps[0]) == len(steps[1]) == 12
    for ours, theirs in zip(*steps, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for ours, theirs in zip(*(table(folder / "metrics.csv") for folder in (two, one)), strict=True):
        for name in TIMES:
            del ours[name], theirs[name]
        assert ours == pytest.approx(theirs, rel=1e-4)
    answers = [(folder / "test_answers.json").read_text() for folder in (two, one)]
    assert answers[0] == answers[1] and len({row["Answer"] for row in json.loads(answers[0])}) > 5
    runs = [json.loads((folder / "run.json").read_text()) for folder in (two, one)]
    assert [run["effective_batch_size"] for run in runs] == [8, 8]
    assert [run["identity"]["number of processes"] for run in runs] == [2, 1]


def test_one_process_speaks_for_all(both):
    def lines(output):
        output = output.replace("cpu:0", "cpu").replace("/two", "/one")
        return [line.split("time=")[0] for line in output.splitlines() if not line.startswith("memory: ")]

    _, (_, two), (_, one) = both
    assert lines(two.stdout) == lines(one.stdout) and "effective batch 8" in one.stdout
    assert two.stderr == ""


def test_a_checkpoint_scores_the_same_to_the_last_digit(both, tmp_path, calm_demo):
    script, _, (one, _) = both
    folders = [shutil.copytree(one, tmp_path / name) for name in ("two", "one")]
    given = [arguments(script, calm_demo, save_dir=folder) for folder in folders]
    for done in (launch(script, "--eval_only", *given[0]), run_script(script, "--eval_only", *given[1])):
        assert done.returncode == 0, done.stderr
    for name in ("validation_predictions.csv", "test_predictions.csv", "test_answers.json", "breakdown.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    finals = [json.loads((folder / "run.json").read_text())["final"] for folder in folders]
    assert finals[0] == finals[1] and finals[0]["f1"] > 0.1


@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_was_killed_goes_on_with_as_many_processes_only(both, shards, request, tmp_path, calm_demo):
    script, (two, _), _ = both
    if shards:
        two, _ = request.getfixturevalue("sharded")
    given = arguments(script, calm_demo, batch_size=4, save_dir=tmp_path / "run")
    running = start_launcher(script, *given, "--save_every", 2, sharded=shards)
    wait_until(lambda: "[epoch 1] val_loss" in running.said(), running)
    launched = psutil.Process(running.pid).children(recursive=True)
    for process in (psutil.Process(running.pid), *launched):
        process.kill()
    assert running.wait().returncode == -signal.SIGKILL and len(launched) == 2
    psutil.wait_procs(launched)
    alone = run_script(script, *given, "--resume")
    assert alone.returncode == 2 and "number of processes (was 2, is 1)" in alone.stderr
    if shards:
        whole = launch(script, *given, "--resume")
        assert whole.returncode != 0 and re.search("started with different .*sharding", whole.stderr)
    done = launch(script, *given, "--resume", sharded=shards)
    assert done.returncode == 0, done.stderr
    for name in ("train_loss.csv", "validation_predictions.csv", "test_answers.json"):
        assert (tmp_path / "run" / name).read_bytes() == (two / name).read_bytes(), name
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize("evaluating", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sigterm_stops_all_processes_together_and_the_run_goes_on(both, evaluating, tmp_path, calm_demo):
    """In the first epoch or in its evaluation; the launcher is told, and tells the processes."""
    script, (two, _), _ = both
    given = arguments(script, calm_demo, batch_size=4, save_dir=tmp_path / "run")
    saving = () if evaluating else ("--save_every", 2)
    running = start_launcher(script, *given, *saving, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="120")
    if evaluating:
        wait_until(lambda: "[epoch 1] time=" in running.said(), running)
    else:
        wait_until((tmp_path / "run" / "last").exists, running)
    running.send(signal.SIGTERM)
    done = running.wait(timeout=300)
    assert done.returncode != 0 and re.search("interrupted: --resume .* after step ", done.stderr)
    loop = json.loads((tmp_path / "run" / "last" / "loop.json").read_text())["state"]
    assert 0 < loop["step"] <= 12 and not (tmp_path / "run" / "test_answers.json").exists()
    done = launch(script, *given, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("train_loss.csv", "validation_predictions.csv", "test_answers.json"):
        assert (tmp_path / "run" / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_two_machines_do_what_two_processes_do(both, tmp_path, calm_demo):
    """The README's two commands, each "machine" on a loopback address of its own; the first one speaks."""
    script, (two, _), _ = both
    given = arguments(script, calm_demo, batch_size=4, save_dir=tmp_path / "run")
    port, launched = free_port(), []
    for rank in (0, 1):
        machines = ("--num_machines", 2, "--machine_rank", rank, "--main_process_ip", "127.0.0.2")
        launched.append(start_launcher(script, *given, machines=machines, port=port))
    done = [launcher.wait(timeout=300) for launcher in launched]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "[final]" in done[0].stdout and done[1].stdout == ""
    for name in ("train_loss.csv", "validation_predictions.csv", "test_answers.json"):
        assert (tmp_path / "run" / name).read_bytes() == (two / name).read_bytes(), name


def test_bad_input_is_told_once(tmp_path, calm_demo):
    given = arguments(FULL, calm_demo, dataset=tmp_path / "none", save_dir=tmp_path / "run")
    done = launch(FULL, *given)
    assert done.returncode != 0 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr.count("error: --dataset") == 1
    refused = launch(FULL, *arguments(FULL, calm_demo), "--auto_batch_size")
    assert refused.stderr.count("error: --auto_batch_size works with one process") == 1


@pytest.mark.slow
def test_seeds_run_one_after_the_other_in_all_processes(tmp_path, calm_demo):
    small = {"max_train_samples": 8, "max_eval_samples": 8, "epochs": 1, "save_dir": tmp_path / "runs"}
    done = launch(FULL, *arguments(FULL, calm_demo, **small), "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    runs = [json.loads((tmp_path / "runs" / f"seed_{seed}" / "run.json").read_text()) for seed in (0, 1)]
    assert [(run["seed"], run["finished"]) for run in runs] == [(0, True), (1, True)]


@pytest.fixture(scope="module")
def sharded(both, made_once, calm_demo):
    """(its folder, what it printed) of the run in two processes once more, now with a part of the weights in each."""
    script = both[0]

    def make(folder):
        done = launch(script, *arguments(script, calm_demo, batch_size=4, save_dir=folder / "two"), sharded=True)
        assert done.returncode == 0, done.stderr
        return vars(done)

    folder, done = made_once(f"sharded-{script}", make)
    return folder / "two", subprocess.CompletedProcess(**done)


def test_sharded_processes_learn_what_whole_ones_do(both, sharded):
    _, (whole, _), _ = both
    folder, done = sharded
    assert done.stderr == ""
    run = json.loads((folder / "run.json").read_text())
    held = run["parameters_per_process"]
    assert 0.5 <= held / run["total_parameters"] < 0.52 and f"sharded, {held:,} parameters per process" in done.stdout
    for file, tolerance in (("train_loss.csv", 1e-4), ("metrics.csv", 1e-5)):
        for ours, theirs in zip(table(folder / file), table(whole / file), strict=True):
            for name in TIMES:
                ours.pop(name, None), theirs.pop(name, None)
            assert ours == pytest.approx(theirs, rel=tolerance)


def test_a_sharded_run_leaves_an_ordinary_checkpoint(both, sharded, tmp_path, calm_demo):
    script, (whole, _), _ = both
    folder, _ = sharded
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    weights = [next(path.glob("*model.safetensors")) for path in (folder, whole)]
    ours, theirs = (load_file(path) for path in weights)
    assert weights[0].name == weights[1].name and list(ours) == list(theirs)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-4)
    if script == FULL:
        assert (folder / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    copy = shutil.copytree(folder, tmp_path / "copy")
    alone = run_script(script, "--eval_only", *arguments(script, calm_demo, save_dir=copy))
    assert alone.returncode == 0, alone.stderr
    for name in ("validation_predictions.csv", "test_answers.json"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name

    model, tokenizer = load_as_readme_says(script, folder, calm_demo)
    with open(folder / "validation_predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    answers = answer(model, tokenizer, "cpu", [row["question"] for row in rows], [row["tweet"] for row in rows])
    assert answers == [row["prediction"] for row in rows]


def load_as_readme_says(script, folder, base):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if script == FULL:
        return AutoModelForSeq2SeqLM.from_pretrained(folder), tokenizer
    return PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder), tokenizer


@pytest.mark.slow
def test_a_sharded_model_may_share_its_embeddings_with_its_head(tmp_path, calm_demo):
    model = AutoModelForSeq2SeqLM.from_pretrained(calm_demo)
    model.config.tie_word_embeddings = model.config.scale_decoder_outputs = True
    weights = load_file(calm_demo / "model.safetensors")
    del weights["lm_head.weight"]
    tied = shutil.copytree(calm_demo, tmp_path / "tied")
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    (tied / "config.json").write_text(json.dumps(model.config.to_dict()))
    small = {"max_train_samples": 16, "max_eval_samples": 8, "epochs": 1}
    folders = [tmp_path / "sharded", tmp_path / "one"]
    given = [arguments(FULL, tied, **small, save_dir=folder) for folder in folders]
    done = launch(FULL, *given[0], "--batch_size", 2, sharded=True)
    alone = run_script(FULL, *given[1], "--batch_size", 4)
    assert (done.returncode, alone.returncode) == (0, 0), done.stderr + alone.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert list(ours) == list(theirs) and "lm_head.weight" not in ours
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-4)
    assert (folders[0] / "config.json").read_bytes() == (folders[1] / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("version", "precision", "message"), [("1", "fp32", "fsdp_version 2"), ("2", "fp16", "--precision fp16")]
)
def test_what_does_not_go_with_shards_is_refused(version, precision, message, monkeypatch):
    assert sharding(precision) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(InputError, match=message):
        sharding(precision)


class Examples(torch.utils.data.Dataset):
    """Examples whose one target token is their own number."""

    def __init__(self, lengths):
        self.input_ids = [[1] * length for length in lengths]
        self.labels = [[number] for number in range(len(lengths))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"index": index, "labels": self.labels[index]}


def collate(items):
    return {"index": [item["index"] for item in items], "labels": torch.tensor([item["labels"] for item in items])}


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), processes=st.integers(1, 5), done=st.integers(0, 3))
def test_each_example_counts_once_in_one_of_the_processes(lengths, batch_size, processes, done):
    counted, batches = [], set()
    for process in range(processes):
        loader = train_loader(Examples(lengths), batch_size, collate, 0)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=process, put_on_device=False)
        accelerator = SimpleNamespace(num_processes=processes, process_index=process)
        batches.add(len(loader))
        done = min(done, len(loader) - 1)
        for batch, tokens in counted_batches(loader, done, accelerator):
            labels = batch["labels"][batch["labels"] != LABEL_PAD].tolist()
            assert len(labels) > 0 and tokens in (0, len(labels))
            counted += labels if tokens else []
    assert len(batches) == 1 and len(set(counted)) == len(counted)
    assert len(counted) == len(lengths) - done * batch_size * processes


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), processes=st.integers(1, 5))
def test_processes_share_the_very_batches_that_one_evaluates(lengths, batch_size, processes):
    def batches(process, processes):
        return [tuple(b["index"]) for b in eval_loader(Examples(lengths), batch_size, collate, process, processes)]

    shares = [batches(process, processes) for process in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert {batch for share in shares for batch in share} == set(batches(0, 1))
