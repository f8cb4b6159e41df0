"""Whole runs of both scripts, as a user starts them: what they print, what they leave, and that they learn."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import (
    FOLDER_NAMES,
    FULL,
    FULL_FIRST,
    LORA,
    PROJECT,
    SCRIPTS,
    TINY,
    WEIGHTS,
    Made,
    readme_snippets,
    run_script,
    write_standin,
)
from safetensors import safe_open
from safetensors.torch import load_file

WRITTEN = (
    "README.md run.json metrics.csv train_loss.csv loss_curve.png val_f1_curve.png val_sem_sim_curve.png"
    " validation_predictions.csv holdout_predictions.csv breakdown.csv breakdown.png test_answers.json"
    " tokenizer.json tokenizer_config.json"
).split(" ")


def start(script, save_dir, standin, tweet_qa, minilm, *more, meteor=False):
    """A short run on real rows: 44 training rows in 6 batches of 8, three optimizer steps an epoch."""
    done = run_script(
        script,
        *("--model_name", standin, "--dataset", tweet_qa, "--sem_model", minilm, "--save_dir", save_dir),
        *("--max_train_samples", 44, "--max_eval_samples", 24, "--epochs", 2, "--lr", 1e-2, "--grad_accum_steps", 2),
        *("--holdout", 20, *more),
        meteor=meteor,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def runs(made_once, standin, tweet_qa, minilm):
    """{script: (finished process, run folder)} of one short run each."""

    def make(script):
        def run(folder):
            return vars(start(script, folder / FOLDER_NAMES[script], standin, tweet_qa, minilm, meteor=True))

        folder, done = made_once(f"runs-{script}", run)
        return subprocess.CompletedProcess(**done), folder / FOLDER_NAMES[script]

    return Made(make)


def final_line(done):
    """The line of the final evaluation, without the folder at its end."""
    [line] = [line for line in done.stdout.splitlines() if line.startswith("[final]")]
    return line.rsplit(" | ", 1)[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_console_shows_what_is_promised_and_nothing_else(runs, script):
    done, folder = runs[script]
    number = r"-?\d+(\.\d+)?"
    expected = [
        r"data: .+ \| 44 train rows \| 24 validation rows \| 20 holdout rows \| 24 test rows",
        r"check: \d+ training rows repeat \| the tweets of 6 validation and 1 test rows are also in train"
        r" \| \d+ tweets have .+ \(<unk>\)",
        r"model: .+ parameters trained \(.+%\) \| cpu, fp32" + (r" \| adapter on q, v" if script == LORA else ""),
        r"memory: about [\d,]+ MB at the peak \(weights 1[67], gradients \d+, optimizer \d+, activations \d+,"
        r" heap fragmentation \d+, process overhead [\d,]+\) of [\d,]+ MB",
        r"steps: 3 per epoch \| effective batch 16",
    ]
    scores = rf"val_loss={number} F1={number} avg_sem_sim={number}"
    for epoch in (1, 2):
        expected += [
            rf"\[epoch {epoch}\] time={number}s \| steps/sec={number} \| peak VRAM=0 MB",
            rf"\[epoch {epoch}\] {scores}",
        ]
    scores += "".join(f" {name}=({number}|n/a)" for name in ("EM", "BLEU-1", "ROUGE-L", "METEOR"))
    expected += [rf"\[{title}\] {scores} \| epoch [12], 5 beams \| .+" for title in ("final", "holdout")]
    if not shutil.which("java"):
        expected += ["note: METEOR is left out: it needs Java, which does not run here"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stdout
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert done.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_run_folder_holds_each_promised_file(runs, script):
    folder = runs[script][1]
    config = "config.json generation_config.json" if script == FULL else "adapter_config.json"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*WRITTEN, WEIGHTS[script], *config.split()])
    metrics = pd.read_csv(folder / "metrics.csv")
    assert list(metrics) == (
        "epoch train_loss val_loss em f1 avg_sem_sim epoch_seconds steps_per_sec samples_per_sec peak_vram_mb"
        " seconds_since_start"
    ).split(" ")
    assert metrics["epoch"].tolist() == [1, 2] and metrics.notna().all(axis=None)
    steps = pd.read_csv(folder / "train_loss.csv")
    assert list(steps) == ["step", "epoch", "loss", "lr", "grad_norm"]
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6] and steps["epoch"].tolist() == [1, 1, 1, 2, 2, 2]
    assert steps["lr"].tolist() == pytest.approx([0, 1e-2, 8e-3, 6e-3, 4e-3, 2e-3])  # one step of warm-up
    for image in folder.glob("*.png"):
        assert image.read_bytes().startswith(b"\x89PNG") and image.stat().st_size > 5000


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_json_tells_the_whole_run(runs, script, standin, tweet_qa):
    done, folder = runs[script]
    run = json.loads((folder / "run.json").read_text())
    metrics = pd.read_csv(folder / "metrics.csv")
    assert run["method"] == ("full" if script == FULL else "lora")
    assert run["args"]["model_name"] == str(standin) and run["args"]["grad_accum_steps"] == 2
    assert run["best_epoch"] == metrics["epoch"][metrics["f1"].idxmax()]
    assert run["versions"]["torch"] == torch.__version__ and run["device"] == "cpu" and run["seed"] == 42
    assert set(run["final"]) == {"val_loss", "f1", "em", "avg_sem_sim", "bleu1", "rougeL", "meteor"}
    assert set(run["holdout"]["metrics"]) == set(run["final"]) and len(run["holdout"]["rows"]) == 20
    assert run["checkpoint_bytes"] == (folder / WEIGHTS[script]).stat().st_size
    since = metrics["seconds_since_start"]
    assert metrics["epoch_seconds"].sum() < since.max() < run["wall_time_seconds"] and since.is_monotonic_increasing
    assert run["answers_per_second"] > 0 and run["epochs"] == 2 and run["train_rows"] == 44
    assert run["wall_time_seconds"] > metrics["epoch_seconds"].sum() and run["peak_ram_mb"] > 100
    assert f"memory: about {run['estimated_peak_mb']:,.0f} MB at the peak" in done.stdout
    shown = f"val_loss={run['final']['val_loss']:.4f} F1={run['final']['f1']:.4f}"
    assert final_line(done).startswith(f"[final] {shown}")
    weights = load_file(standin / "model.safetensors")
    base = sum(tensor.numel() for tensor in weights.values())
    adapter = 2 * 6 * (64 * 8 + 8 * 64)  # q and v of 6 attentions, each A (8 x 64) and B (64 x 8)
    expected = (base, base) if run["method"] == "full" else (adapter, base + adapter)
    assert (run["trainable_parameters"], run["total_parameters"]) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_predictions_are_those_of_the_first_rows_in_order(runs, script, tweet_qa):
    _, folder = runs[script]
    frame = pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False)
    rows = json.loads((tweet_qa / "validation.json").read_text())[:24]
    assert frame["qid"].tolist() == [row["qid"] for row in rows]
    assert frame["tweet"].tolist() == [row["Tweet"] for row in rows]
    assert [json.loads(text) for text in frame["references"]] == [row["Answer"] for row in rows]
    final = json.loads((folder / "run.json").read_text())["final"]
    assert frame["f1"].mean() == final["f1"] and frame["em"].mean() == final["em"]
    assert frame["sem_sim"].mean() == pytest.approx(final["avg_sem_sim"], abs=1e-12)


@pytest.mark.parametrize("script", FULL_FIRST)
def test_the_same_seed_gives_the_same_metrics_and_another_others(runs, script, tmp_path, standin, tweet_qa, minilm):
    timing = ["epoch_seconds", "steps_per_sec", "samples_per_sec", "peak_vram_mb", "seconds_since_start"]

    def read(folder):
        return (
            pd.read_csv(folder / "metrics.csv").drop(columns=timing).to_csv(),
            (folder / "train_loss.csv").read_text(),
            (folder / WEIGHTS[script]).read_bytes(),
        )

    start(script, tmp_path / "same", standin, tweet_qa, minilm)
    start(script, tmp_path / "other", standin, tweet_qa, minilm, "--seed", 7, "--epochs", 1)
    assert read(tmp_path / "same") == read(runs[script][1])
    assert read(tmp_path / "other")[1].splitlines()[1:4] != read(runs[script][1])[1].splitlines()[1:4]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_only_gives_the_same_final_figures_and_files(runs, script, tmp_path):
    """From the folder alone: data, rows, lengths and similarity model are the run's, the base of an adapter is what its
    own config names."""
    done, folder = runs[script]
    copy = shutil.copytree(folder, tmp_path / "copy")
    files = ("validation_predictions.csv", "holdout_predictions.csv", "breakdown.csv", "test_answers.json")
    for name in files:
        (copy / name).unlink()
    again = run_script(script, "--eval_only", "--save_dir", copy, meteor=True)
    assert again.returncode == 0 and "[epoch" not in again.stdout, again.stderr
    assert final_line(again) == final_line(done)
    for name in files:
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((where / "run.json").read_text()) for where in (folder, copy))
    scored = after.pop("eval_only")
    speeds = [record.pop("answers_per_second") for record in (before, after)]
    assert (
        min(speeds) > 0 and after == before and (copy / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    )
    names = ("dataset", "sem_model", "max_input_len", "max_eval_samples", "holdout", "seed", "final_beams")
    assert [scored[name] for name in names] == [before["args"][name] for name in names]
    weights = WEIGHTS[script]
    assert (copy / weights).read_bytes() == (folder / weights).read_bytes()

    other = run_script(script, "--eval_only", "--save_dir", copy, "--holdout_seed", 7)
    assert other.returncode == 2 and "these are not the rows that the run set aside" in other.stderr
    short = run_script(script, "--eval_only", "--save_dir", copy, "--holdout", 0, "--max_input_len", 16, "--seed", 7)
    assert short.returncode == 0 and final_line(short) != final_line(done), short.stderr
    record = json.loads((copy / "run.json").read_text())
    # The former held-out scores are of longer prompts. Which rows they are of stays known, so they can be had again.
    assert record["holdout"] == {"rows": before["holdout"]["rows"]} and record["eval_only"]["max_input_len"] == 16
    assert not (copy / "holdout_predictions.csv").exists()
    restored = run_script(script, "--eval_only", "--save_dir", copy, meteor=True)
    assert restored.returncode == 0 and final_line(restored) == final_line(done), restored.stderr
    assert json.loads((copy / "run.json").read_text())["holdout"] == before["holdout"]
    assert (copy / "holdout_predictions.csv").read_bytes() == (folder / "holdout_predictions.csv").read_bytes()


def test_eval_only_scores_a_checkpoint_that_no_run_of_ours_made(tmp_path, standin, tweet_qa):
    folder = shutil.copytree(standin, tmp_path / "foreign")
    arguments = ("--dataset", tweet_qa, "--sem_model", "none", "--max_eval_samples", 8, "--save_dir", folder)
    done = run_script(FULL, "--eval_only", *arguments)
    assert done.returncode == 0, done.stderr
    assert final_line(done).endswith(", 5 beams") and "epoch" not in final_line(done)
    run = json.loads((folder / "run.json").read_text())
    assert run["method"] == "full" and run["best_epoch"] is None and run["final"]["f1"] >= 0


def test_the_test_split_is_answered_row_by_row_and_scored_if_labeled(runs, tmp_path, standin, tweet_qa, data_folder):
    answers = json.loads((runs[FULL][1] / "test_answers.json").read_text())
    rows = json.loads((tweet_qa / "test.json").read_text())[:24]
    assert [entry["qid"] for entry in answers] == [row["qid"] for row in rows]
    assert all(list(entry) == ["qid", "Answer"] and isinstance(entry["Answer"], str) for entry in answers)

    rows = json.loads((tweet_qa / "validation.json").read_text())
    repeated = [rows[0], rows[1], rows[0]]  # a qid that stands twice gets two entries
    folder = data_folder(train=rows[10:20], validation=rows[20:30], test=repeated)
    arguments = ("--model_name", standin, "--sem_model", "none", "--dataset", folder, "--epochs", 1)
    done = run_script(FULL, *arguments, "--save_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "run" / "test_answers.json").read_text())
    assert [entry["qid"] for entry in answers] == [row["qid"] for row in repeated]
    scored = pd.read_csv(tmp_path / "run" / "test_predictions.csv", keep_default_na=False)
    assert scored["prediction"].tolist() == [entry["Answer"] for entry in answers]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["test"]["em"] == scored["em"].mean() and "[test] val_loss=" in done.stdout


def test_without_java_meteor_is_left_out_with_one_line(tmp_path, standin, tweet_qa):
    folder = shutil.copytree(standin, tmp_path / "copy")
    arguments = ("--dataset", tweet_qa, "--sem_model", "none", "--max_eval_samples", 4, "--save_dir", folder)
    done = run_script(FULL, "--eval_only", *arguments, meteor=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    note = "note: METEOR will be left out: it needs Java, which does not run here"
    assert done.stdout.splitlines().count(note) == 1 and done.stdout.index(note) < done.stdout.index("[final]")
    assert "METEOR=n/a" in final_line(done)
    final = json.loads((folder / "run.json").read_text())["final"]
    assert final["meteor"] is None and final["bleu1"] >= 0 and final["rougeL"] >= 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_snippet_gives_the_predictions_that_the_run_wrote(runs, script, standin, tweet_qa):
    """The snippet runs as it is printed, but for the names of folders."""
    _, folder = runs[script]
    snippet = readme_snippets()[script].replace("google/flan-t5-small", str(standin))
    snippet = snippet.replace(f'"{FOLDER_NAMES[script]}"', repr(str(folder)))
    space, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet, space)
    assert printed.getvalue().count("\n") == 1  # an answer, though a model that learned so little may leave it empty
    frame = pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False)
    answers = space["answer"](
        space["model"], space["tokenizer"], "cpu", frame["question"].tolist(), frame["tweet"].tolist()
    )
    assert answers == frame["prediction"].tolist()
    assert len(set(answers)) > 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_model_card_loads_as_the_folder_does(runs, script, standin):
    from huggingface_hub import ModelCard

    _, folder = runs[script]
    card = ModelCard.load(folder / "README.md")
    # The hub takes no path as a base model, and refuses the card with it; what names a hub id is tested in test_hub.py.
    assert card.data.base_model is None and "question-answering" in card.data.tags
    assert card.data.library_name == ("transformers" if script == FULL else "peft")
    if script == LORA:
        assert "lora" in card.data.tags  # what peft wrote
        assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    final = json.loads((folder / "run.json").read_text())["final"]
    assert f"| F1 | {final['f1']:.4f} |" in card.text and "| `--lr` | 0.01 |" in card.text
    snippet = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    command = [sys.executable, "-c", snippet + "\nassert model.num_parameters() > 0 and len(tokenizer) == 32100"]
    environ = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr


def test_transformers_4_reads_a_full_checkpoint_as_5_does(runs):
    """transformers 4 ties lm_head to shared if the config says so, and wants T5's sentinels under their older name."""
    folder = runs[FULL][1]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokenizer_config
    assert len(tokenizer_config["additional_special_tokens"]) == 100
    weights = load_file(folder / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["shared.weight"])


