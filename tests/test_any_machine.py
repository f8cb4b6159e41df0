"""The scripts run where people run them: without a home, on any console, in a job's memory limit, in a thread."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FULL, FULL_FIRST, PROJECT, main_of, run_script

from pipeline import memory
from pipeline.run_folder import check_is_free, git_commit

DEMO = ("--model_name", PROJECT / "demo" / "tiny-t5", "--dataset", PROJECT / "demo" / "tweets")
SMALL = ("--max_train_samples", "16", "--max_eval_samples", "8", "--epochs", "1")


@pytest.mark.parametrize("script", FULL_FIRST)
def test_a_user_without_home_and_without_an_entry_in_the_password_file(tmp_path, minilm, script):
    if not shutil.which("setpriv") or os.getuid() != 0:
        pytest.skip("setpriv and root are needed to become another user")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own is below a folder that only root may enter
    folder.chmod(0o777)
    may_read = "+dac_override,+dac_read_search"  # the interpreter can be in a folder of root's
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    user += ["--inh-caps", may_read, "--ambient-caps", may_read]
    command = [*user, sys.executable, script, *DEMO, *SMALL, "--sem_model", minilm, "--save_dir", folder / "run"]
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    options = {"capture_output": True, "text": True, "cwd": PROJECT, "env": environ | {"PATH": os.devnull}}
    command[0] = shutil.which("setpriv")
    done = subprocess.run(list(map(str, command)), **options)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run" / "run.json").read_text())["final"]["bleu1"] >= 0
    shutil.rmtree(folder)


def test_what_the_final_evaluation_needs_is_tried_before_training(tmp_path):
    """A broken nltk ends the run in a line before the first step, and nothing is written."""
    (tmp_path / "nltk").mkdir()
    (tmp_path / "nltk" / "__init__.py").write_text("raise OSError('no such disk')")
    environ = {"PYTHONPATH": str(tmp_path)}
    done = run_script(FULL, *DEMO, *SMALL, "--sem_model", "none", "--save_dir", tmp_path / "run", environ=environ)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such disk" in done.stderr
    assert not (tmp_path / "run").exists() and "epoch" not in done.stdout


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "cp1252"))]
)
def test_a_console_that_is_not_utf8(tmp_path, finished_runs, encoding):
    environ = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "PATH": os.devnull}

    def run(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, capture_output=True, encoding=encoding, cwd=PROJECT, env=environ)

    data = tmp_path / "données ☕"
    shutil.copytree(PROJECT / "demo" / "tweets", data)
    given = ("--model_name", PROJECT / "demo" / "tiny-t5", "--dataset", data, "--sem_model", "none")
    done = run(FULL, *given, *SMALL, "--save_dir", tmp_path / "run ☕")
    assert done.returncode == 0 and "run ?" in done.stdout, done.stderr
    done = run("compare_runs.py", finished_runs / "full", finished_runs / "lora", "--out", tmp_path / "ü ☕")
    assert done.returncode == 0 and "LoRA" in done.stdout, done.stderr
    done = run(FULL, *given, "--save_dir", tmp_path / "run ☕")
    assert done.returncode == 2 and "already has a run" in done.stderr


def test_the_commit_is_the_projects_own(tmp_path, monkeypatch):
    """Unpacked inside another repository, the code has no commit; that of the other one says nothing about it."""
    copy = tmp_path / "other" / "copy"
    (copy / "pipeline").mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(copy.parent)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "foreign"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr("pipeline.run_folder.__file__", str(copy / "pipeline" / "run_folder.py"))
    assert git_commit() is None
    subprocess.run([*git[:-1], str(copy), "init", "-q"], check=True)
    subprocess.run([*git[:-1], str(copy), "commit", "-q", "--allow-empty", "-m", "own"], check=True)
    head = subprocess.run([*git[:-1], str(copy), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert git_commit() == head.stdout.strip()


GB = 2**30


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{4 * GB}"}, [4 * GB]),
        (  # v2: each group above has a limit too; another process has 2 GB of this one's, 1 GB of it cache
            {
                "proc/self/cgroup": "0::/slurm/job_1\n",
                "sys/fs/cgroup/slurm/job_1/memory.max": f"{6 * GB}",
                "sys/fs/cgroup/slurm/job_1/memory.current": f"{3 * GB}",
                "sys/fs/cgroup/slurm/job_1/memory.stat": f"anon 1\nfile {GB}\n",
                "sys/fs/cgroup/slurm/memory.max": f"{9 * GB}",
            },
            [5 * GB, 9 * GB],
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max"}, []),
        (  # v1 in a container: the group's folder is not there, the container's limit is at the root
            {
                "proc/self/cgroup": "5:cpu:/docker/x\n4:memory:/docker/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}",
            },
            [2 * GB],
        ),
        (
            {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
            [],
        ),
        ({}, []),
    ],
    ids=["v2", "v2 nested", "v2 without", "v1 container", "v1 without", "no cgroups"],
)
def test_memory_limits_of_jobs_and_containers(tmp_path, files, limits):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.cgroup_limits(GB, tmp_path) == limits


def test_the_estimate_says_the_limit_of_ulimit(tmp_path):
    """`ulimit -v` bounds addresses, of which a process has more than memory."""
    code = (
        "import resource, torch, psutil; from pipeline.memory import memory_of;"
        f"resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + {GB},) * 2);"
        "held, most = memory_of(torch.device('cpu')); print(most - held)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert int(done.stdout) == pytest.approx(GB, rel=0.2), done.stderr


def test_a_script_can_be_called_in_a_thread(tmp_path, without_java):
    codes = []
    argv = [*DEMO, *SMALL, "--sem_model", "none", "--save_dir", tmp_path / "run"]
    thread = threading.Thread(target=lambda: codes.append(main_of(FULL)(list(map(str, argv)))))
    thread.start()
    thread.join()
    assert codes == [0] and (tmp_path / "run" / "model.safetensors").exists()


def test_the_log_of_a_run_may_be_in_its_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / "train.log", "w") as log:
        command = [sys.executable, PROJECT / FULL, *DEMO, *SMALL, "--sem_model", "none", "--save_dir", folder]
        code = subprocess.run(list(map(str, command)), stdout=log, stderr=log, env=os.environ | {"PATH": os.devnull})
    assert code.returncode == 0 and "[final]" in (folder / "train.log").read_text()

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"other contains notes\.txt, which no run has written"):
        check_is_free(tmp_path / "other")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_memory_is_estimated_on_each_name_of_the_cpu(name, standin, rows, capsys):
    from accelerate import Accelerator

    from helper_functions import TweetQADataset, build_collate_fn, load_model_and_tokenizer, train_loader
    from tweet_qa_main import build_optimizer

    model, tokenizer = load_model_and_tokenizer(str(standin))
    accelerator = Accelerator(cpu=True)
    like = SimpleNamespace(
        on_main_process=accelerator.on_main_process,
        device=torch.device(name),
        autocast=accelerator.autocast,
        gradient_accumulation_steps=1,
    )
    loader = train_loader(TweetQADataset(rows[:16], tokenizer), 8, build_collate_fn(tokenizer), seed=0)
    estimate = memory.estimate_memory(model, loader, like, lambda twin: build_optimizer(twin, 1e-3, 10)[0], False)
    assert estimate > 0 and "memory: about" in capsys.readouterr().out
