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
    evaluate,
    load_model_and_tokenizer,
    load_sem_model,
    load_tweet_qa,
    quiet_libraries,
)

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
    add("--model_name", default="google/flan-t5-small", help="T5 model: hub id or folder")
    add("--dataset", default="ucsbnlp/tweet_qa", help="hub id, or folder of train/validation/test files")
    add("--save_dir", default=save_dir, help="run folder to write; must not hold anything yet")
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
    add("--max_eval_samples", type=at_least(1), help="evaluate the first so many rows only (default: all)")
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
    # fused: one kernel for all weights, a third faster than the default in a whole step on a CPU.
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


def run(args, wrap=None):
    """The whole run: load, train, evaluate, save; see the design of a run folder in README.md.

    args: the parsed command line. wrap: None to train every weight, or a function (model, args) -> PeftModel.
    Raises InputError before anything is written for whatever in args cannot be used.
    """
    started = time.perf_counter()
    quiet_libraries()
    run_folder.check_is_free(args.save_dir)
    accelerator = Accelerator(
        mixed_precision=choose_precision(args.precision),
        gradient_accumulation_steps=args.grad_accum_steps,
        # The order of epoch e depends on the seed and e alone, not on what else draws random numbers.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    device = accelerator.device

    splits = load_tweet_qa(args.dataset)
    train_rows = splits["train"][: args.max_train_samples]
    validation_rows = splits["validation"][: args.max_eval_samples]
    sem_model = load_sem_model(args.sem_model, device) if accelerator.is_main_process else None
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(args.model_name)
    if wrap:
        model = wrap(model, args)

    train_data, validation_data = (
        TweetQADataset(rows, tokenizer, args.max_input_len, args.max_target_len)
        for rows in (train_rows, validation_rows)
    )
    collate = build_collate_fn(tokenizer, pad_to_multiple_of=8 if device.type == "cuda" else None)
    train_loader = DataLoader(train_data, args.batch_size, shuffle=True, collate_fn=collate)
    validation_loader = DataLoader(validation_data, args.eval_batch_size, collate_fn=collate)

    batches = math.ceil(len(train_loader) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches / args.grad_accum_steps)
    optimizer, schedule = build_optimizer(model, args.lr, steps_per_epoch * args.epochs)
    record = run_folder.new_run("lora" if wrap else "full", args, device, model)
    # The schedule is not prepared: it counts optimizer steps, whatever the number of processes.
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, train_loader, validation_loader
    )

    say = accelerator.print
    share = record["trainable_parameters"] / record["total_parameters"]
    say(f"data: {args.dataset} | {len(train_rows)} training rows | {len(validation_rows)} validation rows")
    say(
        f"model: {args.model_name} | {record['trainable_parameters']:,} of {record['total_parameters']:,} parameters"
        f" trained ({share:.2%}) | {record['device']}, {accelerator.mixed_precision.replace('no', 'fp32')}"
    )
    say(
        f"steps: {steps_per_epoch} an epoch | effective batch"
        f" {args.batch_size * args.grad_accum_steps * accelerator.num_processes}"
    )
    for name, data in (("training", train_data), ("validation", validation_data)):
        if data.cut_inputs or data.cut_targets:
            say(
                f"note: {data.cut_inputs} {name} prompts were cut to {args.max_input_len} tokens (--max_input_len),"
                f" {data.cut_targets} answers to {args.max_target_len} (--max_target_len)"
            )

    folder = Path(args.save_dir)
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
                "samples_per_sec": round(len(train_rows) / seconds, 3),
                "peak_vram_mb": round(peak_vram_mb, 1),
            }
        )
        improved = metrics["f1"] > state.best_f1
        if improved:
            state.best_f1, state.best_epoch = metrics["f1"], state.epoch
            record["best_epoch"] = state.best_epoch
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

    # The figures that count come from what stands on disk, which is what will be used.
    del model, optimizer, schedule  # the schedule holds the optimizer, and that the weights and its two moments
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    best_model, best_tokenizer = run_folder.load_checkpoint(folder, args.model_name)
    final, predictions = evaluate(
        best_model.to(device),
        validation_loader,
        best_tokenizer,
        device,
        sem_model,
        beams=args.final_beams,
        max_target_len=args.max_target_len,
        accelerator=accelerator,
        title="final evaluation",
    )
    say(f"[final] {metrics_line(final)} | epoch {state.best_epoch}, {args.final_beams} beams | {folder}")
    if accelerator.is_main_process:
        record |= {
            "final": final,
            "wall_time_seconds": round(time.perf_counter() - started, 2),
            "peak_ram_mb": run_folder.peak_ram_mb(),
            "peak_vram_mb": max(row["peak_vram_mb"] for row in epoch_rows),
            "checkpoint_bytes": run_folder.checkpoint_bytes(folder),
        }
        run_folder.write_predictions(folder / "validation_predictions.csv", predictions)
        run_folder.write_model_card(folder, record)
        run_folder.write_run_json(folder, record)
    accelerator.end_training()


def metrics_line(metrics):
    """The metrics of `evaluate` as the console shows them."""
    similarity = "n/a" if metrics["avg_sem_sim"] is None else f"{metrics['avg_sem_sim']:.4f}"
    return f"val_loss={metrics['val_loss']:.4f} F1={metrics['f1']:.4f} avg_sem_sim={similarity}"


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
