"""What the methods of a study forget, for its report: how the loss on a probe changes while they learn the task.

A run with `--probe FILE` has measured the mean loss of a target token of that file, in nats: before the training, after
each epoch, and of the checkpoint that was kept. Forgetting is the change from before, and above 0 is worse.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.conclusions import LEVEL
from pipeline.errors import InputError
from pipeline.markdown import as_markdown, in_words, markdown_table, nats, p_value, paragraph, signed
from pipeline.statistics import Estimate, difference, holm, mean_interval


@dataclass(frozen=True)
class Probed:
    """The lines of the probe, and how the runs of one method at its best rate changed their loss."""

    file: str  # as it was given
    kinds: np.ndarray  # of each line
    tokens: np.ndarray  # target tokens of each line
    before: np.ndarray  # the loss of each line, summed over its target tokens, of the untrained model
    changes: np.ndarray  # (seeds, lines): that of the final checkpoint, minus `before`

    def estimate(self, chosen=slice(None)):
        """The Estimate of the change in the loss of a target token (nats), of these lines; None for a single line."""
        changes, tokens = self.changes[:, chosen], self.tokens[chosen]
        return mean_interval(by_line(changes, tokens), range(len(tokens))) if len(tokens) > 1 else None

    def has_lines_of(self, other):
        """Whether two methods were measured on the same target tokens; another model can have another tokenizer."""
        return list(self.kinds) == list(other.kinds) and list(self.tokens) == list(other.tokens)


@dataclass(frozen=True)
class Compared:
    """How much more one method forgot than the one that it is compared with."""

    result: Estimate  # nats a target token
    p: float  # adjusted for the number of such pairs in the report
    count: int  # of these pairs


def by_line(changes, tokens):
    """The change in the loss of a target token as one value of each line, (seeds, lines), in nats.

    changes: summed over a line's target tokens, (seeds, lines). tokens: how many it has, (lines,). The change of a
    token is a ratio of two sums over lines, and lines are what another probe would draw anew. The values are this
    ratio's linearization (Cochran, 1977, Sampling Techniques, chapter 6): their mean is the ratio, and the variance of
    their mean is the ratio's, to first order. So `statistics.py` treats them as it treats the scores of rows.
    """
    ratios = changes.sum(1, keepdims=True) / tokens.sum()
    return ratios + (changes - ratios * tokens) / tokens.mean()


def find_probed(group):
    """{label: Probed} of the methods of a group whose runs all measured the probe; if there are several probes, the
    one that the first of these methods has. A probe of one line is left out, as it gives no interval.

    Raises InputError if a run folder is damaged.
    """
    probes = {}
    for entry in group.entries:
        found = [run.record.get("probe") or {} for run in entry.row.runs]
        measured = all(each.get("before") and each.get("final") and each.get("lines") != 1 for each in found)
        hashes = {each.get("sha256") if measured else None for each in found}
        if len(hashes) == 1 and None not in hashes:
            probes[entry.label] = hashes.pop()
    first = next(iter(probes.values()), None)
    return {entry.label: _read(entry.row) for entry in group.entries if first and probes.get(entry.label) == first}


def _read(row):
    """The Probed of a Row. Raises InputError if a run's file is damaged, or its runs had different lines."""
    from pipeline.probe import read_probe_losses

    frames = [read_probe_losses(run.folder) for run in row.runs]
    first, same = frames[0], ["kind", "target_tokens"]
    for run, frame in zip(row.runs, frames, strict=True):
        if not frame[same].equals(first[same]):
            raise InputError(f"{run.folder}: probe_losses.csv has other lines than that of {row.runs[0].folder}")
    return Probed(
        file=str(row.first["probe"].get("file")),
        kinds=first["kind"].to_numpy(),
        tokens=first["target_tokens"].to_numpy(float),
        before=first["before"].to_numpy(float),
        changes=np.stack([(frame["final"] - frame["before"]).to_numpy(float) for frame in frames]),
    )


def compare_forgetting(groups, probed):
    """{label: Compared} of each method that is compared with another one and was measured on the same target tokens.

    probed: {label: Probed} of all groups. The p values are adjusted for the number of these pairs by Holm's method.
    """
    results = {}
    for group in groups:
        for label, other in group.references.items():
            ours, theirs = probed.get(label), probed.get(other.label)
            if ours and theirs and ours.has_lines_of(theirs):
                values = (by_line(each.changes, each.tokens) for each in (ours, theirs))
                results[label] = difference(*values, range(len(ours.tokens)))
    adjusted = holm([result.p for result in results.values()])
    return {
        label: Compared(result, float(p), len(results))
        for (label, result), p in zip(results.items(), adjusted, strict=True)
    }


# ------------------------------------------------------------------------------------------------------- the section


