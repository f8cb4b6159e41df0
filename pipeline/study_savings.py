"""What the methods of a study save, for its report: time to equal quality, what is stored, and how fast they answer.

What each forgot is in `study_forgetting.py`. How fast they answer is measured by `benchmarks/answering.py`, which
`study.py` starts when all runs have finished.
"""

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import combinations
from pathlib import Path

import numpy as np

from pipeline.arguments import DEFAULT_MODEL
from pipeline.markdown import as_markdown, in_words, markdown_table, nats, signed, times
from pipeline.plan import FULL
from pipeline.study_forgetting import change_by_epoch
from pipeline.tuning import DIVERGED

TASKS = (1, 10, 100)
ANSWERING = "answering.json"  # in the study's folder
KINDS = {"full": "full checkpoint", "adapter": "base and adapter", "merged": "adapter merged"}
MOST_CONTENDERS = 4  # checkpoints whose answering is measured, before merging

# ------------------------------------------------------------------------------------------------- at equal quality


@dataclass(frozen=True)
class Reached:
    """What two methods needed until each first reached a validation F1 that every seed of both reached."""

    f1: float  # out of 100
    minutes: tuple | None  # (ours, theirs): of each run; None if they cannot be compared
    forgot: tuple | None  # (ours, theirs): change in the probe's loss (nats) of each run at that epoch; None without
    whole: bool  # whether the minutes count from the start of the run; older runs recorded the training alone


def reach(ours, theirs, base_f1):
    """The Reached of two Rows. None if no F1 above base_f1 (out of 100) was reached by every seed of both.

    The F1 is the highest that all these runs reached after some epoch: the lowest of their best ones.
    """
    rows = (ours, theirs)
    runs = [run for row in rows for run in row.runs]
    common = min(run.epochs["f1"].max() for run in runs)
    if 100 * common <= base_f1:
        return None
    whole = all("seconds_since_start" in run.epochs for run in runs)
    first = {id(run): int(np.argmax(run.epochs["f1"].to_numpy() >= common)) for run in runs}

    def at_that_epoch(values_of):
        return tuple([float(values_of(run)[first[id(run)]]) for run in row.runs] for row in rows)

    one_device = len({run.record["device"] for run in runs}) == 1
    probes = {(run.record.get("probe") or {}).get("sha256") for run in runs}
    with_probe = len(probes) == 1 and all(change_by_epoch(run) is not None for run in runs)
    return Reached(
        f1=100 * common,
        minutes=at_that_epoch(lambda run: minutes_by_epoch(run, whole)) if one_device else None,
        forgot=at_that_epoch(change_by_epoch) if with_probe else None,
        whole=whole,
    )


def minutes_by_epoch(run, whole=True):
    """Minutes until the end of each epoch, an array: since the start of the run or, with whole=False and for a run of
    an older version, those of training alone."""
    known = whole and "seconds_since_start" in run.epochs
    seconds = run.epochs["seconds_since_start"] if known else run.epochs["epoch_seconds"].cumsum()
    return seconds.to_numpy(float) / 60


def equal_quality(group, told):
    """The section on what the methods of a group needed for the same validation F1; [] if nothing is compared.

    told: the labels that get a sentence.
    """
    bases = {row.runs[0].model: 100 * row.first["final"]["f1"] for row in group.bases}
    found = {}
    for entry in [entry for entry in group.entries if entry.label in group.references]:
        other = group.references[entry.label]
        found[entry.label] = entry, other, reach(entry.row, other.row, bases.get(entry.row.runs[0].model, 0.0))
    if not found:
        return []
    reached = [each for _, _, each in found.values() if each]
    head = ["method", "validation F1 that both reached", "minutes", "reference's minutes", "ratio"]
    forgot = any(each.forgot for each in reached)
    head += ["change in the probe's loss there (nats)", "reference's"] if forgot else []
    table, sentences, nothing = [head], [], []
    for label, (entry, other, each) in found.items():
        table.append(_equal_cells(label, each, forgot))
        if each is None:
            nothing.append(f"{label} and {other.label}")
        elif label in told:
            sentences += [as_markdown(_equal_sentence(entry, other, each)), ""]
    notes = [
        "The F1 is the highest that every seed of both methods reached after some epoch. It is that of the validation"
        " rows, which also choose the epoch. A time is that of the first epoch that reached it, so it is known to an"
        " epoch. In brackets: from the lowest to the highest seed, which is not an interval."
    ]
    if not all(each.whole for each in reached):
        notes.append(
            "Some runs did not record the time since their start, as older versions did not: the minutes of these pairs"
            " are those of training alone, without evaluation."
        )
    if any(each.minutes is None for each in reached):
        notes.append("Times of different devices are not compared.")
    if made_at_once([run for entry in group.entries for run in entry.row.runs]):
        notes.append(
            "Some of these runs were made at the same time (--jobs): unless each had a device to itself, their times"
            " cannot be compared."
        )
    lines = ["## Time to equal quality" + (f", {as_markdown(group.name)}" if group.name else ""), "", *sentences]
    if nothing:
        text = f"No validation F1 above the untrained model's was reached by every seed of {'; '.join(nothing)}."
        lines += [as_markdown(text), ""]
    return [*lines, *markdown_table(table), as_markdown(" ".join(notes)), ""]


