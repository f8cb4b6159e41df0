"""A probe: lines of text on which a run measures what its model forgets. The file, the measure, the table of losses.

For --probe of the training scripts; the report of a study reads the table back. A probe is JSON Lines of {"prompt",
"target"} and, in all lines or in none, "kind". Its measure is the mean cross entropy of a target token (nats), the end
token included, before training, after each epoch, and of the final checkpoint. It changes nothing in the training.

torch is imported by the functions that measure: reading a table back needs none.
"""

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import InputError, one_line
from pipeline.run_folder import read_numbers, read_run_json, read_table, run_record, write_run_json, write_table
from pipeline.statistics import ratio_interval
from pipeline.text import UNPAIRED_SURROGATE, has_unpaired_surrogate

LOSSES = "probe_losses.csv"
COLUMNS = ["line", "kind", "target_tokens", "before", "final"]
MAX_TARGET_LEN = 512  # tokens: T5's longest text; a longer target is refused


# --------------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class Line:
    """A line of a probe. input_ids, labels: its token ids, end tokens included, once it is tokenized."""

    number: int  # in the file, from 1
    prompt: str
    target: str
    kind: str  # "" in a probe without kinds
    input_ids: tuple = ()
    labels: tuple = ()


@dataclass(frozen=True)
class Probe:
    """A probe file. sha256: of its bytes."""

    file: str
    sha256: str
    lines: tuple

    @property
    def target_tokens(self):
        return sum(len(line.labels) for line in self.lines)


def read_probe(path):
    """The Probe in a file of JSON Lines, not tokenized yet. Blank lines are skipped, but counted.

    Raises InputError, with the number of the line, for a line that is not an object with the texts "prompt" and
    "target", that has another key than these and "kind", or that lacks a kind that others have; and for a file that
    cannot be read or has fewer than two lines, since an interval needs two.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--probe {path} is not UTF-8 text ({one_line(error)}): save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"--probe {path} cannot be read ({one_line(error)})") from None
    # Not splitlines(), which also splits at characters that a JSON string may contain.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    lines = [_parse_line(f"--probe {path}, line {number}", number, line) for number, line in numbered]
    if len(lines) < 2:
        raise InputError(f"--probe {path} has {len(lines)} lines: at least two are needed, {_FORM}")
    for line in lines:
        if bool(line.kind) != bool(lines[0].kind):
            has, other = ("no kind", "has one") if lines[0].kind else ("a kind", "has none")
            raise InputError(
                f"--probe {path}, line {line.number} has {has}, but line {lines[0].number} {other}: give all lines a"
                " kind, or none"
            )
    return Probe(str(path), hashlib.sha256(content).hexdigest(), tuple(lines))


_FORM = 'each an object {"prompt": text, "target": text}, with or without "kind": text'


def _parse_line(where, number, text):
    """The Line of a line's text. where: the start of each message."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON ({one_line(error)})") from None
    if not isinstance(entry, dict):
        raise InputError(f"{where} is not an object: lines are needed, {_FORM}")
    if unknown := sorted(entry.keys() - {"prompt", "target", "kind"}):
        raise InputError(f"{where} has the key {ascii(unknown[0])}: only prompt, target and kind are known")
    for name in ("prompt", "target", "kind"):
        value = entry.get(name)
        if name not in entry:
            if name != "kind":
                raise InputError(f"{where} has no {name}: lines are needed, {_FORM}")
        elif not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: its {name} must be a text that is not empty, not {ascii(value):.80}")
        elif has_unpaired_surrogate(value):
            raise InputError(f"{where}: its {name} {UNPAIRED_SURROGATE}")
    return Line(number, entry["prompt"], entry["target"], entry.get("kind", ""))


def tokenized(probe, tokenizer, max_input_len):
    """The Probe with the token ids of its lines.

    Raises InputError for the first line whose prompt has more than max_input_len tokens, or its target more than
    MAX_TARGET_LEN: a line that was cut would measure something else.
    """
    prompts = tokenizer([line.prompt for line in probe.lines], verbose=False).input_ids
    targets = tokenizer(text_target=[line.target for line in probe.lines], verbose=False).input_ids
    lines = []
    for line, ids, labels in zip(probe.lines, prompts, targets, strict=True):
        where = f"--probe {probe.file}, line {line.number}"
        if len(ids) > max_input_len:
            raise InputError(
                f"{where}: its prompt has {len(ids)} tokens, more than --max_input_len {max_input_len}: shorten it"
            )
        if len(labels) > MAX_TARGET_LEN:
            raise InputError(f"{where}: its target has {len(labels)} tokens, more than {MAX_TARGET_LEN}: shorten it")
        lines.append(replace(line, input_ids=tuple(ids), labels=tuple(labels)))
    return replace(probe, lines=tuple(lines))


