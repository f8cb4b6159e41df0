"""Finished runs side by side: which can be compared, which of them are one method, and which rows measure them.

Used by `compare_runs.py` and by the report of a study. It reads only run folders: no model, no data, no network.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.arguments import Role, as_typed, precision_as_typed, sets_methods_apart, with_role
from pipeline.errors import InputError
from pipeline.run_folder import read_run, read_scored
from pipeline.text import tweet_key

MB = 2**20  # bytes, as in the run folder's own figures
METHODS = {"full": "full fine-tuning", "lora": "LoRA", "base": "untrained model"}
EXAMPLE = ["qid", "question", "tweet", "references"]  # the columns that do not depend on a model
TOLD = ("lora_r", "target_modules", "lr")  # the arguments that a sentence on an adapter always names
# What a run was trained with whatever was typed: the same command makes steps of more rows in more processes, and
# --precision auto depends on the device. {name: its name in run.json's "identity"}
RESOLVED = {"precision": "precision", "processes": "number of processes"}
SPLITS = {"holdout": "held-out", "test": "test", "validation": "validation"}  # {split: how a text calls its rows}


@dataclass(frozen=True)
class Run:
    """A finished run, as read from its folder."""

    folder: Path
    record: dict  # run.json; "scoring" has the arguments that its final metrics were computed with
    epochs: pd.DataFrame  # metrics.csv
    examples: dict  # {"validation" and, where the run scored them, "holdout", "test": the predictions, a DataFrame}

    @property
    def trained(self):
        """Whether it is a training run, and not an untrained model that was only scored."""
        return self.record["method"] != "base"

    @property
    def seed(self):
        return self.record["args"]["seed"]

    @property
    def arguments(self):
        """{name: value} of what sets it apart from other methods: arguments, and the prompt's template."""
        arguments = {name: value for name, value in self.record["args"].items() if sets_methods_apart(name)}
        if not self.trained:
            used = with_role(Role.SCORING | Role.INPUT)
            arguments = {name: value for name, value in arguments.items() if name in used}
        return arguments | {"prompt": self.record["prompt"].replace("\n", "\\n")}

    def typed(self, name):
        """The value of an argument as one types it, or "-"; of the optimizer its class."""
        if name == "optimizer" and name in self.content:
            return self.record["optimizer"]["class"]
        return as_typed(self.arguments.get(name, "-"))

    def meant(self, name):
        """`typed`, with what it was `resolved` to if that is another word: "auto (fp32)"."""
        typed = self.typed(name)
        resolved = self.resolved.get(name, typed)
        return resolved if typed in (resolved, "-") else f"{typed} ({resolved})"

    @property
    def resolved(self):
        """{name: text} of RESOLVED, as far as it is recorded; an untrained model has none."""
        identity = self.record.get("identity", {})
        found = {name: str(identity[key]) for name, key in RESOLVED.items() if key in identity}
        return {name: precision_as_typed(value) for name, value in found.items()}

    @property
    def content(self):
        """{argument: hash} of what each path or hub id holds, and the optimizer, as far as they are recorded."""
        weights = self.record.get("identity", {}).get("weights (--model_name)")
        content = ({"model_name": weights} if weights else {}) | self.record.get("content", {})
        optimizer = self.record.get("optimizer")
        return content | ({"optimizer": json.dumps(optimizer, sort_keys=True)} if optimizer else {})

    @property
    def model(self):
        """What tells its base model: the hash of the weights or, if that was not recorded, the name."""
        return self.content.get("model_name", self.record["args"]["model_name"])

    @cached_property
    def figures(self):
        """The figures of FIGURES in `compare_runs.py`; None if not measured."""
        record, final = self.record, self.record["final"]
        seconds, megabytes = self.epochs["epoch_seconds"], record["checkpoint_bytes"] / MB
        others = {"holdout": (record.get("holdout") or {}).get("metrics") or {}, "test": record.get("test") or {}}
        others = {f"{split}_{name}": each.get(name) for split, each in others.items() for name in ("f1", "em")}
        steps_per_sec = (self.epochs["steps_per_sec"] * seconds).sum() / seconds.sum() if self.trained else None
        return {
            "trainable_parameters": record["trainable_parameters"],
            "trainable_percent": 100 * record["trainable_parameters"] / record["total_parameters"],
            "checkpoint_mb": megabytes,
            **{name: None if value is None else 100 * value for name, value in (final | others).items()},
            "best_epoch": record["best_epoch"],
            "train_minutes": seconds.sum() / 60 if self.trained else None,
            "steps_per_sec": steps_per_sec,
            "peak_memory_mb": record["peak_vram_mb"] or record["peak_ram_mb"],  # without a GPU, the process's memory
            "f1_per_mb": 100 * final["f1"] / megabytes if megabytes else None,
        }


