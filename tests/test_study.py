"""A study runs what is missing and nothing twice, whatever stops it and whoever else runs it."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PROJECT, SERVERS, contents, start_script
from run_folders import write_run

import study
from pipeline.arguments import ROLES
from pipeline.errors import InputError
from pipeline.lock import only_writer
from pipeline.plan import read_plan, words

pytestmark = pytest.mark.skipif("holdout_seed" not in ROLES, reason="the scripts cannot score an untrained model yet")

SMALL = {"model_name": "demo/tiny-t5", "dataset": "demo/tweets", "sem_model": "none", "epochs": 1}
SMALL |= {"max_train_samples": 16, "max_eval_samples": 8}
TIMES = ("seconds", "peak_memory_mb")


@pytest.fixture
def plan_at(tmp_path):
    """plan_at(methods, seeds=…, folder=…, common arguments): the path of a plan with the text `methods`."""
    return plan_in(tmp_path)


def plan_in(tmp_path):
    def write(methods, seeds=(0, 1), folder="study", name="plan.toml", **common):
        given = {key: str(PROJECT / value) if str(value).startswith("demo/") else value for key, value in SMALL.items()}
        lines = [f"{key} = {json.dumps(value)}" for key, value in (given | common).items()]
        head = f"dir = {json.dumps(str(tmp_path / folder))}\nseeds = {list(seeds)}\n[common]\n"
        (tmp_path / name).write_text(head + "\n".join(lines) + "\n" + methods)
        return tmp_path / name

    return write


FULL_METHOD = '[[method]]\nname = "full"\nscript = "tweet_qa_main.py"\nlr = [1e-4, 1e-3]\n'
LORA_METHOD = '[[method]]\nname = "LoRA"\nscript = "tweet_qa_main_lora.py"\nlora_r = [2]\nlr = 3e-3\n'
ONE_RUN = '[[method]]\nname = "full"\nscript = "tweet_qa_main.py"\nlr = 1e-3\n'


@pytest.fixture
def run(monkeypatch, capfd, without_java):
    """run(plan, …): (exit code, stdout, stderr) of study.py in this process; scripts come from the fork server."""
    monkeypatch.setenv("FORK_SERVER", SERVERS[0].address)
    monkeypatch.setattr(study, "PYTHON", [sys.executable, str(PROJECT / "tests" / "forked.py")])
    monkeypatch.setattr(study, "POLL", 0.5)
    monkeypatch.setattr(study, "answering_command", lambda plan, wanted: stand_in_for_answering(MEASURED, plan, wanted))

    def call(*argv):
        capfd.readouterr()
        code = study.main([str(word) for word in argv])
        return code, *capfd.readouterr()

    return call


def stand_in_for_answering(code, plan, wanted):
    """The command line of a script that does not measure; it is given what the measurement is given."""
    given = [f"{label}={folder}" for label, folder in wanted.items()]
    return [sys.executable, "-c", code, str(plan.folder / "answering.json"), *given]


# It writes what `benchmarks/answering.py` would, without the merged adapters.
MEASURED = """
import json, sys
kinds = ["full", *["adapter"] * 9]
found = [each.split("=", 1) for each in sys.argv[2:]]
numbers = {"rows_per_second": 2.0, "delay_ms": 5.0, "delay_ms_quartiles": [4.0, 6.0]}
found = [{"label": label, "folder": folder, "kind": kind} | numbers for (label, folder), kind in zip(found, kinds)]
head = {"machine": "a machine", "date": "a day", "threads": 1, "rows": 8, "beams": 5, "questions": 2}
json.dump(head | {"contenders": found}, open(sys.argv[1], "w"))
"""


def table(folder, without=TIMES):
    with open(folder / "study.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in without} for row in csv.DictReader(file)]


def commands_of(folder):
    """{run: how often a script was started for it}, from the logs."""
    logs = folder / "logs"
    return {
        str(path.parent.relative_to(logs)): sum(line.startswith("$ ") for line in path.read_text().splitlines())
        for path in logs.rglob("output.txt")
        if path.parent != logs / "answering"
    }


def test_a_study_goes_through_its_stages_and_then_makes_only_what_is_new(tmp_path, plan_at, run):
    folder = tmp_path / "study"
    path = plan_at(FULL_METHOD + LORA_METHOD, seeds=[0])
    code, listed, _ = run(path, "--list")
    assert code == 0 and not folder.exists()
    due = [shlex.split(line) for line in listed.splitlines()]
    names = [line[line.index("--save_dir") + 1].removeprefix(f"{folder}/") for line in due]
    assert names == ["base", "full/lr=0.0001/seed_0", "full/lr=0.001/seed_0", "lora,lora_r=2/lr=0.003/seed_0"]

    code, said, errors = run(path)
    assert (code, errors) == (0, "")
    rows = {row["run"]: row for row in table(folder)}
    assert rows.keys() == commands_of(folder).keys() and set(commands_of(folder).values()) == {1}
    assert rows["base"]["stage"] == "base" and rows["base"]["lr"] == rows["base"]["lora_r"] == ""
    assert rows[names[3]]["stage"] == "chosen" and rows[names[3]]["lora_r"] == "2"
    tuned = {float(row["lr"]): float(row["f1"]) for row in rows.values() if row["method"] == "full"}
    best = max(sorted(tuned), key=tuned.get)
    assert {1e-4, 1e-3} < tuned.keys()  # the best of two is at the edge: a third is tried
    assert [row["lr"] for row in rows.values() if row["method"] == "full" and row["stage"] == "chosen"] == [str(best)]
    for name, row in rows.items():
        record = json.loads((folder / name / "run.json").read_text())
        assert float(row["f1"]) == 100 * record["final"]["f1"]
        assert row["trainable_parameters"] == str(record["trainable_parameters"])
    lines = said.splitlines()
    assert f"4 runs in {folder}" in lines[0] and "0 finished, 4 left" in lines[0]
    progress = [line for line in lines if line.startswith("[")]
    assert len(progress) == len(rows) and progress[0].startswith("[1/4] untrained model: F1 ")
    assert re.search(r"F1 \d+\.\d \| 0\.\d min \| (about \d+ min|less than a minute) left$", progress[1])
    assert progress[-1].startswith(f"[{len(rows)}/{len(rows)}] ") and "left" not in progress[-1]
    assert f"full: best learning rate {best}" in said

    before = contents(folder)
    code, said, _ = run(path)
    assert code == 0 and "0 left" in said and contents(folder) == before  # nothing twice
    assert "## The answer" in (folder / "study.md").read_text() and {"study.md", "study_rates.png"} < before.keys()
    assert run(path, "--list")[1] == ""

    path = plan_at(FULL_METHOD + LORA_METHOD, seeds=[0, 1])
    code, said, _ = run(path)
    assert code == 0
    after = contents(folder)
    new = {f"full/lr={best}/seed_1", "lora,lora_r=2/lr=0.003/seed_1"}
    assert {row["run"] for row in table(folder)} == rows.keys() | new
    assert all(any(run in name for run in new) for name in after.keys() - before.keys())
    assert all(after[name] == before[name] for name in before if not name.startswith("study"))

    # A changed plan that contradicts a folder is refused before anything runs.
    code, _, errors = run(plan_at(FULL_METHOD + LORA_METHOD, epochs=2))
    assert code == 2 and errors.count("\n") == 1
    assert "plan.toml: " in errors and "full/lr=0.0001/seed_0 was started with epochs 1, and the plan has 2" in errors
    assert contents(folder) == after


BOTH = ONE_RUN + LORA_METHOD


def test_how_fast_the_methods_answer_is_measured_once_after_all_runs(tmp_path, plan_at, run, monkeypatch):
    """A signal ends the measurement. A failure costs the study nothing, and is told with the command."""
    path, folder, working = plan_at(BOTH, seeds=[0]), tmp_path / "study", study.answering_command

    def replace(code):
        monkeypatch.setattr(study, "answering_command", lambda *given: stand_in_for_answering(code, *given))

    def send_when_it_measures():
        end = time.monotonic() + 120
        while not (folder / "answering.json.begun").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    replace("import sys, time; open(sys.argv[1] + '.begun', 'w').close(); time.sleep(600)")
    sender = threading.Thread(target=send_when_it_measures)
    sender.start()
    code, said, errors = run(path)
    sender.join()
    assert code == 130 and errors == f"interrupted: continue with python study.py {path}\n"
    assert said.index("[3/3]") < said.index("measuring how fast 2 checkpoints answer") and "not measured" not in said
    runs = commands_of(folder)

    replace("print('error: no disk'); raise SystemExit(3)")
    code, said, errors = run(path)
    assert (code, errors) == (0, "") and "## Answering" not in (folder / "study.md").read_text()
    [line] = [line for line in said.splitlines() if line.startswith("the speed of answering was not measured")]
    assert " (exit code 3) | error: no disk | by hand: " in line and "answering.json" in line

    monkeypatch.setattr(study, "answering_command", working)
    code, listed, _ = run(path, "--list")
    assert code == 0 and shlex.split(listed)[-2:] == [
        f"full={folder}/full/lr=0.001/seed_0",
        f"LoRA (lora_r 2)={folder}/lora,lora_r=2/lr=0.003/seed_0",
    ]
    code, said, _ = run(path)
    assert code == 0 and "not measured" not in said and "## Answering" in (folder / "study.md").read_text()
    assert run(path, "--list")[1] == "" and commands_of(folder) == runs


def test_the_measurement_finds_the_project_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = study.by_hand([sys.executable, "-c", "import pipeline.plan; print(pipeline.plan.__file__)"])
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout.strip() == str(PROJECT / "pipeline" / "plan.py")
    monkeypatch.chdir(PROJECT)
    assert study.by_hand(["python"]) == ["python"]


def test_a_signal_stops_the_runs_which_then_go_on_where_they_were(tmp_path, plan_at, run):
    folder = tmp_path / "study" / "full" / "lr=0.001" / "seed_0"
    path = plan_at(ONE_RUN, seeds=[0], epochs=2, max_train_samples=64, save_every=2)

    def send_when_it_trains():
        end = time.monotonic() + 60
        while not (folder / "last").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_when_it_trains)
    sender.start()
    code, said, errors = run(path)
    sender.join()
    assert code == 143 and errors == f"interrupted: continue with python study.py {path}\n"
    assert "stopping 1 runs" in said
    stopped = json.loads((folder / "run.json").read_text())
    steps = json.loads((folder / "last" / "loop.json").read_text())["state"]["step"]
    assert not stopped["finished"] and 0 < steps < 16
    assert "--resume" in run(path, "--list")[1]
    assert run(path)[0] == 0
    assert f"resumed after step {steps}" in (tmp_path / "study/logs/full/lr=0.001/seed_0/output.txt").read_text()
    assert len((folder / "train_loss.csv").read_text().splitlines()) == 17


def test_a_run_that_fails_is_told_and_the_others_are_made(tmp_path, plan_at, run, monkeypatch):
    command = study.command

    def fail(run):
        broken = [sys.executable, "-c", "print('error: the disk is full | so it ends'); raise SystemExit(1)"]
        return broken if run.key == "full/lr=0.0001/seed_0" else command(run)

    monkeypatch.setattr(study, "command", fail)
    path = plan_at(FULL_METHOD)
    code, said, errors = run(path)
    log = tmp_path / "study/logs/full/lr=0.0001/seed_0/output.txt"
    cause = f"failed (exit code 1) | error: the disk is full | so it ends | {log}"
    assert code == 1 and f"full, lr 0.0001, seed 0: {cause}\n" in said and said.count("failed") == 1
    again = f"fix the cause, then python study.py {path}"
    assert errors == f"error: 1 without a result (full, lr 0.0001, seed 0): {again}\n"
    # The seeds wait for the learning rate, which is not known.
    assert [row["run"] for row in table(tmp_path / "study")] == ["base", "full/lr=0.001/seed_0"]


def test_wrong_input_ends_the_study_at_once(tmp_path, plan_at, run):
    code, said, errors = run(plan_at(FULL_METHOD + LORA_METHOD, dataset=str(tmp_path / "none")))
    failed = [line for line in said.splitlines() if "failed" in line]
    assert code == 1 and len(failed) == 1 and "(exit code 2) | error: --dataset" in failed[0]
    assert list(commands_of(tmp_path / "study")) == ["base"]


def test_runs_that_other_numbers_of_processes_made_are_refused(tmp_path, plan_at):
    """As where one of them was started by `accelerate launch`: its steps had more rows."""
    plan = read_plan(plan_at(FULL_METHOD, seeds=[0]), study.training_parsers())
    runs = [plan.run(plan.methods[0], rate, 0) for rate in plan.methods[0].rates]

    def folders(*processes, precision=("no", "no")):
        shutil.rmtree(plan.folder, ignore_errors=True)
        for run, count, used in zip(runs, processes, precision, strict=True):
            given = vars(study.training_parsers()[run.script].parse_args(words(run.arguments)))
            identity = {"number of processes": count, "precision": used}
            write_run(run.folder, record={"args": given, "identity": identity})
        return study.Folders(plan, study.training_parsers())

    study.check_existing(plan, folders(2, 2))
    with pytest.raises(InputError, match=r"were trained with different number of processes \(1 and 2\)"):
        study.check_existing(plan, folders(1, 2))
    with pytest.raises(InputError, match=r"were trained with different precision \(fp32 and bf16\)"):
        study.check_existing(plan, folders(1, 1, precision=("no", "bf16")))


@pytest.mark.slow
def test_a_rate_that_diverges_is_not_chosen(tmp_path, plan_at, run):
    """No weight survives a rate of 1e30."""
    method = FULL_METHOD.replace("[1e-4, 1e-3]", "[1e-3, 1e30]")
    code, said, _ = run(plan_at(method, seeds=[0], max_train_samples=104))
    rows = {row["run"]: row for row in table(tmp_path / "study")}
    assert code == 0 and "full, lr 1e+30, seed 0: diverged | error: loss or gradient was not finite in" in said
    assert rows["full/lr=1e+30/seed_0"]["stage"] == "diverged" and rows["full/lr=1e+30/seed_0"]["f1"] == ""
    assert rows["full/lr=0.001/seed_0"]["stage"] == "chosen"
    assert study.NOT_FINITE in (PROJECT / "tweet_qa_main.py").read_text()


def test_a_run_that_another_process_makes_is_waited_for(tmp_path, plan_at, run):
    path = plan_at(ONE_RUN, seeds=[0])
    key = "full/lr=0.001/seed_0"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "study" / key], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "1\n"
    listed = run(path, "--list")[1]
    assert "--eval_only" in listed and "--lr" not in listed
    threading.Timer(3, lambda: (holder.kill(), holder.wait())).start()
    code, said, _ = run(path)
    assert code == 0 and "waiting for 1 runs that other processes are making" in said
    assert commands_of(tmp_path / "study") == {"base": 1, key: 1}


HOLDS = "import sys, time; from pipeline.lock import only_writer\n"
HOLDS += "with only_writer(sys.argv[1]): print(1, flush=True); time.sleep(600)"


def finished_study(path, *more):
    """Run the study in a process of its own, to its end."""
    done = start_script("study.py", path, *more).wait()
    assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="session")
def whole_study(made_once):
    """study.csv's rows of a study that nothing interrupted."""

    def make(folder):
        finished_study(plan_in(folder)(FULL_METHOD + LORA_METHOD, epochs=5))
        return table(folder / "study")

    return made_once("whole-study", make)[1]


