"""Promises about the project itself: what its files hold, what importing costs, and that the README tells the truth."""

import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, SCRIPTS, main_of, run_script

import tweet_qa_main


def test_importing_the_helper_loads_no_dear_library():
    heavy = ("sentence_transformers", "peft", "matplotlib", "accelerate", "datasets", "pandas", "scipy")
    code = f"import sys, helper_functions; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_importing_costs_little_more_than_torch_and_t5():
    """As ratios of processor times, which another process disturbs less: medians of imports that take turns."""
    modules = {
        "base": "torch, transformers.models.t5.modeling_t5",
        "helper": "helper_functions",
        "main": "tweet_qa_main",
    }
    times = {name: [] for name in modules}
    for _ in range(7):
        for name, imported in modules.items():
            code = f"import time; import {imported}; print(time.process_time())"
            done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
            times[name].append(float(done.stdout))
    base, helper, main = (statistics.median(each) for each in times.values())
    print(f"torch and T5 {base:.2f} s, helper_functions {helper:.2f} s, tweet_qa_main {main:.2f} s")
    assert helper <= 1.15 * base and main <= 1.35 * base, (base, helper, main)


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (PROJECT / "README.md").read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    launched = [re.sub(r"^accelerate launch .*?(?=tweet_qa_main)", "python ", line) for line in lines]
    return [line for line in launched if line.startswith("python tweet_qa_main")]


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_are_understood(command, monkeypatch, tmp_path, capsys):
    """Up to the point where they would load anything; --merge looks for the run first, tests/test_merge.py has one."""
    _, script, *argv = shlex.split(command)
    if "--merge" in argv:
        monkeypatch.chdir(tmp_path)
        assert main_of(script)(argv) == 2
        assert capsys.readouterr().err.startswith(f"error: --merge {argv[1]}: this folder does not exist")
        return
    seen = []
    monkeypatch.setattr(tweet_qa_main, "run", lambda args, wrap: seen.append(args))
    assert main_of(script)(argv) == 0
    assert Path(seen[0].save_dir).is_relative_to(argv[argv.index("--save_dir") + 1])


def test_the_readme_runs_both_scripts():
    assert {shlex.split(command)[1] for command in readme_commands()} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_what_each_argument_does_and_its_default(script):
    done = run_script(script, "--help", environ={"COLUMNS": "160"})
    assert done.returncode == 0 and done.stderr == ""
    arguments = re.findall(r"^  (--\w+) (.*?)(?=^  -|^\w|\Z)", done.stdout, flags=re.MULTILINE | re.DOTALL)
    helps = {flag: " ".join(text.split()) for flag, text in arguments}
    full = {"--lr": "0.0001", "--save_dir": "flan_t5_tweetqa_ckpt"}
    lora = {"--lr": "0.0003", "--save_dir": "flan_t5_tweetqa_ckpt_lora", "--lora_r": "8", "--lora_alpha": "32"}
    both = {"--model_name": "google/flan-t5-small", "--dataset": "ucsbnlp/tweet_qa", "--epochs": "5"}
    for flag, default in (both | (full if script == "tweet_qa_main.py" else lora)).items():
        assert helps[flag].endswith(f"(default: {default})")
    for flag, text in helps.items():
        assert re.fullmatch(r".+ \w.{10,} \(default: .+\)", text), flag
    assert len(helps) >= 18
