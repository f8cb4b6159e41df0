"""compare_runs.py: what it says follows from the runs' own files; what cannot be compared is refused in one line."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

import compare_runs
from pipeline.run_folder import write_predictions, write_run_json, write_table
from pipeline.statistics import interval, mcnemar

WRITTEN = ["comparison.csv", "comparison.md", "comparison.png"]
QUESTIONS = ["who won | lost?", "what is\nit?", "why not?", "where?", "who is *she*?"]


def write_run(folder, method="full", seed=0, f1=None, em=None, sem_sim=None, record=(), **args):
    """Write a finished run as the training scripts do, without training. f1, em, sem_sim: of each example; record and
    args: what to change in run.json and in its arguments."""
    f1 = np.linspace(0, 1, 40) if f1 is None else np.asarray(f1, float)
    em = (f1 == 1).astype(float) if em is None else np.asarray(em, float)
    measured = args.get("sem_model") != "none"
    sem_sim = (f1 / 2 if sem_sim is None else np.asarray(sem_sim, float)) if measured else np.full(len(f1), np.nan)
    folder.mkdir(parents=True)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(f1))]
    frame = pd.DataFrame(
        {
            "qid": "same",
            "question": questions,
            "tweet": [f'tweet {i}, "quoted" \U0001f600 #tag' for i in range(len(f1))],
            "references": [[f"gold {i}", "other"] for i in range(len(f1))],
            "prediction": [f"answer {i} of {folder.name}" if i else "" for i in range(len(f1))],
            **{"em": em, "f1": f1, "sem_sim": sem_sim},
            "question_type": [question.split()[0].strip("?") for question in questions],
        }
    )
    write_predictions(folder / "validation_predictions.csv", frame)
    epochs = [
        {"epoch": n, "f1": f1.mean() * n / 3, "epoch_seconds": 30.0 * n, "steps_per_sec": 2.0 / n} for n in (1, 2, 3)
    ]
    write_table(folder / "metrics.csv", epochs)
    defaults = {
        **{
            "model_name": "google/flan-t5-small",
            "dataset": "ucsbnlp/tweet_qa",
            "epochs": 3,
            "patience": 0,
            "lr": 1e-3,
            "seed": seed,
        },
        **{"sem_model": "minilm", "final_beams": 5, "max_input_len": 256, "max_target_len": 32, "holdout": 0},
        **{"max_train_samples": None, "drop_leaked": False, "eval_only": False, "save_dir": str(folder)},
        **({"lora_r": 8, "target_modules": ["q", "v"]} if method == "lora" else {}),
    }
    final = {"val_loss": 1.0, "f1": f1.mean(), "em": em.mean(), "avg_sem_sim": sem_sim.mean() if measured else None}
    run = {
        **{"method": method, "args": defaults | args, "device": "cpu", "seed": seed, "started": "2026-01-01"},
        **{"trainable_parameters": 400 if method == "lora" else 100_000, "total_parameters": 100_000},
        **{"best_epoch": 3, "final": final | {"bleu1": 0.25, "rougeL": 0.375, "meteor": None}},
        **{"wall_time_seconds": 200.0, "peak_vram_mb": 0.0, "peak_ram_mb": 512.0, "git_commit": None},
        **{"checkpoint_bytes": 2**19 if method == "lora" else 2**22},
    }
    write_run_json(folder, run | dict(record))
    return folder


@pytest.fixture
def two(tmp_path):
    """(full run, LoRA run) that differ in their scores."""
    full = write_run(tmp_path / "full", f1=np.tile([1, 1, 0.5, 0], 10))
    return full, write_run(tmp_path / "lora", "lora", f1=np.tile([1, 0.25, 0.5, 0.125], 10))


def compare(*folders, out=None):
    """Run the program; returns its exit code."""
    return compare_runs.main([*map(str, folders), *(["--out", str(out)] if out else [])])


def refusal(capsys, *folders, out):
    """The one line with which the program refuses these folders, having written nothing."""
    capsys.readouterr()
    assert compare(*folders, out=out) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not out.exists()
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    return printed.err


# ----------------------------------------------------------------------------------------------------- statistics


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_the_interval_is_scipys_paired_bootstrap_and_agrees_with_brute_force(count, seed):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.choice([0, 0.4, 0.5, 1], count), rng.random(count).round(1)
    low, high = interval(ours - theirs)
    paired = stats.bootstrap(
        (ours, theirs),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=10_000,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(paired), abs=1e-8)
    means = []
    for _ in range(4000):
        picked = rng.integers(0, count, count)
        means.append(ours[picked].mean() - theirs[picked].mean())
    error = np.std(means)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.2 * error + 1 / count**2)


def test_the_interval_of_a_constant_is_that_constant():
    assert interval([0.0] * 30) == (0, 0)
    assert interval([2.5] * 30) == (2.5, 2.5)
    assert interval([2.5]) == (2.5, 2.5)  # a kind of question with a single example


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(1, (150, 200))
    covered = [low <= 1 <= high for low, high in map(interval, samples)]
    assert 0.88 <= np.mean(covered) <= 0.99


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_examples(pairs):
    ours, theirs = (np.array(side, float) for side in zip(*pairs, strict=True))
    alone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n = sum(alone)
    tail = sum(math.comb(n, k) for k in range(min(alone) + 1)) / 2**n
    assert mcnemar(ours, theirs) == pytest.approx(min(1, 2 * tail))


# ------------------------------------------------------------------------------------------------------ sentences


def make_row(label, scores, parameters):
    """A row of one run with these F1 scores, out of 100."""
    run = compare_runs.Run(None, {"trainable_parameters": parameters}, None, None)
    return compare_runs.Row(label, [run], pd.DataFrame({"f1": scores, "em": 0.0, "sem_sim": np.nan}))


BASE = np.tile([0.0, 50, 100, 100], 50)
NOISE = np.tile([3.0, -1, 1, -3, 2, -2, 4, -4, 1, -1], 20)


@pytest.mark.parametrize(
    "difference, parameters, sentence",
    [
        (
            NOISE + 1.2,
            400,
            r"LoRA leads full by 1\.2 F1, 95 % interval 0\.\d to 1\.\d, at 0\.4 % of the trained param.*",
        ),
        (NOISE - 1.2, 400, r"LoRA trails full by 1\.2 F1, 95 % interval 0\.\d to 1\.\d, at 0\.4 % of the trained .*"),
        (
            NOISE,
            12_500,
            r"No difference in F1 is shown between LoRA and full: 0\.0 F1, .* -0\.\d to 0\.\d, at 12\.5 % .*",
        ),
        (NOISE * 0, 40, r"LoRA and full have the same F1 on every example, at 0\.04 % of the trained parameters\."),
        (NOISE * 0 - 0.04, 400, r"LoRA trails full by 0\.04 F1, 95 % interval 0\.04 to 0\.04, .*"),
        (
            NOISE * 0 + 100,
            100_000,
            r"LoRA leads full by 100\.0 F1, .* 100\.0 to 100\.0, at as many trained parameters\.",
        ),
    ],
)
def test_the_sentence_says_what_the_interval_says(difference, parameters, sentence):
    rows = make_row("full", BASE, 100_000), make_row("LoRA", BASE + difference, parameters)
    assert re.fullmatch(sentence, compare_runs.compare_pair(*rows)[-1]), compare_runs.compare_pair(*rows)[-1]
    if parameters < 100_000:  # whichever is given first, the smaller one is spoken of
        assert compare_runs.compare_pair(*rows)[-1] == compare_runs.compare_pair(*rows[::-1])[-1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-100.0, -50, -1, 0, 0, 1, 50, 100]), min_size=2, max_size=50))
def test_a_lead_is_claimed_only_if_the_interval_leaves_zero_out(difference):
    rows = make_row("full", np.zeros(len(difference)), 10), make_row("LoRA", np.array(difference), 1)
    subject, reference, differences, sentence = compare_runs.compare_pair(*rows)
    mean, low, high = differences["f1"]
    assert subject.label == "LoRA" and mean == pytest.approx(statistics.mean(difference)) and low <= high
    assert ("LoRA leads full" in sentence) == (low > 0) and ("LoRA trails full" in sentence) == (high < 0)
    assert ("the same F1 on every example" in sentence) == (not any(difference))
    assert set(differences) == {"f1", "em"}  # similarity was not measured


# ----------------------------------------------------------------------------------------------- table and files


def read_cells(lines, separator):
    return {line[0]: line[1:] for line in ([cell.strip() for cell in re.split(separator, line)] for line in lines)}


def test_screen_markdown_and_csv_give_the_same_figures(two, tmp_path, capsys):
    assert compare(*two, out=tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN
    printed = capsys.readouterr().out.splitlines()
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.endswith("|\n") and "![" in text
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["method"].tolist() == ["full fine-tuning", "LoRA"] and table["seeds"].tolist() == [0, 0]

    shown = read_cells(printed[1:17], r"\s{2,}")
    markdown = read_cells([line.strip("| ") for line in text.splitlines() if line.startswith("| ")][2:18], r" \| ")
    for title, (full, lora) in {
        "base model": ("google/flan-t5-small",) * 2,
        "trained parameters": ("100,000", "400"),
        "trained of all parameters (%)": ("100", "0.4"),
        "checkpoint (MB)": ("4.00", "0.50"),
        "F1": ("62.5", "46.9"),
        "EM": ("50.0", "25.0"),
        "avg_sem_sim": ("31.2", "23.4"),
        "BLEU-1": ("25.0", "25.0"),
        "ROUGE-L": ("37.5", "37.5"),
        "METEOR": ("not measured", "not measured"),
        "best epoch": ("3", "3"),
        "training (minutes)": ("3.00", "3.00"),
        "steps/s": ("1.00", "1.00"),  # 60 + 60 + 60 steps in 180 s
        "peak memory (MB)": ("512 RAM", "512 RAM"),
        "F1 per MB of checkpoint": ("15.62", "93.75"),
    }.items():
        assert shown.get(title) == [full, lora] == markdown[title], title
    assert "held-out F1" not in text and "holdout_f1" not in table
    assert table["f1"].tolist() == [62.5, 46.875] and table["f1_sd"].isna().all()
    assert table["f1_per_mb"].tolist() == [15.625, 93.75] and table["meteor"].isna().all()
    [sentence] = [line for line in printed if line.startswith("LoRA trails full fine-tuning by 15.6 F1")]
    assert sentence in text.splitlines() and sentence.endswith("at 0.4 % of the trained parameters.")
    assert "McNemar's exact test that both are right equally often: p = 0.002 (seed 0)." in text  # 2 / 2**10
    assert "| LoRA right | 10 (25.0 %) | 0 (0.0 %) |\n| LoRA wrong | 10 (25.0 %) | 20 (50.0 %) |" in text


def test_seeds_are_one_row_with_mean_and_standard_deviation(tmp_path, capsys):
    rng = np.random.default_rng(0)
    full, lora = (
        [rng.integers(0, high, 40) / 8 for _ in range(3)] for high in (9, 7)
    )  # an F1 an example, of three seeds each
    for seed in range(3):
        write_run(tmp_path / "full" / f"seed_{seed}", seed=seed, f1=full[seed], em=full[seed] > 0.5)
        write_run(tmp_path / "lora" / f"seed_{seed}", "lora", seed, f1=lora[seed], em=lora[seed] > 0.5)
    (tmp_path / "full" / "seed_notes").mkdir()  # no seed's folder
    assert compare(tmp_path / "full", tmp_path / "lora", out=tmp_path / "out") == 0
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    means = [100 * scores.mean() for scores in full]
    assert table["seeds"].tolist() == ["0 1 2", "0 1 2"] and table["runs"].tolist() == [3, 3]
    assert table["f1"][0] == pytest.approx(statistics.mean(means))
    assert table["f1_sd"][0] == pytest.approx(statistics.stdev(means))  # of a sample: n - 1
    for where in (printed, text):
        assert "0 1 2 (n = 3)" in where
        assert f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}" in where
        assert "not which seed was drawn: for that see ±." in where
    low, high = interval(100 * (np.mean(lora, axis=0) - np.mean(full, axis=0)))
    assert f"{compare_runs.points(low)} to {compare_runs.points(high)}" in text
    tests = [mcnemar(a > 0.5, b > 0.5) for a, b in zip(lora, full, strict=True)]
    assert ", ".join(f"p = {p:.2g} (seed {seed})" for seed, p in enumerate(tests)) in text
    wrong = np.mean([((a <= 0.5) & (b <= 0.5)).sum() for a, b in zip(lora, full, strict=True)])
    assert f"{wrong:.5g} ({wrong / 0.4:.1f} %) |\n" in text and "mean of these 3 pairs of runs" in text


def test_runs_without_a_common_seed_are_compared_each_with_each(tmp_path):
    runs = [write_run(tmp_path / f"full_{seed}", seed=seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / "lora", "lora", seed=2)]
    assert compare(*runs, out=tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "p = 1 (seed 2 and 0), p = 1 (seed 2 and 1)" in text and "mean of these 2 pairs of runs" in text


def test_methods_are_told_apart_by_the_arguments_in_which_they_differ(tmp_path, capsys):
    runs = [write_run(tmp_path / "full"), write_run(tmp_path / "r8", "lora")]
    runs += [write_run(tmp_path / "r16", "lora", lora_r=16, target_modules=["q", "k"])]
    assert compare(*runs, out=tmp_path / "out") == 0
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["method"].tolist() == [
        *("full fine-tuning", "LoRA (lora_r 8, target_modules q v)", "LoRA (lora_r 16, target_modules q k)")
    ]
    assert "not adjusted for the number of pairs" in capsys.readouterr().out
    runs[2] = write_run(tmp_path / "base", "lora", model_name="google/flan-t5-base")
    assert compare(*runs[:1], runs[2], out=tmp_path / "out") == 0  # replaces the former comparison
    assert (
        "LoRA (model_name google/flan-t5-base) and full fine-tuning (model_name google/flan-t5-small) have the same"
        in (capsys.readouterr().out)
    )


def test_held_out_f1_is_shown_if_every_run_has_it(tmp_path):
    held = {"holdout": {"rows": [1, 2], "metrics": {"f1": 0.625}}}
    runs = [write_run(tmp_path / "full", record=held), write_run(tmp_path / "lora", "lora", record=held)]
    assert compare(*runs, out=tmp_path / "out") == 0
    assert "| held-out F1 | 62.5 | 62.5 |" in (tmp_path / "out" / "comparison.md").read_text()
    assert compare(runs[0], write_run(tmp_path / "none", "lora"), out=tmp_path / "out") == 0
    assert "eld-out" not in (tmp_path / "out" / "comparison.md").read_text()


def test_methods_that_set_other_rows_aside_are_refused(tmp_path, capsys):
    """The rows of --holdout depend on the seed: both methods must have run the same seeds."""

    def run(name, method, seed, rows):
        held = {"holdout": {"rows": rows, "metrics": {"f1": 0.5}}}
        return write_run(tmp_path / name, method, seed=seed, holdout=2, record=held)

    full = [run("full 1", "full", 1, [3, 8]), run("full 2", "full", 2, [0, 5])]
    lora = [run("lora 1", "lora", 1, [3, 8]), run("lora 2", "lora", 2, [0, 5])]
    assert compare(*full, *lora, out=tmp_path / "out") == 0
    assert "--holdout set different rows aside" in refusal(capsys, full[0], lora[1], out=tmp_path / "none")
    assert "--holdout set different rows aside" in refusal(capsys, *full, lora[0], out=tmp_path / "none")


def test_without_similarity_the_rest_is_compared(tmp_path):
    runs = [write_run(tmp_path / method, method, sem_model="none") for method in ("full", "lora")]
    assert compare(*runs, out=tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| avg_sem_sim | not measured | not measured |" in text and text.count("avg_sem_sim") == 1


def test_a_gpus_memory_is_shown_where_there_is_one(tmp_path):
    gpu = {"device": "NVIDIA H200", "peak_vram_mb": 2048.4}
    assert compare(write_run(tmp_path / "a"), write_run(tmp_path / "b", "lora", record=gpu), out=tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| peak memory (MB) | 512 RAM | 2,048 GPU |" in text
    assert "made on different devices" in text


def test_the_scoring_of_a_later_eval_only_counts(tmp_path, capsys):
    full = write_run(tmp_path / "full")
    arguments = json.loads((full / "run.json").read_text())["args"] | {"eval_only": True}
    lora = write_run(tmp_path / "lora", "lora", final_beams=1, record={"eval_only": arguments | {"final_beams": 5}})
    assert compare(full, lora, out=tmp_path / "out") == 0
    again = write_run(tmp_path / "again", "lora", record={"eval_only": arguments | {"final_beams": 1}})
    assert "--final_beams 5 and 1" in refusal(capsys, full, again, out=tmp_path / "none")


def test_the_telling_examples_show_every_direction_and_read_as_they_are(tmp_path):
    f1 = np.full(60, 0.5)
    full, lora = f1.copy(), f1.copy()
    full[:30], lora[30:33] = 1, [1, 0.8, 0.9]  # full is better on 30, LoRA on 3
    full, lora = write_run(tmp_path / "full", f1=full), write_run(tmp_path / "lora", "lora", f1=lora)
    assert compare(full, lora, out=tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    rows = [int(row) for row in re.findall(r"^\*\*.*\*\* \(row (\d+)\)$", text, flags=re.MULTILINE)]
    assert rows[:8] == [1, 31, 2, 33, 3, 32, 4, 5] and len(rows) == 20
    assert (
        '**who won \\| lost?** (row 1)\n\n- tweet: tweet 0, "quoted" \U0001f600 #tag\n- references: gold 0 / other\n'
        "- full fine-tuning: (nothing) (F1 100)\n- LoRA: (nothing) (F1 50)\n"
    ) in text
    assert "**what is it?** (row 2)" in text and "**who is \\*she\\*?** (row 5)" in text
    # Where nothing differs, those that all get wrong are shown, the worst first.
    same = write_run(tmp_path / "same"), write_run(tmp_path / "too", "lora")
    assert compare(*same, out=tmp_path / "out") == 0
    rows = re.findall(r"\(row (\d+)\)$", (tmp_path / "out" / "comparison.md").read_text(), flags=re.MULTILINE)
    assert rows == [str(n) for n in range(1, 21)]


def test_the_picture_shows_the_runs_figures(two, tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    assert compare(*two, out=tmp_path / "out") == 0
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    by_epoch, by_cost, by_kind = drawn[0].axes
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["full fine-tuning", "LoRA"]
    curves = [line.get_ydata() for line in by_epoch.lines]
    assert [list(curve) for curve in curves] == [
        pytest.approx([62.5 * n / 3 for n in (1, 2, 3)]),
        pytest.approx([46.875 * n / 3 for n in (1, 2, 3)]),
    ]
    dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in by_cost.lines if len(line.get_xdata()) == 1]
    assert dots == [(100_000, 62.5), (400, 46.875)] and by_cost.get_xscale() == "log"
    assert [label.get_text() for label in by_kind.get_yticklabels()] == ["who (16)", "what (8)", "why (8)", "where (8)"]
    dots = [line.get_xdata()[0] for line in by_kind.lines if len(line.get_xdata()) == 1]
    frame = pd.read_csv(two[0] / "validation_predictions.csv")
    assert dots[0] == pytest.approx(100 * frame["f1"][frame["question_type"] == "who"].mean())


def test_the_pictures_labels_stay_inside_it_and_apart(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: (save(self, *given, **more), drawn.append(self))
    )
    long = {"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}
    runs = [write_run(tmp_path / f"r{r}_{lr}", "lora", lora_r=r, lr=lr, **long) for r in (8, 16) for lr in (1e-3, 3e-4)]
    assert (
        compare(write_run(tmp_path / "full"), *runs, write_run(tmp_path / "short", "lora"), out=tmp_path / "out") == 0
    )
    figure = drawn[-1]
    texts = [*figure.legends[0].get_texts(), *figure.axes[2].get_yticklabels(), *(axes.title for axes in figure.axes)]
    assert len(figure.legends[0].get_texts()) == 6
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    by_cost = figure.axes[1]
    low, high = by_cost.get_xlim()
    ticks = [text for text in by_cost.get_xticklabels() if low <= text.get_position()[0] <= high]
    ticks = [text.get_window_extent() for text in ticks]
    assert all(left.x1 < right.x0 for left, right in zip(ticks, ticks[1:], strict=False)) and len(ticks) >= 2


def test_a_comparison_needs_no_model_library(two, tmp_path):
    code = (
        "import sys, compare_runs; code = compare_runs.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'helper_functions') if name in sys.modules], code)"
    )
    command = [sys.executable, "-c", code, *map(str, two), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] 0" and done.stderr == "", done.stderr


# ------------------------------------------------------------------------------------------------------- refusals


def change_record(**changes):
    """A function that changes run.json of a folder: key=value, or args__key=value in its arguments."""

    def change(folder):
        run = json.loads((folder / "run.json").read_text())
        for name, value in changes.items():
            *parts, key = name.split("__")
            part = run
            for each in parts:
                part = part[each]
            part[key] = value
        (folder / "run.json").write_text(json.dumps(run))

    return change


def change_table(name, change):
    """A function that changes the text of a file in a folder."""

    def change_file(folder):
        text = (folder / name).read_text()
        assert change(text) != text
        (folder / name).write_text(change(text))

    return change_file


def change_rows(column, row, value):
    """A function that changes one value of validation_predictions.csv."""

    def change(folder):
        frame = pd.read_csv(folder / "validation_predictions.csv", dtype=str, keep_default_na=False)
        frame.loc[row - 1, column] = value
        frame.to_csv(folder / "validation_predictions.csv", index=False)

    return change


@pytest.mark.parametrize(
    "change, reason",
    [
        (change_record(args__dataset="squad"), "tweet_qa and squad"),
        (change_record(args__max_train_samples=64), "--max_train_samples none and 64"),
        (change_record(args__holdout=100), "--holdout none and 100"),
        (change_record(args__sem_model="other"), "--sem_model minilm and other"),
        (change_record(args__final_beams=1), "--final_beams 5 and 1"),
        (change_record(args__max_target_len=8), "--max_target_len 32 and 8"),
        (change_rows("question", 7, "when?"), "row 7 has the question 'what is\\nit?' and 'when?'"),
        (change_rows("tweet", 40, "x"), "row 40 has the tweet"),
        (change_rows("qid", 1, "x"), "row 1 has the qid 'same' and 'x'"),
        (change_rows("references", 2, '["gold 1"]'), "row 2 has the references ['gold 1', 'other'] and ['gold 1']"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_with_the_reason(two, tmp_path, capsys, change, reason):
    change(two[1])
    line = refusal(capsys, *two, out=tmp_path / "out")
    assert reason in line and str(two[0]) in line and str(two[1]) in line and "cannot be compared" in line


def test_another_number_of_rows_is_refused(tmp_path, capsys):
    runs = write_run(tmp_path / "full"), write_run(tmp_path / "lora", "lora", f1=[0, 0.5, 1])
    assert "40 and 3 validation rows" in refusal(capsys, *runs, out=tmp_path / "out")


def test_what_is_no_two_runs_is_refused(two, tmp_path, capsys):
    out = tmp_path / "out"
    assert "single run" in refusal(capsys, two[0], out=out)
    assert "given twice" in refusal(capsys, two[0], two[1], tmp_path / "lora" / ".." / "full", out=out)
    copy = shutil.copytree(two[0], tmp_path / "copy")
    assert "same method, arguments and seed" in refusal(capsys, two[0], two[1], copy, out=out)
    assert "no such folder" in refusal(capsys, two[0], tmp_path / "nothing", out=out)
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refusal(capsys, two[0], tmp_path / "file", out=out)
    readme = re.search(r"^python compare_runs.py (.+)$", (PROJECT / "README.md").read_text(), flags=re.MULTILINE)
    assert "no such folder" in refusal(capsys, *readme[1].split(), out=out)  # understood, but not run yet
    with pytest.raises(SystemExit) as end:
        compare_runs.main(["a", "b", "--seed", "1"])
    assert end.value.code == 2 and re.fullmatch(r"error: .*--seed.*\n", capsys.readouterr().err)


def cut(text, characters=0, lines=0):
    return "".join(text.splitlines(keepends=True)[: -lines or None])[: -characters or None]


def remove(name):
    return lambda folder: (folder / name).unlink()


EXAMPLES, EPOCHS = "validation_predictions.csv", "metrics.csv"
MALFORMED = {
    "no run.json": (remove("run.json"), "run.json is missing"),
    "no metrics.csv": (remove(EPOCHS), "metrics.csv is missing"),
    "no predictions": (remove(EXAMPLES), "validation_predictions.csv is missing"),
    "run.json cut off": (change_table("run.json", lambda text: cut(text, 100)), "run.json cannot be read"),
    "run.json empty": (change_table("run.json", lambda text: ""), "run.json cannot be read"),
    "run.json a list": (change_table("run.json", lambda text: "[1]"), "run.json cannot be read"),
    "run.json nested": (change_table("run.json", lambda text: "[" * 100_000), "run.json cannot be read"),
    "run.json of something else": (change_table("run.json", lambda text: '{"a": 1}'), "run.json cannot be read"),
    "run.json no text": (lambda folder: (folder / "run.json").write_bytes(b"\xff\xfe{"), "run.json cannot be read"),
    "run.json without arguments": (change_record(args={}), "args.model_name must be text, not null"),
    "arguments of another type": (change_record(args=[1]), "run.json cannot be read"),
    "another method": (change_record(method="prompt"), "method must be full or lora, not 'prompt'"),
    "a method that is no text": (change_record(method=["full"]), "run.json cannot be read"),
    "no base model": (change_record(args__model_name=None), "args.model_name must be text, not null"),
    "a seed of another type": (change_record(args__seed="one"), 'args.seed must be a number, not "one"'),
    "beams of another type": (change_record(args__final_beams=True), "args.final_beams must be a number above 0"),
    "no later beams": (
        change_record(eval_only={"sem_model": "minilm"}),
        "eval_only.final_beams must be a number above 0",
    ),
    "never finished": (change_record(final=None, wall_time_seconds=None), "not finished"),
    "scored, but never finished": (change_record(wall_time_seconds=None), "not finished"),
    "to be resumed": (lambda folder: (folder / "last").mkdir(), "not finished"),
    "never trained": (change_record(args__eval_only=True), "only scored (--eval_only), not a training run"),
    "NaN in final": (change_record(final__f1=math.nan), "final.f1 must be a number, not NaN"),
    "infinity in final": (change_record(final__bleu1=math.inf), "final.bleu1 must be a number or null, not Infinity"),
    "no EM in final": (change_record(final={"f1": 0.5}), "final.em must be a number, not null"),
    "final of another type": (change_record(final=3), "final.f1 must be a number, not null"),
    "held out without metrics": (change_record(holdout={"rows": [1]}), "holdout.metrics.f1 must be a number, not null"),
    "no parameters": (change_record(trainable_parameters=0), "trainable_parameters must be a number above 0, not 0"),
    "no checkpoint": (change_record(checkpoint_bytes=None), "checkpoint_bytes must be a number above 0, not null"),
    "predictions cut in a row": (change_table(EXAMPLES, lambda text: cut(text, 12)), "is truncated or was changed"),
    "predictions cut in quotes": (change_table(EXAMPLES, lambda text: cut(text, 50)), "is truncated or was changed"),
    "predictions cut in the last field": (change_table(EXAMPLES, lambda text: cut(text, 2)), "row 40 is incomplete"),
    "predictions cut after a row": (
        change_table(EXAMPLES, lambda text: cut(text, lines=1)),
        "the mean f1 of its 39 rows",
    ),
    "predictions without rows": (change_table(EXAMPLES, lambda text: text.split("\n")[0] + "\n"), "is incomplete"),
    "predictions empty": (change_table(EXAMPLES, lambda text: ""), "has no column qid"),
    "predictions of other columns": (
        change_table(EXAMPLES, lambda text: text.replace("f1,", "F1,", 1)),
        "no column f1",
    ),
    "one field too many": (change_table(EXAMPLES, lambda text: text.rstrip("\n") + ",1\n"), "row 40 is incomplete"),
    "NaN in a row": (change_rows("f1", 5, "nan"), "row 5: f1 cannot be 'nan'"),
    "a gap in a row": (change_rows("sem_sim", 5, ""), "row 5: sem_sim cannot be ''"),
    "an F1 above 1": (change_rows("f1", 3, "1.5"), "row 3: f1 cannot be '1.5'"),
    "an EM that is no number": (change_rows("em", 3, "yes"), "row 3: em cannot be 'yes'"),
    "other scores": (change_rows("em", 40, "1"), "the mean em of its 40 rows is 0.2750, but run.json says 0.2500"),
    "references that are no list": (change_rows("references", 4, "gold"), "row 4: references must be a list of texts"),
    "predictions no text": (lambda folder: (folder / EXAMPLES).write_bytes(b"\xff\xfe"), "is truncated or was changed"),
    "metrics cut off": (
        change_table(EPOCHS, lambda text: cut(text, lines=1)),
        "the epochs 1 to 3",
    ),
    "NaN in metrics": (
        change_table(EPOCHS, lambda text: text.replace("30.0", "nan")),
        "row 1: epoch_seconds cannot be",
    ),
    "an epoch twice": (
        change_table(EPOCHS, lambda text: text.replace("\n2,", "\n1,")),
        "the epochs 1 to 3",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_run_folder_is_refused_in_one_line(two, tmp_path, capsys, case):
    change, reason = MALFORMED[case]
    change(two[1])
    line = refusal(capsys, *two, out=tmp_path / "out")
    assert reason in line and str(two[1]) in line


def test_a_single_row_is_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / method, method, f1=[0.5]) for method in ("full", "lora")]
    assert "single validation row" in refusal(capsys, *runs, out=tmp_path / "out")


def test_only_a_former_comparison_is_replaced(two, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert compare(*two, out=out) == 0 and compare(*two[::-1], out=out) == 0
    assert (out / "notes.txt").read_text() == "mine" and len(list(out.iterdir())) == 4
    for name in ("comparison.md", "comparison.csv"):
        other = tmp_path / f"other {name}"
        other.mkdir()
        (other / name).write_text("mine")
        capsys.readouterr()
        assert compare(*two, out=other) == 2
        assert re.fullmatch(rf"error: --out .* contains a {name} .*\n", capsys.readouterr().err)
        assert [path.read_text() for path in other.iterdir()] == ["mine"]
    assert compare(*two, out=out / "notes.txt") == 2
    assert re.fullmatch(r"error: --out .* is not a folder; .*\n", capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ real runs


def test_the_figures_of_real_runs_follow_from_their_own_files(finished_runs, tmp_path, capsys):
    assert compare(finished_runs / "full", finished_runs / "lora", out=tmp_path / "out") == 0
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    text = (tmp_path / "out" / "comparison.md").read_text()
    frames = []
    for place, method in enumerate(("full", "lora")):
        run = json.loads((finished_runs / method / "run.json").read_text())
        epochs = pd.read_csv(finished_runs / method / "metrics.csv")
        frames.append(pd.read_csv(finished_runs / method / "validation_predictions.csv", keep_default_na=False))
        row = table.iloc[place]
        for name in ("f1", "em", "bleu1", "rougeL"):
            assert row[name] == pytest.approx(100 * run["final"][name])
        assert row["trainable_percent"] == 100 * run["trainable_parameters"] / run["total_parameters"]
        assert row["train_minutes"] == pytest.approx(epochs["epoch_seconds"].sum() / 60)
        steps = len(pd.read_csv(finished_runs / method / "train_loss.csv"))
        assert row["steps_per_sec"] == pytest.approx(steps / epochs["epoch_seconds"].sum(), rel=1e-2)
        assert row["best_epoch"] == run["best_epoch"] and row["peak_memory_mb"] == run["peak_ram_mb"]
        assert row["checkpoint_mb"] * 2**20 == sum(
            path.stat().st_size for path in (finished_runs / method).glob("*.safetensors")
        )
    difference = 100 * (frames[1]["f1"] - frames[0]["f1"]).to_numpy()
    picks = np.random.default_rng(1).integers(0, len(difference), (10_000, len(difference)))
    low, high = np.quantile(difference[picks].mean(1), [0.025, 0.975])
    shown = re.search(r"\| F1 \| (-?[\d.]+) \| (-?[\d.]+) to (-?[\d.]+) \|", text)
    expected = [difference.mean(), low, high]
    assert [float(value) for value in shown.groups()] == pytest.approx(expected, abs=0.05 + 0.1 * difference.std())
    alone = [int((a["em"] > b["em"]).sum()) for a, b in (frames, frames[::-1])]
    p = stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1
    assert f"p = {p:.2g} (seed 42)" in text and ("full fine-tuning" in printed and "LoRA" in printed)
