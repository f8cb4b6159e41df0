"""Does a way to train cost quality? The same seeds under each variant, and the F1 difference with its interval.

    python -m benchmarks.quality --variants fp32 bf16 --seeds 50      # 200 runs, about 40 s each on one core

The training scripts train the demo's T5 on the demo's 960 rows, full and LoRA, once for each variant and seed. The F1
of a run is that of its last epoch, greedy, on the demo's validation split: the best epoch would be a chosen one. A
variant is compared with the first one named. Each run is added to the results when it ends, so the same command
continues after an interruption, and shows the table alone where nothing is missing.
"""

import argparse
import csv
import io
import json
import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.report import paired_difference, slug, spread
from benchmarks.run import DEMO, DEMO_LORA, DEMO_LR, RESULTS, device_name, say
from pipeline.arguments import at_least
from pipeline.run_folder import git_commit

VARIANTS = {  # name: what it adds to the command line
    "plain": ["--precision", "fp32"],  # and nothing of what makes training fast on a CPU, see `_plain_training`
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
}
METHODS = ("full", "LoRA")
WITHIN, AT_MOST = 0.4, 1.0  # points of F1: the estimate must be so near to 0, and the interval exclude so large a loss
FAR_BELOW = 10.0  # points of F1 below the median run of the first variant: about five of its standard deviations


