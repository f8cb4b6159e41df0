"""--push_to_hub: what reaches the hub, what is refused before any training, and that a failed upload loses nothing."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from conftest import FULL, LORA, SCRIPTS, WEIGHTS, main_of, run_script
from hub_stub import HubStub
from huggingface_hub import ModelCard

from helper_functions import RunError
from pipeline.publish import push

TOKENS = {"hf_writer": ("me", "write"), "hf_reader": ("me", "read")}
# What must not leave the machine: rows of the data set, and what only --resume and the trackers need.
KEPT_BACK = ("validation_predictions.csv", "holdout_predictions.csv", "test_answers.json")


@pytest.fixture
def arguments(tmp_path, standin, tweet_qa):
    """Of a run of one epoch on a few real rows, in the folder `run`."""
    given = {"--model_name": standin, "--dataset": tweet_qa, "--sem_model": "none", "--save_dir": tmp_path / "run"}
    given |= {"--max_train_samples": 16, "--max_eval_samples": 8, "--epochs": 1, "--holdout": 4, "--lr": 1e-2}
    return [str(word) for pair in given.items() for word in pair]


@pytest.fixture
def home(tmp_path):
    return tmp_path / "hf"


def environ(hub, home, token="hf_writer"):
    """Without Xet, which the stub has not; the model and the data are local, so the hub is asked for nothing else."""
    return hub.environ(home, HF_HUB_DISABLE_XET="1", HF_TOKEN=token, HF_HUB_DISABLE_UPDATE_CHECK="1")


def assert_whole(upload, folder, script):
    """Everything in the run folder has arrived as it is, but for what is kept back."""
    files = {path.name for path in folder.iterdir()}
    assert set(KEPT_BACK) < files and {"README.md", "run.json", "metrics.csv", "loss_curve.png"} < files
    assert upload.keys() == files - {*KEPT_BACK}
    for name, content in upload.items():
        assert content == (folder / name).read_bytes(), name
    assert len(upload[WEIGHTS[script]]) == json.loads((folder / "run.json").read_text())["checkpoint_bytes"]


def test_a_run_uploads_its_checkpoint_and_none_of_the_rows(tmp_path, arguments, home):
    with HubStub(tokens=TOKENS) as hub:
        done = run_script(FULL, *arguments, "--push_to_hub", "me/tweet-qa", environ=environ(hub, home))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1] == f"uploaded: {hub.url}/me/tweet-qa"
    assert_whole(hub.uploads["me/tweet-qa"], tmp_path / "run", FULL)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "AutoModelForSeq2SeqLM.from_pretrained('me/tweet-qa')" in card.text


@pytest.mark.slow
def test_an_upload_that_fails_is_repeated_by_the_command_shown_or_later(tmp_path, arguments, home):
    """The hub answers at the start and is gone at the end: the run is finished, and one line says how to go on."""
    script, folder = LORA, tmp_path / "run"
    with HubStub(tokens=TOKENS, dies_after="/api/whoami-v2") as hub:
        done = run_script(script, *arguments, "--push_to_hub", "me/tweet-qa", environ=environ(hub, home))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert re.fullmatch(
        rf"error: the upload failed \(.+\); .+: hf upload me/tweet-qa .+ \| {folder} has a finished run\n", done.stderr
    )
    assert json.loads((folder / "run.json").read_text())["finished"] and not (folder / "last").exists()
    assert not hub.uploads

    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "events").write_text("stays here")
    command = shlex.split(re.search(r": (hf upload .+) \| ", done.stderr)[1])
    with HubStub(tokens=TOKENS) as hub:
        hf = Path(sys.executable).with_name(command[0])
        again = subprocess.run([hf, *command[1:]], env=environ(hub, home), capture_output=True, text=True, timeout=120)
        assert again.returncode == 0, again.stderr
        shutil.rmtree(folder / "tensorboard")
        assert_whole(hub.uploads["me/tweet-qa"], folder, script)

        # A resumed run that is finished trains nothing, and shows the same command.
        resumed = run_script(script, *arguments, "--resume", "--push_to_hub", "me/other", environ=environ(hub, home))
        assert resumed.returncode == 0, resumed.stderr
        shown = shlex.join(command).replace("me/tweet-qa", "me/other")
        assert "there is nothing to resume; " in resumed.stdout and resumed.stdout.endswith(f": {shown}\n")

        later = run_script(
            script, *arguments, "--eval_only", "--final_beams", 2, "--push_to_hub", "later", environ=environ(hub, home)
        )
        assert later.returncode == 0 and later.stderr == "", later.stderr
        assert later.stdout.splitlines()[-1] == f"uploaded: {hub.url}/me/later"
    assert_whole(hub.uploads["me/later"], folder, script)
    card = hub.uploads["me/later"]["README.md"].decode()
    final = json.loads((folder / "run.json").read_text())["final"]
    assert "2 beams" in card and f"| F1 | {final['f1']:.4f} |" in card and "'later'" in card


@pytest.fixture
def refused(tmp_path, arguments, monkeypatch, capfd):
    """refused(message, repo, hub=URL, token=...): check how a run ends that cannot be uploaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def check(message, repo, *more, url="http://127.0.0.1:9", token="hf_writer", script=FULL):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", token)
        started = time.perf_counter()
        assert main_of(script)([*arguments, "--push_to_hub", repo, *more]) == 2
        out, err = capfd.readouterr()
        assert time.perf_counter() - started < 5 and out == "" and not (tmp_path / "run").exists()
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err

    return check


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_token_that_may_write_nothing_begins(refused, script):
    refused(
        "--push_to_hub me/qa needs a token: run `hf auth login` first, or set HF_TOKEN",
        "me/qa",
        token="",
        script=script,
    )
    with HubStub(tokens=TOKENS) as hub:
        message = "--push_to_hub me/qa: the hub refuses the token; `hf auth login` sets another"
        refused(message, "me/qa", url=hub.url, token="hf_expired", script=script)
        message = "--push_to_hub me/qa: the token can only read"
        refused(message, "me/qa", url=hub.url, token="hf_reader", script=script)
    assert not hub.uploads


