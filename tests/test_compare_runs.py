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
from matplotlib.figure import Figure
from run_folders import write_run
from scipy import stats

import compare_runs
from pipeline.markdown import points, signed
from pipeline.run_folder import read_run_json, run_record, write_scored
from pipeline.statistics import costs_at_most, difference, mean_interval
from pipeline.text import tweet_key

WRITTEN = ["comparison.csv", "comparison.md", "comparison.png"]


@pytest.fixture
def two(tmp_path):
    """(full run, LoRA run) that differ in their scores."""
    full = write_run(tmp_path / "full", f1=np.tile([1, 1, 0.5, 0], 10))
    return full, write_run(tmp_path / "lora", "lora", f1=np.tile([1, 0.25, 0.5, 0.125], 10))


def compare(*folders, out=None, margin=None):
    """Run the program; returns its exit code."""
    margin = [] if margin is None else ["--margin_f1", str(margin)]
    return compare_runs.main([*map(str, folders), *(["--out", str(out)] if out else []), *margin])


def refusal(capsys, *folders, out):
    """The one line with which the program refuses these folders, having written nothing."""
    capsys.readouterr()
    assert compare(*folders, out=out) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and not out.exists()
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    return printed.err


# ----------------------------------------------------------------------------------------------- table and files


def read_cells(lines, separator):
    return {line[0]: line[1:] for line in ([cell.strip() for cell in re.split(separator, line)] for line in lines)}


def interval_of(folder, split="validation"):
    """The bounds of the interval of a run's F1, as text."""
    frame = pd.read_csv(folder / f"{split}_predictions.csv")
    result = mean_interval(100 * frame["f1"], frame["tweet"])
    return f"{points(result.low)} to {points(result.high)}"


