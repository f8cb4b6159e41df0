"""Run a study: each method tuned for itself, then the best learning rate of each with several seeds.

    python study.py studies/demo.toml

The plan is a TOML file, docs/study.md describes it. A study first scores the untrained model. It then runs each method
at each of its learning rates with the first seed, and takes the rate with the best validation F1. Where that is the
highest or the lowest of the list, it tries more rates beyond it, at most two. At last it runs the best rate with every
seed.

The same command again runs only what is missing, and resumes runs that were interrupted. It can run at the same time on
several machines that share the disk: each run is made once.
"""

import argparse
import csv
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pipeline import interrupts, study_report, study_savings
from pipeline.arguments import Parser, as_typed, at_least, build_parser, precision_as_typed
from pipeline.console import show_any_character
from pipeline.errors import InputError, RunError, one_line
from pipeline.lock import check_writable, in_use, only_writer
from pipeline.metrics import METRICS
from pipeline.plan import BASE, FULL, LORA, Run, check_fits, f1_of, read_plan, words
from pipeline.run_folder import read_run_json
from pipeline.slots import environment_of_jobs
from pipeline.study_savings import ANSWERING
from pipeline.tuning import DIVERGED, EXTENSIONS, survey

NOT_FINITE = "loss or gradient was not finite"  # how the message of such a run begins
POLL = 5.0  # seconds between looks at what other studies have finished
RETRY = 30.0  # seconds until a run that turned out to be in use is tried again
PYTHON = [sys.executable]  # what starts a training script
MEASURES_ANSWERING = "benchmarks.answering"  # the module that measures how fast checkpoints answer
PROJECT = Path(__file__).resolve().parent
MB = 2**20


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("plan", metavar="PLAN.toml", help="the plan of the study")
    parser.add_argument("--list", action="store_true", help="print the commands that are due now, and run nothing")
    parser.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="runs at the same time (default: 1)")
    show_any_character()
    args = parser.parse_args(argv)
    again = shlex.join(["python", "study.py", args.plan, *(["--jobs", str(args.jobs)] if args.jobs > 1 else [])])
    try:
        with interrupts.handled():
            parsers = training_parsers()
            plan = read_plan(args.plan, parsers)
            folders = Folders(plan, parsers)
            check_existing(plan, folders)
            return list_due(plan, folders) if args.list else run_study(plan, folders, args.jobs, again)
    except (InputError, RunError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print(f"interrupted: continue with {again}", file=sys.stderr)
        return interrupts.exit_code()


def training_parsers():
    """{script: its parser} of the scripts that a plan can name."""
    from tweet_qa_main_lora import LORA_FLAGS  # imports torch

    return {
        FULL: build_parser("", lr=None, save_dir=None),
        LORA: build_parser("", lr=None, save_dir=None, more=LORA_FLAGS, title="LoRA"),
    }


# ------------------------------------------------------------------------------------------------ the run folders


class Folders:
    """What the run folders say; a finished run is read once."""

    def __init__(self, plan, parsers):
        self.plan, self.parsers = plan, parsers
        self.records = {}  # {key: run.json} of finished runs
        self.diverged = set()  # keys
        self.firsts = {}  # {what must be the same: (the first finished run that has it, its value)}

    def f1(self, run):
        """The F1 of a run (out of 100), DIVERGED, or None if it has not ended. Raises InputError, see `check_fits`."""
        if run.key not in self.records and run.key not in self.diverged:
            record = read_run_json(run.folder)
            if record:
                check_fits(self.plan, run, record, self.parsers)
            if f1_of(record) is not None:
                self._check_trained_alike(run, record)
                self.records[run.key] = record
            elif self.note_of_divergence(run).exists():
                self.diverged.add(run.key)
        return DIVERGED if run.key in self.diverged else f1_of(self.records.get(run.key))

    def _check_trained_alike(self, run, record):
        """Raise InputError if a run was trained in more processes than the others, or --precision auto was another one:
        the plan has the same arguments then, but other steps were made."""
        identity, typed = record.get("identity", {}), record["args"].get("precision")
        for key, name in (("processes", "number of processes"), (f"precision {typed}", "precision")):
            if name in identity:
                first, value = self.firsts.setdefault(key, (run, identity[name]))
                if value != identity[name]:
                    raise InputError(
                        f"{self.plan.path}: {first.folder} and {run.folder} were trained with different {name}"
                        f" ({precision_as_typed(value)} and {precision_as_typed(identity[name])}): remove one of these"
                        " folders, and the study trains it again"
                    )

    def logs(self, run):
        """The folder with what a run has printed."""
        return self.plan.folder / "logs" / run.key

    def note_of_divergence(self, run):
        """The file that says that a run has diverged; its own folder does not tell."""
        return self.logs(run) / "diverged.txt"


def check_existing(plan, folders):
    """Raise InputError if a folder of the plan has a run with other arguments, or cannot be written to."""
    check_writable(plan.folder, f"{plan.path}: dir")
    for method in plan.methods:
        for rate in method.rates or (None,):
            for seed in plan.seeds:
                folders.f1(plan.run(method, rate, seed))


# ---------------------------------------------------------------------------------------------------- running them


def command(run):
    """The command line of a run."""
    script = PROJECT / run.script
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    begun = run.method != BASE and (run.folder / "run.json").exists()
    return [*PYTHON, str(script), *words(run.arguments | {"save_dir": str(run.folder), "resume": begun})]


def list_due(plan, folders):
    """Print the commands of the runs that are due and that nobody is running, one a line; after all runs, that of the
    measurement of answering."""
    now = survey(plan, folders.f1)
    due = now.due
    lines = [command(run) for run in due if not in_use(run.folder) and not in_use(folders.logs(run))]
    if (wanted := answering_due(plan, now, folders)) and not in_use(plan.folder / "logs" / "answering"):
        lines = [by_hand(answering_command(plan, wanted))]
    for line in lines:
        print(shlex.join(line))
    if not lines:
        busy = f"{len(due)} runs are being made: list again when they are finished" if due else "all runs are finished"
        print(f"{plan.path}: nothing is due now, {busy}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Job:
    """A run that this study is making."""

    run: Run
    process: subprocess.Popen
    slot: int  # its place among --jobs
    began: float
    claim: ExitStack  # to be closed when it has ended


def run_study(plan, folders, jobs, again):
    """Make all runs of the study and write the report. Returns the exit code.

    A run that fails is told and not tried again; runs that do not need it are still made. After wrong input (a script's
    exit code 2), which other runs are likely to have too, no more are started.
    """
    announce(plan, survey(plan, folders.f1), folders, jobs)
    running, failed = [], {}
    with interrupts.deferred():
        try:
            make_runs(plan, folders, environment_of_jobs(jobs), running, failed)
            measure_answering(plan, folders)
        finally:
            stop(running)  # after a signal or an error; there are none otherwise
    return finish(plan, folders, failed, again)


def make_runs(plan, folders, environments, running, failed):
    """Make what is due until nothing is, or until a signal comes in.

    environments: the variables of each slot. running: a list, here the Jobs of the moment are. failed: a dict, gets
    {key: Run} of those that failed.
    """
    later, told, waiting, wrong_input = {}, set(), False, False
    while not interrupts.anyone_interrupted():
        now = survey(plan, folders.f1)
        tell_tunings(now.tunings, told)
        to_do = [run for run in now.due if run.key not in {job.run.key for job in running} | failed.keys()]
        to_do = [] if wrong_input else to_do
        if not running and not to_do:
            return
        for run in to_do:
            free = sorted(set(range(len(environments))) - {job.slot for job in running})
            if free and time.monotonic() >= later.get(run.key, 0) and not in_use(run.folder):
                running += start(run, folders, free[0], environments[free[0]])
        if not running and not waiting:
            print(f"waiting for {len(to_do)} runs that other processes are making", flush=True)
        waiting = not running
        for job in wait_for_some(running):
            running.remove(job)
            job.claim.close()
            code, said = job.process.returncode, last_line(folders.logs(job.run) / "output.txt")
            if " is in use: process " in said and code == 2:
                later[job.run.key] = time.monotonic() + RETRY
            elif folders.f1(job.run) is not None:
                tell_finished(job, survey(plan, folders.f1), folders, len(environments))
            elif code == 1 and NOT_FINITE in said:
                folders.note_of_divergence(job.run).write_text(said + "\n", encoding="utf-8")
                print(f"{job.run.title}: diverged | {said}", flush=True)
            else:
                failed[job.run.key], wrong_input = job.run, wrong_input or code == 2
                cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                log = folders.logs(job.run) / "output.txt"
                print(f"{job.run.title}: failed ({cause}) | {said} | {log}", flush=True)


def start(run, folders, slot, environment):
    """Start a run: [its Job], or [] if another study is making it or has made it meanwhile."""
    logs, claim = folders.logs(run), ExitStack()
    if in_use(logs):
        return []
    try:
        # The run's own lock begins seconds later, when its libraries are imported.
        claim.enter_context(only_writer(logs, f"{folders.plan.path}: dir"))
    except InputError as error:
        if " is in use: process " in str(error):
            return []
        raise
    if folders.f1(run) is not None:
        claim.close()
        return []
    process = start_logged(command(run), logs, environment)
    return [Job(run, process, slot, time.monotonic(), claim)]


def start_logged(line, logs, environment):
    """Start a command line, whose output goes to a folder of logs. environment: variables to set. Returns the Popen."""
    with open(logs / "output.txt", "a", encoding="utf-8") as output:
        print("$", shlex.join(line), file=output, flush=True)
        # A separate session: a Ctrl-C in the terminal reaches the study alone, which passes it on once.
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        return subprocess.Popen(line, env=os.environ | environment, start_new_session=True, **streams)


def wait_for_some(running):
    """The jobs that have ended, after waiting for one of them, for POLL seconds or for a signal."""
    end = time.monotonic() + POLL
    while time.monotonic() < end and not interrupts.anyone_interrupted():
        if ended := [job for job in running if job.process.poll() is not None]:
            return ended
        time.sleep(0.1)
    return []


def stop(running):
    """Let the jobs finish their step, save, and end."""
    if running:
        print(f"stopping {len(running)} runs, which save where they are …", flush=True)
    for job in running:
        job.process.send_signal(signal.SIGTERM)
    for job in running:
        job.process.wait()
        job.claim.close()


def last_line(path):
    """The error that a run has ended with, or else the last line that it has printed."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    begins = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    said = [line.strip() for line in lines[begins + 1 :] if line.strip()]
    errors = [line for line in said if line.startswith("error: ")]
    return one_line(([*said[-1:], *errors] or ["it printed nothing"])[-1])


# -------------------------------------------------------------------------------------------------------- answering


def answering_due(plan, now, folders):
    """{label: folder} of the checkpoints whose speed of answering is to be measured; {} while a run is due, and when
    it was measured."""
    wanted = {} if now.due else study_savings.contenders(plan, now, folders.f1)
    return {} if study_savings.read_answering(plan.folder, wanted) else wanted


def answering_command(plan, wanted):
    """The command line that measures the checkpoints of `answering_due`; it needs `on_path`."""
    given = [f"{label}={folder}" for label, folder in wanted.items()]
    return [*PYTHON, "-m", MEASURES_ANSWERING, str(plan.folder / ANSWERING), *given]


def on_path():
    """The variables with which the project's modules are found from any folder."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))}


def by_hand(line):
    """The command line of `answering_command` as one types it in the current folder."""
    variables = [] if Path.cwd() == PROJECT else [f"{name}={value}" for name, value in on_path().items()]
    return ["env", *variables, *line] if variables else line


def measure_answering(plan, folders):
    """Measure how fast the methods answer, when all runs have finished and no other process of the study runs, unless
    that was done. A failure is told, and the study goes on without. A signal ends the measurement."""
    wanted = answering_due(plan, survey(plan, folders.f1), folders)
    logs = plan.folder / "logs" / "answering"
    if not wanted or interrupts.anyone_interrupted() or in_use(logs):
        return
    line = answering_command(plan, wanted)
    with ExitStack() as claim:
        try:
            claim.enter_context(only_writer(logs, f"{plan.path}: dir"))
        except InputError:
            return  # another study has begun it at this moment
        print(f"measuring how fast {len(wanted)} checkpoints answer …", flush=True)
        process = start_logged(line, logs, on_path())
        while process.poll() is None and not interrupts.anyone_interrupted():
            time.sleep(0.1)
        if process.poll() is None:
            process.terminate()
        code = process.wait()
    if interrupts.anyone_interrupted() or study_savings.read_answering(plan.folder, wanted):
        return
    said = last_line(logs / "output.txt")
    again = f"by hand: {shlex.join(by_hand(line))}"
    print(f"the speed of answering was not measured (exit code {code}) | {said} | {again}", flush=True)


# --------------------------------------------------------------------------------------------------- what it prints


def announce(plan, now, folders, jobs):
    """Print how many runs there are, and how many are finished."""
    tried = sum(len(tuning.rates) for tuning in now.tunings if len(tuning.rates) > 1)
    done = sum(folders.f1(run) is not None for run, _ in now.runs.values())
    methods = f"{len(plan.methods)} methods, {tried} runs that tune the learning rate, {len(plan.seeds)} seeds"
    print(f"{plan.path}: {now.expected} runs in {plan.folder} ({methods}); {done} finished, {now.expected - done} left")
    if any(not tuning.chosen for tuning in now.tunings):
        print(f"up to {EXTENSIONS} more for each method whose best learning rate is the highest or lowest of its list")
    if done < now.expected and jobs > 1:
        print(f"{jobs} runs at the same time")


def tell_tunings(tunings, told):
    """Print what is newly known about the learning rates. told: the lines that were printed before."""
    for tuning in tunings:
        lines, given = [], set(tuning.method.rates)
        for rate in sorted(set(tuning.rates) - given, key=lambda rate: (rate > min(given), abs(math.log(rate)))):
            side = "highest" if rate > max(given) else "lowest"
            lines.append(f"{tuning.method.title}: the best learning rate so far is the {side}: trying {rate} too")
        if len(tuning.rates) > 1 and not tuning.missing:
            at = f"best learning rate {tuning.best}" if tuning.chosen else "every learning rate diverged"
            edge = f", still the {tuning.at_edge} that was tried: a better one may lie beyond" * bool(tuning.at_edge)
            lines.append(f"{tuning.method.title}: {at}{edge}")
        for line in lines:
            if line not in told:
                told.add(line)
                print(line, flush=True)


def tell_finished(job, now, folders, jobs):
    """Print the line of a finished run: how many are finished, its F1 and minutes, and how long the rest will take."""
    record = folders.records[job.run.key]
    done = {key: run for key, (run, _) in now.runs.items() if folders.f1(run) is not None}
    left = minutes_left(now, done, folders) / jobs
    rest = f" | {duration(left)} left" if len(done) < now.expected else ""
    minutes = (time.monotonic() - job.began) / 60
    f1 = f"F1 {100 * record['final']['f1']:.1f}"
    print(f"[{len(done)}/{now.expected}] {job.run.title}: {f1} | {minutes:.1f} min{rest}", flush=True)


def minutes_left(now, done, folders):
    """The minutes that the rest takes, one run after the other: as many a run as the finished ones of its method took,
    or else as all took."""
    took = {}
    for key, run in done.items():
        if seconds := folders.records.get(key, {}).get("wall_time_seconds"):
            took.setdefault(run.method, []).append(seconds / 60)
    everything = [minutes for each in took.values() for minutes in each] or [0.0]
    means = {method: sum(each) / len(each) for method, each in took.items()}
    mean = sum(everything) / len(everything)
    known = [run for key, (run, _) in now.runs.items() if key not in done]
    return sum(means.get(run.method, mean) for run in known) + (now.expected - len(now.runs)) * mean


def duration(minutes):
    """How long something is expected to take, in words."""
    if minutes < 1:
        return "less than a minute"
    return f"about {minutes:.0f} min" if minutes < 90 else f"about {minutes / 60:.1f} hours"


def finish(plan, folders, failed, again):
    """Write the report of what is finished, and return the exit code."""
    now = survey(plan, folders.f1)
    report(plan, now, folders)
    diverged = [tuning.method.title for tuning in now.tunings if not tuning.missing and not tuning.chosen]
    diverged += [run.title for run, stage in now.runs.values() if stage == "chosen" and folders.f1(run) == DIVERGED]
    if failed or diverged:
        names = [run.title for run in failed.values()] + diverged
        advice = f"fix the cause, then {again}"
        if diverged:  # the same command does not try it again
            logs = plan.folder / "logs"
            advice += f" (a run that diverged: give other lr in the plan, or remove its diverged.txt in {logs})"
        print(f"error: {len(names)} without a result ({'; '.join(names)}): {advice}", file=sys.stderr)
        return 1
    return 0


# -------------------------------------------------------------------------------------------------------- the report


def report(plan, now, folders):
    """Write the report of what is finished to the study's folder: study.csv, study.md and the pictures."""
    rows = [csv_row(plan, run, stage, folders) for run, stage in now.runs.values() if folders.f1(run) is not None]
    if not rows:
        return
    with (
        study_report.replacing(plan.folder / "study.csv") as beside,
        open(beside, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    names = ["study.csv", *study_report.write(plan, now, folders.f1)]
    print(f"written to {plan.folder}, {len(rows)} runs: {', '.join(names)}")


def csv_row(plan, run, stage, folders):
    """The row of study.csv of a run that has ended, {column: value}. Metrics are out of 100, "seconds" are of the whole
    run, and the memory is the GPU's or, without one, the process's."""
    record = folders.records.get(run.key) or {}
    holdout, test = (record.get("holdout") or {}).get("metrics") or {}, record.get("test") or {}

    def of_100(values, name):
        return None if values.get(name) is None else 100 * values[name]

    return {
        "run": run.key,
        "method": run.method,
        **{axis: as_typed(run.axes.get(axis, "")) for axis in plan.axes},
        "lr": run.lr,
        "seed": run.seed,
        "stage": stage if record else "diverged",
        **{metric.name: of_100(record.get("final") or {}, metric.name) for metric in METRICS},
        **{
            f"{split}_{name}": of_100(values, name)
            for split, values in (("holdout", holdout), ("test", test))
            for name in ("f1", "em")
        },
        "best_epoch": record.get("best_epoch"),
        "seconds": record.get("wall_time_seconds"),
        "trainable_parameters": record.get("trainable_parameters"),
        "total_parameters": record.get("total_parameters"),
        "checkpoint_mb": None if record.get("checkpoint_bytes") is None else record["checkpoint_bytes"] / MB,
        "peak_memory_mb": record.get("peak_vram_mb") or record.get("peak_ram_mb"),
        "device": record.get("device"),
    }


if __name__ == "__main__":
    sys.exit(main())
