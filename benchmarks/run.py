"""Compare the speed of this project with that of the loops people use today, side by side in one run.

    python -m benchmarks.run                  # on the CPU: about 40 minutes on two cores
    python -m benchmarks.run --device cuda
    python -m benchmarks.run --quick          # checks that everything works and agrees; its times mean nothing

The contenders are `this_project.py`, `plain_loop.py` and `hf_trainer.py`. Each runs in a separate process, where
it trains the same number of batches and answers the same rows with the same checkpoint. They take turns, in an order
that changes with each round, and the figures are medians over the rounds. The data are TweetQA's files in
../shared/tweet_qa, or the demo's if those are missing; the models are a stand-in with flan-t5-small's shape and the
demo's T5.
"""

import argparse
import importlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

# Not a contender's module, and not `tweet_qa_main`: the processes started from this one would inherit what they set.
from benchmarks.report import CONTENDERS, write
from helper_functions import load_tweet_qa
from pipeline.fast_cpu import onednn_product
from pipeline.run_folder import git_commit

HERE = Path(__file__).resolve().parent
MODELS, RESULTS = HERE / "models", HERE / "results"
DEMO, SHARED = HERE.parent / "demo", HERE.parent.parent / "shared"
BATCH_SIZE = 8
SKIPPED = 2  # first steps of a round, in which memory is allocated and kernels are chosen: they are not timed
# The adapters: the LoRA script's defaults, and what `make demo` gives it.
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q", "v"]}
DEMO_LORA = LORA | {"target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}
DEMO_LR = {"full": 1e-3, "LoRA": 3e-3}


# ------------------------------------------------------------------------- what a contender's process is asked to do


def in_contender(name, job, *args):
    """Call `job` with the contender's module: what a process of the pool runs."""
    return job(importlib.import_module(f"benchmarks.{name}"), *args)


def epoch(contender, case, seed=0):
    """The batches of an epoch, as lists of row positions, without a last one of fewer rows."""
    _, tokenizer = contender.load(case["model"], None)
    order = contender.epoch_order(case["train"], tokenizer, BATCH_SIZE, seed)
    return [order[start : start + BATCH_SIZE] for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE)]


def token_counter(case):
    """A function of a list of batches of training rows: {"source", "target": (tokens, tokens with their padding)}."""
    from helper_functions import TweetQADataset

    data = TweetQADataset(case["train"], load_tokenizer(case["model"]))

    def count(batches):
        counts = {"source": [0, 0], "target": [0, 0]}
        for batch in batches:
            for side, ids in (("source", data.input_ids), ("target", data.labels)):
                lengths = [len(ids[position]) for position in batch]
                counts[side][0] += sum(lengths)
                counts[side][1] += len(lengths) * max(lengths)
        return counts

    return count


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def padding(contender, case):
    """The share of padding in an epoch's source and target tokens."""
    counts = token_counter(case)(epoch(contender, case))
    return {side: 1 - tokens / padded for side, (tokens, padded) in counts.items()}


def typical_batches(contender, case, count):
    """The SKIPPED largest batches of an epoch, followed by `count` batches of typical sizes.

    The latter are spread evenly over all batches in order of size, so that a short round represents the epoch. They are
    shuffled: in descending order only the first step would allocate memory, while in an epoch many steps do.
    """

    def size(batch):  # with the output layer, a target's token takes about twice the operations of a prompt's
        padded = {side: count for side, (_, count) in counts_of([batch]).items()}
        return padded["source"] + 2 * padded["target"]

    batches, counts_of = epoch(contender, case), token_counter(case)
    batches.sort(key=size, reverse=True)
    timed = [batches[int((n + 0.5) * len(batches) / count)] for n in range(count)]
    random.Random(0).shuffle(timed)  # in the same order for all contenders
    return batches[:SKIPPED] + timed


