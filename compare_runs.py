"""Compare finished runs: what LoRA costs in quality against full fine-tuning, and what it saves.

    python compare_runs.py flan_t5_tweetqa_ckpt flan_t5_tweetqa_ckpt_lora

It reads only run folders: no model, no data, no network. A folder of seed_N runs can be given in place of its runs, and
runs that differ only in their seed are one row of the table, mean ± standard deviation. It prints the table and writes
comparison.md (with the conclusions, and the examples whose answers differ most), comparison.csv and comparison.png to
--out.

The metrics are out of 100, on the screen and in the files.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from itertools import combinations, product, zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.arguments import Role, as_typed, sets_methods_apart, with_role
from pipeline.console import show_any_character
from pipeline.errors import InputError, RunError
from pipeline.lock import only_writer
from pipeline.metrics import EACH_EPOCH, METRICS
from pipeline.run_folder import read_run, writing
from pipeline.statistics import interval, mcnemar

TITLE = "# Comparison of runs"  # the first line of comparison.md, by which a former comparison is known
TELLING = 20  # examples in comparison.md
MB = 2**20  # bytes, as in the run folder's own figures
METHODS = {"full": "full fine-tuning", "lora": "LoRA"}
EXAMPLE = ["qid", "question", "tweet", "references"]  # the columns that do not depend on a model
# The figures of the table: title and format.
FIGURES = {
    "trainable_parameters": ("trained parameters", "{:,.0f}"),
    "trainable_percent": ("trained of all parameters (%)", "{:.3g}"),
    "checkpoint_mb": ("checkpoint (MB)", "{:,.2f}"),
    **{metric.name: (metric.title, metric.form_of_100) for metric in METRICS},
    "holdout_f1": ("held-out F1", "{:.1f}"),
    "best_epoch": ("best epoch", "{:.3g}"),
    "train_minutes": ("training (minutes)", "{:,.2f}"),
    "steps_per_sec": ("steps/s", "{:,.2f}"),
    "peak_memory_mb": ("peak memory (MB)", "{:,.0f}"),
    "f1_per_mb": ("F1 per MB of checkpoint", "{:,.2f}"),
}
FIXED = ["trainable_parameters", "trainable_percent", "checkpoint_mb"]  # no seed changes these
# Okabe and Ito's palette, safe for colour-blind readers, and a marker for each colour.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "os^Dv<>"


# ---------------------------------------------------------------------------------------------------------- read


@dataclass
class Run:
    """A finished run, as read from its folder."""

    folder: Path
    record: dict  # run.json; "scoring" has the arguments that its final metrics were computed with
    epochs: pd.DataFrame  # metrics.csv
    examples: pd.DataFrame  # validation_predictions.csv

    @property
    def arguments(self):
        """{name: value} of what sets it apart from other methods: arguments, and the prompt's template."""
        arguments = {name: value for name, value in self.record["args"].items() if sets_methods_apart(name)}
        return arguments | {"prompt": self.record["prompt"].replace("\n", "\\n")}

    def typed(self, name):
        """The value of an argument as one types it, or "-"; of the optimizer its class."""
        if name == "optimizer":
            return self.record["optimizer"]["class"]
        return as_typed(self.arguments.get(name, "-"))

    @property
    def content(self):
        """{argument: hash} of what each path or hub id holds, and the optimizer, as far as they are recorded."""
        weights = self.record.get("identity", {}).get("weights (--model_name)")
        content = ({"model_name": weights} if weights else {}) | self.record.get("content", {})
        optimizer = self.record.get("optimizer")
        return content | ({"optimizer": json.dumps(optimizer, sort_keys=True)} if optimizer else {})


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