def forgetting(group, probed, compared, told):
    """The section on what the methods of a group forgot; [] if none measured a probe.

    probed: {label: Probed}, compared: {label: Compared} of these methods. told: the labels that get a sentence.
    """
    entries = [entry for entry in group.entries if entry.label in probed]
    if not entries:
        return []
    first = probed[entries[0].label]
    lines = ["## Forgetting" + (f", {as_markdown(group.name)}" if group.name else ""), ""]
    text = (
        f"The probe is {first.file}: {len(first.tokens):,} lines with {first.tokens.sum():,.0f} target tokens that"
        " are not of the task. Forgetting is the change in the mean loss of a target token (nats), from the untrained"
        " model to the checkpoint of the best epoch: above 0 is worse."
    )
    if without := [entry.label for entry in group.entries if entry.label not in probed]:
        text += f" Without this probe, and so left out: {in_words(without)}."
    lines += [as_markdown(text), ""]
    for entry in entries:
        if entry.label in told and entry.label in compared:
            other = group.references[entry.label]
            lines += [paragraph(_said(entry, other, probed, compared[entry.label])), ""]
    lines += markdown_table(_table(entries, probed, compared, bool(group.references)))
    lines += _by_kind(entries, probed)
    notes = (
        "The 95 % intervals cover which lines are in the probe and, where each method has several seeds, which seeds"
        " were drawn."
    )
    if (count := max((each.count for each in compared.values()), default=0)) > 1:
        notes += f" The p values are adjusted for the {count} pairs (Holm), the intervals are not."
    return [*lines, notes, ""]


def _said(entry, other, probed, pair):
    """Who forgot less, as sentences, and no more than the interval and p allow."""
    ours, theirs, result = entry.row.described, other.label, pair.result
    own, reference = (probed[each.label].estimate() for each in (entry, other))
    p = f"{'adjusted ' if pair.count > 1 else ''}{p_value(pair.p)}"
    inside = f"({_covering(result)}; {p})"
    changes = f"The loss of a target token changed by {signed(own.mean, nats)} nats, {theirs}'s by"
    changes += f" {signed(reference.mean, nats)}."
    if pair.p >= LEVEL:
        lead = f"{ours} and {theirs}: the difference in forgetting of {signed(result.mean, nats)} nats is within noise"
        said = [f"{lead} {inside}.", changes]
    else:
        forgot = (reference if result.mean < 0 else own).mean > 0
        verb = {  # (ours is lower, and the higher one of the two did forget)
            (True, True): f"forgot less than {theirs}",
            (False, True): f"forgot more than {theirs}",
            (True, False): f"improved more on the probe than {theirs}",
            (False, False): f"improved less on the probe than {theirs}",
        }[result.mean < 0, forgot]
        said = [f"{ours} {verb}, by {nats(abs(result.mean))} nats a target token {inside}.", changes]
    if own.low <= 0 <= own.high:
        said.append("It is not shown that it forgot anything: the interval of its change contains 0.")
    return said


def _covering(result):
    """The interval of an Estimate of nats, and what it covers."""
    return f"95 % interval {_interval(result)}, {result.covers.replace('tweets', 'lines')}"


def _interval(result):
    return f"{nats(result.low)} to {nats(result.high)}"


def _table(entries, probed, compared, with_references):
    """The lists of cells of the table of forgetting."""
    head = ["method", "seeds", "loss before (nats)", "loss of the best epoch", "change", "95 % interval"]
    several = any(each.count > 1 for each in compared.values())
    p_title = "adjusted p" if several else "p"
    head += ["change minus reference's", "95 % interval", p_title] if with_references else []
    table = [head]
    for entry in entries:
        own, result = probed[entry.label], probed[entry.label].estimate()
        before = own.before.sum() / own.tokens.sum()
        line = [entry.label, len(own.changes), nats(before), nats(before + result.mean)]
        line += [signed(result.mean, nats), _interval(result)]
        if pair := compared.get(entry.label):
            p = p_value(pair.p).removeprefix("p = ").removeprefix("p ")
            line += [signed(pair.result.mean, nats), _interval(pair.result), p]
        table.append(line + ["-"] * (len(head) - len(line)))
    return table


def _by_kind(entries, probed):
    """The table of the change by kind of line; [] if the probe has a single kind."""
    first = probed[entries[0].label]
    kinds = list(dict.fromkeys(first.kinds))
    if len(kinds) < 2:
        return []
    counts = [int((first.kinds == kind).sum()) for kind in kinds]
    counted = [f"{kind} ({count} line{'s' * (count > 1)})" for kind, count in zip(kinds, counts, strict=True)]
    table = [["change by kind (95 % interval)", *counted]]
    for entry in entries:
        own, cells = probed[entry.label], []
        for kind in kinds:
            chosen = own.kinds == kind
            result = own.estimate(chosen)
            mean = (own.changes[:, chosen].sum(1) / own.tokens[chosen].sum()).mean()
            cells.append(signed(mean, nats) + (f" ({_interval(result)})" if result else ""))
        table.append([entry.label, *cells])
    return markdown_table(table)


# ------------------------------------------------------------------------------------------------------- the picture


def change_by_epoch(run):
    """How much the loss of a target token of the probe had changed after each epoch (nats), an array; None unless the
    run measured it."""
    before = ((run.record.get("probe") or {}).get("before") or {}).get("loss")
    if before is None or "probe_loss" not in run.epochs:
        return None
    return run.epochs["probe_loss"].to_numpy(float) - before


def learning_curves(entries, probed):
    """[(label, number of its style, [(change of the probe's loss, validation F1) by epoch, of each run])] of the
    methods that measured the probe, for the picture of learning against forgetting."""
    found = []
    for entry in entries:
        changes = [change_by_epoch(run) for run in entry.row.runs]
        if entry.label in probed and all(each is not None for each in changes):
            f1 = [100 * run.epochs["f1"].to_numpy(float) for run in entry.row.runs]
            found.append((entry.label, entry.number, list(zip(changes, f1, strict=True))))
    return found