def test_what_is_no_repository_or_no_hub_is_refused(refused, monkeypatch):
    for repo in ("me/qa/more", "./run", "me/..qa", "", "me/q a"):
        refused(f"--push_to_hub {repo}: ", repo)
    refused("--push_to_hub me/qa: the hub cannot be reached (ConnectError)", "me/qa")
    refused("--seeds cannot be combined with --push_to_hub", "me/qa", "--seeds", "1", "2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("--push_to_hub me/qa: HF_HUB_OFFLINE is set", "me/qa")


def test_a_malformed_token_is_not_shown(refused, capfd):
    refused("--push_to_hub me/qa: the hub cannot be reached", "me/qa", token="hf_säcret")


def test_a_hub_that_never_answers_is_not_waited_for(tmp_path, arguments, home):
    with socket.create_server(("127.0.0.1", 0)) as silent, HubStub(tokens=TOKENS) as hub:
        changes = environ(hub, home) | {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        started = time.perf_counter()
        done = run_script(FULL, *arguments, "--push_to_hub", "me/qa", environ=changes)
    assert time.perf_counter() - started < 40  # 8 of them for the hub
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr == "error: --push_to_hub me/qa: the hub cannot be reached (TimeoutError)\n"


def test_a_repository_of_somebody_else_is_said_at_the_end(tmp_path, refused, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with HubStub(tokens=TOKENS) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        with pytest.raises(RunError, match="the upload failed .*: hf upload you/qa "):
            push(tmp_path / "run", "you/qa")
    assert not hub.uploads and os.listdir(tmp_path / "run") == ["run.json"]