def read(folder):
    """The Run in a folder. Raises InputError, see `read_run`."""
    record, epochs, examples = read_run(folder)
    scored = {split: read_scored(folder, record, split) for split in ("holdout", "test")}
    scored = {split: frame for split, frame in scored.items() if frame is not None}
    return Run(Path(folder), record, epochs, {"validation": examples} | scored)


# ------------------------------------------------------------------------------------------------------ comparable


def check_comparable(runs):
    """Raise InputError, with the reason, unless all runs were trained and scored on the same rows in the same way."""
    first = runs[0]
    if len(first.examples["validation"]) == 1:
        raise InputError(f"{first.folder} was scored on a single validation row, which gives no interval")
    first_trained = next((run for run in runs if run.trained), first)
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
            two = (first_trained, run) if part == "args" else (first, run)
            if part == "args" and not all(each.trained for each in two):
                continue  # an untrained model was trained on no rows
            for name in names:
                given = [each.record[part].get(name) for each in two]
                if name == "holdout_seed" and None in given:  # an older version chose the rows by --seed
                    continue  # the rows that were held out are compared below
                values = [value or ("none" if name != "holdout_seed" else value) for value in given]
                known = [each.record[part].get("content", {}).get(name) for each in two]
                ours, theirs = known if all(known) else values
                if ours != theirs:
                    raise InputError(f"{pair}: they were {what}, --{name} {' and '.join(map(as_typed, values))}")
        _check_same_examples(pair, first.examples["validation"], run.examples["validation"])


def _check_same_examples(pair, ours, theirs):
    """Raise InputError, which begins with `pair`, unless two runs were scored on the same validation rows."""
    if len(ours) != len(theirs):
        raise InputError(
            f"{pair}: they were scored on {len(ours)} and {len(theirs)} validation rows (--max_eval_samples)"
        )
    for column in EXAMPLE:
        for number, (one, other) in enumerate(zip(ours[column], theirs[column], strict=True), start=1):
            if one != other:
                differ = f"row {number} has the {column} {one!r:.80} and {other!r:.80}"
                raise InputError(f"{pair}: they were scored on different rows, {differ}")


def check_same_rows_held_out(rows):
    """Raise InputError unless the runs of each Row set the same training rows aside (--holdout, --holdout_seed):
    otherwise they were trained on different rows, and their held-out F1 is of different rows."""

    def held_out(row):
        return {json.dumps(run.record["holdout"].get("rows")) for run in row.runs if run.record.get("holdout")}

    with_some = [row for row in rows if held_out(row)]
    for row in with_some[1:]:
        if held_out(row) != held_out(with_some[0]):
            pair = f"{with_some[0].runs[0].folder} and {row.runs[0].folder} cannot be compared"
            raise InputError(
                f"{pair}: --holdout set different rows aside; train one of them again with the other's --holdout_seed"
                " (its --seed, if an older version trained it)"
            )


# ---------------------------------------------------------------------------------------------- rows of the table


@dataclass(frozen=True)
class Row:
    """A row of the table: the runs of one method with the same arguments, which differ in their seed."""

    label: str  # tells it apart from the other rows
    described: str  # the label, with what a sentence about an adapter always names
    runs: list

    @property
    def first(self):
        return self.runs[0].record

    @property
    def parameters(self):
        """How many are trained; 0 for an untrained model."""
        return self.first["trainable_parameters"]

    @property
    def trained(self):
        return self.runs[0].trained

    def scores(self, split, column="f1"):
        """A metric of each example of a split, out of 100: (seeds, rows). NaN if it was not measured."""
        return 100 * np.stack([run.examples[split][column].to_numpy(float) for run in self.runs])

    def mean(self, figure):
        """The mean of one of the runs' figures; None unless every run measured it."""
        values = [run.figures.get(figure) for run in self.runs]
        return None if None in values else float(np.mean(values))


def make_rows(runs):
    """The rows of the table, in the order of their first runs. Raises InputError for a run that is given twice."""
    groups, known, resolved = {}, known_content(runs), differently_resolved(runs)
    for run in runs:
        key = run.arguments | {name: run.content.get(name) for name in known}
        key |= {f"resolved {name}": run.resolved.get(name) for name in resolved}
        group = groups.setdefault(json.dumps([run.record["method"], key], sort_keys=True), [])
        for other in group:
            if other.seed == run.seed:
                same = "have the same method, arguments and seed"
                raise InputError(f"{other.folder} and {run.folder} {same}: leave one out, it would count twice")
        group.append(run)
    firsts = [group[0] for group in groups.values()]
    return [Row(_label(group[0], firsts), _label(group[0], firsts, TOLD), group) for group in groups.values()]