@pytest.mark.slow
def test_a_study_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, plan_at, whole_study):
    import psutil

    path, moments = plan_at(FULL_METHOD + LORA_METHOD, epochs=5), random.Random(0)
    for kill in range(10):
        script = start_script("study.py", path)
        time.sleep(moments.uniform(1, 7))
        if not script.is_running():
            break
        children = psutil.Process(script.pid).children(recursive=True)
        script.send(signal.SIGKILL)
        if kill % 2:  # as when the machine goes down; else the runs go on without the study
            for child in children:
                child.kill()
        script.wait()
    assert kill > 3
    finished_study(path)
    assert table(tmp_path / "study") == whole_study


@pytest.mark.slow
def test_two_studies_at_once_make_every_run_once(tmp_path, plan_at, whole_study):
    path = plan_at(FULL_METHOD + LORA_METHOD, epochs=5)
    both = [start_script("study.py", path), start_script("study.py", path, "--jobs", 2)]
    done = [script.wait() for script in both]
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert set(commands_of(tmp_path / "study").values()) == {1}
    made = [line.split("] ")[1].split(":")[0] for each in done for line in each.stdout.splitlines() if line[0] == "["]
    assert len(made) == len(set(made)) == len(whole_study)
    assert all(any(line[0] == "[" for line in each.stdout.splitlines()) for each in done)
    assert table(tmp_path / "study") == whole_study