# ------------------------------------------------------------------------------------------------------ the measure


def line_losses(model, probe, *, pad, batch_size=32, precision=nullcontext):
    """The summed cross entropy (nats) of the target of each line of a tokenized probe, a list in the file's order.

    model: a T5 model or a PeftModel, on any device; its train/eval mode does not change, and no random number is drawn.
    pad: the id of the pad token. precision: a context manager to compute in, such as autocast's. Without one it is
    computed in float32, or in the type of the weights if that is another one: rounding would hide a small change.
    """
    import torch
    from torch.nn import functional as F

    from pipeline.t5 import LABEL_PAD, eval_mode

    def padded(rows, value):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value).to(model.device)

    lines, losses = probe.lines, [0.0] * len(probe.lines)
    order = sorted(range(len(lines)), key=lambda n: (-len(lines[n].input_ids), -len(lines[n].labels)))
    # The class's own forward: accelerate gives a prepared model another one, which computes in --precision.
    forward = type(model).forward
    with eval_mode(model), torch.inference_mode(), precision():
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            ids = padded([lines[n].input_ids for n in some], pad)
            mask = padded([[1] * len(lines[n].input_ids) for n in some], 0)
            labels = padded([lines[n].labels for n in some], LABEL_PAD)
            logits = forward(model, input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).logits
            nats = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            for n, loss in zip(some, nats.view(labels.shape).double().sum(1).tolist(), strict=True):
                losses[n] = loss
    return losses


def _measure(setup, model):
    from pipeline.devices import bf16_on_cpu
    from pipeline.memory import memory_for

    # In float32 also with --precision bf16 or fp16, but not on a CPU, where a frozen matrix is in bf16 itself then.
    precision = setup.accelerator.autocast if bf16_on_cpu(setup.accelerator) else nullcontext
    size, pad = setup.args.eval_batch_size, setup.tokenizer.pad_token_id
    with memory_for(f"--eval_batch_size {size} on --probe: lower it"):
        return line_losses(model, setup.probe, pad=pad, batch_size=size, precision=precision)


# The main process measures alone, and the others meet it at the next step: a probe is short.


def measure_before(setup, prepared, record):
    """Measure the model before training, and write probe_losses.csv and, with the result, run.json.

    setup: the run's Setup. prepared: its Prepared, whose weights are put together if they are sharded. record: what
    run.json says so far. Returns what run.json says of the probe; None in all processes but the main one.
    """
    from pipeline.devices import empty, whole_model

    model = whole_model(prepared.model, prepared.hollow, setup.accelerator)  # in which every process takes part
    losses = _measure(setup, model) if setup.accelerator.is_main_process else None
    empty(prepared.hollow)
    if losses is None:
        return None
    entry = _record(setup, _table(setup.probe, before=losses))
    setup.say(f"[probe] before training: loss={entry['before']['loss']:.4f}")
    # After its table: a run that is killed in between has nothing to resume from yet, and measures again.
    write_run_json(setup.folder, run_record(record, training={"probe": entry}))
    return entry


def epoch_column(setup, model):
    """{"probe_loss": mean loss of a target token} for an epoch's row, None in all processes but the main one; {}
    without a probe."""
    if not setup.probe:
        return {}
    if not setup.accelerator.is_main_process:
        return {"probe_loss": None}
    return {"probe_loss": sum(_measure(setup, model)) / setup.probe.target_tokens}


def measure_checkpoint(setup, model, record):
    """Measure the checkpoint that was read from disk, and complete probe_losses.csv.

    record: what run.json says so far. A loss before training that it knows is kept; the loss of an untrained model
    (method "base") is its loss before training. Returns {"probe": what run.json says of it}, {} without a probe and in
    all processes but the main one.
    """
    if not setup.probe or not setup.accelerator.is_main_process:
        return {}
    losses = _measure(setup, model)
    if record["method"] == "base":
        entry = _record(setup, _table(setup.probe, before=losses))
        setup.say(f"[probe] loss={entry['before']['loss']:.4f}")
        return {"probe": entry}
    known = "before" in record.get("probe", {})
    before = read_probe_losses(setup.folder)["before"] if known else None
    table = _table(setup.probe, before=before, final=losses)
    entry = _record(setup, table)
    compared = ""
    if known:
        rise, low, high = change(table)
        interval = f"95 % interval {low:.4f} to {high:.4f}"
        compared = f" (before {entry['before']['loss']:.4f}, change {rise:+.4f}, {interval})"
    setup.say(f"[probe] loss={entry['final']['loss']:.4f}{compared}")
    return {"probe": entry}


