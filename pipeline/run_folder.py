"""The files of a run folder: written safely, and read back when the run is finished.

Every file is written next to its place and then renamed, so a run that is killed at any moment leaves either the old
file or the new one, never half of one. `checkpoint.py` writes the weights, `resume.py` what --resume needs.

torch is not imported here: `compare_runs.py` reads finished runs without it.
"""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from pipeline.arguments import as_run
from pipeline.errors import InputError, RunError, one_line, reason
from pipeline.lock import LOCK, check_held, check_writable
from pipeline.metrics import EACH_EPOCH, METRICS

# The libraries whose versions run.json records: what a result can depend on.
LIBRARIES = [
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "sentence-transformers", "peft", "accelerate"),
    *("pandas", "matplotlib"),
]
CURVES = tuple(metric.curve for metric in METRICS if metric.curve)
PLOTS = ("loss_curve", *CURVES, "breakdown")
TRACKER_FOLDERS = ("tensorboard", "wandb")  # in the run folder; trackio has one place for all runs
# Everything that a run writes at the root of its folder: what --overwrite removes. Weights come first, so that half a
# checkpoint is never left behind. run.json, which says that the folder is a run's, is replaced instead.
RUN_FILES = (
    *("model.safetensors", "adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
    *("metrics.csv", "train_loss.csv", *(f"{name}.png" for name in ("loss_curve", *CURVES))),
    *("validation_predictions.csv", "holdout_predictions.csv", "test_predictions.csv", "test_answers.json"),
    *("breakdown.csv", "breakdown.png", "probe_losses.csv", "README.md"),
)
FIRST_PROMPT = "Question: {question}\nTweet: {tweet}\nAnswer:"  # of the runs that did not record theirs
MERGING = ".tmp-merged"  # where --merge writes, in its OUT
# What a killed run can leave behind.
UNRENAMED = {".tmp-last", ".tmp-checkpoint", MERGING, *(f".tmp-{name}" for name in ("run.json", *RUN_FILES))}


# ----------------------------------------------------------------------------------------------- before it is written


def check_is_free(folder, overwrite=False):
    """Raise InputError unless a new run may be written to `folder`.

    It must be new or empty; with `overwrite` it may also be the folder of a former run.
    """
    folder = Path(folder)
    has_run = (folder / "run.json").is_file()
    if has_run and not overwrite:
        raise InputError(
            f"--save_dir {folder} already has a run: resume it (--resume), replace it (--overwrite), or choose another"
            " folder"
        )
    if has_run:
        check_writable(folder)
    else:
        check_is_empty(folder)


def check_is_empty(folder, flag="--save_dir"):
    """Raise InputError unless `folder` can be written to, and is new or empty. flag: what an error message names."""
    folder = Path(folder)
    check_writable(folder, flag)
    if folder.is_dir():
        other = sorted(path.name for path in folder.iterdir() if not _may_be_there(path))
        if other:
            more = f" and {len(other) - 1} more" if len(other) > 1 else ""
            raise InputError(
                f"{flag} {folder} contains {other[0]}{more}, which no run has written: choose another folder, or"
                " empty it first"
            )


def _may_be_there(path):
    """Whether a new run's folder may have this file: a lock, what a killed run left, or the log of this process."""
    if path.name in UNRENAMED or path.name.startswith(LOCK):
        return True
    with suppress(OSError):
        # run > folder/log: the shell has created the file that stdout or stderr goes to.
        return any(os.path.samestat(path.stat(), os.fstat(number)) for number in (1, 2))
    return False


def check_outlives_overwriting(folder, inputs):
    """Raise InputError if one of the inputs {argument: hub id or path} is in `folder`, which --overwrite replaces."""
    for name, path in inputs.items():
        if path and os.path.exists(path) and Path(path).resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(f"--{name} {path} is inside --save_dir {folder}, which --overwrite would remove")


def begin(folder, record):
    """Start a new run in `folder`: write run.json, and remove the files of a former run and nothing else.

    A former run.json must not outlive its files: it would say that a run has finished there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_last(folder)
        write_run_json(folder, record)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        for name in TRACKER_FOLDERS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
    except OSError as error:
        raise cannot_write(folder, error) from None


def remove_last(folder):
    """Remove last/ and whatever a killed run can have left half-written."""
    for name in ("last", ".old-last", *UNRENAMED):
        path = Path(folder, name)
        if path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- write


@contextmanager
def writing(path):
    """Yield a path next to `path` to write to; when that has succeeded, rename it to `path`.

    Raises RunError if the disk is full, the folder has been removed, or the like; the file at `path` is unchanged then.
    """
    path = Path(path)
    check_held(path)
    beside = path.with_name(f".tmp-{path.name}")
    try:
        yield beside
        check_held(path)
        os.replace(beside, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def writing_folder(path):
    """Yield a new folder to write to, and remove it afterwards if it still exists. Raises RunError, see `writing`."""
    check_held(path)
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()  # without its parents: a run folder that was deleted meanwhile is not created again
        yield path
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors, and RuntimeError from torch.save
        raise cannot_write(path, error) from None
    finally:
        shutil.rmtree(path, ignore_errors=True)


def cannot_write(path, error):
    """The RunError for a file or folder that could not be written."""
    return RunError(f"{path} cannot be written ({one_line(error)})")


def write_table(path, rows):
    """Write rows (a list of dicts, or a DataFrame) as CSV. Floats are written in full, so they read back the same."""
    import pandas as pd

    with writing(path) as beside:
        pd.DataFrame(rows).to_csv(beside, index=False, lineterminator="\n")


def write_predictions(path, frame):
    """Write the frame of `evaluate` as CSV; `references` becomes a JSON list, which `load_tweet_qa` can read too."""
    write_table(path, frame.assign(references=[json.dumps(refs, ensure_ascii=False) for refs in frame["references"]]))


def write_test_answers(path, rows, predictions):
    """Write the leaderboard's file: one {"qid", "Answer"} per row, in row order, repeated qids included."""
    answers = [{"qid": row["qid"], "Answer": text} for row, text in zip(rows, predictions, strict=True)]
    with writing(path) as beside:
        beside.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------- run.json


def describe_run(setup, method, model, prompt):
    """What run.json says of a run from its start: a dict for `run_record`.

    setup: the run's Setup. method: "full", "lora", or "base" for a model that nobody has fine-tuned. model: as it will
    be trained or scored. prompt: the template of the model's input.
    """
    from pipeline.devices import device_name  # imports torch

    adapter = next(iter(getattr(model, "peft_config", {}).values()), None)
    adapted = getattr(adapter, "target_modules", None)
    return {
        "method": method,
        "args": dict(vars(setup.args)),
        "prompt": prompt,
        "content": setup.content,  # {argument: hash of what its path or hub id holds}
        "versions": versions(),
        "git_commit": git_commit(),
        "run_id": uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(setup.accelerator.device),
        "seed": setup.args.seed,
        "trainable_parameters": 0 if method == "base" else model.num_parameters(only_trainable=True),
        "total_parameters": model.num_parameters(),
        # As --target_modules means them in this model.
        **({"adapted_matrices": sorted(adapted)} if isinstance(adapted, set | list) else {}),
    }


def run_record(start, *, training=None, results=None, end=None):
    """The content of run.json; what is not known yet is None.

    start: from `describe_run`, or a whole record whose results are replaced, also those of rows that are not scored
    again. training: {name: value} known since the training began. results: {"final": metrics, ...} of the final
    evaluation. end: {name: value} known at the end.
    """
    if results:
        start = {name: value for name, value in start.items() if name != "test"}
        if start.get("holdout"):
            start["holdout"] = {"rows": start["holdout"].get("rows")}  # which rows are unseen stays known
    unknown = ("best_epoch", "final", "answers_per_second", "wall_time_seconds")
    unknown += ("estimated_peak_mb", "peak_ram_mb", "peak_vram_mb")
    later = {"finished": False, **dict.fromkeys((*unknown, "checkpoint_bytes"))}
    return later | start | (training or {}) | (results or {}) | (end or {})


def write_run_json(folder, record):
    """Write run.json, see `run_record`."""
    write_json(Path(folder, "run.json"), record)


def write_scored(folder, record, roles):
    """Write the run.json of a run that was scored again, and remove the files of rows that were not.

    record: see `run_record`. roles: of the rows that were scored or answered.
    """
    write_run_json(folder, record)
    unscored = [role for role in ("holdout", "test") if not _scores_of(record, role)]
    names = [f"{role}_predictions.csv" for role in unscored] + ([] if "test" in roles else ["test_answers.json"])
    for name in names:
        Path(folder, name).unlink(missing_ok=True)


def write_json(path, record):
    """Write a dict as JSON that one can read."""
    with writing(path) as beside:
        beside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_run_json(folder):
    """The content of run.json in `folder`, None without that file. Raises InputError if it is damaged."""
    path = Path(folder, "run.json")
    if not path.exists():
        return None
    try:
        run = {"prompt": FIRST_PROMPT} | json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(run[name], str) for name in ("method", "prompt")) or not isinstance(run["args"], dict):
            raise ValueError("not the record of a run")
        _check_parts(run)
        return run | {name: run[name] or {} for name in ("content", "identity") if name in run}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None