def _equal_cells(label, each, with_forgetting):
    """The cells of a method in the table of equal quality."""
    if each is None:
        return [label, *["-"] * (6 if with_forgetting else 4)]
    cells = [label, f"{each.f1:.1f}"]
    cells += [*map(_minutes, each.minutes), times(_ratio(each.minutes))] if each.minutes else ["-"] * 3
    if with_forgetting:
        cells += map(_nats, each.forgot) if each.forgot else ["-"] * 2
    return cells


def _equal_sentence(entry, other, each):
    """What two methods needed for the same F1, in words."""
    name, theirs = entry.row.described, other.label
    name = f"{name[0].upper()}{name[1:]}"
    if each.minutes:
        ours, reference = map(_minutes, each.minutes)
        text = f"{name} reached {each.f1:.1f} validation F1 in {ours} minutes, {theirs} in {reference}:"
        text += f" {times(_ratio(each.minutes))} of the time."
    else:
        text = f"{name} and {theirs} both reached {each.f1:.1f} validation F1."
    if each.forgot:
        ours, reference = map(_nats, each.forgot)
        text += f" When they reached it, the loss of a target token of the probe had changed by {ours} nats, with"
        text += f" {theirs} by {reference}."
    return text


def _ratio(two):
    ours, theirs = map(np.mean, two)
    return float(ours / theirs) if theirs else float("nan")


def _minutes(values):
    return _with_range(values, lambda value: f"{value:.2f}" if value < 10 else f"{value:.1f}")


def _nats(values):
    return _with_range(values, lambda value: signed(value, nats))


def _with_range(values, form):
    """The mean of several seeds' values with their range."""
    text = form(float(np.mean(values)))
    return f"{text} ({form(min(values))} to {form(max(values))})" if len(values) > 1 else text


def made_at_once(runs):
    """Whether two of these runs seem to have been made at the same time, by when each started and how long it took."""
    spans = []
    for run in runs:
        try:
            begin = datetime.fromisoformat(run.record["started"])
            spans.append((begin, begin + timedelta(seconds=run.record["wall_time_seconds"])))
        except (KeyError, TypeError, ValueError):
            continue  # not recorded
    # Starts are recorded to the second.
    second = timedelta(seconds=1)
    return any(max(one[0], other[0]) + second < min(one[1], other[1]) for one, other in combinations(spans, 2))


# ------------------------------------------------------------------------------------------------------------ storing


def storing(groups):
    """The section on what the checkpoints of several tasks take, where full fine-tuning and LoRA are compared."""
    table = [["weights in MB", *(f"{count} {'tasks' if count > 1 else 'task'}" for count in TASKS)]]
    told = {}  # {sentence: labels}
    for group in groups:
        for reference in [entry for entry in group.entries if entry.full]:
            full = reference.row.mean("checkpoint_mb")
            adapters = [entry for entry in group.compared_with(reference) if not entry.full]
            adapters = [entry for entry in adapters if entry.row.runs[0].model == reference.row.runs[0].model]
            if not adapters:
                continue
            table.append([f"{reference.label}: a checkpoint each", *(f"{full * count:,.1f}" for count in TASKS)])
            for entry in adapters:
                own = entry.row.mean("checkpoint_mb")
                cells = (f"{full + own * count:,.1f}" for count in TASKS)
                table.append([f"{entry.label}: the base and an adapter each", *cells])
                told.setdefault(_break_even(full, own), []).append(entry.label)
    if len(table) == 1:
        return []
    takes = [f"{in_words(labels)} {'take' if labels[1:] else 'takes'} {said}." for said, labels in told.items()]
    takes.append(
        "The base is stored once. It counts as much as a checkpoint of full fine-tuning, which has the same weights"
        " with other values. Tokenizers and settings are not counted."
    )
    return ["## Storing several tasks", "", *markdown_table(table), as_markdown(" ".join(takes)), ""]


