"""Compare finished runs: what LoRA costs in quality against full fine-tuning, and what it saves.

    python compare_runs.py flan_t5_tweetqa_ckpt flan_t5_tweetqa_ckpt_lora

It reads only run folders: no model, no data, no network. A folder of seed_N runs can be given in place of its runs, and
runs that differ only in their seed are one row of the table, mean ± standard deviation. It prints the table and writes
comparison.md (with the conclusions, and the examples whose answers differ most), comparison.csv and comparison.png to
--out.

The conclusions are of rows that chose nothing, where all runs have the same ones: held-out rows (--holdout), or else a
test split with answers. Without them they are of validation, which chose each run's epoch.

The metrics are out of 100, on the screen and in the files.
"""

import argparse
import math
import re
import sys
from itertools import combinations, product, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.arguments import path_or_id
from pipeline.compared import (
    check_comparable,
    check_same_rows_held_out,
    differing,
    make_rows,
    read,
    rows_that_measure,
    spread,
)
from pipeline.comparison_figures import draw_comparison
from pipeline.conclusions import base_of, compare_rows, estimate, in_order, interval_text, notes, sentences
from pipeline.console import show_any_character
from pipeline.errors import InputError, RunError
from pipeline.lock import only_writer
from pipeline.markdown import as_markdown, markdown_table, p_value, paragraph, points, signed
from pipeline.metrics import METRICS
from pipeline.run_folder import writing
from pipeline.statistics import mcnemar

TITLE = "# Comparison of runs"  # the first line of comparison.md, by which a former comparison is known
TELLING = 20  # examples in comparison.md
# The figures of the table: title and format.
FIGURES = {
    "trainable_parameters": ("trained parameters", "{:,.0f}"),
    "trainable_percent": ("trained of all parameters (%)", "{:.3g}"),
    "checkpoint_mb": ("checkpoint (MB)", "{:,.2f}"),
    "holdout_f1": ("held-out F1", "{:.1f}"),
    "holdout_em": ("held-out EM", "{:.1f}"),
    "test_f1": ("test F1", "{:.1f}"),
    "test_em": ("test EM", "{:.1f}"),
    **{metric.name: (f"validation {metric.title}", metric.form_of_100) for metric in METRICS},
    "f1": ("validation F1 (chose the epoch)", "{:.1f}"),
    "best_epoch": ("best epoch", "{:.3g}"),
    "train_minutes": ("training (minutes)", "{:,.2f}"),
    "steps_per_sec": ("steps/s", "{:,.2f}"),
    "peak_memory_mb": ("peak memory (MB)", "{:,.0f}"),
    "f1_per_mb": ("validation F1 per MB of checkpoint", "{:,.2f}"),
}
FIXED = ["trainable_parameters", "trainable_percent", "checkpoint_mb"]  # no seed changes these
OF_SOME_RUNS = ["holdout_f1", "holdout_em", "test_f1", "test_em"]  # left out of the table unless all runs have them


def run_folders(given):
    """The run folders that the command line names; a folder of seed_N folders is replaced by those, in their order."""
    folders = []
    for folder in map(Path, given):
        seeds = [path for path in folder.glob("seed_*") if re.fullmatch(r"seed_\d+", path.name)]
        if seeds and not (folder / "run.json").exists():
            folders += sorted(seeds, key=lambda path: int(path.name.removeprefix("seed_")))
        else:
            folders.append(folder)
    return folders


# --------------------------------------------------------------------------------------------------------- table


def make_table(rows, measured):
    """comparison.csv: a DataFrame with one row per method. A figure is the mean over the seeds, its column "…_sd" their
    sample standard deviation, empty for one seed. A figure that was not measured in every run is empty.

    "measured_f1" is F1 on the rows that the conclusions are of ("measured_on"), with its 95 % interval.
    """
    table = []
    for row in rows:
        line = {"method": row.label, "base_model": row.first["args"]["model_name"], "runs": len(row.runs)}
        line["seeds"] = " ".join(str(run.seed) for run in row.runs)
        result = estimate(row, measured)
        line |= {"measured_on": measured.split, "measured_f1": result.mean}
        line |= {"measured_f1_low": result.low, "measured_f1_high": result.high}
        for name in FIGURES:
            values = np.array([run.figures.get(name) for run in row.runs], float)
            line[name] = values.mean()
            if name not in FIXED:
                line[f"{name}_sd"] = spread(values)
        table.append(line | {"peak_memory_of": "GPU" if row.first["peak_vram_mb"] else "RAM"})
    table = pd.DataFrame(table)
    missing = [name for name in OF_SOME_RUNS if table[name].isna().any()]
    return table.drop(columns=[*missing, *(f"{name}_sd" for name in missing)])


