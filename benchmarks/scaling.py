"""How time and memory grow with rows and with processes, measured by running the scripts.

    python -m benchmarks.scaling        # on the CPU: about 13 minutes on two cores

Rows: `tweet_qa_main.py` trains the demo's T5 for an epoch on the first 250 to all 10,692 rows of TweetQA
(../shared/tweet_qa). Processes: the same number of rows with one process and with two under `accelerate launch`, on
one thread each, with batches of 8 in each process, for the demo's T5 and for flan-t5-small's shape.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.report import save, slug
from benchmarks.run import DEMO, HERE, RESULTS, SHARED, device_name, say
from benchmarks.standin import FLAN_T5_SMALL, write_standin

ROWS = (250, 500, 1000, 2500, 5000, 10_692)
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def run(model, rows, processes=1, threads=None):
    """(row of metrics.csv, run.json) of one epoch of `tweet_qa_main.py`."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, *(LAUNCH if processes > 1 else []), HERE.parent / "tweet_qa_main.py"]
        command += ["--model_name", model, "--dataset", SHARED / "tweet_qa", "--sem_model", "none", "--epochs", "1"]
        command += ["--max_train_samples", str(rows), "--max_eval_samples", "32", "--final_beams", "1"]
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if threads:
            environ["OMP_NUM_THREADS"] = str(threads)
        save_dir = Path(folder, "run")
        done = subprocess.run([*command, "--save_dir", save_dir], env=environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        with open(save_dir / "metrics.csv", newline="") as file:
            (epoch,) = csv.DictReader(file)
        return epoch, json.loads((save_dir / "run.json").read_text())


def by_rows():
    """[{"rows", "epoch_seconds", "peak_ram_mb"}]."""
    found = []
    for rows in ROWS:
        say(f"{rows} rows")
        epoch, record = run(DEMO / "tiny-t5", rows)
        seconds = float(epoch["epoch_seconds"])
        found.append({"rows": rows, "epoch_seconds": seconds, "peak_ram_mb": record["peak_ram_mb"]})
    return found


def by_processes(model, rows, rounds):
    """{processes: median examples a second}, measured in turns."""
    found = {1: [], 2: []}
    for _ in range(rounds):
        for processes, speeds in found.items():
            say(f"{model.name}, {processes} processes")
            speeds.append(float(run(model, rows, processes, threads=1)[0]["samples_per_sec"]))
    return {processes: statistics.median(speeds) for processes, speeds in found.items()}


def table(found):
    """The Markdown tables of what was found."""
    lines = [f"| {found['device']}, {found['date']} | 1 process | 2 processes | ratio |", "| --- | --- | --- | --- |"]
    for model, speeds in found["processes"].items():
        one, two = speeds[1], speeds[2]
        lines.append(f"| {model}: training, examples/s | {one:,.1f} | {two:,.1f} | {two / one:.2f} |")
    lines += ["", "| rows | epoch (s) | ms a row | peak memory (MB) |", "| --- | --- | --- | --- |"]
    for row in found["rows"]:
        each = 1000 * row["epoch_seconds"] / row["rows"]
        lines.append(f"| {row['rows']:,} | {row['epoch_seconds']:.1f} | {each:.2f} | {row['peak_ram_mb']:,.0f} |")
    return "\n".join(lines) + "\n"


def draw(found, path):
    """Seconds of an epoch and peak memory by rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    rows = [row["rows"] for row in found["rows"]]
    for place, (key, label) in enumerate({"epoch_seconds": "an epoch (s)", "peak_ram_mb": "peak memory (MB)"}.items()):
        axes = figure.add_subplot(1, 2, place + 1, xlabel="training rows", ylabel=label)
        values = [row[key] for row in found["rows"]]
        axes.plot(rows, values, "o-", color="#0072B2")
        axes.set_ylim(0, 1.1 * max(values))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"The demo's T5 on TweetQA, {found['device']}, {found['date']}", fontsize=10)
    figure.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of one and two processes (default: 3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written (default: %(default)s)")
    options = parser.parse_args(argv)
    if not (SHARED / "tweet_qa").is_dir() or not (SHARED / "flan_t5_small").is_dir():
        parser.error("TweetQA's files or flan-t5-small's tokenizer are not in ../shared")
    found = {"device": device_name("cpu"), "date": date.today().isoformat(), "rows": by_rows(), "processes": {}}
    with TemporaryDirectory() as folder:
        flan = write_standin(Path(folder, "flan-t5-small's shape"), SHARED / "flan_t5_small", **FLAN_T5_SMALL)
        for name, model, rows in (("demo model", DEMO / "tiny-t5", 2500), (flan.name, flan, 128)):
            found["processes"][name] = by_processes(model, rows, options.rounds)
    base = options.out / f"scaling-{slug(found['device'])}"
    for path in save(found, base, table, draw):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