def _label(run, runs, always=()):
    """A name that distinguishes a run from the others: its method, with the base model and, among runs of one method,
    every argument that is not the same for all. always: arguments that an adapter's name has in any case."""
    same_method = [other for other in runs if other.record["method"] == run.record["method"]]
    names = [*(name for name in differing(runs) if name == "model_name")]
    names += [name for name in differing(same_method) if name != "model_name"]
    if run.record["method"] == "lora":
        names = list(dict.fromkeys([*names, *(name for name in always if name in run.arguments)]))
    resolved = differently_resolved(runs)
    told = ", ".join(f"{name} {run.meant(name) if name in resolved else run.typed(name)}" for name in names)
    return METHODS[run.record["method"]] + (f" ({told})" if told else "")


def differing(runs):
    """{name: its values} of the arguments that set methods apart and are not the same for all runs."""
    names = dict.fromkeys(name for run in runs for name in run.arguments)
    # An untrained model has no arguments of training, in which others could differ from it.
    values = {name: [run.typed(name) for run in runs if run.trained or name in run.arguments] for name in names}
    known = {name: [run.content[name] for run in runs if name in run.content] for name in known_content(runs)}
    differ = {name: [run.typed(name) for run in runs] for name, each in (values | known).items() if len(set(each)) > 1}
    differ |= {name: [run.meant(name) for run in runs] for name in differently_resolved(runs)}
    if {"optim", "weight_decay"} & set(differ):
        differ.pop("optimizer", None)  # its class and settings differ because these flags do
    return differ


def known_content(runs):
    """The arguments whose content all runs recorded: a model or a data set can have moved between two runs. An
    untrained model has no optimizer."""
    names = {name for run in runs for name in run.content}
    return sorted(
        name for name in names if all(name in run.content for run in runs if run.trained or name != "optimizer")
    )


def differently_resolved(runs):
    """The names of RESOLVED that are known not to be the same for all runs."""
    return [name for name in RESOLVED if len({run.resolved[name] for run in runs if name in run.resolved}) > 1]


# -------------------------------------------------------------------------------------- the rows that measure them


@dataclass(frozen=True)
class Measured:
    """The rows that the headline figures are of: held-out ones, a labeled test split or, at worst, validation."""

    split: str  # "holdout", "test" or "validation"
    tweets: list  # the key of each row's tweet
    why_not: str = ""  # why held-out rows that some runs have are not used

    @property
    def title(self):
        """ "held-out", "test" or "validation"."""
        return SPLITS[self.split]

    @property
    def chose_nothing(self):
        """Whether these rows chose neither the epoch nor the learning rate."""
        return self.split != "validation"

    @property
    def sentence(self):
        """Which rows these are and whether they chose anything."""
        rows = f"{len(self.tweets):,} {self.title} rows ({len(set(self.tweets)):,} tweets)"
        text = f"Measured on {rows}, which chose neither the epoch nor the learning rate."
        if not self.chose_nothing:
            text = (
                f"Measured on {rows}. These rows also chose each run's epoch, and the learning rate where it was tuned,"
                " so the figures are a little optimistic; --holdout sets rows aside that choose nothing."
            )
        return text + (f" Held-out rows are not used: {self.why_not}." if self.why_not else "")


def rows_that_measure(runs):
    """The Measured of comparable runs: the best rows that all of them were scored on."""
    why_not = ""
    for split in ("holdout", "test"):
        frames = [run.examples.get(split) for run in runs]
        without = [run.folder for run, frame in zip(runs, frames, strict=True) if frame is None]
        if not without:
            first, *others = (frame[EXAMPLE].to_numpy().tolist() for frame in frames)
            if any(other != first for other in others):
                problem = "the runs set different rows aside"
            elif len({tweet_key(tweet) for tweet in frames[0]["tweet"]}) < 2:
                problem = "they are of a single tweet"
            else:
                return Measured(split, [tweet_key(tweet) for tweet in frames[0]["tweet"]], why_not)
        else:
            problem = f"{without[0]} was not scored on any" if any(run.record.get("holdout") for run in runs) else ""
        why_not = problem if split == "holdout" else why_not
    return Measured("validation", [tweet_key(tweet) for tweet in runs[0].examples["validation"]["tweet"]], why_not)


def spread(values):
    """The sample standard deviation; NaN for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