def check_comparable(runs):
    """Raise InputError, with the reason, unless all runs were trained and scored on the same rows in the same way."""
    first = runs[0]
    if len(first.examples) == 1:
        raise InputError(f"{first.folder} was scored on a single validation row, which gives no interval")
    for run in runs[1:]:
        pair = f"{first.folder} and {run.folder} cannot be compared"
        names = [each.record["args"]["dataset"] for each in (first, run)]
        # The same data can be in another place. Older versions did not record its content, but the rows are compared.
        known = [each.record.get("content", {}).get("dataset") for each in (first, run)]
        ours, theirs = known if all(known) else (Path(name).resolve().name for name in names)
        if ours != theirs:
            raise InputError(f"{pair}: they were trained on different data sets, --dataset {' and '.join(names)}")
        for part, names, what in (
            ("args", with_role(Role.ROWS), "trained on different rows"),
            ("scoring", with_role(Role.MEASURE), "scored differently (--eval_only scores a run again)"),
        ):
            for name in names:
                values = [each.record[part].get(name) or "none" for each in (first, run)]
                known = [each.record[part].get("content", {}).get(name) for each in (first, run)]
                ours, theirs = known if all(known) else values
                if ours != theirs:
                    raise InputError(f"{pair}: they were {what}, --{name} {' and '.join(map(as_typed, values))}")
        if len(first.examples) != len(run.examples):
            counts = f"{len(first.examples)} and {len(run.examples)} validation rows"
            raise InputError(f"{pair}: they were scored on {counts} (--max_eval_samples)")
        for column in EXAMPLE:
            values = enumerate(zip(first.examples[column], run.examples[column], strict=True), start=1)
            for number, (ours, theirs) in values:
                if ours != theirs:
                    differ = f"row {number} has the {column} {ours!r:.80} and {theirs!r:.80}"
                    raise InputError(f"{pair}: they were scored on different rows, {differ}")


def check_same_rows_held_out(rows):
    """Raise InputError unless the runs of each Row set the same training rows aside (--holdout, by seed):
    otherwise they were trained on different rows, and their held-out F1 is of different rows."""

    def held_out(row):
        return {json.dumps(run.record["holdout"].get("rows")) for run in row.runs if run.record.get("holdout")}

    with_some = [row for row in rows if held_out(row)]
    for row in with_some[1:]:
        if held_out(row) != held_out(with_some[0]):
            pair = f"{with_some[0].runs[0].folder} and {row.runs[0].folder} cannot be compared"
            raise InputError(f"{pair}: --holdout set different rows aside; give both the same --seed, or --seeds")


# --------------------------------------------------------------------------------------------------------- table


@dataclass
class Row:
    """A row of the table: the runs of one method with the same arguments, which differ in their seed."""

    label: str
    runs: list
    scores: pd.DataFrame  # the metrics of each example, out of 100, means over the runs

    @property
    def parameters(self):
        return self.runs[0].record["trainable_parameters"]


def make_rows(runs):
    """The rows of the table, in the order of their first runs. Raises InputError for a run that is given twice."""
    groups, known = {}, known_content(runs)
    for run in runs:
        key = run.arguments | {name: run.content[name] for name in known}
        group = groups.setdefault(json.dumps([run.record["method"], key], sort_keys=True), [])
        for other in group:
            if other.record["args"]["seed"] == run.record["args"]["seed"]:
                same = "have the same method, arguments and seed"
                raise InputError(f"{other.folder} and {run.folder} {same}: leave one out, it would count twice")
        group.append(run)
    firsts = [group[0] for group in groups.values()]
    rows = []
    for group in groups.values():
        scores = sum(100 * run.examples[[metric.column for metric in EACH_EPOCH]] for run in group) / len(group)
        rows.append(Row(label(group[0], firsts), group, scores))
    return rows


def label(run, runs):
    """A name that distinguishes a run from the others: its method, with the base model and, among runs of one method,
    every argument that is not the same for all."""
    same_method = [other for other in runs if other.record["method"] == run.record["method"]]
    names = [*(name for name in differing(runs) if name == "model_name")]
    names += [name for name in differing(same_method) if name != "model_name"]
    told = ", ".join(f"{name} {run.typed(name)}" for name in names)
    return METHODS[run.record["method"]] + (f" ({told})" if told else "")


