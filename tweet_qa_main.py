"""Fine-tune every weight of a T5 model on TweetQA.

    python tweet_qa_main.py --model_name google/flan-t5-small --epochs 5 --batch_size 8 --lr 1e-4 \\
        --save_dir flan_t5_tweetqa_ckpt

Without the hub, give folders: --model_name FOLDER --dataset FOLDER --sem_model FOLDER (or none). For a short look at
how a run goes: --max_train_samples 64 --max_eval_samples 32 --epochs 2.

After each epoch the validation split is scored and the best epoch by F1 is kept in --save_dir; at the end that
checkpoint is read back and scored with --final_beams. `tweet_qa_main_lora.py` is the same run with a LoRA adapter.
"""

import argparse
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

import run_folder
from helper_functions import (
    LABEL_PAD,
    InputError,
    TweetQADataset,
    build_collate_fn,
    count_repeats,
    evaluate,
    hold_out,
    leaderboard_scores,
    load_model_and_tokenizer,
    load_sem_model,
    load_tweet_qa,
    predict,
    quiet_libraries,
    tweet_key,
)

DEFAULT_MODEL = "google/flan-t5-small"
WEIGHT_DECAY = 0.01  # on matrices only: norms have one-dimensional weights, and pulling those to zero hurts
WARMUP = 0.06  # share of all steps in which the learning rate rises; T5 without any is unstable in the first steps
MAX_GRAD_NORM = 1.0