def _break_even(full, adapter):
    """From how many tasks on the base and adapters take less than full checkpoints, as the end of a sentence."""
    if adapter >= full:
        return "more than full checkpoints for any number of tasks"
    count = int(full // (full - adapter)) + 1  # the first whole number above full / (full - adapter)
    return f"less than full checkpoints from {count} tasks on"


# ---------------------------------------------------------------------------------------------------------- answering


def contenders(plan, now, f1):
    """{label: folder} of the checkpoints whose speed of answering is measured; {} unless both methods have one.

    They are the first seed's runs at the best rates: the full fine-tuning with the best validation F1 and, of each LoRA
    of the plan, the best one that has the same model, data and beams. plan, now, f1: as for `study_report.write`.
    """
    results = []
    for tuning in now.tunings:
        run = plan.run(tuning.method, tuning.best, plan.seeds[0]) if tuning.chosen else None
        if run and f1(run) not in (None, DIVERGED):
            results.append((f1(run), tuning.method, run))
    results.sort(key=lambda each: -each[0])  # of equal ones the first in the plan
    full = next((each for each in results if each[1].script == FULL), None)
    if full is None:
        return {}
    best = {}
    for each in results:
        if each[1].script != FULL and _answers_like(each[1], full[1]):
            best.setdefault(each[1].name, each)
    chosen = [full, *best.values()][:MOST_CONTENDERS] if best else []
    return {method.label.replace("=", " "): run.folder for _, method, run in chosen}


def _answers_like(method, other):
    """Whether two methods answer the same rows with the same model and number of beams."""
    ours, theirs = ({"model_name": DEFAULT_MODEL} | each.arguments for each in (method, other))
    return all(ours.get(name) == theirs.get(name) for name in ("model_name", "dataset", "final_beams"))


def read_answering(folder, wanted):
    """The measurement of answering in a study's folder, as `benchmarks/answering.py` wrote it. None if there is none,
    it cannot be read, or it is of other folders than those of `wanted`, {label: folder}."""
    try:
        found = json.loads(Path(folder, ANSWERING).read_text(encoding="utf-8"))
        measured = {Path(each["folder"]).resolve() for each in found["contenders"] if each["kind"] != "merged"}
        for each in found["contenders"]:
            numbers = [each["rows_per_second"], each["delay_ms"], *each["delay_ms_quartiles"]]
            if not all(value > 0 for value in numbers) or not isinstance(each["label"], str):
                return None
        fits = all(name in found for name in ("machine", "date", "threads", "rows", "beams", "questions"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if fits and wanted and measured == {Path(each).resolve() for each in wanted.values()} else None


def answering(found):
    """The section on how fast the methods answer. found: of `read_answering`; None: []."""
    if found is None:
        return []
    full = next((each for each in found["contenders"] if each["kind"] == "full"), None)
    head = ["what answers", "rows a second", "delay of a question (ms)", "its quartiles"]
    head[2:2] = ["relative to full"] if full else []
    head += ["relative to full"] if full else []
    table = [[*head, "answers that merging changed"]]
    for each in found["contenders"]:
        kind = KINDS.get(each["kind"], each["kind"])
        quartiles = " to ".join(f"{value:.1f}" for value in each["delay_ms_quartiles"])
        speed, delay = each["rows_per_second"], each["delay_ms"]
        line = [f"{each['label']}: {kind}", f"{speed:,.1f}", f"{delay:.1f}", quartiles]
        if full:
            line.insert(2, times(speed / full["rows_per_second"]))
            line.append(times(delay / full["delay_ms"]))
        changed = each.get("answers_changed")
        table.append([*line, "-" if changed is None else f"{changed} of {found['rows']:,}"])
    text = f"Measured on {found['date']} on {found['machine']}, {found['threads']} threads, in one process in turns:"
    text += f" {found['rows']:,} rows with {found['beams']} beams, and the median delay of {found['questions']} single"
    text += " questions, of the first seed's runs."
    return ["## Answering", "", as_markdown(text), "", *markdown_table(table)]