def differing(runs):
    """{name: its values} of the arguments that set methods apart and are not the same for all runs."""
    names = dict.fromkeys(name for run in runs for name in run.arguments)
    values = {name: [run.typed(name) for run in runs] for name in names}
    values |= {name: [run.content[name] for run in runs] for name in known_content(runs)}
    return {name: [run.typed(name) for run in runs] for name, each in values.items() if len(set(each)) > 1}


def known_content(runs):
    """The arguments whose content all runs recorded: a model or a data set can have moved between two runs."""
    return sorted(set.intersection(*(set(run.content) for run in runs)))


def figures(run):
    """The FIGURES of one run; None if not measured."""
    record, final = run.record, run.record["final"]
    seconds, megabytes = run.epochs["epoch_seconds"], record["checkpoint_bytes"] / MB
    holdout = record.get("holdout")
    return {
        "trainable_parameters": record["trainable_parameters"],
        "trainable_percent": 100 * record["trainable_parameters"] / record["total_parameters"],
        "checkpoint_mb": megabytes,
        **{name: None if value is None else 100 * value for name, value in final.items()},
        "holdout_f1": 100 * holdout["metrics"]["f1"] if holdout else None,
        "best_epoch": record["best_epoch"],
        "train_minutes": seconds.sum() / 60,
        "steps_per_sec": (run.epochs["steps_per_sec"] * seconds).sum() / seconds.sum(),
        "peak_memory_mb": record["peak_vram_mb"] or record["peak_ram_mb"],  # without a GPU, the process's memory
        "f1_per_mb": 100 * final["f1"] / megabytes,
    }


def make_table(rows):
    """comparison.csv: a DataFrame with one row per method. A figure is the mean over the seeds, its column "…_sd" their
    sample standard deviation, empty for one seed. A figure that was not measured in every run is empty."""
    table = []
    for row in rows:
        first = row.runs[0].record
        line = {"method": row.label, "base_model": first["args"]["model_name"], "runs": len(row.runs)}
        line["seeds"] = " ".join(str(run.record["args"]["seed"]) for run in row.runs)
        measured = pd.DataFrame([figures(run) for run in row.runs]).astype(float)
        for name in FIGURES:
            line[name] = measured[name].mean(skipna=False)
            if name not in FIXED:
                line[f"{name}_sd"] = measured[name].std(ddof=1, skipna=False)
        table.append(line | {"peak_memory_of": "GPU" if first["peak_vram_mb"] else "RAM"})
    table = pd.DataFrame(table)
    return table.drop(columns=["holdout_f1", "holdout_f1_sd"]) if table["holdout_f1"].isna().any() else table


def cells(table):
    """The table as it is printed, with the methods side by side: for each figure a list of its title and one text per
    method."""
    methods = table.to_dict("records")
    lines = [["method", *table["method"]], ["base model", *table["base_model"]]]
    lines += [["seeds", *(each["seeds"] + (f" (n = {each['runs']})" if each["runs"] > 1 else "") for each in methods)]]
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
    return lines


# ----------------------------------------------------------------------------------------------------- conclusions


def compare_pair(one, other):
    """(subject, reference, {column: (mean difference, low, high)}, sentence) of two rows.

    The subject is the one with fewer trained parameters, or else the later one: "LoRA trails full fine-tuning". The
    differences are subject minus reference, with the bounds of `interval`, for each metric that was measured.
    """
    subject, reference = (one, other) if one.parameters < other.parameters else (other, one)
    values = (subject.scores - reference.scores).dropna(axis="columns").round(9)  # equal means can differ by 1e-15
    # Rounded: a remainder of rounding errors is not a difference.
    differences = {
        name: tuple(round(float(x), 9) for x in (values[name].mean(), *interval(values[name]))) for name in values
    }
    return subject, reference, differences, sentence(subject, reference, *differences["f1"])