# ----------------------------------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong argument gets one line, without the usage."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the arguments)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default that there is, and the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def at_least(low):
    """An argparse type: a whole number from `low` up."""

    def parse(text):
        try:
            if int(text) >= low:
                return int(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, not {text!r}")

    return parse


def positive_float(text):
    """An argparse type: a finite number above 0."""
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def seed_number(text):
    """An argparse type: a seed, as numpy takes it."""
    if at_least(0)(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2**32, not {text!r}")
    return int(text)


def build_parser(description, lr, save_dir):
    """The arguments of both scripts, with the defaults in which they differ."""
    parser = Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model_name", help=f"T5 model: hub id or folder (default: {DEFAULT_MODEL})")
    add("--dataset", default="ucsbnlp/tweet_qa", help="hub id, or folder of train/validation/test files")
    add("--save_dir", default=save_dir, help="run folder to write; must not hold anything yet")
    add("--eval_only", action="store_true", help="train nothing: evaluate the checkpoint in --save_dir once more")
    add("--epochs", type=at_least(1), default=5, help="passes over the training rows")
    add("--batch_size", type=at_least(1), default=8, help="training examples per forward pass")
    add("--grad_accum_steps", type=at_least(1), default=1, help="batches per optimizer step")
    add("--lr", type=positive_float, default=lr, help="peak learning rate; 6%% linear warm-up, then linearly to 0")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on GPUs made for it")
    add("--seed", type=seed_number, default=42, help="of data order, dropout and adapter")
    add("--patience", type=at_least(0), default=0, help="stop after so many epochs without a better F1; 0: never")
    add("--eval_batch_size", type=at_least(1), default=32, help="validation examples per batch")
    add("--eval_beams", type=at_least(1), default=1, help="beams after each epoch; 1 is greedy")
    add("--final_beams", type=at_least(1), default=5, help="beams of the final evaluation")
    add("--max_input_len", type=at_least(8), default=256, help="most tokens of a prompt; TweetQA's longest has 141")
    add("--max_target_len", type=at_least(2), default=32, help="most tokens of an answer, trained and generated")
    add("--sem_model", default="sentence-transformers/all-MiniLM-L6-v2", help="hub id, folder, or none to switch off")
    add("--max_train_samples", type=at_least(1), help="train on the first so many rows only (default: all)")
    add("--max_eval_samples", type=at_least(1), help="evaluate the first so many rows of a split (default: all)")
    add("--holdout", type=at_least(0), default=0, help="training rows to set aside, by tweet, and score at the end")
    add("--drop_leaked", action="store_true", help="drop training rows whose tweet stands in validation or test too")
    return parser


def choose_precision(precision):
    """accelerate's name for --precision. Raises InputError for fp16 without a GPU."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a CUDA GPU: use fp32 or bf16")
    if precision == "auto":
        native_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if native_bf16 else "fp32"  # never fp16: T5's activations overflow it
    return "no" if precision == "fp32" else precision


# ------------------------------------------------------------------------------------------------------ training


@dataclass
class LoopState:
    """Where the training loop stands."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimizer steps done
    best_f1: float = -1.0
    best_epoch: int = 0


def build_optimizer(model, lr, total_steps):
    """(AdamW over the trainable weights, linear schedule with warm-up to be stepped after each optimizer step)."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    # fused: one kernel for all weights in place of several operations a weight.
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    return optimizer, get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * total_steps), total_steps)


def train_epoch(model, loader, optimizer, schedule, accelerator, state):
    """Train on every example once. Returns the epoch's rows of train_loss.csv and its mean loss (nats a token).

    --grad_accum_steps batches make one optimizer step. Its loss is the mean over all their target tokens, whatever
    batch they stand in: the same step as one large batch would make, also for a last group of fewer batches.
    """
    model.train()
    learning_rates, measured = [], []  # of each step; `measured` stays on the device, reading it would wait for it
    steps = math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
    groups = _groups(loader, accelerator.gradient_accumulation_steps)
    title = f"epoch {state.epoch + 1}"
    for group in tqdm(groups, title, steps, leave=False, delay=1, unit="step", disable=_no_bar(accelerator)):
        tokens = [(batch["labels"] != LABEL_PAD).sum() for batch in group]
        step_tokens = accelerator.reduce(sum(tokens))  # over all processes
        step_loss = 0
        for position, batch in enumerate(group, start=1):
            with accelerator.no_sync(model) if position < len(group) else nullcontext():
                mean_loss = model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
                ).loss
                loss = mean_loss * tokens[position - 1] / step_tokens
                # backward() divides by the accumulation steps and averages over processes; this loss needs neither.
                accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            step_loss = step_loss + loss.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        learning_rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflowed
            schedule.step()
        optimizer.zero_grad()
        measured.append(torch.stack([accelerator.reduce(step_loss), grad_norm, step_tokens]))

    rows = []
    for lr, (loss, grad_norm, _) in zip(learning_rates, torch.stack(measured).tolist(), strict=True):
        state.step += 1
        rows.append({"step": state.step, "epoch": state.epoch + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm})
    losses, _, tokens = torch.stack(measured).double().unbind(1)
    return rows, float((losses * tokens).sum() / tokens.sum())


def _groups(loader, size):
    """The loader's batches in lists of `size`, the last one shorter if need be."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def _no_bar(accelerator):
    """tqdm's `disable`: bars on the main process only, and (None) only where stderr is a terminal."""
    return None if accelerator.is_main_process else True


def select_rows(args):
    """Load the data and choose the rows of each role.

    Returns ({"train", "validation", "holdout", "test": rows}, the numbers of the held-out rows in the train file
    counted from 0, a line that says what was found). holdout and test are empty where there is none.
    """
    splits = load_tweet_qa(args.dataset)
    train = list(enumerate(splits["train"]))
    tweets = {split: [tweet_key(row["Tweet"]) for row in split_rows] for split, split_rows in splits.items()}
    validation_tweets, test_tweets = set(tweets["validation"]), set(tweets.get("test", []))
    train_tweets = set(tweets["train"])
    in_train = [sum(tweet in train_tweets for tweet in tweets.get(split, [])) for split in ("validation", "test")]
    note = (
        f"check: {count_repeats(splits['train'])} training rows repeat | the tweets of {in_train[0]} validation and"
        f" {in_train[1]} test rows also stand in train"
    )
    if args.drop_leaked:
        kept = [(n, row) for n, row in train if tweet_key(row["Tweet"]) not in validation_tweets | test_tweets]
        note += f" ({len(train) - len(kept)} training rows dropped)"
        train = kept
        if not train:
            raise InputError("--drop_leaked leaves no training row: every tweet stands in validation or test too")
    held = []
    if args.holdout:  # a tweet that validation chooses the checkpoint by would not be unseen
        places = set(hold_out([row for _, row in train], args.holdout, args.seed, validation_tweets))
        held = [pair for place, pair in enumerate(train) if place in places]
        train = [pair for place, pair in enumerate(train) if place not in places]
    rows = {
        "train": [row for _, row in train][: args.max_train_samples],
        "validation": splits["validation"][: args.max_eval_samples],
        "holdout": [row for _, row in held],
        "test": splits.get("test", [])[: args.max_eval_samples],
    }
    return rows, [n for n, _ in held], note


def run(args, wrap=None):
    """The whole run: load, train, evaluate, save; README.md describes the folder that it leaves.

    args: the parsed command line. wrap: None to train every weight, or a function (model, args) -> PeftModel.
    Raises InputError before anything is written for whatever in args cannot be used.
    """
    started = time.perf_counter()
    quiet_libraries()
    folder = Path(args.save_dir)
    if args.eval_only:
        run_folder.check_holds_checkpoint(folder)
        record = run_folder.read_run_json(folder)
    else:
        run_folder.check_is_free(folder)
    accelerator = Accelerator(
        mixed_precision=choose_precision(args.precision),
        gradient_accumulation_steps=args.grad_accum_steps,
        # The order of epoch e depends on the seed and e alone, not on what else draws random numbers.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    device, say = accelerator.device, accelerator.print

    rows, held, note = select_rows(args)
    sem_model = load_sem_model(args.sem_model, device) if accelerator.is_main_process else None
    set_seed(args.seed)
    if args.eval_only:
        model, tokenizer = run_folder.load_checkpoint(folder, args.model_name)
        record = record or run_folder.new_run("lora" if hasattr(model, "peft_config") else "full", args, device, model)
    else:
        args.model_name = args.model_name or DEFAULT_MODEL
        model, tokenizer = load_model_and_tokenizer(args.model_name)
        model = wrap(model, args) if wrap else model
        record = run_folder.new_run("lora" if wrap else "full", args, device, model)

    collate = build_collate_fn(tokenizer, pad_to_multiple_of=8 if device.type == "cuda" else None)
    loaders = {}
    for role, role_rows in rows.items():
        if role_rows:
            data = TweetQADataset(role_rows, tokenizer, args.max_input_len, args.max_target_len)
            batch_size = args.batch_size if role == "train" else args.eval_batch_size
            loaders[role] = DataLoader(data, batch_size, shuffle=role == "train", collate_fn=collate)

    share = record["trainable_parameters"] / record["total_parameters"]
    say(f"data: {args.dataset} | " + " | ".join(f"{len(role_rows)} {role} rows" for role, role_rows in rows.items()))
    say(f"{note} | {unreadable_tweets(loaders, tokenizer)} tweets hold what the tokenizer cannot read (<unk>)")
    say(
        f"model: {folder if args.eval_only else args.model_name} | {record['trainable_parameters']:,} of"
        f" {record['total_parameters']:,} parameters trained ({share:.2%}) | {record['device']},"
        f" {accelerator.mixed_precision.replace('no', 'fp32')}"
    )
    for role, loader in loaders.items():
        if loader.dataset.cut_inputs or loader.dataset.cut_targets:
            say(
                f"note: {loader.dataset.cut_inputs} {role} prompts were cut to {args.max_input_len} tokens"
                f" (--max_input_len), {loader.dataset.cut_targets} answers to {args.max_target_len} (--max_target_len)"
            )

    if not args.eval_only:
        train(args, model, tokenizer, loaders, sem_model, accelerator, record)
        # The figures that count come from what stands on disk, which is what will be used.
        del model
        accelerator.free_memory()
        accelerator.wait_for_everyone()
        model, tokenizer = run_folder.load_checkpoint(folder, args.model_name, cached=True)
    final_pass(args, model.to(device), tokenizer, loaders, held, sem_model, accelerator, record)
    if accelerator.is_main_process:
        if args.eval_only:
            record["eval_only"] = vars(args)  # what the final metrics were made with; "args" is how it was trained
        else:
            record |= {
                "wall_time_seconds": round(time.perf_counter() - started, 2),
                "peak_ram_mb": run_folder.peak_ram_mb(),
                "checkpoint_bytes": run_folder.checkpoint_bytes(folder),
            }
            run_folder.write_model_card(folder, record)
        run_folder.write_run_json(folder, record)
    accelerator.end_training()


def unreadable_tweets(loaders, tokenizer):
    """How many distinct tweets have an <unk> in their prompt."""
    tweets = set()
    for loader in loaders.values():
        for row, ids in zip(loader.dataset.rows, loader.dataset.input_ids, strict=True):
            if tokenizer.unk_token_id in ids:
                tweets.add(tweet_key(row["Tweet"]))
    return len(tweets)


def train(args, model, tokenizer, loaders, sem_model, accelerator, record):
    """All epochs: train, score the validation split, keep the best epoch, and write down how it goes."""
    device, say, folder = accelerator.device, accelerator.print, Path(args.save_dir)
    batches = math.ceil(len(loaders["train"]) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches / args.grad_accum_steps)
    optimizer, schedule = build_optimizer(model, args.lr, steps_per_epoch * args.epochs)
    # The schedule is not prepared: it counts optimizer steps, whatever the number of processes.
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, loaders["train"], loaders["validation"]
    )
    examples = len(train_loader.dataset)
    effective_batch = args.batch_size * args.grad_accum_steps * accelerator.num_processes
    say(f"steps: {steps_per_epoch} an epoch | effective batch {effective_batch}")

    state, epoch_rows, step_rows = LoopState(), [], []
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_run_json(folder, record)

    while state.epoch < args.epochs:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        epoch_started = time.perf_counter()
        new_rows, train_loss = train_epoch(model, train_loader, optimizer, schedule, accelerator, state)
        seconds = time.perf_counter() - epoch_started
        peak_vram_mb = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
        state.epoch += 1
        step_rows += new_rows
        say(
            f"[epoch {state.epoch}] time={seconds:.1f}s | steps/sec={len(new_rows) / seconds:.2f}"
            f" | peak VRAM={peak_vram_mb:.0f} MB"
        )

        metrics, _ = evaluate(
            accelerator.unwrap_model(model),
            validation_loader,
            tokenizer,
            device,
            sem_model,
            beams=args.eval_beams,
            max_target_len=args.max_target_len,
            accelerator=accelerator,
            title=f"epoch {state.epoch}, validation",
        )
        say(f"[epoch {state.epoch}] {metrics_line(metrics)}")
        epoch_rows.append(
            {
                "epoch": state.epoch,
                "train_loss": train_loss,
                "val_loss": metrics["val_loss"],
                "em": metrics["em"],
                "f1": metrics["f1"],
                "avg_sem_sim": metrics["avg_sem_sim"],
                "epoch_seconds": round(seconds, 3),
                "steps_per_sec": round(len(new_rows) / seconds, 4),
                "samples_per_sec": round(examples / seconds, 3),
                "peak_vram_mb": round(peak_vram_mb, 1),
            }
        )
        improved = metrics["f1"] > state.best_f1
        if improved:
            state.best_f1, state.best_epoch = metrics["f1"], state.epoch
        record |= {
            "best_epoch": state.best_epoch,
            "peak_vram_mb": max(row["peak_vram_mb"] for row in epoch_rows),
        }
        if accelerator.is_main_process:
            if improved:
                run_folder.save_checkpoint(folder, accelerator.unwrap_model(model), tokenizer, record)
            run_folder.write_table(folder / "metrics.csv", epoch_rows)
            run_folder.write_table(folder / "train_loss.csv", step_rows)
            run_folder.draw_curves(folder, epoch_rows, step_rows)
            run_folder.write_run_json(folder, record)
        if args.patience and state.epoch - state.best_epoch >= args.patience:
            say(f"stopped: F1 has not been better than epoch {state.best_epoch}'s for {args.patience} epochs")
            break


def final_pass(args, model, tokenizer, loaders, held, sem_model, accelerator, record):
    """Score the checkpoint with --final_beams on validation and on the held-out rows, and answer the test split.

    A test split with answers is scored too. Writes the prediction files, the breakdown and the leaderboard's file, and
    puts the metrics into `record` as "final", "holdout" and "test".
    """
    folder, say = Path(args.save_dir), accelerator.print
    options = {"beams": args.final_beams, "max_target_len": args.max_target_len, "accelerator": accelerator}
    results = {}  # {role: (metrics, frame)} of the labeled splits
    for role in ("validation", "holdout", "test"):
        if role not in loaders:
            continue
        loader = accelerator.prepare(loaders[role])
        given = (model, loader, tokenizer, accelerator.device)
        if loader.dataset.labels is None:
            answers = predict(*given, **options, title=role)["prediction"]
        else:
            results[role] = evaluate(*given, sem_model, **options, title=role)
            answers = results[role][1]["prediction"]
        if role == "test" and accelerator.is_main_process:
            run_folder.write_test_answers(folder / "test_answers.json", loader.dataset.rows, answers)
    if not accelerator.is_main_process:
        return

    add_leaderboard_scores(results)
    epoch = f" | epoch {record['best_epoch']}" if record["best_epoch"] else ""
    for role, (metrics, frame) in results.items():
        title = "final" if role == "validation" else role
        say(f"[{title}] {metrics_line(metrics)}{epoch}, {args.final_beams} beams | {folder}")
        record[title] = {"rows": held, "metrics": metrics} if role == "holdout" else metrics
        run_folder.write_predictions(folder / f"{role}_predictions.csv", frame)
    metrics, frame = results["validation"]
    if metrics["meteor"] is None:
        say("note: METEOR is left out, since it needs Java and none runs here")
    table = run_folder.breakdown(frame)
    run_folder.write_table(folder / "breakdown.csv", table)
    run_folder.draw_breakdown(folder / "breakdown.png", table, metrics["f1"])


def add_leaderboard_scores(results):
    """Add bleu1, rougeL and meteor (None without Java) to the metrics and frames {role: (metrics, frame)}.

    All splits are scored at once: METEOR takes longer to start than to score them.
    """
    frames = [frame for _, frame in results.values()]
    predictions = [text for frame in frames for text in frame["prediction"]]
    scores = leaderboard_scores(predictions, [references for frame in frames for references in frame["references"]])
    start = 0
    for metrics, frame in results.values():
        for name in ("bleu1", "rougeL", "meteor"):
            metrics[name] = None
            if name in scores:
                frame[name] = scores[name][start : start + len(frame)]
                metrics[name] = float(frame[name].mean())
        start += len(frame)


def metrics_line(metrics):
    """The metrics of `evaluate` as the console shows them; those of the final evaluation have some more."""
    shown = {"val_loss": "val_loss", "f1": "F1", "avg_sem_sim": "avg_sem_sim"}
    if "bleu1" in metrics:
        shown |= {"em": "EM", "bleu1": "BLEU-1", "rougeL": "ROUGE-L", "meteor": "METEOR"}
    values = ((label, metrics[name]) for name, label in shown.items())
    return " ".join(f"{label}={'n/a' if value is None else f'{value:.4f}'}" for label, value in values)


def run_from_command_line(parser, argv=None, wrap=None):
    """Parse argv and run. Returns the exit code: 0, or 2 after one line on stderr about what was wrong."""
    args = parser.parse_args(argv)
    try:
        run(args, wrap)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv=None):
    return run_from_command_line(build_parser(__doc__, lr=1e-4, save_dir="flan_t5_tweetqa_ckpt"), argv)


if __name__ == "__main__":
    sys.exit(main())