def test_screen_markdown_and_csv_give_the_same_figures(two, tmp_path, capsys):
    assert compare(*two, out=tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN
    printed = capsys.readouterr().out.splitlines()
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text.endswith("|\n") and "![" in text
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["method"].tolist() == ["full fine-tuning", "LoRA"] and table["seeds"].tolist() == [0, 0]

    shown = read_cells(printed[1:18], r"\s{2,}")
    markdown = read_cells([line.strip("| ") for line in text.splitlines() if line.startswith("| ")][2:19], r" \| ")
    for title, (full, lora) in {
        "base model": ("google/flan-t5-small",) * 2,
        "trained parameters": ("100,000", "400"),
        "trained of all parameters (%)": ("100", "0.4"),
        "checkpoint (MB)": ("4.00", "0.50"),
        "validation F1 (chose the epoch)": ("62.5", "46.9"),
        "validation F1, 95 % interval": tuple(interval_of(folder) for folder in two),
        "validation EM": ("50.0", "25.0"),
        "validation avg_sem_sim": ("31.2", "23.4"),
        "validation BLEU-1": ("25.0", "25.0"),
        "validation ROUGE-L": ("37.5", "37.5"),
        "validation METEOR": ("not measured", "not measured"),
        "best epoch": ("3", "3"),
        "training (minutes)": ("3.00", "3.00"),
        "steps/s": ("1.00", "1.00"),  # 60 + 60 + 60 steps in 180 s
        "peak memory (MB)": ("512 RAM", "512 RAM"),
        "validation F1 per MB of checkpoint": ("15.62", "93.75"),
    }.items():
        assert shown.get(title) == [full, lora] == markdown[title], title
    assert "held-out F1" not in text and "holdout_f1" not in table and "test_f1" not in table
    assert table["f1"].tolist() == [62.5, 46.875] and table["f1_sd"].isna().all()
    assert table["f1_per_mb"].tolist() == [15.625, 93.75] and table["meteor"].isna().all()
    [line] = [
        line for line in printed if line.startswith("LoRA (lora_r 8, target_modules q v, lr 0.001) costs at most")
    ]
    first, rest = line.split(". ", 1)
    assert f"**{first}.** {rest}" in text.splitlines() and first.endswith("of full fine-tuning's 62.5 (95 %, tweets)")
    assert "It is worse by 15.6 F1" in rest and "It needs 0.4 % of the trained parameters" in rest
    assert "Measured on 40 validation rows (40 tweets). These rows also chose each run's epoch" in "\n".join(printed)
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
        assert "(95 %, tweets and 3 seeds)" in where
    result = difference(100 * np.array(lora), 100 * np.array(full), range(40))
    assert f"| F1 | {signed(result.mean)} | {points(result.low)} to {points(result.high)} |" in text
    assert "McNemar" not in text  # a test of two runs
    wrong = np.mean([((a <= 0.5) & (b <= 0.5)).sum() for a, b in zip(lora, full, strict=True)])
    assert f"{wrong:.1f} ({wrong / 0.4:.1f} %) |\n" in text and "mean of 3 pairs of runs" in text


def test_runs_of_other_steps_or_precision_are_no_seeds_of_one_method(tmp_path, capsys):
    """The same arguments make steps of four times the rows in four processes, and `auto` is bf16 on some devices."""

    def trained(name, method, seed, processes, used):
        record = {"identity": {"precision": used, "number of processes": processes}, "optimizer": {"class": "AdamW"}}
        return write_run(tmp_path / name, method, seed, precision="auto", record=record)

    one, four = trained("one", "full", 0, 1, "no"), trained("four", "full", 1, 4, "bf16")
    lora, base = trained("lora", "lora", 0, 1, "no"), write_run(tmp_path / "base", "base", precision="auto")
    for others in ([], [base]):
        assert compare(one, four, lora, *others, out=tmp_path / "out") == 0
        methods = pd.read_csv(tmp_path / "out" / "comparison.csv")["method"].tolist()
        assert methods[:2] == [
            f"full fine-tuning (precision auto ({used}), processes {processes})"
            for used, processes in (("fp32", 1), ("bf16", 4))
        ]
        assert "| --processes | 1 | 4 | 1 |" in (tmp_path / "out" / "comparison.md").read_text()
    old = write_run(tmp_path / "old", seed=3, precision="auto")  # an older version did not record it
    assert compare(one, four, old, lora, out=tmp_path / "out") == 0
    methods = pd.read_csv(tmp_path / "out" / "comparison.csv")["method"].tolist()
    assert methods[2] == "full fine-tuning (precision auto, processes -)" and len(methods) == 4
    assert compare(one, old, lora, out=tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "precision" not in text and pd.read_csv(tmp_path / "out" / "comparison.csv")["runs"].tolist() == [2, 1]
    same = trained("same", "full", 2, 1, "no")
    assert compare(one, same, lora, base, out=tmp_path / "out") == 0
    assert pd.read_csv(tmp_path / "out" / "comparison.csv")["runs"].tolist() == [2, 1, 1]


def test_runs_without_a_common_seed_are_compared_each_with_each(tmp_path):
    runs = [write_run(tmp_path / f"full_{seed}", seed=seed) for seed in (0, 1)]
    runs += [write_run(tmp_path / "lora", "lora", seed=2)]
    assert compare(*runs, out=tmp_path / "out") == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "mean of 2 pairs of runs" in text and "As one method has one seed, the interval covers which tweets" in text


def test_methods_are_told_apart_by_the_arguments_in_which_they_differ(tmp_path, capsys):
    runs = [write_run(tmp_path / "full"), write_run(tmp_path / "r8", "lora")]
    runs += [write_run(tmp_path / "r16", "lora", lora_r=16, target_modules=["q", "k"])]
    assert compare(*runs, out=tmp_path / "out") == 0
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["method"].tolist() == [
        *("full fine-tuning", "LoRA (lora_r 8, target_modules q v)", "LoRA (lora_r 16, target_modules q k)")
    ]
    assert "The p values are adjusted for the 3 pairs of this report (Holm)" in capsys.readouterr().out
    runs[2] = write_run(tmp_path / "base", "lora", model_name="google/flan-t5-base")
    assert compare(*runs[:1], runs[2], out=tmp_path / "out") == 0  # replaces the former comparison
    assert (
        "LoRA (model_name google/flan-t5-base, lora_r 8, target_modules q v, lr 0.001) and full fine-tuning (model_name"
        " google/flan-t5-small) have the same F1 on every row" in capsys.readouterr().out
    )


HELD = np.tile([1, 0.5, 0.25, 0, 1], 6)


def test_the_headline_is_of_the_held_out_rows(tmp_path, capsys):
    """Validation would say the opposite."""
    folders, scores = {}, {"full": [], "lora": []}
    for method in scores:
        for seed in range(2):
            held = np.clip(HELD - (method == "lora") * 0.25 - 0.01 * seed, 0, 1)
            f1 = np.full(40, 0.9 if method == "lora" else 0.3)
            folders[method, seed] = write_run(tmp_path / f"{method}{seed}", method, seed, f1, held_out=held, test=f1)
            scores[method].append(100 * held)
    assert compare(*folders.values(), out=tmp_path / "out", margin=50) == 0
    said, text = capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()
    result = difference(scores["lora"], scores["full"], [f"tweet {i % 15}" for i in range(30)])
    most, reached = points(costs_at_most(result)), np.mean(scores["full"])
    for where in (said, text):
        assert "Measured on 30 held-out rows (15 tweets), which chose neither the epoch nor the learning rate." in where
        assert f"costs at most {most} F1 of full fine-tuning's {reached:.1f} (95 %, tweets and 2 seeds)." in where
        assert "It is worse by" in where and "The cost is within the margin of 50 F1." in where
    assert f"| F1 | {signed(result.mean)} | {points(result.low)} to {points(result.high)} |" in text
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["measured_on"].tolist() == ["holdout"] * 2
    assert table["holdout_f1"].tolist() == pytest.approx(table["measured_f1"].tolist())
    assert table["f1"].tolist() == [30, 90] and table["test_f1"].tolist() == [30, 90]
    lines = read_cells([line.strip("| ") for line in text.splitlines() if line.startswith("| ")], r" \| ")
    assert lines["validation F1 (chose the epoch)"] == ["30.0 ± 0.0", "90.0 ± 0.0"]
    both = zip(table["measured_f1_low"], table["measured_f1_high"], strict=True)
    assert lines["held-out F1, 95 % interval"] == [f"{points(low)} to {points(high)}" for low, high in both]


def test_without_the_same_held_out_rows_the_next_best_rows_are_used(tmp_path, capsys):
    out = tmp_path / "out"
    full = write_run(tmp_path / "full", held_out=HELD, test=HELD)
    lora = write_run(tmp_path / "lora", "lora", held_out=HELD / 2, test=HELD / 2)
    untrained = write_run(tmp_path / "base", "base", test=HELD / 4)
    assert compare(full, lora, untrained, out=out) == 0
    said = capsys.readouterr().out
    assert "Measured on 30 test rows (15 tweets)" in said and f"not used: {untrained} was not scored on any." in said
    assert compare(full, lora, write_run(tmp_path / "other", "base"), out=out) == 0
    assert (
        "Measured on 40 validation rows (40 tweets). These rows also chose each run's epoch" in capsys.readouterr().out
    )

    # Older versions set other rows aside for each seed.
    runs = []
    for seed in (1, 2):
        for method in ("full", "lora"):
            folder = write_run(tmp_path / f"{method} {seed}", method, seed, held_out=HELD)
            change_record(holdout__rows=[seed])(folder)
            change_table("holdout_predictions.csv", lambda text, seed=seed: text.replace("who", f"who{seed}"))(folder)
            runs.append(folder)
    assert compare(*runs, out=out) == 0
    said = capsys.readouterr().out
    assert "Measured on 40 validation rows" in said
    assert "Held-out rows are not used: the runs set different rows aside." in said


def test_damaged_held_out_rows_are_refused(tmp_path, capsys):
    runs = [write_run(tmp_path / method, method, held_out=HELD) for method in ("full", "lora")]
    change_table("holdout_predictions.csv", lambda text: cut(text, lines=1))(runs[1])
    assert "the mean f1 of its 29 rows" in refusal(capsys, *runs, out=tmp_path / "out")
    change_record(holdout__metrics__f1="high")(runs[0])
    assert "holdout.metrics.f1 must be a number" in refusal(capsys, *runs, out=tmp_path / "out")


def test_the_untrained_model_is_a_row_and_a_line_in_the_picture(tmp_path, capsys):
    runs = [write_run(tmp_path / "base", "base", held_out=HELD / 4), write_run(tmp_path / "full", held_out=HELD)]
    runs += [write_run(tmp_path / "lora", "lora", held_out=HELD / 2)]
    assert compare(*runs, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    gain, kept = 100 * (HELD - HELD / 4).mean(), (HELD / 2 - HELD / 4).mean() / (HELD - HELD / 4).mean()
    assert f"Full fine-tuning gains {gain:.1f} F1 over the untrained model's {25 * HELD.mean():.1f}" in said
    assert f"LoRA keeps {100 * kept:.0f} % of the {gain:.1f} F1 that training gained" in said
    assert "untrained model is" not in said.lower() and "untrained model costs" not in said.lower()


@pytest.mark.parametrize("margin", ["-1", "100", "nan", "two"])
def test_a_margin_that_is_none_is_refused(tmp_path, capsys, margin):
    with pytest.raises(SystemExit) as end:
        compare(tmp_path, margin=margin)
    assert end.value.code == 2 and re.fullmatch(r"error: argument --margin_f1: .*\n", capsys.readouterr().err)


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
    assert "| validation avg_sem_sim | not measured | not measured |" in text and text.count("avg_sem_sim") == 1


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


def test_scoring_again_without_some_rows_leaves_no_old_scores_of_them(tmp_path, capsys):
    """As after --eval_only --holdout 0 --final_beams 1, on data without a test split: the old scores had 5 beams."""
    full, lora = (write_run(tmp_path / name, name, held_out=HELD, test=HELD) for name in ("full", "lora"))
    for folder in (full, lora):
        before = read_run_json(folder)
        scored = {"eval_only": before["args"] | {"final_beams": 1, "holdout": 0}}
        record = run_record(before, results={"final": before["final"]}, end=scored)
        write_scored(folder, record, roles=["train", "validation"])
        assert record["holdout"] == {"rows": before["holdout"]["rows"]} and "test" not in record
        assert not [*folder.glob("holdout_*"), *folder.glob("test_*")]
    assert compare(full, lora, out=tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "Measured on 40 validation rows" in said and f"not used: {full} was not scored on any." in said
    assert "held-out" not in pd.read_csv(tmp_path / "out" / "comparison.csv").columns


def test_old_scores_of_held_out_rows_that_a_later_scoring_left_out_are_not_used(tmp_path, capsys):
    """As older versions left them in the folder."""
    runs = []
    for method in ("full", "lora"):
        runs.append(write_run(tmp_path / method, method, held_out=HELD))
        record = read_run_json(runs[-1])
        record["eval_only"] = record["args"] | {"final_beams": 1, "holdout": 0}
        (runs[-1] / "run.json").write_text(json.dumps(record))
    assert compare(*runs, out=tmp_path / "out") == 0
    assert "Measured on 40 validation rows" in capsys.readouterr().out


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
    assert "this folder does not exist" in refusal(capsys, two[0], tmp_path / "nothing", out=out)
    for path in ("x" * 300, "a\0b"):
        with pytest.raises(SystemExit) as end:
            compare_runs.main([path, str(two[0])])
        assert end.value.code == 2 and re.fullmatch(
            r"error: argument RUN_DIR: cannot be used.*\n", capsys.readouterr().err
        )
    (tmp_path / "file").write_text("x")
    assert "this folder does not exist" in refusal(capsys, two[0], tmp_path / "file", out=out)
    readme = re.search(r"^python compare_runs.py (.+)$", (PROJECT / "README.md").read_text(), flags=re.MULTILINE)
    assert "this folder does not exist" in refusal(capsys, *readme[1].split(), out=out)  # understood, but not run yet
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
    "another method": (change_record(method="prompt"), "method must be full, lora or base, not 'prompt'"),
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
    "final of another type": (change_record(final=3), "run.json cannot be read (ValueError: final is not an object)"),
    "held out without metrics": (
        change_record(holdout={"rows": [1]}, args__holdout=1),
        "holdout.metrics.f1 must be a number, not null",
    ),
    "held out of another type": (change_record(holdout={"metrics": [1]}), "holdout.metrics is not an object"),
    "content of another type": (change_record(content=[1]), "content is not an object"),
    "content of a scoring of another type": (
        change_record(eval_only={"content": 5}),
        "eval_only.content is not an object",
    ),
    "a metric of the test split of another type": (change_record(test={"f1": "x"}), "test.f1 must be a number or null"),
    "a probe without its hash": (change_record(probe={"file": "x"}), "run.json cannot be read (KeyError"),
    "a hash of another type": (change_record(content={"model_name": ["a"]}), "model_name is neither text nor a number"),
    "identity of another type": (change_record(identity="a"), "identity is not an object"),
    "an optimizer without a name": (change_record(optimizer={"groups": []}), "run.json cannot be read (KeyError"),
    "test of another type": (change_record(test=[0.5]), "test is not an object"),
    "a prompt of another type": (change_record(prompt=None), "run.json cannot be read"),
    "a number of epochs of another type": (change_record(epochs="3"), 'epochs must be a number, not "3"'),
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
    result = difference(*(100 * frame["f1"] for frame in frames[::-1]), frames[0]["tweet"].map(tweet_key))
    assert f"| F1 | {signed(result.mean)} | {points(result.low)} to {points(result.high)} |" in text
    alone = [int((a["em"] > b["em"]).sum()) for a, b in (frames, frames[::-1])]
    p = stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1
    assert f"p = {p:.2g} (seed 42)" in text and ("full fine-tuning" in printed and "LoRA" in printed)