def sentence(subject, reference, mean, low, high):
    """What a difference in F1 says, and no more than its interval allows."""
    ours, theirs = subject.label, reference.label
    share = 100 * subject.parameters / reference.parameters
    cost = f"at {points(share)} % of the trained parameters" if share < 100 else "at as many trained parameters"
    if mean == low == high == 0:
        text = f"{ours} and {theirs} have the same F1 on every example, {cost}."
    elif low <= 0 <= high:
        span = f"95 % interval {points(low)} to {points(high)}"
        text = f"no difference in F1 is shown between {ours} and {theirs}: {points(mean)} F1, {span}, {cost}."
    else:
        verb = "leads" if mean > 0 else "trails"
        span = " to ".join(points(bound) for bound in sorted((abs(low), abs(high))))
        text = f"{ours} {verb} {theirs} by {points(abs(mean))} F1, 95 % interval {span}, {cost}."
    return text[0].upper() + text[1:]


def points(value):
    """A figure out of 100 with one decimal, or with its first digit if it is not 0 and would be printed as 0.0."""
    return f"{value + 0.0:.1f}" if value == 0 or abs(value) >= 0.05 else f"{value:.1g}"  # + 0.0: no "-0.0"


def caveat(rows):
    """What the intervals cover, in one line."""
    text = "The intervals cover which examples were asked, not which seed was drawn"
    text += ": for that see ±." if any(len(row.runs) > 1 for row in rows) else "."
    return text + (" They are not adjusted for the number of pairs." if len(rows) > 2 else "")


def matched_runs(subject, reference):
    """The pairs of runs of two rows that are compared answer by answer: those of the same seed or, if the rows share no
    seed, every pair."""
    every = list(product(subject.runs, reference.runs))
    return [pair for pair in every if len({run.record["args"]["seed"] for run in pair}) == 1] or every


def telling_examples(rows):
    """The positions of the most informative examples: at most TELLING.

    First those with the largest difference in F1, then in similarity, each row's best examples in turn so that every
    direction is shown; then, if too few differ, those that all get wrong, the worst first.
    """
    f1 = np.column_stack([row.scores["f1"] for row in rows]).round(9)
    similarity = np.nan_to_num(np.column_stack([row.scores["sem_sim"] for row in rows]))
    order = np.lexsort((-np.ptp(similarity, axis=1), -np.ptp(f1, axis=1)))  # stable: then in the split's order
    best = [[i for i in order if np.ptp(f1[i]) and f1[i].argmax() == column] for column in range(len(rows))]
    in_turn = [i for turn in zip_longest(*best) for i in turn if i is not None]
    alike = np.lexsort((similarity.mean(1), f1[:, 0]))
    return (in_turn + [i for i in alike if not np.ptp(f1[i]) and f1[i, 0] < 100])[:TELLING]


# --------------------------------------------------------------------------------------------------------- write