def _check_parts(run):
    """Raise ValueError if a part of run.json that has parts itself, and that not every run has, is something else."""

    def part(*names):
        value = run
        for name in names:
            value = value.get(name) or {}
            if not isinstance(value, dict):
                raise ValueError(f"{'.'.join(names)} is not an object")
        return value

    for name in ("final", "holdout", "test"):
        part(name)
    part("holdout", "metrics")
    named = part("content") | part("eval_only", "content") | part("identity")
    named |= {"optimizer.class": part("optimizer")["class"]} if part("optimizer") else {}
    named |= {"probe.sha256": part("probe")["sha256"]} if part("probe") else {}
    for name, value in named.items():
        if not isinstance(value, str | int):
            raise ValueError(f"{name} is neither text nor a number")


def is_finished(run):
    """Whether the run of this run.json has finished, so that there is nothing to resume."""
    return run.get("finished", True)


def versions():
    """{library: version} of Python and what a result can depend on."""
    return {"python": sys.version.split()[0]} | {library: version(library) for library in LIBRARIES}


def git_commit():
    """The commit of the code that runs, with "-dirty" if tracked files were changed since.

    None without git, and if the code is not a repository but lies in one, whose commits say nothing about it.
    """
    project = Path(__file__).resolve().parent.parent

    def git(*command):
        options = {"cwd": project, "capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(["git", *command], **options).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != project:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def peak_ram_mb():
    """The largest resident memory (MB) of this process so far; None on systems that do not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # macOS counts bytes, Linux kilobytes


# ------------------------------------------------------------------------------------------------- read a finished run

# What is read of it, for `compare_runs.py`: fields of run.json and columns of its tables.
TEXTS = ["method", "device", "args.model_name", "args.dataset", "scoring.sem_model"]
OF_TRAINING = ["trainable_parameters", "checkpoint_bytes", "best_epoch"]  # counts that an untrained model does not have
COUNTS = ["total_parameters", "scoring.final_beams", "scoring.max_input_len", "scoring.max_target_len", "args.epochs"]
NUMBERS = ["args.seed", "args.patience", "final.f1", "final.em"]
NUMBERS_OR_NULL = ["peak_vram_mb", "peak_ram_mb", *(f"final.{metric.name}" for metric in METRICS)]
NUMBERS_OR_NULL += [f"{split}.{name}" for split in ("holdout.metrics", "test") for name in ("f1", "em")]
EPOCH_COLUMNS = ["epoch", "f1", "epoch_seconds", "steps_per_sec"]
# Missing in the runs of older versions, and in runs without --probe.
LATER_EPOCH_COLUMNS = ["seconds_since_start", "probe_loss"]
EXAMPLE_COLUMNS = ["qid", "question", "tweet", "references", "prediction", "question_type"]


def read_run(folder):
    """The finished run in `folder`: (record, epochs, examples), checked against each other.

    record: run.json; its "args" have every argument (see `as_run`), its "scoring" those that the final metrics were
    computed with, those of a later --eval_only if there was one, and their "content". epochs: metrics.csv; it has no
    rows for an untrained model. examples: validation_predictions.csv, with the references as lists and NaN for a metric
    that was not measured. Both are DataFrames.

    Raises InputError for a missing, unfinished or damaged run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: this folder does not exist; give one that a training script wrote (--save_dir)")
    record = read_run_json(folder)
    if record is None:
        problem = "is not the record of a run" if (folder / "run.json").exists() else "is missing"
        raise InputError(f"{folder / 'run.json'} {problem}: give a folder that a training script wrote (--save_dir)")
    _check_record(folder, record)
    record["args"] = as_run(record["args"])
    if not record["args"].get("holdout"):
        record["args"].pop("holdout_seed", None)  # it chose nothing
    epochs = _read_epochs(folder, record)

    return record, epochs, _read_examples(folder / "validation_predictions.csv", record["final"])


def read_scored(folder, record, split):
    """The examples of a run's "holdout" or "test" rows, as `read_run` returns those of validation.

    None if the run has no such rows, or no answers to compare with. Raises InputError if the file is damaged.
    """
    path, scores = Path(folder, f"{split}_predictions.csv"), _scores_of(record, split)
    if not scores or not path.exists():
        return None
    where = "test" if split == "test" else "holdout.metrics"
    for metric in EACH_EPOCH:
        value = scores.get(metric.name)
        if not _is_number(value) and (value is not None or metric.name == "f1"):
            must = f"must be a number, not {json.dumps(value):.80}"
            raise InputError(f"{Path(folder, 'run.json')}: {where}.{metric.name} {must}")
    return _read_examples(path, scores)


def _scores_of(record, split):
    """The metrics of a run's "holdout" or "test" rows; None or {} if there are none, or they were not scored."""
    return (record.get("holdout") or {}).get("metrics") if split == "holdout" else record.get("test")


def _read_examples(path, means):
    """A file of predictions, checked against the means of its metrics (null: not measured) in run.json."""
    measured = [metric for metric in EACH_EPOCH if means.get(metric.name) is not None]
    examples = read_table(path, EXAMPLE_COLUMNS + [metric.column for metric in measured])
    examples["references"] = [_parse_references(path, *entry) for entry in enumerate(examples["references"], start=1)]
    for metric in EACH_EPOCH:
        mean = means.get(metric.name)
        if mean is None:
            examples[metric.column] = math.nan
            continue
        examples[metric.column] = read_numbers(path, examples[metric.column], metric.lowest, 1)
        if not math.isclose(examples[metric.column].mean(), mean, abs_tol=1e-6):
            found = f"the mean {metric.column} of its {len(examples)} rows is {examples[metric.column].mean():.4f}"
            raise InputError(f"{path} is truncated or was changed: {found}, but run.json says {mean:.4f}")
    return examples


def _read_epochs(folder, record):
    """EPOCH_COLUMNS of metrics.csv, and those of LATER_EPOCH_COLUMNS that the run wrote; a DataFrame."""
    import pandas as pd

    if record["method"] == "base":
        return pd.DataFrame(columns=EPOCH_COLUMNS, dtype=float)
    path, best, patience = folder / "metrics.csv", record["best_epoch"], record["args"]["patience"]
    epochs = read_table(path, EPOCH_COLUMNS, LATER_EPOCH_COLUMNS)
    for name in epochs:
        epochs[name] = read_numbers(path, epochs[name], 0, 1 if name == "f1" else math.inf)
    planned = int(record.get("epochs", record["args"]["epochs"]))  # with --max_steps, not as many as --epochs
    ended = min(planned, best + patience) if patience else planned
    if list(epochs["epoch"]) != list(range(1, ended + 1)):
        raise InputError(f"{path} is truncated or was changed: it must have the epochs 1 to {ended}, in order")
    return epochs


def _check_record(folder, record):
    """Raise InputError unless run.json is that of a finished training run, or of the scoring of an untrained model, and
    has every field that is read of it."""

    record["scoring"] = record.get("eval_only") or {**record["args"], "content": record.get("content", {})}
    record["scoring"]["content"] = record["scoring"].get("content") or {}
    untrained = record["method"] == "base"
    if isinstance(record["args"], dict) and record["args"].get("eval_only") and not untrained:
        raise InputError(f"{folder} has a checkpoint that was only scored (--eval_only), not a training run")
    unfinished = record.get("wall_time_seconds") is None and not untrained
    if unfinished or record.get("final") is None or (folder / "last").exists():
        raise InputError(f"{folder} has a run that is not finished: let it finish first, or leave it out")
    if record.get("holdout") and not record["scoring"].get("holdout", True):  # an --eval_only left them out
        record["holdout"] = {"rows": record["holdout"].get("rows")}  # older versions kept the former scores
        held_out = []
    else:
        held_out = ["holdout.metrics.f1"] if record.get("holdout") else []
    for names, wanted, is_right in (
        (TEXTS, "text", lambda value: isinstance(value, str)),
        (
            COUNTS + ([] if untrained else OF_TRAINING),
            "a number above 0",
            lambda value: _is_number(value) and value > 0,
        ),
        (NUMBERS + held_out, "a number", _is_number),
        (NUMBERS_OR_NULL, "a number or null", lambda value: value is None or _is_number(value)),
    ):
        for name in names:
            value = record
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if not is_right(value):
                name = name.replace("scoring", "eval_only" if record.get("eval_only") else "args")
                raise InputError(f"{folder / 'run.json'}: {name} must be {wanted}, not {json.dumps(value):.80}")
    if record["method"] not in ("full", "lora", "base"):
        raise InputError(f"{folder / 'run.json'}: method must be full, lora or base, not {record['method']!r:.80}")
    if not _is_number(record.get("epochs", 1)):
        raise InputError(f"{folder / 'run.json'}: epochs must be a number, not {json.dumps(record['epochs']):.80}")
    record["final"] = {metric.name: record["final"].get(metric.name) for metric in METRICS}  # null if missing
    record |= {name: record.get(name) for name in NUMBERS_OR_NULL if "." not in name}


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_table(path, columns, optional=()):
    """`columns` of a CSV file that a run wrote, and `optional` ones if it has them, as text. Raises InputError unless
    the file is there and complete."""
    import pandas as pd

    try:
        text = path.read_bytes().decode("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: the run folder is incomplete") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is truncated or was changed ({error})") from None
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise InputError(f"{path} has no column {missing[0]}: it is truncated or was changed")
    broken = [number for number, row in enumerate(rows, start=1) if None in row or None in row.values()]
    if broken or not rows or not text.endswith("\n"):
        raise InputError(f"{path} is truncated or was changed: row {broken[0] if broken else len(rows)} is incomplete")
    return pd.DataFrame(rows)[columns + [name for name in optional if name in reader.fieldnames]]


def read_numbers(path, column, low, high):
    """A column of `read_table` as floats. Raises InputError if one is not a number from `low` to `high`."""
    import numpy as np
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(float)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= low) & (values <= high)))
    if len(wrong):
        raise InputError(f"{path}, row {wrong[0] + 1}: {column.name} cannot be {column[wrong[0]]!r:.80}")
    return values


def _parse_references(path, number, text):
    """The references of row `number`: a list of strings, written as JSON."""
    try:
        references = json.loads(text)
        if references and isinstance(references, list) and all(isinstance(each, str) for each in references):
            return references
    except (ValueError, RecursionError):
        pass
    raise InputError(f"{path}, row {number}: references must be a list of texts as JSON, not {text!r:.80}")
