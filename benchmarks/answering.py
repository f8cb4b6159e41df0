"""How fast finished runs answer: rows a second in batches, and the delay of a single question.

    python -m benchmarks.answering answering.json full=demo/runs/full LoRA=demo/runs/lora

Each LABEL=FOLDER is a finished run of a training script. A LoRA run is measured twice: as base + adapter, and with the
adapter merged into the base, in memory. All are loaded into one process and call `answer()` in turns, in an order that
is reversed each time, so that they meet alike whatever else the machine does. They answer the runs' validation rows
with the runs' --final_beams, on the GPU if there is one. No autocast is used, as in a notebook: all computes in
float32, but for base + adapter of a run with --base_dtype bf16. The figures are medians.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from itertools import cycle, islice
from pathlib import Path

import torch

import pipeline  # noqa: F401 (before the libraries, which look for the home folder)
from benchmarks.run import device_name
from helper_functions import (
    InputError,
    RunError,
    TweetQADataset,
    answer,
    build_collate_fn,
    load_tweet_qa,
    quiet_libraries,
)
from pipeline.arguments import at_least
from pipeline.checkpoint import has_checkpoint, load_checkpoint
from pipeline.lock import check_writable
from pipeline.markdown import markdown_table
from pipeline.merge import merge
from pipeline.run_folder import git_commit, is_finished, read_run_json, write_json

KINDS = {"full": "full checkpoint", "adapter": "base + adapter", "merged": "adapter merged"}
BATCH = 8  # rows with which a merged model is checked


@dataclass
class Contender:
    """A model that answers, and what was measured of it."""

    label: str
    folder: str
    kind: str  # of KINDS
    model: object
    tokenizer: object
    options: dict  # of `answer`
    rows_per_second: list = field(default_factory=list)  # one figure a round
    delays: list = field(default_factory=list)  # ms, one a question
    answers: list = field(default_factory=list)  # of the last round


def read_runs(pairs):
    """{label: (folder, run.json)} of LABEL=FOLDER texts.

    Raises InputError unless each is a finished run of a training script, and all are on the same data and score with
    the same number of beams.
    """
    runs = {}
    for pair in pairs:
        label, equals, folder = pair.partition("=")
        if not (label and equals and folder):
            raise InputError(f"{pair}: give each run as LABEL=FOLDER")
        if label in runs:
            raise InputError(f"{pair}: two runs have the label {label}: give each its own")
        run = read_run_json(folder)
        trained = run is not None and run["method"] in ("full", "lora") and has_checkpoint(folder)
        if not trained or not is_finished(run) or Path(folder, "last").exists():
            raise InputError(f"{pair}: {folder} has no finished run of a training script")
        runs[label] = folder, run | {"scoring": run.get("eval_only") or run["args"]}
    for name, value_of in (
        ("data (--dataset)", lambda run: run["scoring"].get("content", run.get("content", {})).get("dataset")),
        ("numbers of beams (--final_beams)", lambda run: run["scoring"]["final_beams"]),
    ):
        if len({str(value_of(run)) for _, run in runs.values()}) > 1:
            raise InputError(f"{' '.join(pairs)}: these runs have different {name}: measure them separately")
    return runs


def load_contenders(runs, rows, device):
    """The Contenders of `read_runs`, on the device: one for a full run, two for a LoRA run."""
    contenders = []
    for label, (folder, run) in runs.items():
        scoring = run["scoring"]
        options = {"beams": scoring["final_beams"]}
        options |= {name: scoring[name] for name in ("max_input_len", "max_target_len")}
        for kind in ("adapter", "merged") if run["method"] == "lora" else ("full",):
            model, tokenizer = load_checkpoint(folder)
            if kind == "merged":
                data = TweetQADataset(rows[:BATCH], tokenizer, options["max_input_len"], options["max_target_len"])
                model = merge(model, build_collate_fn(tokenizer)([*data]), f"{label}={folder}")
            contenders.append(Contender(label, folder, kind, model.to(device).eval(), tokenizer, options))
    return contenders


def in_turns(contenders, times, do):
    """do(contender, number) for each number below `times`, each time in the opposite order."""
    for number in range(times):
        for contender in contenders[:: -1 if number % 2 else 1]:
            do(contender, number)


def measure(contenders, rows, device, *, rounds, questions):
    """Let all answer the rows `rounds` times, and `questions` single questions, in turns. Fills the Contenders."""
    texts = [row["Question"] for row in rows], [row["Tweet"] for row in rows]
    singles = list(islice(cycle(zip(*texts, strict=True)), questions))

    def seconds(contender, *asked):
        began = time.perf_counter()
        answers = answer(contender.model, contender.tokenizer, device, *asked, **contender.options)
        return time.perf_counter() - began, answers  # texts: the device has finished

    def answer_all(contender, number):
        took, contender.answers = seconds(contender, *texts)
        contender.rows_per_second.append(len(rows) / took)

    def answer_one(contender, number):
        contender.delays.append(1000 * seconds(contender, *singles[number])[0])

    for contender in contenders:  # memory is allocated and kernels are chosen: not timed
        seconds(contender, *(part[:32] for part in texts))
        seconds(contender, *singles[0])
    in_turns(contenders, rounds, answer_all)
    in_turns(contenders, questions, answer_one)


def figures(contender, contenders):
    """What the output file says of a Contender."""
    low, _, high = statistics.quantiles(contender.delays, n=4, method="inclusive")
    found = {
        "label": contender.label,
        "folder": contender.folder,
        "kind": contender.kind,
        "rows_per_second": statistics.median(contender.rows_per_second),
        "rows_per_second_of_rounds": contender.rows_per_second,
        "delay_ms": statistics.median(contender.delays),
        "delay_ms_quartiles": [low, high],
    }
    if contender.kind == "merged":
        adapter = next(each for each in contenders if (each.label, each.kind) == (contender.label, "adapter"))
        pairs = zip(contender.answers, adapter.answers, strict=True)
        found["answers_changed"] = sum(one != other for one, other in pairs)
    return found


def table(found):
    """The figures as a Markdown table."""
    lines = [[f"{found['machine']}, {found['date']}", "", "rows/s", "single question (ms)", "answers changed"]]
    for each in found["contenders"]:
        low, high = each["delay_ms_quartiles"]
        delay = f"{each['delay_ms']:.1f} ({low:.1f} to {high:.1f})"
        changed = f"{each['answers_changed']} of {found['rows']}" if "answers_changed" in each else ""
        lines.append([each["label"], KINDS[each["kind"]], f"{each['rows_per_second']:.1f}", delay, changed])
    return "\n".join(markdown_table(lines))


def main(argv=None):
    """Returns the exit code: 0, or 2 after one line on stderr that says what cannot be used (1: out of disk space)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="file to write")
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER", help="a finished run, and what to call it")
    parser.add_argument("--rows", type=at_least(1), default=200, help="validation rows (default: at most %(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="times all rows are answered (default: 3)")
    parser.add_argument("--questions", type=at_least(2), default=50, help="single questions (default: %(default)s)")
    options = parser.parse_args(argv)
    quiet_libraries()
    try:
        runs = read_runs(options.runs)
        if options.out.is_dir():
            raise InputError(f"{options.out} is a folder: give the name of a file")
        check_writable(options.out.parent, "OUT.json in")
        scoring = next(iter(runs.values()))[1]["scoring"]
        rows = load_tweet_qa(scoring["dataset"])["validation"][: scoring.get("max_eval_samples")][: options.rows]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        contenders = load_contenders(runs, rows, device)
        measure(contenders, rows, device, rounds=options.rounds, questions=options.questions)
        found = {
            "machine": device_name(device),
            "date": date.today().isoformat(),
            "commit": git_commit(),
            "threads": torch.get_num_threads(),
            "rows": len(rows),
            "beams": scoring["final_beams"],
            "questions": options.questions,
            "rounds": options.rounds,
            "contenders": [figures(each, contenders) for each in contenders],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, found)
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
