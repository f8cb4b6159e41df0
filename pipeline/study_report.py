"""The report of a study: study.md and its pictures, of whatever is finished.

Used by `study.py`. The statistics and sentences are those of `compare_runs.py`.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from pipeline.arguments import ROLES, Role, as_typed
from pipeline.compared import Measured, Row, check_comparable, read, rows_that_measure
from pipeline.comparison_figures import draw_axis, draw_forgetting, draw_minutes, draw_parameters, draw_rates
from pipeline.conclusions import base_of, compare_rows, estimate, interval_text, notes, sentences
from pipeline.errors import RunError, one_line
from pipeline.markdown import as_markdown, in_words, markdown_table, p_value, paragraph, points, signed, times
from pipeline.plan import FULL, labelled
from pipeline.statistics import expected_maximum
from pipeline.study_forgetting import compare_forgetting, find_probed, forgetting, learning_curves
from pipeline.study_savings import answering, contenders, equal_quality, minutes_by_epoch, read_answering, storing
from pipeline.tuning import DIVERGED, Tuning

RANK = "lora_r"
MOST_PAIRS = 4  # pairs whose conclusions are told in full; of more, the best of each method
MOST_RATES = 10  # that a table has a column for


@dataclass(frozen=True)
class Entry:
    """A method of the plan, as far as it was run."""

    number: int  # its place in the plan, which chooses its colour
    label: str  # "LoRA (lora_r 4)"
    tuning: Tuning
    tried: dict  # {rate: validation F1 with the first seed, None if it diverged}, of the runs that have ended
    row: Row | None  # its runs at the best rate; None while there is none, or all diverged
    missing: int  # runs at the best rate that have not ended
    diverged: int  # runs at the best rate that diverged

    @property
    def axes(self):
        return self.tuning.method.axes

    @property
    def full(self):
        return self.tuning.method.script == FULL


@dataclass(frozen=True)
class Group:
    """Methods that were trained and scored on the same rows."""

    name: str  # what sets it apart from other groups, "train_subset 250"; "" if there is one group
    entries: list  # Entries that have a row
    bases: list  # Rows of untrained models
    measured: Measured
    references: dict  # {label: the Entry that the method of this label is compared with}

    def compared_with(self, reference):
        """The Entries that are compared with this one."""
        return [entry for entry in self.entries if self.references.get(entry.label) is reference]


def write(plan, now, f1):
    """Write study.md and the pictures to the study's folder, of the runs that have ended. Returns the file names.

    plan: of `plan.py`. now: its `Survey`. f1: a function from a run of the plan to its F1 (out of 100), DIVERGED, or
    None. Raises InputError if a run folder is damaged, RunError if a file cannot be written.
    """
    entries = find_entries(plan, now, f1)
    groups = find_groups(plan, entries, {run.key: read(run.folder) for run in plan.bases if f1(run) is not None})
    compared = [
        (group, entry, group.references[entry.label])
        for group in groups
        for entry in group.entries
        if entry.label in group.references
    ]
    pairs = compare_rows(
        [(one.row, other.row) for _, one, other in compared], [group.measured for group, *_ in compared]
    )
    pairs = {one.label: pair for (_, one, _), pair in zip(compared, pairs, strict=True)}
    probed = {label: each for group in groups for label, each in find_probed(group).items()}
    forgot = compare_forgetting(groups, probed)
    pictures = draw(plan, entries, groups, probed)
    lines = [f"# Study: {as_markdown(plan.path.name)}", "", *state(plan, now, f1, entries)]
    for group in groups:
        lines += answer(plan, group, pairs)
    if pairs:
        lines += [notes(list(pairs.values())), ""]
    for group in groups:
        told = [entry.label for entry in told_in_full(group, pairs)]
        lines += [*forgetting(group, probed, forgot, told), *equal_quality(group, told)]
    lines += [*storing(groups), *answering(read_answering(plan.folder, contenders(plan, now, f1)))]
    lines += rates(plan, entries, groups)
    lines += smallest_rank(plan, groups, pairs)
    lines += more_tries(entries)
    if pictures:
        lines += ["## Pictures", ""]
        lines += [line for name, title in pictures.items() for line in (f"![{as_markdown(title)}]({name})", "")]
    lines += how_it_was_made(plan, groups)
    with replacing(plan.folder / "study.md") as beside:
        beside.write_text("\n".join(lines), encoding="utf-8")
    return ["study.md", *pictures]


# ------------------------------------------------------------------------------------------------- what there is


def find_entries(plan, now, f1):
    """The Entries of a plan, in its order."""
    entries = []
    for number, tuning in enumerate(now.tunings):
        method = tuning.method
        first = {rate: f1(plan.run(method, rate, plan.seeds[0])) for rate in tuning.rates}
        tried = {rate: None if value == DIVERGED else value for rate, value in first.items() if value is not None}
        chosen = [plan.run(method, tuning.best, seed) for seed in plan.seeds] if tuning.chosen else []
        results = [f1(run) for run in chosen]
        label = method.label
        rate = {} if tuning.best is None else {"lr": tuning.best}
        runs = [read(run.folder) for run, result in zip(chosen, results, strict=True) if result not in (None, DIVERGED)]
        row = Row(label, labelled(method.name, method.axes | rate), runs) if runs else None
        entries.append(
            Entry(number, label, tuning, tried, row, results.count(None), results.count(DIVERGED)),
        )
    return entries


def find_groups(plan, entries, bases):
    """The Groups of the Entries that have a row. bases: {key: the Run of an untrained model}."""
    keys = {}
    for entry in entries:
        if entry.row:
            keys.setdefault(str(sorted(_rows_of(entry).items(), key=str)), []).append(entry)
    groups = []
    for members in keys.values():
        own = dict.fromkeys(plan.base_keys[entry.tuning.method.key] for entry in members)
        own = [bases[key] for key in own if key in bases]
        runs = [run for entry in members for run in entry.row.runs] + own
        check_comparable(runs)
        differing = {
            name: value
            for name, value in _rows_of(members[0]).items()
            if any(_rows_of(entry).get(name) != value for entry in entries)
        }
        name = ", ".join(f"{name} {as_typed(value)}" for name, value in differing.items())
        rows = [Row("untrained model", "untrained model", [base]) for base in own]
        groups.append(Group(name, members, rows, rows_that_measure(runs), _references(members)))
    return groups


def _rows_of(entry):
    """{name: value} of a method's arguments, typed or by default, that say which rows it is trained and scored on, and
    how."""
    apart = Role.ROWS | Role.MEASURE
    names = ("dataset", "max_eval_samples")
    given = entry.tuning.method.meant
    return {name: value for name, value in given.items() if ROLES[name] & apart or name in names}


def _references(members):
    """{label: the Entry it is compared with}: full fine-tuning or, without it, what trains the most parameters.

    Of several, the one that shares the most values of axes.
    """
    candidates = [entry for entry in members if entry.full] or [max(members, key=lambda entry: entry.row.parameters)]
    if len(candidates) == len(members):
        candidates = candidates[:1]
    return {
        entry.label: max(candidates, key=lambda other: len(other.axes.items() & _hashable(entry.axes)))
        for entry in members
        if entry not in candidates
    }


# ------------------------------------------------------------------------------------------------------ the parts


def state(plan, now, f1, entries):
    """How many runs there are, and what is missing."""
    ended = [run for run, _ in now.runs.values() if f1(run) is not None]
    diverged = [run.title for run in ended if f1(run) == DIVERGED]
    stages = [stage for run, stage in now.runs.values() if f1(run) is not None]
    counts = {
        "base": "of the untrained model",
        "tuning": "at rates that were not chosen",
        "chosen": "at the best rates",
    }
    told = ", ".join(f"{stages.count(stage)} {what}" for stage, what in counts.items() if stage in stages)
    lines = [f"{len(ended)} runs{f' ({told})' if told else ''}, with seeds {in_words(plan.seeds)}.", ""]
    if len(ended) < now.expected:
        waiting = [
            entry.label for entry in entries if not entry.tuning.chosen and (entry.tuning.missing or not entry.tried)
        ]
        few = [f"{entry.label} lacks {entry.missing} of {len(plan.seeds)} seeds" for entry in entries if entry.missing]
        few += [f"the learning rate of {label} is not chosen yet" for label in waiting]
        few += [f"the {run.title} is not scored yet" for run in plan.bases if f1(run) is None]
        said = f"**This study is not finished**: {len(ended)} of {now.expected} runs have ended"
        lines += [f"{said}; {as_markdown('; '.join(few))}." if few else f"{said}.", ""]
    if diverged:
        few = "; ".join(diverged) if len(diverged) <= MOST_PAIRS else f"{len(diverged)} runs, see study.csv"
        lines += [f"Diverged: {as_markdown(few)}.", ""]
    lost = [
        entry.label for entry in entries if entry.tuning.rates and not entry.tuning.missing and not entry.tuning.chosen
    ]
    if lost:
        lines += [f"Every learning rate diverged: {as_markdown('; '.join(lost))}. It has no result.", ""]
    return lines


def answer(plan, group, pairs):
    """What the methods of a group reach, and what each costs against its reference."""
    lines = ["## The answer" + (f", {as_markdown(group.name)}" if group.name else ""), "", group.measured.sentence, ""]
    bases = {row.runs[0].model: row for row in group.bases}
    for entry in [entry for entry in group.entries if entry.label not in group.references]:
        result = estimate(entry.row, group.measured)
        text = f"{entry.row.described} has {points(result.mean)} F1 (95 % interval {interval_text(result)},"
        text += f" {result.covers})"
        if base := bases.get(entry.row.runs[0].model):
            text += f", the untrained model {points(estimate(base, group.measured).mean)}"
        lines += [as_markdown(f"{text[0].upper()}{text[1:]}."), ""]
    told = told_in_full(group, pairs)
    for entry in told:
        pair = pairs[entry.label]
        said = sentences(pair, base_of(group.bases, pair.ours, pair.theirs), plan.margin_f1)
        lines += [paragraph(said), ""]
    if len(told) < sum(entry.label in pairs for entry in group.entries):
        lines += ["These are the best ones by validation F1. The table has all.", ""]
    return lines + best_table(group, pairs)


def told_in_full(group, pairs):
    """The Entries of a group whose comparison is told in sentences: all that are compared or, of more than MOST_PAIRS,
    of each name of the plan, and each method that it is compared with, the one with the best validation F1."""
    own, best = [entry for entry in group.entries if entry.label in pairs], {}
    if len(own) <= MOST_PAIRS:
        return own
    for entry in own:
        key, f1 = (entry.tuning.method.name, group.references[entry.label].label), entry.row.mean("f1")
        if key not in best or f1 > best[key].row.mean("f1"):
            best[key] = entry
    return list(best.values())


def best_table(group, pairs):
    """The table of each method at its best rate."""
    title = group.measured.title
    p_title = "adjusted p" if len(pairs) > 1 else "p"
    head = ["method", "learning rate", "seeds", f"{title} F1", "95 % interval", f"{title} EM"]
    head += ["F1 minus reference's", "95 % interval", p_title] if group.references else []
    head += ["validation F1 (chose the epoch and the rate)"] if group.measured.chose_nothing else []
    head += ["trained parameters", "checkpoint (MB)", "training (minutes)", "peak memory (MB)"]
    table = [head]
    # Each method stands below the one that it is compared with.
    references = [entry for entry in group.entries if entry.label not in group.references]
    ordered = [other for entry in references for other in [entry, *group.compared_with(entry)]]
    for row in [*group.bases, *(entry.row for entry in ordered)]:
        result, exact = estimate(row, group.measured), estimate(row, group.measured, "em")
        line = [
            row.label,
            f"{row.first['args']['lr']:g}" if row.trained else "-",
            len(row.runs) if row.trained else "-",
        ]
        line += [points(result.mean), interval_text(result), points(exact.mean)]
        if group.references:
            line += _difference_cells(pairs.get(row.label))
        line += [_figure(row, "f1", "{:.1f}")] if group.measured.chose_nothing else []
        formats = {"trainable_parameters": "{:,.0f}", "checkpoint_mb": "{:,.2f}", "train_minutes": "{:,.2f}"}
        line += [_figure(row, name, form) for name, form in (formats | {"peak_memory_mb": "{:,.0f}"}).items()]
        table.append(line)
    lines = markdown_table(table)
    if group.references:
        names = list(dict.fromkeys(entry.label for entry in group.references.values()))
        several = ": of each method, the one that shares the most of its settings" if len(names) > 1 else ""
        lines += [as_markdown(f"The reference is {' or '.join(names)}{several}."), ""]
    return lines


def _difference_cells(pair):
    """The difference in F1, its interval and its p as cells."""
    if pair is None:
        return ["-"] * 3
    result = pair.differences["f1"]
    return [signed(result.mean), interval_text(result), p_value(pair.p["f1"]).removeprefix("p = ").removeprefix("p ")]


def _figure(row, name, form):
    value = row.mean(name)
    return "-" if value is None or not (row.trained or name == "f1") else form.format(value)


def rates(plan, entries, groups):
    """How the learning rates were chosen."""
    tuned = [entry for entry in entries if entry.tried]
    if not tuned:
        return []
    lines = ["## How the learning rates were chosen", ""]
    lines += [
        f"Validation F1 with seed {plan.seeds[0]} at each learning rate. The best one was run with every seed.",
        "",
    ]

    def cell(entry, rate):
        f1 = entry.tried[rate]
        best = " (best)" if rate == entry.tuning.best and len(entry.tuning.rates) > 1 else ""
        return "diverged" if f1 is None else f"{f1:.1f}{best}"

    columns = sorted({rate for entry in tuned for rate in entry.tried})
    if len(columns) <= MOST_RATES:
        head = ["method", *(f"{rate:g}" for rate in columns)]
        table = [[cell(entry, rate) if rate in entry.tried else "-" for rate in columns] for entry in tuned]
    else:
        head = ["method", "learning rate: F1"]
        table = [[", ".join(f"{rate:g}: {cell(entry, rate)}" for rate in sorted(entry.tried))] for entry in tuned]
    lines += markdown_table([head, *([entry.label, *cells] for entry, cells in zip(tuned, table, strict=True))])
    said = [f"{entry.label} was not tuned: the plan gives one rate." for entry in tuned if len(entry.tuning.rates) == 1]
    said += [
        f"The best rate of {entry.label} is the {entry.tuning.at_edge} that was tried: a better one may lie beyond."
        for entry in tuned
        if entry.tuning.at_edge
    ]
    said += _ratios(groups)
    return lines + [f"- {as_markdown(text)}" for text in said] + [""] * bool(said)


def _ratios(groups):
    """How the best rates of the methods compare with those of their references, as sentences."""
    told = {}
    for group in groups:
        for entry in group.entries:
            other = group.references.get(entry.label)
            if other and entry.tuning.best and other.tuning.best:
                told.setdefault((other.label, entry.tuning.best / other.tuning.best), []).append(entry.label)
    multiples = {ratio: "the same as" if ratio == 1 else f"{times(ratio)} times" for _, ratio in told}
    return [
        f"The best rate of {in_words(labels)} is {multiples[ratio]} that of {label}."
        for (label, ratio), labels in told.items()
    ]


def smallest_rank(plan, groups, pairs):
    """The smallest rank whose cost is within the margin, for each method that has ranks as an axis."""
    families = {}
    for group in groups:
        for entry in group.entries:
            if RANK in entry.axes:
                families.setdefault(labelled(entry.tuning.method.name, _without(entry.axes, RANK)), []).append(entry)
    lines = []
    for label, members in families.items():
        known = {entry.axes[RANK]: pairs[entry.label] for entry in members if entry.label in pairs}
        if len(members) < 2 or not known:
            continue
        within = [rank for rank, pair in sorted(known.items()) if pair.at_most <= plan.margin_f1]
        theirs = next(iter(known.values())).theirs.label
        if within:
            most = points(known[within[0]].at_most)
            text = f"{label}: rank {within[0]}, which costs at most {most} F1 of {theirs}'s."
        else:
            least = min(known.values(), key=lambda pair: pair.at_most)
            text = f"{label}: none of the ranks {in_words(sorted(known))} is shown to be within it."
            text += f" The lowest cost that is shown is at most {points(least.at_most)} F1."
        lines += [f"- {as_markdown(text)}"]
    title = f"## The smallest rank within the margin of {plan.margin_f1:g} F1"
    text = "Each rank is judged by its own interval, which is not adjusted for the number of ranks."
    return [title, "", *lines, "", text, ""] if lines else []


def more_tries(entries):
    """The best validation F1 to be expected of n tries of the learning rate."""
    tuned = [entry for entry in entries if len(entry.tried) > 1 and not entry.tuning.missing]
    if not tuned:
        return []
    most = max(len(entry.tried) for entry in tuned)
    table = [["method", *(f"{n} {'tries' if n > 1 else 'try'}" for n in range(1, most + 1))]]
    for entry in tuned:
        scores = [f1 or 0.0 for f1 in entry.tried.values()]
        best = [f"{expected_maximum(scores, n):.1f}" for n in range(1, len(scores) + 1)]
        table.append([entry.label, *best, *["-"] * (most - len(scores))])
    text = (
        "The best validation F1 to be expected of n of the learning rates that were tried, chosen at random (Dodge et"
        " al., 2019, as the mean over all sets of n). A rate that diverged counts as 0."
    )
    return ["## What more tries of the learning rate bring", "", text, "", *markdown_table(table)]


def how_it_was_made(plan, groups):
    """The machine and the code of the runs."""
    runs = [run.record for group in groups for entry in group.entries for run in entry.row.runs]
    if not runs:
        return []
    devices, commits = (
        in_words(dict.fromkeys(str(run.get(name) or "unknown") for run in runs)) for name in ("device", "git_commit")
    )
    text = f"Devices: {devices}. Commits: {commits}. Margin: {plan.margin_f1:g} F1."
    more = "Metrics are out of 100, 1 MB is 2^20 bytes. All runs are in study.csv."
    if len({run["device"] for run in runs}) > 1:
        more += " Times and memory of different devices cannot be compared."
    return ["## How it was made", "", as_markdown(f"{text} {more}"), ""]


# ------------------------------------------------------------------------------------------------------- pictures


def draw(plan, entries, groups, probed):
    """Draw the pictures for which there is something to show. probed: of `find_probed`, of all groups. Returns
    {file name: title}."""
    drawn = {}

    def picture(name, title, function, *given):
        with replacing(plan.folder / name) as beside:
            function(beside, *given)
        drawn[name] = title

    tried = [(entry.label, entry.number, entry.tried, entry.tuning.best) for entry in entries if entry.tried]
    if any(f1 is not None for each in tried for f1 in each[2].values()):
        picture("study_rates.png", "Validation F1 at each learning rate", draw_rates, tried, plan.seeds[0])
    for axis in plan.axes:
        if given := _along(axis, groups):
            picture(f"study_{axis}.png", f"F1 by {axis}", draw_axis, axis, *given)
    if not groups:
        return drawn
    main = max(groups, key=lambda group: max(map(_train_rows, group.entries)))
    most = max(map(_train_rows, main.entries))  # a learning curve has a separate picture
    largest = [entry for entry in main.entries if _train_rows(entry) in (0, most)]
    of = f" (trained on {most:,} rows)" if len(largest) < sum(len(group.entries) for group in groups) else ""
    curves = [(entry.label, entry.number, [_learning(run) for run in entry.row.runs]) for entry in largest]
    picture("study_minutes.png", f"Validation F1 while training{of}", draw_minutes, curves)
    methods = [
        (entry.label, entry.number, entry.row.parameters, estimate(entry.row, main.measured)) for entry in largest
    ]
    title = f"{main.measured.title.capitalize()} F1 against trained parameters{of}"
    picture("study_parameters.png", title, draw_parameters, main.measured.title, methods, _base_estimate(main))
    if learned := learning_curves(largest, probed):
        base = 100 * main.bases[0].first["final"]["f1"] if len(main.bases) == 1 else None
        picture("study_forgetting.png", f"Learning against forgetting{of}", draw_forgetting, learned, base)
    return drawn


def _along(axis, groups):
    """The arguments of `draw_axis` after the axis, or None if fewer than two values of it have a result."""
    groups = [group for group in groups if group.measured.split == groups[0].measured.split]
    lines, others, values = {}, [], set()
    for group in groups:
        for entry in group.entries:
            result = estimate(entry.row, group.measured)
            if axis not in entry.axes:
                others.append((entry.label, entry.number, result))
                continue
            value = _hashable(entry.axes)
            value = dict(value)[axis]
            label = labelled(entry.tuning.method.name, _without(entry.axes, axis))
            lines.setdefault(label, (entry.number, {}))[1][value] = result
            values.add(value)
    if len(values) < 2:
        return None
    lines = [(label, number, found) for label, (number, found) in lines.items()]
    return groups[0].measured.title, lines, others, _base_estimate(groups[0])


def _base_estimate(group):
    """The Estimate of the untrained model; None if there is none, or several."""
    return estimate(group.bases[0], group.measured) if len(group.bases) == 1 else None


def _train_rows(entry):
    """How many rows a method was trained on; 0 if an older version did not record it."""
    return entry.row.first.get("train_rows") or 0


def _learning(run):
    """(minutes, validation F1) after each epoch."""
    return list(minutes_by_epoch(run)), list(100 * run.epochs["f1"])


def _without(axes, axis):
    return {name: value for name, value in axes.items() if name != axis}


def _hashable(axes):
    """The items of axes, whose lists become tuples."""
    return {(name, tuple(value) if isinstance(value, list) else value) for name, value in axes.items()}


@contextmanager
def replacing(path):
    """Yield a path next to `path`, which then replaces it. Two studies of one plan may do this at the same moment.

    Raises RunError if the file cannot be written.
    """
    beside = path.with_name(f".tmp-{uuid4().hex}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({one_line(error)})") from None
    finally:
        beside.unlink(missing_ok=True)
