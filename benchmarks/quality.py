"""Does a faster way of training cost quality? The same trainings, with and without it, over many paired seeds.

    python -m benchmarks.quality                                    # 50 seeds on the demo: about an hour on two cores
    python -m benchmarks.quality --data ../shared/tweet_qa --train_rows 2000 --seeds 10
    python -m benchmarks.quality --quick                            # checks that it works

Each variant trains the demo's T5 for three epochs with the scripts' own functions, full and LoRA. F1 is that of the
last epoch on the whole validation split, greedy: no row chooses anything. A variant and the baseline, random order in
float32, share their seeds, so that the difference of each seed is one draw, and Student's interval is that of its mean.
"""

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "demo"
EPOCHS, BATCH_SIZE, FIRST_SEED = 3, 8, 100
LR = {"full": 1e-3, "LoRA": 3e-3}
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]}
LOSS_ALLOWED, BOUND = 0.4, 1.0  # of the estimate and of the interval's lower end, in points of F1


@dataclass(frozen=True)
class Variant:
    name: str
    window: int  # batches of which the prompts are sorted by length; 1 is a random order
    precision: str = "no"


BASELINE = Variant("random order, float32", 1)
VARIANTS = (
    Variant("windows of 4 batches sorted by prompt, float32", 4),
    Variant("random order, bfloat16", 1, "bf16"),
)


def trainings(variant, method, seeds, folder, train_rows):
    """F1 (out of 100) after EPOCHS of training, for each seed. Run in a process of its own, on one core."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from benchmarks import this_project
    from helper_functions import LengthGroupedSampler, TweetQADataset, build_collate_fn, eval_loader, load_tweet_qa

    torch.set_num_threads(1)
    LengthGroupedSampler.WINDOW = variant.window
    accelerator, splits, scores = Accelerator(mixed_precision=variant.precision, cpu=True), load_tweet_qa(folder), []
    for seed in seeds:
        set_seed(seed)  # the adapter's first weights are random
        model, tokenizer = this_project.load(str(DEMO / "tiny-t5"), LORA if method == "LoRA" else None)
        data = TweetQADataset(splits["train"][:train_rows], tokenizer)
        this_project.fit(model, data, build_collate_fn(tokenizer), accelerator, BATCH_SIZE, LR[method], seed, EPOCHS)
        loader = eval_loader(TweetQADataset(splits["validation"], tokenizer), 32, build_collate_fn(tokenizer))
        metrics, _ = this_project.evaluate(
            model, loader, tokenizer, accelerator.device, accelerator=accelerator, with_scores=False
        )
        scores.append(100 * metrics["f1"])
        print(f"{variant.name}, {method}, seed {seed}: F1 {scores[-1]:.1f}", flush=True)
    return scores


def paired(scores, baseline):
    """{"mean", "low", "high"} of the differences of two lists of the same seeds: Student's 95 % interval."""
    from scipy import stats

    differences = [one - other for one, other in zip(scores, baseline, strict=True)]
    mean = sum(differences) / len(differences)
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=stats.sem(differences))
    return {"mean": mean, "low": float(low), "high": float(high)}


def table(found):
    lines = [
        f"F1 on {found['data']}, {found['seeds']} seeds, {found['date']}, {found['machine']}:",
        f"`{found['command']}`",
        "",
        "| | full | LoRA |",
        "| --- | --- | --- |",
    ]
    for variant in (BASELINE, *VARIANTS):
        cells = []
        for method in LR:
            scores = found["scores"][variant.name][method]
            mean = sum(scores) / len(scores)
            sd = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
            cells.append(f"{mean:.2f} ± {sd:.2f}")
        lines.append(f"| {variant.name} | {' | '.join(cells)} |")
    for variant in VARIANTS:
        cells = []
        for method in LR:
            difference = found["differences"][variant.name][method]
            within = difference["mean"] >= -LOSS_ALLOWED and difference["low"] > -BOUND
            verdict = "no loss" if within else "a loss is not excluded"
            cells.append("{mean:+.2f} ({low:+.2f} to {high:+.2f})".format(**difference) + f", {verdict}")
        lines.append(f"| {variant.name}, minus baseline (95 %) | {' | '.join(cells)} |")
    note = f"± is the standard deviation over seeds. No loss: the estimate is above -{LOSS_ALLOWED} and the interval"
    return "\n".join([*lines, "", f"{note} excludes a loss of more than {BOUND}.", ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(DEMO / "tweets"), help="folder of a data set")
    parser.add_argument("--train_rows", type=int, help="its first N training rows only")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.md")
    args = parser.parse_args(argv)
    count = 2 if args.quick else args.seeds
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    given = {"seeds": seeds, "folder": args.data, "train_rows": 64 if args.quick else args.train_rows}
    from benchmarks.run import device_name

    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {
            (variant.name, method): pool.submit(trainings, variant, method, **given)
            for variant in (BASELINE, *VARIANTS)
            for method in LR
        }
        scores = {}
        for (name, method), job in jobs.items():
            scores.setdefault(name, {})[method] = job.result()
    differences = {
        variant.name: {method: paired(scores[variant.name][method], scores[BASELINE.name][method]) for method in LR}
        for variant in VARIANTS
    }
    rows = f", first {given['train_rows']} training rows" if given["train_rows"] else ""
    found = {
        "command": "python -m benchmarks.quality" + "".join(f" {word}" for word in argv or []),
        "data": f"{Path(args.data).name}'s validation split{rows}",
        "seeds": count,
        "date": date.today().isoformat(),
        "machine": device_name("cpu"),
        "scores": scores,
        "differences": differences,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(table(found))
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