def train(contender, case, batches, lora, device):
    """Train on the batches. Returns seconds and examples a second of the steps after the first, and the peak memory."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    model, tokenizer = contender.load(case["model"], lora)
    ends = []

    def note(*_):
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    reset_peak_memory(device)
    hook = register_optimizer_step_post_hook(note)
    order = [position for batch in batches for position in batch]
    contender.train(model, tokenizer, case["train"], order, BATCH_SIZE, 1e-4, 0, device)
    hook.remove()
    steps = [end - start for start, end in pairwise(ends)][SKIPPED - 1 :]
    return {"seconds": sum(steps), "steps": len(steps), "peak_memory_mb": peak_memory_mb(device)}


def validate(contender, case, beams, device):
    """Seconds, metrics and predictions of a pass over the validation rows."""
    model, tokenizer = contender.load(case["model"], None)
    model.to(device)
    started = time.perf_counter()
    metrics, predictions = contender.validate(model, tokenizer, case["validation"], beams, device)
    return {"seconds": time.perf_counter() - started, "metrics": metrics, "predictions": predictions}


def quality(contender, case, lora, lr, seed, epochs, device):
    """F1 on the validation rows after training on all the rows `epochs` times."""
    model, tokenizer = contender.load(case["model"], lora)
    orders = [[p for batch in epoch(contender, case, 100 * seed + n) for p in batch] for n in range(epochs)]
    contender.train(model, tokenizer, case["train"], sum(orders, []), BATCH_SIZE, lr, seed, device)
    return contender.validate(model, tokenizer, case["validation"], 1, device)[0]["f1"]


def where_training_time_goes(contender, case, batches, lora, device):
    """Floating point operations of a training step, and the operations that take most of its time (shares)."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def given(batches):
        return case["train"], [position for batch in batches for position in batch], BATCH_SIZE, 1e-4, 0, device

    with count_operations() as counter:
        contender.train(*contender.load(case["model"], lora), *given(batches[SKIPPED:]))
    loaded, steps, profiler = contender.load(case["model"], lora), [], new_profiler(device)

    def note(*_):
        steps.append(True)
        if len(steps) == SKIPPED:
            profiler.start()

    hook = register_optimizer_step_post_hook(note)
    contender.train(*loaded, *given(batches))
    profiler.stop()
    hook.remove()
    return {"flops_a_step": counter.get_total_flops() / len(batches[SKIPPED:])} | shares_of(profiler, device)


def where_validation_time_goes(contender, case, beams, device):
    """Floating point operations of a pass over the validation rows, and what takes most of its time (shares)."""
    model, tokenizer = contender.load(case["model"], None)
    given = (model.to(device), tokenizer, case["validation"], beams, device)
    with count_operations() as counter:
        contender.validate(*given)
    with new_profiler(device) as profiler:
        contender.validate(*given)
    return {"flops": counter.get_total_flops()} | shares_of(profiler, device)


def new_profiler(device):
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU])


def shares_of(profiler, device):
    """The ten operations that took most time, and what the device can do at best."""
    import torch

    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    total = sum(spent.values())
    most = sorted(spent, key=spent.get, reverse=True)[:10]
    return {
        "shares": {name: round(spent[name] / total, 4) for name in most},
        "matmul_flops_a_second": matmul_peak(torch, device),
    }


def matmul_peak(torch, device):
    """Floating point operations a second of the fastest of some large matrix multiplications, in training's type: by
    torch's own product and, on a CPU, by oneDNN's."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    products = [torch.matmul] + ([onednn_product] if device == "cpu" and torch.backends.mkldnn.is_available() else [])
    seconds = []
    for product in products:
        for _ in range(10):
            started = time.perf_counter()
            product(a, b)[0, 0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def count_operations():
    """torch's counter of floating point operations, which does not know oneDNN's product by itself."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def of_linear(x, weight, *_, out_shape=None, **__):
        return 2 * x[0] * x[1] * weight[0]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: of_linear})


def reset_peak_memory(device):
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM back to what is held now