def kept(folder, former, probe):
    """{"probe": what the run.json in `folder` says of its probe}, {} if nothing: what --eval_only keeps of it.

    former: that run.json, or None. probe: the Probe of this command, or None. Raises InputError if both are there and
    their content differs, or if the table of the former one is damaged.
    """
    known = (former or {}).get("probe")
    if not known:
        return {}
    if probe and known["sha256"] != probe.sha256:
        raise InputError(
            f"--probe {probe.file} is not the probe of the run in --save_dir {folder}, {known['file']}: give that one,"
            " or omit --probe"
        )
    if probe:
        read_probe_losses(folder)
    return {"probe": known}


def _record(setup, table):
    """Write probe_losses.csv, and return what run.json says of the probe."""
    write_table(Path(setup.folder, LOSSES), table)
    probe = setup.probe
    entry = {"file": probe.file, "sha256": probe.sha256, "lines": len(probe.lines)}
    entry["target_tokens"] = probe.target_tokens
    return entry | {name: mean_losses(table, name) for name in ("before", "final") if table[name].notna().all()}


# -------------------------------------------------------------------------------------------------------- the table


def _table(probe, before=None, final=None):
    """The rows of probe_losses.csv: a DataFrame. before, final: summed losses (nats) of the lines, or None."""
    import pandas as pd

    columns = {
        "line": [line.number for line in probe.lines],
        "kind": [line.kind for line in probe.lines],
        "target_tokens": [len(line.labels) for line in probe.lines],
        "before": math.nan if before is None else list(before),
        "final": math.nan if final is None else list(final),
    }
    return pd.DataFrame(columns)[COLUMNS]


def mean_losses(table, column):
    """{"loss": mean loss of a target token, "kinds": {kind: the same of its lines}} of "before" or "final"."""
    kinds = {kind: rows for kind, rows in table.groupby("kind", sort=False) if kind}
    means = {kind: float(rows[column].sum() / rows["target_tokens"].sum()) for kind, rows in kinds.items()}
    return {"loss": float(table[column].sum() / table["target_tokens"].sum()), "kinds": means}


def read_probe_losses(folder):
    """The probe_losses.csv of a run as a DataFrame with COLUMNS, checked against run.json.

    line: the number in the probe file. kind: "" if it has none. target_tokens: with the end token. before, final: the
    summed loss (nats) of the line's target, NaN in the whole column if it was not measured.
    Raises InputError if the file is missing, damaged or of another run.
    """
    path, record = Path(folder, LOSSES), read_run_json(folder)
    table = read_table(path, COLUMNS)
    for name, low in (("line", 1), ("target_tokens", 1), ("before", 0), ("final", 0)):
        if name in ("before", "final") and (table[name] == "").all():
            table[name] = math.nan
        else:
            table[name] = read_numbers(path, table[name], low, math.inf)
    table = table.astype({"line": int, "target_tokens": int})
    known = (record or {}).get("probe") or {}
    for name in ("before", "final"):
        if name in known:
            mean, said = mean_losses(table, name)["loss"], known[name]["loss"]
            if not math.isclose(mean, said, rel_tol=1e-9):
                raise InputError(
                    f"{path} is truncated or was changed: its mean {name} is {mean:.4f}, but run.json says {said:.4f}"
                )
    return table


def change(table):
    """(how much the mean loss of a target token rose, low, high): final less before, in nats, and its 95 % interval.

    table: a DataFrame with target_tokens, before and final, a row for each line, such as that of `read_probe_losses` or
    its rows of one kind. The interval is for other lines of the same sort: see `ratio_interval`, whose coverage
    tests/test_probe.py simulates. Raises InputError if the losses were not measured both before and after the training.
    """
    rise = table["final"] - table["before"]
    if len(table) < 2 or rise.isna().any():
        raise InputError("a change needs the losses of two or more lines, both before and after the training")
    return ratio_interval(rise, table["target_tokens"])