def as_markdown(text):
    """Text as one line of Markdown that is shown literally, in a table too."""
    return re.sub(r"([\\`*{}\[\]<>|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(str(text).split()))


def markdown_table(lines):
    """Lists of cells as the lines of a Markdown table; the first list is its header."""
    head, *body = (f"| {' | '.join(map(as_markdown, line))} |" for line in lines)
    return [head, "| --- " * len(lines[0]) + "|", *body, ""]


def report(rows, table, compared):
    """The text of comparison.md. compared: the results of `compare_pair`."""
    runs = [run for row in rows for run in row.runs]
    lines = [TITLE, "", *(line for pair in compared for line in (as_markdown(pair[-1]), "")), caveat(rows), ""]
    lines += ["![F1 by epoch, against cost and by kind of question](comparison.png)", "", *markdown_table(cells(table))]
    note = (
        f"{len(rows[0].scores)} validation rows, {runs[0].record['scoring']['final_beams']} beams. Metrics are out of"
        " 100, ± is the standard deviation over seeds, 1 MB is 2^20 bytes. The epoch was chosen on these rows, so the"
        " metrics are a little optimistic. Training time and steps/s do not include evaluation."
    )
    if "holdout_f1" in table:
        note += " Held-out F1 is not optimistic: it is of training rows that each seed set aside."
    if len({run.record["device"] for run in runs}) > 1:
        note += " The runs were made on different devices: their times and memory cannot be compared."
    lines += [note, ""]
    for subject, reference, differences, _ in compared:
        lines += report_pair(subject, reference, differences)
    if compared:
        lines += ["## The most informative examples", "", "The largest differences in F1, in each direction.", ""]
        for place in telling_examples(rows):
            lines += report_example(rows, place)
    lines += ["## The runs", ""]
    if different := differing([row.runs[0] for row in rows]):
        different = [[f"--{name}", *values] for name, values in different.items()]
        lines += markdown_table([["argument", *(row.label for row in rows)], *different])
    names = ["device", "started", "git_commit"]
    lines += markdown_table(
        [["folder", "seed", *names]]
        + [[run.folder, run.record["args"]["seed"], *(run.record.get(name) or "-" for name in names)] for run in runs]
    )
    return "\n".join(lines)


def report_pair(subject, reference, differences):
    """The part of comparison.md on two rows: the differences, which examples each gets right, and McNemar's test."""
    ours, theirs = subject.label, reference.label
    lines = [f"## {as_markdown(ours)} against {as_markdown(theirs)}", ""]
    titles = {metric.column: metric.title for metric in METRICS}
    table = [[f"{ours} minus {theirs}", "difference", "95 % interval"]]
    for name, (mean, low, high) in differences.items():
        table.append([titles[name], points(mean), f"{points(low)} to {points(high)}"])
    lines += markdown_table(table)

    matched, counts, tests = matched_runs(subject, reference), np.zeros((2, 2)), []
    for pair in matched:
        a, b = (run.examples["em"] == 1 for run in pair)
        counts += [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        seeds = " and ".join(dict.fromkeys(str(run.record["args"]["seed"]) for run in pair))
        tests.append(f"p = {mcnemar(a, b):.2g} (seed {seeds})")
    counts /= len(matched)
    shares = [[f"{count:.5g} ({100 * count / counts.sum():.1f} %)" for count in line] for line in counts]
    lines += markdown_table(
        [["exact match", f"{theirs} right", f"{theirs} wrong"]]
        + [[f"{ours} {verdict}", *line] for verdict, line in zip(("right", "wrong"), shares, strict=True)]
    )
    lines += [f"McNemar's exact test that both are right equally often: {', '.join(tests)}.", ""]
    return lines + ([f"The table is the mean of these {len(matched)} pairs of runs.", ""] if len(matched) > 1 else [])


def report_example(rows, place):
    """An example in comparison.md: the question, and the answer of each row."""
    example = rows[0].runs[0].examples.iloc[place]
    lines = [f"**{as_markdown(example['question'])}** (row {place + 1})", ""]
    lines += [f"- tweet: {as_markdown(example['tweet'])}"]
    lines += [f"- references: {as_markdown(' / '.join(example['references']))}"]
    for row in rows:
        answers = dict.fromkeys(run.examples["prediction"].iloc[place] or "(nothing)" for run in row.runs)
        answers = f"{' / '.join(answers)} (F1 {row.scores['f1'].iloc[place]:.0f})"
        lines += [f"- {as_markdown(row.label)}: {as_markdown(answers)}"]
    return [*lines, ""]


def draw(path, rows):
    """Draw comparison.png: F1 by epoch of each run, F1 against cost, and F1 by kind of question."""
    from matplotlib.figure import Figure  # without pyplot: no windows, no state that outlives the drawing
    from matplotlib.ticker import EngFormatter, NullFormatter

    examples = rows[0].runs[0].examples
    kinds = examples["question_type"].value_counts()
    figure = Figure(figsize=(14, max(5, 1.6 + 0.17 * len(kinds) * (len(rows) + 1))), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15)
    by_epoch, by_cost, by_kind = figure.subplots(1, 3)
    for number, row in enumerate(rows):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        line, point = {"color": colour, "alpha": 0.5, "linewidth": 2}, {"color": colour, "marker": marker}
        for run in row.runs:
            by_epoch.plot(run.epochs["epoch"], 100 * run.epochs["f1"], alpha=1 / len(row.runs) ** 0.5, **point)
        f1 = row.scores["f1"]
        x = row.parameters * 1.08 ** sum(other.parameters == row.parameters for other in rows[:number])  # side by side
        by_cost.plot([x, x], interval(f1), **line)
        by_cost.plot(x, f1.mean(), linestyle="none", markersize=9, label=row.label, **point)
        for place, kind in enumerate(kinds.index):
            values = f1[examples["question_type"] == kind]
            y = place + 0.55 * ((number + 0.5) / len(rows) - 0.5)
            by_kind.plot(interval(values), [y, y], **line)
            by_kind.plot(values.mean(), y, **point)
    by_epoch.set(title="Validation F1 after each epoch", xlabel="epoch", ylabel="F1 (out of 100)")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_cost.set(title="Final F1 against cost", xlabel="trained parameters", ylabel="F1 (out of 100), 95 % interval")
    by_cost.set_xscale("log")
    by_cost.set_xlim(min(row.parameters for row in rows) / 5, max(row.parameters for row in rows) * 5)
    by_cost.xaxis.set_major_formatter(EngFormatter())
    by_cost.xaxis.set_minor_formatter(NullFormatter())  # within one decade it would label every tick
    by_kind.set(title="Final F1 by kind of question", xlabel="F1 (out of 100), 95 % interval", xlim=(-2, 102))
    by_kind.set_yticks(range(len(kinds)), [f"{kind} ({count})" for kind, count in kinds.items()])
    by_kind.invert_yaxis()  # the most frequent on top
    for axes in (by_epoch, by_cost, by_kind):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    columns = 190 // (max(len(row.label) for row in rows) + 10)  # as many labels as fit beside each other
    figure.legend(loc="outside upper center", ncols=max(1, min(columns, len(rows))), frameon=False)
    figure.savefig(path, format="png")


def check_out(folder):
    """Raise InputError if writing a comparison to `folder` would replace anything but a former comparison."""
    there = [name for name in ("comparison.md", "comparison.csv", "comparison.png") if (folder / name).exists()]
    text = folder / "comparison.md"
    if there and not (text.is_file() and text.read_bytes().startswith(TITLE.encode())):
        raise InputError(f"--out {folder} contains a {there[0]} that this script did not write: choose another folder")


def compare(given, out):
    """Read the runs, write the comparison to `out` and print it. Raises InputError before anything is written."""
    folders = run_folders(given)
    if len(folders) < 2:
        raise InputError(f"{folders[0]} is a single run: give at least two")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run folder is given twice: give each folder once")
    runs = [Run(folder, *read_run(folder)) for folder in folders]
    check_comparable(runs)
    rows = make_rows(runs)
    check_same_rows_held_out(rows)
    table = make_table(rows)
    compared = [compare_pair(*pair) for pair in combinations(rows, 2)]
    with only_writer(out, "--out"):
        check_out(out)
        # All three are complete before the first one, the .md, is renamed: it identifies a former comparison.
        with (
            writing(out / "comparison.png") as png,
            writing(out / "comparison.csv") as spreadsheet,
            writing(out / "comparison.md") as markdown,
        ):
            draw(png, rows)
            table.to_csv(spreadsheet, index=False, lineterminator="\n")
            markdown.write_text(report(rows, table, compared), encoding="utf-8")
    head, *body = cells(table)
    print(pd.DataFrame([line[1:] for line in body], [line[0] for line in body], head[1:]).to_string())
    print("", *(pair[-1] for pair in compared), caveat(rows), f"written to {out}: comparison.md, .csv, .png", sep="\n")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the arguments)\n")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a finished run, or of its seed_N runs")
    parser.add_argument("--out", type=Path, default="comparison", help="folder to write to (default: comparison)")
    show_any_character()
    args = parser.parse_args(argv)
    try:
        compare(args.runs, args.out)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