def peak_memory_mb(device):
    """Peak memory since it was reset: of the GPU, or of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def learn_to_answer(contender, model_folder, rows, repeats, folder, device):
    """Train the stand-in until its answers are as long as real ones, since their length decides the validation's time.

    Random weights learn this from few rows that are seen often. From as many different rows they learn to give the same
    answer to every question.
    """
    model, tokenizer = contender.load(model_folder, None)
    order = list(range(len(rows))) * repeats
    contender.train(model, tokenizer, rows, order, BATCH_SIZE, 1e-3, 0, device)
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def until_first_step(name, case):
    """Seconds that a new Python process of a contender takes until its first step is done."""
    code = (
        f"import os; from benchmarks.{name} import start\n"
        "from torch.optim.optimizer import register_optimizer_step_post_hook as at_step\n"
        f"at_step(lambda *_: os._exit(0)); start({case['model']!r}, {case['data']!r}); os._exit(1)"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    shutil.rmtree(Path(case["model"]).parent / "started", ignore_errors=True)
    return seconds


# ----------------------------------------------------------------------------------------------- the run as a whole


def in_turns(rounds, call):
    """{contender: [what `call(contender)` returned in each round]}; the order of the contenders changes each round."""
    results = {name: [] for name in CONTENDERS}
    names = list(CONTENDERS)
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
        self.pools = {name: ProcessPoolExecutor(1, mp_context=context) for name in CONTENDERS}
        return self

    def __exit__(self, *_):
        for pool in self.pools.values():
            pool.shutdown()

    def ask(self, name, job, *args):
        return self.pools[name].submit(in_contender, name, job, *args).result()


def measure(case, methods, options, found):
    """Measure a case for each contender, except for figures that `found` has, and add them. Yields after each part.

    found: {"padding": ..., method: ..., "validation": ...}.
    """
    device, rounds = options.device, options.rounds
    found["rows"] = {role: len(case[role]) for role in ("train", "validation")}
    passes = found.setdefault("validation", {})
    with Pools() as pools:
        found["padding"] = {name: pools.ask(name, padding, case) for name in CONTENDERS}
        chosen = {name: pools.ask(name, typical_batches, case, case["batches"]) for name in CONTENDERS}
        for beams in (1, 5):
            if f"{beams}_beams" in passes:
                continue
            say(f"{case['name']}: validation with {beams} beam{'s' * (beams > 1)}")
            results = in_turns(rounds, lambda name: pools.ask(name, validate, case, beams, device))  # noqa: B023
            answers = {name: runs[0]["predictions"] for name, runs in results.items()}
            if device == "cpu" and len({tuple(texts) for texts in answers.values()}) > 1:
                raise SystemExit(f"the contenders' answers differ with {beams} beams: {answers}")
            figures = {
                name: {"seconds": median_of(runs, "seconds"), "seconds_of_each_round": [run["seconds"] for run in runs]}
                for name, runs in results.items()
            }
            profile = pools.ask("this_project", where_validation_time_goes, case, beams, device)
            reached = profile["flops"] / figures["this_project"]["seconds"] / profile["matmul_flops_a_second"]
            passes[f"{beams}_beams"] = figures | {"profile": profile | {"share_of_matmul_peak": reached}}
            found["words_an_answer"] = statistics.mean(len(text.split()) for text in answers["this_project"])
            yield
    for method, lora in methods.items():
        if method in found:
            continue
        say(f"{case['name']}, {method}: training")
        with Pools() as pools:
            results = in_turns(rounds, lambda name: pools.ask(name, train, case, chosen[name], lora, device))  # noqa: B023
            given = (case, chosen["this_project"], lora, device)
            profile = pools.ask("this_project", where_training_time_goes, *given)
        figures = {}
        for name, runs in results.items():
            timed = chosen[name][SKIPPED:]
            tokens = sum(count for count, _ in token_counter(case)(timed).values())
            seconds = median_of(runs, "seconds")
            assert {run["steps"] for run in runs} == {len(timed)}
            figures[name] = {
                "examples_a_second": len(timed) * BATCH_SIZE / seconds,
                "tokens_a_second": tokens / seconds,
                "peak_memory_mb": median_of(runs, "peak_memory_mb"),
                "seconds_of_each_round": [run["seconds"] for run in runs],
            }
        steps_a_second = figures["this_project"]["examples_a_second"] / BATCH_SIZE
        reached = profile["flops_a_step"] * steps_a_second / profile["matmul_flops_a_second"]
        found[method] = figures | {"profile": profile | {"share_of_matmul_peak": reached}}
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
            given = (str(untrained), rows["train"][:64], 38, str(MODELS / "learned"), options.device)
            pools.ask("this_project", learn_to_answer, *given)
        (MODELS / "learned").rename(folder)
        shutil.rmtree(untrained)
    flan = {
        "name": "flan-t5-small's shape",
        "model": str(folder),
        "data": str(data),
        "train": rows["train"],
        "validation": rows["validation"][:96],
        "batches": 12,
    }
    return [flan, demo]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; in each, every contender runs once (default: 5)")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the demo model's F1 (default: 20)")
    parser.add_argument("--quick", action="store_true", help="the demo's model on a few rows, one round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of what is written (default: %(default)s)")
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.quick:
        options.rounds = 1
    import accelerate
    import peft
    import torch
    import transformers

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    found = {
        "device": device_name(options.device),
        "date": date.today().isoformat(),
        "quick": options.quick,
        "rounds": options.rounds,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)},
        "threads": torch.get_num_threads(),
        "commit": git_commit(),
    }
    kept = options.out / "unfinished.json"  # from an interrupted run of this command: not measured again
    if kept.exists() and (before := json.loads(kept.read_text())).items() >= found.items():
        found = before
    found.setdefault("cases", {})

    def keep():
        options.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))

    cases = make_cases(options)
    for case in cases:
        lora = DEMO_LORA if case["name"] == "demo model" else LORA
        figures = found["cases"].setdefault(case["name"], {})
        for _ in measure(case, {"full": None, "LoRA": lora}, options, figures):
            keep()
        if "data" in case and "start_up_seconds" not in found:
            say(f"{case['name']}: start-up")
            seconds = in_turns(3, lambda name: until_first_step(name, case))  # noqa: B023
            found["start_up_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
            keep()
    seeds, epochs = ([0], 1) if options.quick else (list(range(options.seeds)), 3)
    f1 = found.setdefault("f1", {"epochs": epochs, "seeds": seeds})
    with Pools() as pools:
        for method, lora in {"full": None, "LoRA": DEMO_LORA}.items():
            if method in f1:
                continue
            say(f"demo model, {method}: F1")
            given = (cases[-1], lora, DEMO_LR[method])
            f1[method] = {
                name: [pools.ask(name, quality, *given, seed, epochs, options.device) for seed in seeds]
                for name in CONTENDERS
            }
            keep()
    kept.unlink()
    for path in write(found, options.out):
        say(f"wrote {path}")


if __name__ == "__main__":
    main()