def train(variant, method, seed, epochs):
    """One run of a training script, in this process: {"f1": of each epoch, "val_loss", "skipped_steps", "seconds"}.

    A run that its script ends because loss or gradient is not finite has {"f1": []}.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    from accelerate.state import AcceleratorState

    import tweet_qa_main
    import tweet_qa_main_lora

    AcceleratorState._reset_state(True)  # its precision is otherwise that of the first run in a process
    script = tweet_qa_main_lora if method == "LoRA" else tweet_qa_main
    with TemporaryDirectory() as folder:
        command = ["--model_name", DEMO / "tiny-t5", "--dataset", DEMO / "tweets", "--sem_model", "none"]
        command += ["--save_dir", Path(folder, "run"), "--epochs", epochs, "--seed", seed, "--lr", DEMO_LR[method]]
        command += ["--final_beams", 1, *VARIANTS[variant]]
        if method == "LoRA":
            names = {"r": "lora_r"}
            for name, value in DEMO_LORA.items():
                command += [f"--{names.get(name, name)}", *(value if isinstance(value, list) else [value])]
        told = io.StringIO()
        changed = _plain_training(tweet_qa_main) if variant == "plain" else nullcontext()
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(told),
            _without_the_final_evaluation(tweet_qa_main),
            changed,
        ):
            code = script.main([str(part) for part in command])
        if code == 1 and "not finite" in told.getvalue():
            return {"f1": []}
        if code:
            raise RuntimeError(f"{variant}, {method}, seed {seed} ended with exit code {code}: {told.getvalue()}")
        with open(Path(folder, "run", "metrics.csv"), newline="") as file:
            rows = list(csv.DictReader(file))
        record = json.loads(Path(folder, "run", "run.json").read_text())
    return {
        "f1": [float(row["f1"]) for row in rows],
        "val_loss": float(rows[-1]["val_loss"]),
        "skipped_steps": record["skipped_steps"],
        "seconds": sum(float(row["epoch_seconds"]) for row in rows),
    }


@contextmanager
def _without_the_final_evaluation(script):
    """It would score the best epoch a second time, by METEOR too, and takes as long as the training of an epoch."""
    with patch.object(script, "final_evaluation", lambda *_: {}), patch.object(script.publish, "write_model_card"):
        yield


@contextmanager
def _plain_training(script):
    """Padded batches, torch's own dropout, and the embedding's gradient by autograd."""
    from torch.nn import functional as F

    from pipeline import fast_cpu

    with (
        patch.object(script, "packed_rows", lambda *_: None),
        patch.object(script, "use_fast_training", lambda *_, **__: None),
        patch.object(fast_cpu, "fast_dropout", F.dropout),
    ):
        yield


# ------------------------------------------------------------------------------------------------------ what it says


def last_f1(run):
    """F1 out of 100 after the last epoch; 0 for a run without a finite loss."""
    return 100 * run["f1"][-1] if run["f1"] and math.isfinite(run["val_loss"]) else 0.0


def compare(runs, variants):
    """A dict for each method and variant of what the table shows, over the seeds that all the variants have.

    runs: of one number of epochs. variants: their names; the first is the one that the others are compared with.
    """
    found = []
    for method in METHODS:
        own = {v: {r["seed"]: r for r in runs if (r["method"], r["variant"]) == (method, v)} for v in variants}
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in own.values())))
        if not seeds:
            continue
        f1 = {v: [last_f1(own[v][seed]) for seed in seeds] for v in variants}
        usual = statistics.median(f1[variants[0]])
        for v in variants:
            row = {"method": method, "variant": v, "seeds": len(seeds), "f1": spread(f1[v])}
            row["diverged"] = sum(value < usual - FAR_BELOW for value in f1[v])
            row["seconds"] = statistics.median(own[v][seed].get("seconds", math.nan) for seed in seeds)
            if v != variants[0]:
                mean, low, high = paired_difference(f1[v], f1[variants[0]])
                row |= {"difference": mean, "low": low, "high": high}
                row |= {"within": abs(mean) <= WITHIN, "excludes": low >= -AT_MOST}
            found.append(row)
    return found


def table(found, title):
    """The Markdown table of `compare`'s rows."""
    lines = [
        f"| {title} | F1 | difference | 95 % interval | within {WITHIN} | a loss of {AT_MOST:.1f} excluded | diverged |"
        " training (s) |",
        "| --- " * 8 + "|",
    ]
    words = {True: "yes", False: "no"}
    for row in found:
        cells = [f"{row['method']}, {row['variant']}, {row['seeds']} seeds", row["f1"]]
        if "difference" in row:
            cells += [f"{row['difference']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}"]
            cells += [words[row["within"]], words[row["excludes"]]]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} | {row['diverged']} | {row['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------- the study


def key(run):
    return run["variant"], run["method"], run["seed"], run["epochs"]


def study(options, path):
    """Make the runs that the file does not have, and add each to it. Returns all runs of the file."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    there = {key(run) for run in runs}
    wanted = [
        {"variant": variant, "method": method, "seed": seed, "epochs": options.epochs}
        for seed in range(options.first_seed, options.first_seed + options.seeds)  # pairs are complete early
        for method in options.methods
        for variant in options.variants
    ]
    missing = [run for run in wanted if key(run) not in there]
    commit = git_commit()
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        started = {pool.submit(train, *key(run)): run for run in missing}
        try:
            for number, done in enumerate(as_completed(started), start=1):
                run = started[done] | done.result() | {"commit": commit, "date": date.today().isoformat()}
                runs.append(run)
                unfinished = path.with_suffix(".tmp")
                unfinished.write_text(json.dumps({"device": device_name("cpu"), "runs": runs}, indent=1) + "\n")
                unfinished.replace(path)
                named = f"{run['method']}, {run['variant']}, seed {run['seed']}"
                say(f"{number}/{len(missing)} {named}: F1 {last_f1(run):.1f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return runs


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["fp32", "bf16"], help="default: fp32 bf16")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: both")
    parser.add_argument("--seeds", type=at_least(1), default=50, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first_seed", type=at_least(0), default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--epochs", type=at_least(1), default=3, help="of each run (default: %(default)s)")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written (default: %(default)s)")
    options = parser.parse_args(argv)
    options.variants = list(dict.fromkeys(options.variants))
    machine = device_name("cpu")
    path = options.out / f"quality-{slug(machine)}.json"
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    runs = [run for run in study(options, path) if run["epochs"] == options.epochs and run["seed"] in seeds]
    shown = [run for run in runs if run["variant"] in options.variants and run["method"] in options.methods]
    commits = sorted({str(run["commit"])[:7] for run in shown})
    if len(commits) > 1:
        say(f"these runs were made at different commits: {', '.join(commits)}")
    title = f"{machine}, {max(run['date'] for run in shown)}, {options.epochs} epochs"
    text = table(compare(shown, options.variants), title)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