def test_a_study_does_not_start_what_another_study_has_claimed(tmp_path, plan_at, run):
    path = plan_at(ONE_RUN, seeds=[0])
    parsers = study.training_parsers()
    plan = study.read_plan(path, parsers)
    folders, base = study.Folders(plan, parsers), plan.bases[0]
    with only_writer(folders.logs(base)):
        assert study.start(base, folders, 0, {}) == []
    assert not base.folder.exists()


@pytest.mark.slow
def test_the_first_runs_of_the_plan_for_tweetqa_run_on_a_stand_in(tmp_path, standin, tweet_qa):
    text = (PROJECT / "studies" / "tweetqa.toml").read_text()
    given = {"dir": tmp_path / "study", "model_name": standin}
    for name, value in given.items():
        text, count = re.subn(f"(?m)^{name} = .*$", f"{name} = {json.dumps(str(value))}", text)
        assert count == 1
    small = {"dataset": str(tweet_qa), "sem_model": "none", "max_train_samples": 32, "max_eval_samples": 16}
    small |= {"max_target_len": 8, "final_beams": 1}  # an untrained model uses all the tokens it may
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in small.items())
    (tmp_path / "plan.toml").write_text(text.replace("\n[common]\n", f"\n[common]\n{lines}\n"))
    listed = start_script("study.py", tmp_path / "plan.toml", "--list").wait()
    due = [shlex.split(line)[1:] for line in listed.stdout.splitlines()]
    assert listed.returncode == 0 and len(due) == 21  # the untrained model, and five rates of four methods
    for script, *arguments in (due[0], due[1], due[6]):
        done = start_script(script, *arguments).wait()
        assert done.returncode == 0, done.stderr
        record = json.loads((Path(arguments[-1]) / "run.json").read_text())
        assert record["finished"] and len(record["holdout"]["rows"]) == 1203
    after = start_script("study.py", tmp_path / "plan.toml", "--list").wait().stdout.splitlines()
    assert [shlex.split(line)[1:] for line in after] == due[1 + 1 : 6] + due[7:]