def cells(table, measured):
    """The table as it is printed, with the methods side by side: for each figure a list of its title and one text per
    method."""
    methods = table.to_dict("records")
    lines = [["method", *table["method"]], ["base model", *table["base_model"]]]
    seeds = [each["seeds"] + (f" (n = {each['runs']})" if each["runs"] > 1 else "") for each in methods]
    lines += [
        ["seeds", *(text if each["trainable_parameters"] else "-" for text, each in zip(seeds, methods, strict=True))]
    ]
    of_interval = "f1" if measured.split == "validation" else f"{measured.split}_f1"
    for name, (title, form) in FIGURES.items():
        if name not in table:
            continue
        line = [title]
        for each in methods:
            text = form.format(each[name])
            if each["runs"] > 1 and name not in FIXED:
                text += f" ± {form.format(each[f'{name}_sd'])}"
            text += f" {each['peak_memory_of']}" if name == "peak_memory_mb" else ""
            line.append("not measured" if math.isnan(each[name]) else text)
        lines.append(line)
        if name == of_interval:
            bounds = [f"{points(each['measured_f1_low'])} to {points(each['measured_f1_high'])}" for each in methods]
            lines.append([f"{measured.title} F1, 95 % interval", *bounds])
    return lines


# -------------------------------------------------------------------------------------------------------- examples


def matched_runs(subject, reference):
    """The pairs of runs of two rows that are compared answer by answer: those of the same seed or, if the rows share no
    seed, every pair."""
    every = list(product(subject.runs, reference.runs))
    return [pair for pair in every if len({run.seed for run in pair}) == 1] or every


def telling_examples(rows, split):
    """The positions of the most informative examples of a split: at most TELLING.

    First those with the largest difference in F1, then in similarity, each row's best examples in turn so that every
    direction is shown; then, if too few differ, those that all get wrong, the worst first.
    """
    f1 = np.column_stack([row.scores(split).mean(0) for row in rows]).round(9)
    similarity = np.nan_to_num(np.column_stack([row.scores(split, "sem_sim").mean(0) for row in rows]))
    order = np.lexsort((-np.ptp(similarity, axis=1), -np.ptp(f1, axis=1)))  # stable: then in the split's order
    best = [[i for i in order if np.ptp(f1[i]) and f1[i].argmax() == column] for column in range(len(rows))]
    in_turn = [i for turn in zip_longest(*best) for i in turn if i is not None]
    alike = np.lexsort((similarity.mean(1), f1[:, 0]))
    return (in_turn + [i for i in alike if not np.ptp(f1[i]) and f1[i, 0] < 100])[:TELLING]


# --------------------------------------------------------------------------------------------------------- write


def report(rows, measured, table, pairs, margin):
    """The text of comparison.md. pairs: the results of `compare_rows`."""
    lines = [TITLE, "", measured.sentence, ""]
    for pair in pairs:
        lines += [paragraph(conclusion(pair, rows, margin)), ""]
    lines += [notes(pairs), ""]
    lines += ["![F1 by epoch, against cost and by kind of question](comparison.png)", ""]
    lines += [*markdown_table(cells(table, measured)), remarks(rows, table), ""]
    for pair in pairs:
        lines += report_pair(pair)
    if pairs:
        lines += ["## The most informative examples", ""]
        lines += [f"The largest differences in F1 among the {measured.title} rows, in each direction.", ""]
        for place in telling_examples(rows, measured.split):
            lines += report_example(rows, measured.split, place)
    lines += ["## The runs", ""]
    if different := differing([row.runs[0] for row in rows]):
        different = [[f"--{name}", *values] for name, values in different.items()]
        lines += markdown_table([["argument", *(row.label for row in rows)], *different])
    names = ["device", "started", "git_commit"]
    runs = [run for row in rows for run in row.runs]
    lines += markdown_table(
        [["folder", "seed", *names]]
        + [[run.folder, run.seed, *(run.record.get(name) or "-" for name in names)] for run in runs]
    )
    return "\n".join(lines)


def conclusion(pair, rows, margin):
    """What a pair shows, as a list of sentences."""
    return sentences(pair, base_of(rows, pair.ours, pair.theirs), margin)


def remarks(rows, table):
    """What one must know to read the table."""
    runs = [run for row in rows for run in row.runs]
    text = (
        f"{len(runs[0].examples['validation'])} validation rows, {runs[0].record['scoring']['final_beams']} beams."
        " Metrics are out of 100, ± is the standard deviation over seeds, 1 MB is 2^20 bytes. Each run's epoch was"
        " chosen on the validation rows, so the metrics on them are a little optimistic. Training time and steps/s do"
        " not include evaluation."
    )
    if "holdout_f1" in table:
        text += " Held-out rows are training rows that were set aside and chose nothing."
    if len({run.record["device"] for run in runs}) > 1:
        text += " The runs were made on different devices: their times and memory cannot be compared."
    return text


