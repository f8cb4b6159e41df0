"""What a contender's process is asked to do for `benchmarks.run`: each job gets the contender's module and measures it.

A contender has `load`, `epoch_order`, `train`, `validate` and `start`, see `plain_loop.py`; CTranslate2, which does not
train, has `load`, `validate` and `answer`.
"""

import importlib
import random
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from pipeline.fast_cpu import onednn_product

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 8
SKIPPED = 2  # first steps of a round, in which memory is allocated and kernels are chosen: they are not timed


def in_contender(name, job, *args, **options):
    """Call `job` with the contender's module: what a process of the pool runs."""
    return job(importlib.import_module(f"benchmarks.{name}"), *args, **options)


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


def train(contender, case, batches, lora, device, precision):
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
    contender.train(model, tokenizer, case["train"], order, BATCH_SIZE, 1e-4, 0, device, precision)
    hook.remove()
    steps = [end - start for start, end in pairwise(ends)][SKIPPED - 1 :]
    return {"seconds": sum(steps), "steps": len(steps), "peak_memory_mb": peak_memory_mb(device)}


def validate(contender, case, beams, device, precision, **options):
    """Seconds, metrics and predictions of a pass over the validation rows. options: of the contender's `load`."""
    model, tokenizer = contender.load(case["model"], None, **options)
    if device != "cpu":
        model.to(device)
    started = time.perf_counter()
    metrics, predictions = contender.validate(model, tokenizer, case["validation"], beams, device, precision)
    return {"seconds": time.perf_counter() - started, "metrics": metrics, "predictions": predictions}


def answer(contender, case, beams, **options):
    """Seconds and answers to the case's many questions, from text to text, on the CPU. options: of `load`."""
    model, tokenizer = contender.load(case["model"], None, **options)
    questions, tweets = ([row[name] for row in case["asked"]] for name in ("Question", "Tweet"))
    contender.answer(model, tokenizer, questions[:BATCH_SIZE], tweets[:BATCH_SIZE], beams)  # it loads what it needs
    started = time.perf_counter()
    answers = contender.answer(model, tokenizer, questions, tweets, beams)
    return {"seconds": time.perf_counter() - started, "answers": answers}


def quality(contender, case, lora, lr, seed, epochs, device, precision):
    """F1 on the validation rows after training on all the rows `epochs` times. On one thread: others run beside it."""
    import torch

    torch.set_num_threads(1)
    model, tokenizer = contender.load(case["model"], lora)
    orders = [[p for batch in epoch(contender, case, 100 * seed + n) for p in batch] for n in range(epochs)]
    contender.train(model, tokenizer, case["train"], sum(orders, []), BATCH_SIZE, lr, seed, device, precision)
    return contender.validate(model, tokenizer, case["validation"], 1, device, precision)[0]["f1"]


def where_training_time_goes(contender, case, batches, lora, device, precision):
    """Floating point operations of a training step, and the operations that take most of its time (shares)."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def given(batches):
        order = [position for batch in batches for position in batch]
        return case["train"], order, BATCH_SIZE, 1e-4, 0, device, precision

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


def where_validation_time_goes(contender, case, beams, device, precision):
    """Floating point operations of a pass over the validation rows, and what takes most of its time (shares)."""
    model, tokenizer = contender.load(case["model"], None)
    given = (model.to(device), tokenizer, case["validation"], beams, device, precision)
    with count_operations() as counter:
        contender.validate(*given)
    with new_profiler(device) as profiler:
        contender.validate(*given)
    return {"flops": counter.get_total_flops()} | shares_of(profiler, device)


def new_profiler(device):
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU])


def shares_of(profiler, device):
    """{"shares": of the time, for the ten operations that took most of it}."""
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    total = sum(spent.values())
    most = sorted(spent, key=spent.get, reverse=True)[:10]
    return {"shares": {name: round(spent[name] / total, 4) for name in most}}


def matmul_peak(_, device, precision, seconds=1.0):
    """Floating point operations a second of the fastest large matrix multiplication in float32 or bfloat16: torch's own
    product and, on a CPU, oneDNN's, of some sizes. seconds: that each of them is tried for, since others may disturb.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    products = [torch.matmul] + ([onednn_product] if device == "cpu" and torch.backends.mkldnn.is_available() else [])
    peak = 0.0
    for size in (8192,) if device == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        for product in products:
            began = ended = time.perf_counter()
            while ended - began < seconds:
                started = time.perf_counter()
                product(a, b)[0, 0].item()  # waits for a GPU
                ended = time.perf_counter()
                peak = max(peak, 2 * size**3 / (ended - started))
    return peak


def computes_in_bf16():
    """Whether this CPU has instructions for bfloat16; another one emulates it, many times as slowly."""
    import torch

    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


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


def learn_to_answer(contender, model_folder, rows, repeats, folder, device, precision):
    """Train the stand-in until its answers are as long as real ones, since their length decides the validation's time.

    Random weights learn this from few rows that are seen often. From as many different rows they learn to give the same
    answer to every question.
    """
    model, tokenizer = contender.load(model_folder, None)
    order = list(range(len(rows))) * repeats
    contender.train(model, tokenizer, rows, order, BATCH_SIZE, 1e-3, 0, device, precision)
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
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    shutil.rmtree(Path(case["model"]).parent / "started", ignore_errors=True)
    return seconds