def test_a_lora_folder_holds_the_adapter_alone(runs):
    folder = runs[LORA][1]
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        assert all("lora_A" in name or "lora_B" in name for name in weights.keys())  # noqa: SIM118
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 32, 0.05)
    assert sorted(config["target_modules"]) == ["q", "v"] and config["task_type"] == "SEQ_2_SEQ_LM"


def test_without_similarity_and_with_patience(tmp_path, standin, tweet_qa):
    """A learning rate near 0 never improves F1, so epoch 1 stays the best and patience ends the run."""
    done = run_script(
        FULL,
        *("--model_name", standin, "--dataset", tweet_qa, "--sem_model", "none", "--save_dir", tmp_path / "run"),
        *("--max_train_samples", 8, "--max_eval_samples", 8, "--epochs", 5, "--patience", 2, "--lr", 1e-12),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "[epoch 3]" in done.stdout and "[epoch 4]" not in done.stdout
    assert any(line.startswith("stopped: F1 ") and "epoch 1" in line and "2 epochs" in line for line in lines)
    assert "avg_sem_sim=n/a EM" in final_line(done) and "epoch 1, 5 beams" in final_line(done)
    assert not (tmp_path / "run" / "val_sem_sim_curve.png").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["final"]["avg_sem_sim"] is None
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["avg_sem_sim"].isna().all()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_learns_32_real_rows_by_heart(script, tmp_path, tweet_qa, flan_t5_files):
    """Rows with the longest answers are among them, so an F1 near 1 also shows that no answer is out of reach.

    An adapter on q and v alone cannot do it on a model of random weights: its output layer has to change. LoRA gets
    rank 32 on every matrix, the output layer among them, and no dropout.
    """
    rows = json.loads((tweet_qa / "train.json").read_text())[:2000]
    rows = sorted(rows, key=lambda row: len(row["Answer"][0]))[-4:] + rows[:28]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    shape = TINY | {"d_model": 128, "d_ff": 256, "d_kv": 32, "dropout_rate": 0.0}
    standin = write_standin(tmp_path / "standin", flan_t5_files, **shape)
    method = {
        FULL: ["--epochs", 16, "--lr", 3e-3],
        LORA: [
            *("--epochs", 20, "--lr", 5e-3, "--lora_r", 32, "--lora_dropout", 0),
            *("--target_modules", "q", "k", "v", "o", "wi_0", "wi_1", "wo", "lm_head"),
        ],
    }
    done = run_script(
        script,
        *("--model_name", standin, "--dataset", tmp_path, "--sem_model", "none", "--save_dir", tmp_path / "run"),
        *method[script],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["final"]["f1"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shape_of_flan_t5_small(script, tmp_path, tweet_qa, flan_t5_files, minilm):
    standin = write_standin(tmp_path / "flan", flan_t5_files)
    save_dir = tmp_path / "run"
    done = run_script(
        script,
        *("--model_name", standin, "--dataset", tweet_qa, "--sem_model", minilm, "--save_dir", save_dir),
        *("--max_train_samples", 64, "--max_eval_samples", 32, "--epochs", 2, "--holdout", 8),
        environ={"OMP_NUM_THREADS": None},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((save_dir / "run.json").read_text())
    assert set(WRITTEN) < {path.name for path in save_dir.iterdir()}
    if script == FULL:
        assert run["trainable_parameters"] == run["total_parameters"] == 76_961_152
    else:
        assert run["trainable_parameters"] == 344_064
        tokenizer_bytes = sum((save_dir / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json"))
        assert sum(path.stat().st_size for path in save_dir.iterdir()) - tokenizer_bytes < 4_000_000
    shutil.rmtree(tmp_path)
