"""Compare the speed of this project with that of the loops people use today, side by side in one run.

    python -m benchmarks.run                  # on the CPU: two hours on two cores, most of them for the seeds
    python -m benchmarks.run --seeds 0        # without them; a later run without --seeds 0 adds them
    python -m benchmarks.run --device cuda
    python -m benchmarks.run --quick          # checks that everything works and agrees; its times mean nothing

The contenders are `this_project.py`, `plain_loop.py` and `hf_trainer.py` and, where CTranslate2 is installed and on the
CPU alone, `ct2.py`, which does not train. Each runs in a separate process, where it trains the same number of batches
and answers the same rows with the same checkpoint, with the same number of threads. They take turns, in an order that
changes with each round, and the figures are medians over the rounds. Training is in float32, and once more in bfloat16
where the CPU has instructions for it. The data are TweetQA's files in ../shared/tweet_qa, or the demo's if those are
missing; the models are a stand-in with flan-t5-small's shape and the demo's T5.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

# Not a contender's module, and not `tweet_qa_main`: the processes started from this one would inherit what they set.
from benchmarks import ct2, jobs
from benchmarks.jobs import BATCH_SIZE, ROOT, SKIPPED
from benchmarks.report import ALL, CONTENDERS, write
from helper_functions import load_tweet_qa
from pipeline.arguments import at_least
from pipeline.run_folder import git_commit

HERE = ROOT / "benchmarks"
MODELS, RESULTS = HERE / "models", HERE / "results"
DEMO, SHARED = ROOT / "demo", ROOT.parent / "shared"
ASKED = 1000  # questions that `answer` is timed on
# The adapters: the LoRA script's defaults, and what `make demo` gives it.
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q", "v"]}
DEMO_LORA = LORA | {"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}
DEMO_LR = {"full": 1e-3, "LoRA": 3e-3}


# ----------------------------------------------------------------------------------------------- the run as a whole


def in_turns(names, rounds, call):
    """{contender: [what `call(contender)` returned in each round]}; the order of the contenders changes each round."""
    results = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            results[name].append(call(name))
    return results


def median_of(results, key):
    return statistics.median(result[key] for result in results)


class Pools:
    """A process for each contender. Each measurement uses new ones."""

    def __enter__(self):
        context = get_context("spawn")
        self.pools = {name: ProcessPoolExecutor(1, mp_context=context) for name in ALL}
        return self

    def __exit__(self, *_):
        for pool in self.pools.values():
            pool.shutdown()

    def start(self, name, job, *args, **options):
        return self.pools[name].submit(jobs.in_contender, name, job, *args, **options)

    def ask(self, *given, **options):
        return self.start(*given, **options).result()


def measure(case, methods, options, found):
    """Measure a case for each contender, except for figures that `found` has, and add them. Yields after each part.

    found: {"padding": ..., "validation": ..., "answers": ..., method: ...}.
    """
    found["rows"] = {role: len(case[role]) for role in ("train", "validation")}
    passes = found.setdefault("validation", {})
    with Pools() as pools:
        found["padding"] = {name: pools.ask(name, jobs.padding, case) for name in CONTENDERS}
        chosen = {name: pools.ask(name, jobs.typical_batches, case, case["batches"]) for name in CONTENDERS}
        for beams in (1, 5):
            if f"{beams}_beams" not in passes:
                say(f"{case['name']}: validation with {beams} beam{'s' * (beams > 1)}")
                passes[f"{beams}_beams"] = measure_validation(pools, case, beams, options)
                yield
            if options.ct2 and case["asked"] and f"{beams}_beams" not in found.setdefault("answers", {}):
                say(f"{case['name']}: {len(case['asked'])} questions with {beams} beam{'s' * (beams > 1)}")
                patience = passes[f"{beams}_beams"]["ct2"]["patience"]
                found["answers"][f"{beams}_beams"] = measure_answers(pools, case, beams, patience, options)
                yield
    for method, (lora, precision) in methods.items():
        if method not in found:
            say(f"{case['name']}, {method}: training")
            found[method] = measure_training(case, chosen, lora, precision, options)
            yield


def measure_validation(pools, case, beams, options):
    """{contender: seconds, "profile": of this project} of passes over the validation rows.

    On the CPU the answers of all contenders must be the same, those of `generate` in the plain loop.
    """
    device, precision = options.device, options.usual_precision
    given = (jobs.validate, case, beams, device, precision)
    first = {name: pools.ask(name, *given)["predictions"] for name in CONTENDERS}  # not timed: kernels are chosen in it
    expected = first["plain_loop"]
    settings, patience = {name: {} for name in CONTENDERS}, None
    if options.ct2:
        tries = [1] if beams == 1 else [1, 2, beams]  # its fastest search that finds the same answers
        same = (p for p in tries if pools.ask("ct2", *given, patience=p)["predictions"] == expected)
        patience = next(same, None)
        if patience is None:
            raise SystemExit(f"{case['name']}: CTranslate2's answers with {beams} beams are not those of generate")
        settings["ct2"] = {"patience": patience}
    for name, predictions in first.items():
        if device == "cpu" and predictions != expected:
            raise SystemExit(f"{case['name']}: the answers of {name} with {beams} beams are not those of generate")
    results = in_turns(list(settings), options.rounds, lambda name: pools.ask(name, *given, **settings[name]))
    if options.ct2:
        losses = {name: results[name][0]["metrics"]["val_loss"] for name in ("this_project", "ct2")}
        if abs(losses["this_project"] - losses["ct2"]) > 1e-3:
            raise SystemExit(f"{case['name']}: the losses of the validation rows differ: {losses}")
    figures = {
        name: {"seconds": median_of(runs, "seconds"), "seconds_of_each_round": [run["seconds"] for run in runs]}
        for name, runs in results.items()
    }
    if options.ct2:
        figures["ct2"]["patience"] = patience
    profile = pools.ask("this_project", jobs.where_validation_time_goes, case, beams, device, precision)
    reached = profile["flops"] / figures["this_project"]["seconds"] / options.peaks[precision]
    words = statistics.mean(len(text.split()) for text in expected)
    return figures | {"profile": profile | {"share_of_matmul_peak": reached}, "words_an_answer": words}


def measure_answers(pools, case, beams, patience, options):
    """{"this_project" and "ct2": seconds, "asked", "same": questions, and those that both answer in the same way}."""
    settings = {"this_project": {}, "ct2": {"patience": patience}}
    rounds = min(3, options.rounds)  # a round takes minutes
    given = (jobs.answer, case, beams)
    results = in_turns(list(settings), rounds, lambda name: pools.ask(name, *given, **settings[name]))
    ours, theirs = (results[name][0]["answers"] for name in settings)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    seconds = {name: {"seconds": median_of(runs, "seconds")} for name, runs in results.items()}
    return seconds | {"asked": len(ours), "same": same}


def measure_training(case, chosen, lora, precision, options):
    """{contender: speed and memory, "profile": of this project} of training on the chosen batches."""

    def ask(name, job):  # a new process each time: its peak memory would contain what the round before left
        with Pools() as pools:
            return pools.ask(name, job, case, chosen[name], lora, options.device, precision)

    results = in_turns(list(CONTENDERS), options.rounds, lambda name: ask(name, jobs.train))
    profile = ask("this_project", jobs.where_training_time_goes)
    figures = {}
    for name, runs in results.items():
        timed = chosen[name][SKIPPED:]
        tokens = sum(count for count, _ in jobs.token_counter(case)(timed).values())
        seconds = median_of(runs, "seconds")
        assert {run["steps"] for run in runs} == {len(timed)}
        figures[name] = {
            "examples_a_second": len(timed) * BATCH_SIZE / seconds,
            "tokens_a_second": tokens / seconds,
            "peak_memory_mb": median_of(runs, "peak_memory_mb"),
            "seconds_of_each_round": [run["seconds"] for run in runs],
        }
    steps_a_second = figures["this_project"]["examples_a_second"] / BATCH_SIZE
    reached = profile["flops_a_step"] * steps_a_second / options.peaks[precision]
    return figures | {"profile": profile | {"share_of_matmul_peak": reached}}


def measure_f1(case, methods, options, found):
    """Add the F1 of the demo model after training with each seed, for each contender. Yields after each seed.

    found: {"epochs", "seeds", method: {contender: [F1 of each seed]}}; what it has is not measured again.
    """
    with Pools() as pools:
        for method in options.f1_of:
            lora, precision = methods[method]
            scores = found.setdefault(method, {name: [] for name in CONTENDERS})
            for number, seed in enumerate(found["seeds"]):
                missing = [name for name in CONTENDERS if len(scores[name]) == number]
                if not missing:
                    continue
                say(f"{case['name']}, {method}: F1 with seed {seed}")
                given = (jobs.quality, case, lora, DEMO_LR[method], seed, found["epochs"], options.device, precision)
                started = {name: pools.start(name, *given) for name in missing}  # together: no times are measured
                for name, run in started.items():
                    scores[name].append(run.result())
                yield


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def device_name(device):
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", described)
    return f"{model[1].strip() if model else platform.processor()}, {os.cpu_count()} cores"


def make_cases(options):
    """The two cases: folders, rows and sizes."""
    demo_data = load_tweet_qa(str(DEMO / "tweets"))
    few = slice(48 if options.quick else None)
    demo = {
        "name": "demo model",
        "model": str(DEMO / "tiny-t5"),
        "train": demo_data["train"][few],
        "validation": demo_data["validation"][few],
        "asked": demo_data["validation"][few] if options.quick else [],
        "batches": 3 if options.quick else 60,
    }
    if options.quick:
        return [demo]
    real = (SHARED / "tweet_qa").is_dir() and (SHARED / "flan_t5_small").is_dir()
    data = SHARED / "tweet_qa" if real else DEMO / "tweets"
    rows = load_tweet_qa(str(data))
    folder = MODELS / ("flan_t5_small_shape" if real else "flan_t5_small_shape_demo")
    if not folder.exists():
        from benchmarks.standin import FLAN_T5_SMALL, write_standin

        say("the flan-t5-small stand-in learns to answer")
        shutil.rmtree(MODELS / "untrained", ignore_errors=True)
        files = SHARED / "flan_t5_small" if real else DEMO / "tiny-t5"
        untrained = write_standin(MODELS / "untrained", files, **FLAN_T5_SMALL)
        with Pools() as pools:
            given = (rows["train"][:64], 38, str(MODELS / "learned"), options.device, options.usual_precision)
            pools.ask("this_project", jobs.learn_to_answer, str(untrained), *given)
        (MODELS / "learned").rename(folder)
        shutil.rmtree(untrained)
    flan = {
        "name": "flan-t5-small's shape",
        "model": str(folder),
        "data": str(data),
        "train": rows["train"],
        "validation": rows["validation"][:96],
        "asked": list(islice(cycle(rows["validation"]), ASKED)),
        "batches": 12,
    }
    return [flan, demo]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="rounds; in each, every contender runs once (default: 5)"
    )
    parser.add_argument(
        "--seeds", type=at_least(0), default=20, help="seeds of the demo model's F1; 0: not measured (default: 20)"
    )
    parser.add_argument(
        "--f1_of", nargs="+", choices=DEMO_LR, default=list(DEMO_LR), help="methods of that F1 (default: both)"
    )
    parser.add_argument("--quick", action="store_true", help="the demo's model on a few rows, one round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written (default: %(default)s)")
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # One GPU of several: Seq2SeqTrainer would use all of them, and train larger batches.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if options.device == "cpu" else visible
    if options.quick:
        options.rounds = 1
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    options.usual_precision = "bf16" if options.device == "cuda" else "fp32"
    options.ct2 = options.device == "cpu" and ct2.is_installed()
    precisions = {"": options.usual_precision}
    if options.device == "cpu" and jobs.computes_in_bf16():
        precisions |= {", bf16": "bf16"}
    found = describe(options)
    kept = options.out / "unfinished.json"  # from an interrupted run of this command: not measured again
    if kept.exists() and is_continued(before := json.loads(kept.read_text()), found):
        found = before
    found.setdefault("cases", {})
    if "matmul_flops_a_second" not in found:
        with Pools() as pools:
            peaks = {p: pools.ask("this_project", jobs.matmul_peak, options.device, p) for p in precisions.values()}
        found["matmul_flops_a_second"] = peaks
    options.peaks = found["matmul_flops_a_second"]

    def keep():
        options.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))

    cases = make_cases(options)
    for case in cases:
        lora = DEMO_LORA if case["name"] == "demo model" else LORA
        figures = found["cases"].setdefault(case["name"], {})
        methods = {
            f"{method}{suffix}": (adapter, precision)
            for suffix, precision in precisions.items()
            for method, adapter in (("full", None), ("LoRA", lora))
            if not suffix or "data" in case or options.quick  # the demo's matrices are too small to gain from it
        }
        for _ in measure(case, methods, options, figures):
            keep()
        if "data" in case and "start_up_seconds" not in found:
            say(f"{case['name']}: start-up")
            seconds = in_turns(list(CONTENDERS), 3, lambda name: jobs.until_first_step(name, case))  # noqa: B023
            found["start_up_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
            keep()
    seeds = min(options.seeds, 1) if options.quick else options.seeds
    f1 = found.setdefault("f1", {})
    f1 |= {"epochs": 1 if options.quick else 3, "seeds": list(range(seeds))}
    methods = {"full": (None, options.usual_precision), "LoRA": (DEMO_LORA, options.usual_precision)}
    for _ in measure_f1(cases[-1], methods, options, f1):
        keep()
    if options.seeds:
        kept.unlink(missing_ok=True)
    for path in write(found, options.out):
        say(f"wrote {path}")


def describe(options):
    """What a run's figures depend on, besides the models and rows."""
    import accelerate
    import peft
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)}
    if options.ct2:
        import ctranslate2

        versions["ctranslate2"] = ctranslate2.__version__
    return {
        "device": device_name(options.device),
        "date": date.today().isoformat(),
        "quick": options.quick,
        "rounds": options.rounds,
        "versions": versions,
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
    }


def is_continued(before, now):
    """Whether a run with the description `now` may use what an interrupted one measured, on whatever day. That one may
    have written its results, which alone makes the repository "dirty"."""
    before, now = (dict(each, commit=str(each["commit"]).removesuffix("-dirty"), date=None) for each in (before, now))
    return before.items() >= now.items()


if __name__ == "__main__":
    main()