def report_pair(pair):
    """The part of comparison.md on two rows: the differences, which examples each gets right, and McNemar's test."""
    ours, theirs, split = pair.ours.label, pair.theirs.label, pair.measured.split
    lines = [f"## {as_markdown(ours)} against {as_markdown(theirs)}", ""]
    titles = {metric.column: metric.title for metric in METRICS}
    table = [[f"{ours} minus {theirs}", "difference", "95 % interval", "adjusted p" if pair.count > 1 else "p"]]
    for name, result in pair.differences.items():
        p = p_value(pair.p[name]).removeprefix("p = ").removeprefix("p ")
        table.append([titles[name], signed(result.mean), interval_text(result), p])
    lines += [f"On the {pair.measured.title} rows; the intervals cover {pair.differences['f1'].covers}.", ""]
    lines += markdown_table(table)

    matched, counts, tests = matched_runs(pair.ours, pair.theirs), np.zeros((2, 2)), []
    for two in matched:
        a, b = (run.examples[split]["em"] == 1 for run in two)
        counts += [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        seeds = " and ".join(dict.fromkeys(str(run.seed) for run in two if run.trained))
        tests.append(f"p = {mcnemar(a, b):.2g} (seed {seeds})")
    counts /= len(matched)
    digits = 1 if len(matched) > 1 else 0  # a mean of several pairs need not be a whole number
    shares = [[f"{count:.{digits}f} ({100 * count / counts.sum():.1f} %)" for count in line] for line in counts]
    lines += markdown_table(
        [["exact match", f"{theirs} right", f"{theirs} wrong"]]
        + [[f"{ours} {verdict}", *line] for verdict, line in zip(("right", "wrong"), shares, strict=True)]
    )
    if len(matched) > 1:
        return [*lines, f"The table is the mean of {len(matched)} pairs of runs.", ""]
    return [*lines, f"McNemar's exact test that both are right equally often: {tests[0]}.", ""]


def report_example(rows, split, place):
    """An example in comparison.md: the question, and the answer of each row."""
    example = rows[0].runs[0].examples[split].iloc[place]
    lines = [f"**{as_markdown(example['question'])}** (row {place + 1})", ""]
    lines += [f"- tweet: {as_markdown(example['tweet'])}"]
    lines += [f"- references: {as_markdown(' / '.join(example['references']))}"]
    for row in rows:
        answers = dict.fromkeys(run.examples[split]["prediction"].iloc[place] or "(nothing)" for run in row.runs)
        answers = f"{' / '.join(answers)} (F1 {row.scores(split).mean(0)[place]:.0f})"
        lines += [f"- {as_markdown(row.label)}: {as_markdown(answers)}"]
    return [*lines, ""]


def check_out(folder):
    """Raise InputError if writing a comparison to `folder` would replace anything but a former comparison."""
    there = [name for name in ("comparison.md", "comparison.csv", "comparison.png") if (folder / name).exists()]
    text = folder / "comparison.md"
    if there and not (text.is_file() and text.read_bytes().startswith(TITLE.encode())):
        raise InputError(f"--out {folder} contains a {there[0]} that this script did not write: choose another folder")


def compare(given, out, margin=None):
    """Read the runs, write the comparison to `out` and print it. Raises InputError before anything is written."""
    folders = run_folders(given)
    if len(folders) < 2:
        raise InputError(f"{folders[0]} is a single run: give at least two")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run folder is given twice: give each folder once")
    runs = [read(folder) for folder in folders]
    check_comparable(runs)
    rows = make_rows(runs)
    check_same_rows_held_out(rows)
    measured = rows_that_measure(runs)
    table = make_table(rows, measured)
    compared = [in_order(*pair) for pair in combinations(rows, 2)]
    compared.sort(key=lambda pair: not pair[1].trained)  # what training gained comes last
    pairs = compare_rows(compared, [measured] * len(compared))
    with only_writer(out, "--out"):
        check_out(out)
        # All three are complete before the first one, the .md, is renamed: it identifies a former comparison.
        with (
            writing(out / "comparison.png") as png,
            writing(out / "comparison.csv") as spreadsheet,
            writing(out / "comparison.md") as markdown,
        ):
            draw_comparison(png, rows, measured)
            table.to_csv(spreadsheet, index=False, lineterminator="\n")
            markdown.write_text(report(rows, measured, table, pairs, margin), encoding="utf-8")
    head, *body = cells(table, measured)
    print(pd.DataFrame([line[1:] for line in body], [line[0] for line in body], head[1:]).to_string())
    print("", measured.sentence, *(" ".join(conclusion(pair, rows, margin)) for pair in pairs), notes(pairs), sep="\n")
    print(f"written to {out}: comparison.md, .csv, .png")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the arguments)\n")
    parser.add_argument(
        "runs", nargs="+", type=path_or_id, metavar="RUN_DIR", help="folder of a finished run, or of its seed_N runs"
    )
    parser.add_argument("--out", type=path_or_id, default="comparison", help="folder to write to (default: comparison)")
    margin = "say whether the loss is within so many points of F1, which count as none (default: not said)"
    parser.add_argument("--margin_f1", type=margin_f1, metavar="N", help=margin)
    show_any_character()
    args = parser.parse_args(argv)
    try:
        compare(args.runs, Path(args.out), args.margin_f1)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def margin_f1(text):
    """The argument type of --margin_f1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"must be a number of F1 points of at least 0 and below 100, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
