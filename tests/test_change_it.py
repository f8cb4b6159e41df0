"""README, "Change it": the places that it names are all that has to change.

The changes are made in a copy of the project. Its scripts run, and what they write shows each change.
"""

import ast
import json
import re
import shutil
from dataclasses import dataclass

import pandas as pd
import pytest
from conftest import FULL, LORA, PROJECT, run_script

MODEL = PROJECT / "demo" / "tiny-t5"
SMALL = ("--dataset", PROJECT / "demo" / "tweets", "--sem_model", "none", "--final_beams", 1)
SMALL += ("--max_train_samples", 32, "--max_eval_samples", 20, "--epochs", 1)


@dataclass(frozen=True)
class Change:
    """An edit in `place`, a function or constant of `file`."""

    file: str
    place: str
    old: str
    new: str


SCORE, METRIC = '"precision": [word_precision(*pair) for pair in pairs],', 'Metric("precision", "word precision"),'
ROW, TENSOR, NAMES = '"grad_norm": grad_norm', "[step_loss, grad_norm, step_tokens", "(loss, grad_norm, tokens"
# {what the README calls it: the edits}
RECIPES = {
    "the optimizer": [
        Change("pipeline/optimizers.py", "build_optimizer", "torch.optim.AdamW(", "torch.optim.SGD("),
        Change("pipeline/optimizers.py", "build_optimizer", "lr=lr, fused=True)", "lr=lr)"),
    ],
    "the prompt": [
        Change("helper_functions.py", "PROMPT", r"Question: {question}\nTweet: {tweet}", r"{tweet}\nQ: {question}"),
    ],
    "a metric": [
        Change("helper_functions.py", "evaluate", "scores = {\n", f"scores = {{\n        {SCORE}\n"),
        Change("pipeline/metrics.py", "METRICS", 'Metric("em", "EM"),\n', f'Metric("em", "EM"),\n    {METRIC}\n'),
    ],
    "what is logged": [
        Change(FULL, "train_and_score_epoch", "row = {\n", 'row = {\n        "steps": state.step,\n'),
        Change(FULL, "note_steps", ROW, f'{ROW}, "tokens": tokens, "weight_norm": weight_norm'),
        Change(FULL, "note_steps", NAMES, f"{NAMES}, weight_norm"),
        Change(FULL, "train_step", TENSOR, f"{TENSOR}, next(model.parameters()).detach().norm()"),
    ],
}


@pytest.fixture(scope="module")
def section():
    """The README's section "Change it"."""
    return (PROJECT / "README.md").read_text().split("\n## Change it\n")[1].split("\n## ")[0]


def source_of(text, place):
    """The source text of a function or a constant of a module."""
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else []
        names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        if place in names:
            return ast.get_source_segment(text, node)
    raise AssertionError(f"there is no {place}")


def apply(change, folder):
    path = folder / change.file
    text = path.read_text()
    source = source_of(text, change.place)
    assert source.count(change.old) == 1, change
    path.write_text(text.replace(source, source.replace(change.old, change.new)))


@pytest.fixture(scope="module")
def changed(tmp_path_factory, section):
    """A folder with project/, a copy with all the changes, and what it wrote: full/, lora/ and comparison/."""
    folder = tmp_path_factory.mktemp("changed")
    project = folder / "project"
    shutil.copytree(PROJECT / "pipeline", project / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, project)
    for change in sum(RECIPES.values(), []):
        apply(change, project)
    [function] = re.findall(r"^def word_precision.*?\n(?=\n)", section, flags=re.MULTILINE | re.DOTALL)
    with open(project / "helper_functions.py", "a") as helper:
        helper.write(f"\n\n{function}")
    for script, name in ((FULL, "full"), (LORA, "lora")):
        given = ("--model_name", MODEL, *SMALL, "--lr", 0.1, "--save_dir", folder / name)
        done = run_script(project / script, *given, *(("--report_to", "tensorboard") if name == "full" else ()))
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.txt").write_text(done.stdout)
    runs = folder / "full", folder / "lora"
    done = run_script(project / "compare_runs.py", *runs, "--out", folder / "comparison")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_readme_names_each_place(section):
    rows = dict(re.findall(r"^\| (.*?) \| (.*)$", section, flags=re.MULTILINE))
    for title, changes in RECIPES.items():
        for change in changes:
            assert f"`{change.file}`" in rows[title] and f"`{change.place}`" in rows[title], (title, change)
    assert all(f"\n{line}\n" in section.replace("    ", "") for line in (SCORE, METRIC))
    assert "`pipeline/t5.py`" in rows["the model family"] and "`pipeline/fast_cpu.py`" in rows["the model family"]


def test_another_optimizer(changed):
    """SGD without momentum keeps no state, and moves the weights by no more than the clipped gradient allows."""
    from safetensors.torch import load_file

    assert ", optimizer 0, " in (changed / "full.txt").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (MODEL, changed / "full"))
    moved = sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5
    decay = 0.01 * sum(float(weight.square().sum()) for weight in before.values()) ** 0.5
    assert 0 < moved <= 1.1 * pd.read_csv(changed / "full" / "train_loss.csv")["lr"].sum() * (1 + decay)


def test_another_prompt(changed):
    for name in ("full", "lora"):
        assert json.loads((changed / name / "run.json").read_text())["prompt"] == "{tweet}\nQ: {question}\nAnswer:"
        assert r"The input is `{tweet}\nQ: {question}\nAnswer:`" in (changed / name / "README.md").read_text()
    done = run_script(FULL, "--eval_only", "--save_dir", changed / "full")  # the project as it is
    assert done.returncode == 2 and "trained with another prompt" in done.stderr


def test_another_metric(changed):
    cells = []
    for name in ("full", "lora"):
        folder, said = changed / name, (changed / f"{name}.txt").read_text()
        frame = pd.read_csv(folder / "validation_predictions.csv")
        mean = frame["precision"].mean()
        assert json.loads((folder / "run.json").read_text())["final"]["precision"] == pytest.approx(mean)
        assert pd.read_csv(folder / "metrics.csv")["precision"].between(0, 1).all()
        assert pd.read_csv(folder / "breakdown.csv")["precision"].between(0, 1).all()
        assert f" word precision={mean:.4f} " in said
        assert f"| word precision | {mean:.4f} |" in (folder / "README.md").read_text()
        cells.append(f"{100 * mean:.1f}")
    assert cells != ["0.0", "0.0"]
    report = (changed / "comparison" / "comparison.md").read_text()
    assert f"| validation word precision | {cells[0]} | {cells[1]} |" in report  # the table of both runs
    assert re.search(r"^\| word precision \| .* to .* \|$", report, flags=re.MULTILINE)  # the difference's interval
    assert "precision" in pd.read_csv(changed / "comparison" / "comparison.csv")


def test_another_logged_value(changed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = pd.read_csv(changed / "full" / "train_loss.csv")
    assert len(steps) == 4 and (steps["tokens"] > 0).all() and steps["weight_norm"].nunique() > 1
    assert pd.read_csv(changed / "full" / "metrics.csv")["steps"].tolist() == [4]
    events = EventAccumulator(str(changed / "full" / "tensorboard")).Reload()
    assert {"train/tokens", "train/weight_norm", "epoch/steps"} <= set(events.Tags()["scalars"])
