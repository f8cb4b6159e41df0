"""With the hub's own names: a stand-in hub on loopback serves model, data and MiniLM, or fails in one of its ways."""

import json
import shutil
import socket
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from hub_stub import HubStub

DATA, MODEL, MINILM = "ucsbnlp/tweet_qa", "google/flan-t5-small", "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def hub_data(tmp_path_factory, tweet_qa):
    """The data set as the hub holds it: a loading script on main, and a parquet copy on a revision of its own."""
    script, parquet = tmp_path_factory.mktemp("script"), tmp_path_factory.mktemp("parquet")
    (script / "README.md").write_text("# TweetQA\n")
    (script / "tweet_qa.py").write_text("raise SystemExit('a loading script was run')\n")
    for split in ("train", "validation", "test"):
        rows = json.loads((tweet_qa / f"{split}.json").read_text())[:12]
        columns = {name: [row.get(name, []) for row in rows] for name in ("Question", "Answer", "Tweet", "qid")}
        types = pa.schema(
            {"Question": pa.string(), "Answer": pa.list_(pa.string()), "Tweet": pa.string(), "qid": pa.string()}
        )
        (parquet / "default" / split).mkdir(parents=True)
        pq.write_table(pa.table(columns, types), parquet / "default" / split / "0000.parquet")
    return {"main": script, "refs/convert/parquet": parquet}


@pytest.fixture(scope="module")
def hub(hub_data, standin, minilm):
    with HubStub(models={MODEL: standin, MINILM: minilm}, datasets={DATA: hub_data}) as hub:
        yield hub


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory, hub):
    """A hub cache that a run with the default names has filled, and that run's output."""
    home = tmp_path_factory.mktemp("cache")
    save_dir = home / "run"
    done = run_script("tweet_qa_main_lora.py", "--save_dir", save_dir, "--epochs", 1, environ=hub.environ(home / "hf"))
    assert done.returncode == 0, done.stderr
    return home / "hf", done, save_dir


def test_a_run_with_the_default_names_takes_everything_from_the_hub(filled_cache, hub):
    _, done, save_dir = filled_cache
    assert (
        f"data: {DATA} | 12 train rows | 12 validation rows | 0 holdout rows | 12 test rows" in done.stdout
        and done.stderr == ""
    )
    read = [path for method, path, status in hub.requests if method == "GET" and status == 200]
    for part in ("flan-t5-small/resolve", "MiniLM-L6-v2/resolve", "refs/convert/parquet"):
        assert any(part in path for path in read), part
    run = json.loads((save_dir / "run.json").read_text())
    assert run["args"]["dataset"] == DATA and run["final"]["avg_sem_sim"] is not None
    config = json.loads((save_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == MODEL
    card = (save_dir / "README.md").read_text()
    assert f"base_model: {MODEL}" in card and f"- base_model:adapter:{MODEL}" in card and f"- {DATA}" in card


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(params=["refuses", pytest.param("never answers", marks=pytest.mark.slow), "offline mode"])
def dead_hub(request, hub):
    """The environment of a process for which no hub can be reached, in three ways."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        changes = {
            "refuses": {"HF_ENDPOINT": closed_port()},
            "never answers": {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"},
            "offline mode": {"HF_HUB_OFFLINE": "1"},
        }[request.param]
        yield lambda home: hub.environ(home, **changes)


def test_without_a_hub_one_line_says_within_30_s_what_is_missing(dead_hub, tmp_path, tweet_qa, standin, minilm):
    local = {"--model_name": standin, "--dataset": tweet_qa, "--sem_model": minilm, "--max_train_samples": 8}
    for flag, what in (("--dataset", "data set"), ("--model_name", "model"), ("--sem_model", "similarity model")):
        given = [word for pair in local.items() if pair[0] != flag for word in pair]
        started = time.perf_counter()
        done = run_script("tweet_qa_main.py", *given, "--save_dir", tmp_path / "run", environ=dead_hub(tmp_path / "hf"))
        assert time.perf_counter() - started < 30
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {flag} ") and done.stderr.count("\n") == 1, done.stderr
        assert f"the {what} could not be downloaded; give {flag} a local folder" in done.stderr
        assert not (tmp_path / "run").exists()


def test_without_a_hub_what_is_cached_is_enough(dead_hub, tmp_path, filled_cache):
    home, first, _ = filled_cache
    arguments = ("--save_dir", tmp_path / "run", "--epochs", 1)
    done = run_script("tweet_qa_main_lora.py", *arguments, environ=dead_hub(shutil.copytree(home, tmp_path / "hf")))
    assert done.returncode == 0, done.stderr
    losses = [[word for word in out.split() if "val_loss" in word] for out in (first.stdout, done.stdout)]
    assert losses[0] == losses[1] and len(losses[0]) == 2  # of the epoch and of the final evaluation


def test_a_name_that_the_hub_does_not_know(hub, tmp_path, tweet_qa, standin):
    good = {"--model_name": standin, "--dataset": tweet_qa, "--sem_model": "none", "--save_dir": tmp_path / "run"}
    for flag in ("--model_name", "--dataset", "--sem_model"):
        arguments = [word for pair in (good | {flag: "nobody/nothing"}).items() for word in pair]
        done = run_script("tweet_qa_main.py", *arguments, environ=hub.environ(tmp_path / "hf"))
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {flag} nobody/nothing: ") and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "run").exists()
