"""Fine-tune every weight of a T5 model on TweetQA.

    python tweet_qa_main.py --model_name google/flan-t5-small --epochs 5 --batch_size 8 --lr 1e-4 \\
        --save_dir flan_t5_tweetqa_ckpt

Without the hub, give folders: --model_name FOLDER --dataset FOLDER --sem_model FOLDER (or none). For a short look at
how a run goes: --max_train_samples 64 --max_eval_samples 32 --epochs 2.

After each epoch the validation split is scored and the best epoch by F1 is kept in --save_dir; at the end that
checkpoint is read back and scored with --final_beams. `tweet_qa_main_lora.py` is the same run with a LoRA adapter.

A run that was interrupted goes on, to the same result, with the same command and --resume. Exit codes: 0 done, 1 the
run could not go on or be uploaded, 2 something given is wrong and nothing was begun, 130 and 143 interrupted by Ctrl-C
and SIGTERM.
"""

import argparse
import copy
import ctypes
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

# torch reads it with its first large tensor: memory in huge pages is there at once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    find_executable_batch_size,
    set_seed,
)
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

import run_folder
from helper_functions import (
    LABEL_PAD,
    InputError,
    LengthGroupedSampler,
    RunError,
    TweetQADataset,
    build_collate_fn,
    by_length,
    chunks,
    count_repeats,
    evaluate,
    hold_out,
    largest_batch,
    leaderboard_scores,
    load_model_and_tokenizer,
    load_sem_model,
    load_tweet_qa,
    memory_of,
    one_line,
    predict,
    quiet_libraries,
    training_memory,
    tweet_key,
    use_fast_dropout,
    use_gradient_checkpointing,
)

DEFAULT_MODEL = "google/flan-t5-small"
WEIGHT_DECAY = 0.01  # on matrices only: norms have one-dimensional weights, and pulling those to zero hurts
WARMUP = 0.06  # share of all steps in which the learning rate rises; T5 without any is unstable in the first steps
MAX_GRAD_NORM = 1.0
# The CPU gains nothing from more, and in a beam search of 128 it loses; a GPU is kept busier (not measured yet).
EVAL_BATCH_SIZE = {"cpu": 32, "cuda": 64}
HEAP_GAPS = 0.5  # of the activations: gaps on the CPU, where freed memory is kept (0.1 to 0.9 of them were measured)
# What decides which rows are scored, and how.
SCORING = ("dataset", "max_eval_samples", "holdout", "seed", "drop_leaked")
SCORING += ("max_input_len", "max_target_len", "final_beams", "precision", "sem_model")
MAX_SKIPPED = 10  # steps in a row whose loss or gradient is not finite, after which the run stops


# ----------------------------------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong argument gets one line, without the usage."""

    def error(self, message):
        said = f"error: {' '.join(message.splitlines())} (--help lists the arguments)\n"
        self.exit(2, said if is_first_process() else None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default that there is, and the description as it is written."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def at_least(low):
    """An argparse type: a whole number from `low` up, as long as the libraries can count with it."""

    def parse(text):
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, not {text!r}")
        if number >= 2**32:
            raise argparse.ArgumentTypeError(f"must be below 2**32, not {text!r}")
        return number

    return parse


def positive_float(text):
    """An argparse type: a finite number above 0."""
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def path_or_id(text):
    """An argparse type: what can be a path or a hub id. Whether it is one is seen when it is used."""
    try:
        text.encode("utf-8")  # it is printed, and written to run.json
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, not to be reached, a NUL byte, not UTF-8
        raise argparse.ArgumentTypeError(f"cannot be used: {one_line(error)}") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def build_parser(description, lr, save_dir):
    """The arguments of both scripts, with the defaults in which they differ."""
    parser = Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--model_name", type=path_or_id, help=f"T5 model: hub id or folder (default: {DEFAULT_MODEL})")
    add(
        "--dataset",
        type=path_or_id,
        default="ucsbnlp/tweet_qa",
        help="hub id, or folder of train/validation/test files",
    )
    add(
        "--save_dir",
        type=path_or_id,
        default=save_dir,
        help="run folder to write; a new run's must not hold anything yet",
    )
    add("--resume", action="store_true", help="go on with the interrupted run in --save_dir, to the same result")
    add("--overwrite", action="store_true", help="replace the run in --save_dir, once the input is checked")
    add("--save_every", type=at_least(0), default=0, help="steps between saves for --resume; 0: epochs only")
    add("--seeds", type=at_least(0), nargs="+", help="run these in turn, in SAVE_DIR/seed_N (default: --seed alone)")
    add("--eval_only", action="store_true", help="train nothing: evaluate the checkpoint in --save_dir once more")
    add("--epochs", type=at_least(1), default=5, help="passes over the training rows")
    add("--batch_size", type=at_least(1), default=8, help="training examples per forward pass")
    add("--grad_accum_steps", type=at_least(1), default=1, help="batches per optimizer step")
    add("--auto_batch_size", action="store_true", help="where memory runs out, halve the batch and double its number")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time: activations are computed twice")
    add("--lr", type=positive_float, default=lr, help="peak learning rate; 6%% linear warm-up, then linearly to 0")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on GPUs made for it")
    add("--seed", type=at_least(0), default=42, help="of data order, dropout and adapter")
    add("--patience", type=at_least(0), default=0, help="stop after so many epochs without a better F1; 0: never")
    add(
        "--eval_batch_size",
        type=at_least(1),
        help="validation examples per batch (default: {cpu} on the CPU, {cuda} on a GPU)".format(**EVAL_BATCH_SIZE),
    )
    add("--eval_beams", type=at_least(1), default=1, help="beams after each epoch; 1 is greedy")
    add("--final_beams", type=at_least(1), default=5, help="beams of the final evaluation")
    add(
        "--max_input_len",
        type=at_least(8),
        default=256,
        help="most tokens of a prompt; TweetQA's longest has 141, or 449 of ByT5's bytes",
    )
    add(
        "--max_target_len",
        type=at_least(2),
        default=32,
        help="most tokens of an answer, trained and generated; TweetQA's longest has 33, or 69 of ByT5's bytes",
    )
    add(
        "--sem_model",
        type=path_or_id,
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="hub id, folder, or none to switch off",
    )
    add("--max_train_samples", type=at_least(1), help="train on the first so many rows only (default: all)")
    add("--max_eval_samples", type=at_least(1), help="evaluate the first so many rows of a split (default: all)")
    add("--holdout", type=at_least(0), default=0, help="training rows to set aside, by tweet, and score at the end")
    add("--drop_leaked", action="store_true", help="drop training rows whose tweet stands in validation or test too")
    trackers = ["tensorboard", "wandb", "trackio", "none"]
    add("--report_to", choices=trackers, default="none", help="where losses, metrics, arguments and plots go as well")
    add("--push_to_hub", metavar="REPO", help="upload what the run saved to this hub repository (default: no upload)")
    return parser


def as_it_was_scored(parser, argv, args):
    """The arguments of --eval_only: those of SCORING that the command line leaves out are the run's in --save_dir."""
    run = run_folder.read_run_json(args.save_dir)
    if not run:
        return args
    parser.set_defaults(**{name: run["args"][name] for name in SCORING if run["args"].get(name) is not None})
    return parser.parse_args(argv)


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
    """Where the training loop stands; with weights, optimizer and random generators it is all that --resume needs."""

    epoch: int = 0  # epochs finished, their evaluation included
    step: int = 0  # optimizer steps done, skipped ones included: the schedule goes by it
    best_f1: float = -1.0
    best_epoch: int = 0
    batch_size: int = 0  # --batch_size, or what --auto_batch_size made of it
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    epoch_rows: list = field(default_factory=list)  # of metrics.csv
    step_rows: list = field(default_factory=list)  # of train_loss.csv
    epoch_tokens: list = field(default_factory=list)  # target tokens of each step of the epoch that has begun
    epoch_seconds: float = 0.0  # that epoch has taken so far
    wall_seconds: float = 0.0  # the run has taken so far


@dataclass
class StopWish:
    """A signal that came in. There is one for the process, as there is one handler for each of its signals."""

    signal: int = 0
    hold: bool = False  # whether what runs now is to be finished first, see `unbroken`


STOP = StopWish()


def note_signal(number, frame):
    """Handler of SIGINT and SIGTERM: end as soon as the work may be left, and at once with a second SIGINT.

    Not with a second SIGTERM: a cluster sends it to every process, and the launcher of several passes its own on.
    """
    if STOP.signal:
        if number == signal.SIGINT:
            os._exit(128 + number)
        return
    STOP.signal = number
    if not STOP.hold:
        raise KeyboardInterrupt


@contextmanager
def signals_noted():
    """Let `note_signal` handle the signals, and whatever did so before handle them again afterwards."""
    STOP.signal, STOP.hold = 0, False
    before = {number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def unbroken(accelerator=None):
    """Finish this block before a signal that comes in meanwhile ends the run.

    accelerator: given by all of several processes, which then leave together after the block. One that left alone would
    let the others wait for it in vain.
    """
    held, STOP.hold = STOP.hold, True
    try:
        yield
    finally:
        STOP.hold = held
    if not held and (_all_told_to_stop(accelerator) if accelerator else STOP.signal):
        raise KeyboardInterrupt


@contextmanager
def memory_for(flags):
    """Raise RunError where memory runs out; `flags` says with which arguments, and which to lower."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise RunError(f"out of memory with {flags}") from None


def keep_memory():
    """Let glibc keep memory that was freed, for the next step to use: left alone it gives gradients back to the system
    after each step and fetches them again, which takes up to a tenth of a step on the CPU. Elsewhere it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks, which end with the block
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the heap cut while less than 2 GB at its end are free


def estimate_memory(args, model, data, collate, batch_size, accelerator):
    """Say what memory training will take at its peak, and what to lower if there is not as much.

    model: as it will be trained, still on the CPU. Returns MB, to be held against the peak that is measured, or None
    where it cannot be estimated.
    """
    device = accelerator.device
    batch = collate([data[index] for index in largest_batch(model, LengthGroupedSampler(data, batch_size, args.seed))])
    accumulate = accelerator.gradient_accumulation_steps > 1
    try:
        parts = training_memory(model, batch, device, accelerator.autocast, accumulate)
    except Exception as error:  # no run ends for want of an estimate: a model may do what torch cannot without memory
        voice(accelerator)(f"note: memory is not estimated ({type(error).__name__}: {one_line(error)})")
        return None
    if device.type == "cpu":
        parts["gaps between them"] = int(HEAP_GAPS * parts["activations"])
        for weight in model.parameters():  # they are read from their file with the first use of each page of 4 kB
            weight.detach().flatten()[::1024].sum()
    held, there_is = memory_of(device)
    # On the CPU what the process holds has the weights in it.
    parts["the process itself"] = max(0, held - parts["weights"]) if device.type == "cpu" else held
    for line in memory_lines(parts, there_is, args.gradient_checkpointing):
        voice(accelerator)(line)
    return round(sum(parts.values()) / 2**20)  # as it is printed


def memory_lines(parts, there_is, checkpointing):
    """What to say of memory: a line with the sum of `parts` ({name: bytes}), and one more if it exceeds `there_is`.

    checkpointing: whether --gradient_checkpointing is given already.
    """
    peak = sum(parts.values())
    shares = ", ".join(f"{name} {part / 2**20:,.0f}" for name, part in parts.items())
    yield f"memory: about {peak / 2**20:,.0f} MB at the peak ({shares}) of {there_is / 2**20:,.0f} MB"
    if peak > there_is:
        add = "" if checkpointing else " add --gradient_checkpointing,"
        yield (
            f"warning: training may run out of memory: lower --batch_size and raise --grad_accum_steps as much,{add} or"
            " lower --max_input_len"
        )


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


def train_epoch(model, loader, optimizer, schedule, accelerator, state, save=None, save_every=0):
    """Train on every example once, or on those that are left of an epoch that state.epoch_tokens says has begun.

    Returns the epoch's rows of train_loss.csv, which stand in `state` too, and its mean loss (nats a token).

    --grad_accum_steps batches make one optimizer step. Its loss is the mean over all their target tokens, whatever
    batch they stand in: the same step as one large batch would make, also for a last group of fewer batches.

    A step whose loss or gradient is not finite changes nothing but the learning rate, which goes on as planned.
    Raises RunError after MAX_SKIPPED such steps in a row.

    save: a function that saves the state, called every `save_every` steps (0: never). Once a signal has come in, the
    step is finished and KeyboardInterrupt raised, with everything in `state` as a save needs it.
    """
    model.train()
    measured, noted = [], time.perf_counter()  # `measured` stays on the device, for reading it would wait for it
    size = accelerator.gradient_accumulation_steps
    steps, done = math.ceil(len(loader) / size), len(state.epoch_tokens)
    loader.set_epoch(state.epoch)  # the order of the examples depends on the seed and this number alone
    groups = _groups(_counted_batches(loader, done * size, accelerator), size)
    title, bar_off = f"epoch {state.epoch + 1}", _no_bar(accelerator)
    for group in tqdm(groups, title, steps, initial=done, leave=False, delay=1, unit="step", disable=bar_off):
        step_tokens = accelerator.reduce(sum(tokens for _, tokens in group))  # over all processes
        step_loss = 0
        for position, (batch, tokens) in enumerate(group, start=1):
            with accelerator.no_sync(model) if position < len(group) else nullcontext():
                with accelerator.autocast():  # a sharded model does not do it by itself
                    mean_loss = model(
                        input_ids=batch["input_ids"],
                        attention_mask=batch["attention_mask"],
                        labels=batch["labels"],
                        use_cache=False,  # a copy of keys and values that only a search has use for
                    ).loss
                loss = mean_loss * tokens / step_tokens
                # backward() divides by the accumulation steps and averages over processes; this loss needs neither.
                accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            step_loss = step_loss + loss.detach()
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        if accelerator.is_fsdp2:
            grad_norm = grad_norm.full_tensor()
        step_loss = accelerator.reduce(step_loss)
        if accelerator.scaler is None:
            # The fused AdamW leaves everything as it was where this is 1. The scaler of fp16 sets it by itself. An
            # `if` would have to wait for the device in each step.
            optimizer.optimizer.found_inf = 1.0 - (step_loss.isfinite() & grad_norm.isfinite()).float()
        measured.append((schedule.get_last_lr()[0], torch.stack([step_loss, grad_norm, step_tokens])))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        step = state.step + len(measured)
        due = save_every > 0 and step % save_every == 0
        note = due or step % MAX_SKIPPED == 0 or len(state.epoch_tokens) + len(measured) == steps
        # Of several processes all have to leave at the same step, and to ask the others is to wait for them.
        stop = (note or accelerator.num_processes == 1) and _all_told_to_stop(accelerator)
        if note or stop:
            _note_steps(state, measured, accelerator)
            state.epoch_seconds += time.perf_counter() - noted
            if stop:
                raise KeyboardInterrupt
            if due and save:
                save()
            noted = time.perf_counter()

    rows = [row for row in state.step_rows if row["epoch"] == state.epoch + 1]
    losses = torch.tensor([row["loss"] for row in rows], dtype=torch.double)
    tokens = torch.tensor(state.epoch_tokens, dtype=torch.double)
    used = losses.isfinite()
    return rows, float((losses * tokens)[used].sum() / tokens[used].sum())


def _note_steps(state, measured, accelerator):
    """Move what was measured of the last steps from the device into the state. Raises RunError, see `train_epoch`."""
    rates, values = [lr for lr, _ in measured], [values for _, values in measured]
    measured.clear()
    for lr, (loss, grad_norm, tokens) in zip(rates, torch.stack(values).tolist() if values else [], strict=True):
        state.step += 1
        row = {"step": state.step, "epoch": state.epoch + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        state.step_rows.append(row)
        state.epoch_tokens.append(tokens)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        run_folder.report(accelerator, "train", {name: row[name] for name in ("loss", "lr", "grad_norm")}, state.step)
        if state.skipped_in_a_row == MAX_SKIPPED:
            precision = accelerator.mixed_precision.replace("no", "fp32")
            raise RunError(
                f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row, the last of them step {state.step}"
                f" (learning rate {lr:.3g}, precision {precision}): begin again with a lower --lr or other --precision"
            )


def _all_told_to_stop(accelerator):
    """Whether a signal has come in, to this process or to another."""
    if accelerator.num_processes == 1:
        return bool(STOP.signal)
    return bool(accelerator.reduce(torch.tensor(float(STOP.signal), device=accelerator.device)).item())


def _counted_batches(loader, done, accelerator):
    """(batch, target tokens that count in it) of the batches of an epoch after the first `done`.

    So that every process has as many whole batches as the others, accelerate fills the last of them up with examples
    of the first ones. Those are not trained on again: their targets do not count.
    """
    per_batch = loader.total_batch_size // accelerator.num_processes
    for number, batch in enumerate(skip_first_batches(loader, done) if done else loader, start=done):
        before = (number * accelerator.num_processes + accelerator.process_index) * per_batch
        new = max(0, len(loader.dataset) - before)
        batch["labels"][max(new, 1) :] = LABEL_PAD  # one has to stay: a mean over no token is not a number
        yield batch, (batch["labels"] != LABEL_PAD).sum() * (new > 0)


def _groups(batches, size):
    """Batches in lists of `size`, the last one shorter if need be."""
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


def _no_bar(accelerator):
    """tqdm's `disable`: bars on the main process only, and (None) only where stderr is a terminal."""
    return None if accelerator.is_main_process else True


def sharding(precision):
    """accelerate's plugin for FSDP2 where the config of `accelerate launch` asks for sharding, else None.

    Raises InputError for what does not go with it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise InputError("accelerate's config shards with FSDP1: give fsdp_version 2, as benchmarks/fsdp2.yaml does")
    if precision == "fp16":
        raise InputError("--precision fp16 is not for sharded training: use bf16 or fp32")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(),  # float32 weights and gradients, and autocast, as without shards
        state_dict_type="FULL_STATE_DICT",  # of last/: the other kind would be read by unpickling it
        cpu_ram_efficient_loading=False,  # else all processes but one would evaluate a model without its weights
    )


def hollow_copy(model, device):
    """A copy of the model without the weights, which takes no memory. Weights that are shared will be so there too."""
    nothing = torch.empty(0, device=device)
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(nothing, p.requires_grad) for p in model.parameters()})


def fill(hollow, model):
    """Put the weights of the sharded model, whole, into its hollow copy. To be called by every process."""
    with unbroken():  # a process that left in the midst of it would let the others wait
        for whole, shard in zip(hollow.parameters(), model.parameters(), strict=True):
            whole.data = shard.detach().full_tensor().to(whole.device)


def empty(hollow):
    """Let go of the weights that `fill` put there."""
    for whole in hollow.parameters():
        whole.data = whole.new_empty(0)


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
    Raises InputError before anything is written for whatever in args cannot be used, RunError for what stops a run that
    has begun, and KeyboardInterrupt for a signal, see `note_signal`.
    """
    started = time.perf_counter()
    quiet_libraries()
    folder = Path(args.save_dir)
    method, former, saved = "lora" if wrap else "full", None, None
    if [args.eval_only, args.resume, args.overwrite].count(True) > 1:
        raise InputError("--eval_only, --resume and --overwrite exclude each other: give one of them")
    if args.eval_only:
        run_folder.check_holds_checkpoint(folder)
        record = run_folder.read_run_json(folder)
        if record and "base_dtype" in record["args"]:
            args.base_dtype = record["args"]["base_dtype"]  # which the checkpoint is loaded with
    elif args.resume:
        former = run_folder.check_can_go_on(folder, method, vars(args))
        if run_folder.is_finished(former):
            run_folder.remove_last(folder)  # where the run was killed in its very last moment
            upload = f"; {run_folder.upload_command(folder, args.push_to_hub)} uploads it" if args.push_to_hub else ""
            if is_first_process():
                print(f"{folder} holds this run, finished: there is nothing to resume{upload}")
            return
        saved = run_folder.read_loop(folder, LoopState)
    else:
        run_folder.check_is_free(folder, args.overwrite)
        if args.overwrite:
            inputs = {name: getattr(args, name) for name in ("model_name", "dataset", "sem_model")}
            run_folder.check_outlives_overwriting(folder, **inputs)
    run_folder.check_tracker(args.report_to)
    if args.push_to_hub is not None:
        run_folder.check_can_push(args.push_to_hub)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.auto_batch_size and processes > 1:
        raise InputError("--auto_batch_size is for one process: where one of several runs out of memory, all end")
    plugin = sharding(args.precision)
    accelerator = Accelerator(
        cpu=processes > 1 and not torch.cuda.is_available(),  # unless told so, accelerate would not connect them
        fsdp_plugin=plugin,
        mixed_precision=choose_precision(args.precision),
        gradient_accumulation_steps=args.grad_accum_steps,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=args.save_dir,
    )
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate takes the plugin on GPUs only. On CPUs FSDP2 works as well, and can be tried and tested there.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    device, say = accelerator.device, voice(accelerator)
    args.eval_batch_size = args.eval_batch_size or EVAL_BATCH_SIZE.get(device.type, EVAL_BATCH_SIZE["cpu"])

    rows, held, note = select_rows(args)
    if args.eval_only and args.holdout and record:
        before = (record.get("holdout") or {}).get("rows", held)  # not there yet if the run was interrupted
        chosen_by = ("holdout", "seed", "drop_leaked")
        if held != before or any(record["args"].get(name) != getattr(args, name) for name in chosen_by):
            raise InputError(
                f"--holdout {args.holdout}: these are not the rows that the run set aside before its training; leave"
                " --holdout, --seed and --drop_leaked out, or give --holdout 0 to score none"
            )
    sem_model = load_sem_model(args.sem_model, device) if accelerator.is_main_process else None
    set_seed(args.seed)
    if args.eval_only:
        base_dtype = getattr(args, "base_dtype", "fp32")
        model, tokenizer = run_folder.load_checkpoint(folder, args.model_name, base_dtype=base_dtype)
        if not record:  # someone else's checkpoint: there is no run to resume
            own_method = "lora" if hasattr(model, "peft_config") else "full"
            record = run_folder.new_run(own_method, args, device, model) | {"finished": True}
    else:
        args.model_name = args.model_name or DEFAULT_MODEL
        model, tokenizer = load_model_and_tokenizer(args.model_name)
        weights = run_folder.weights_sha256(model)
        model = wrap(model, args) if wrap else model
        record = run_folder.new_run(method, args, device, model)

    collate = build_collate_fn(tokenizer, pad_to_multiple_of=8 if device.type == "cuda" else None)
    loaders = {}
    for role, role_rows in rows.items():
        if role_rows:
            data = TweetQADataset(role_rows, tokenizer, args.max_input_len, args.max_target_len)
            if role == "train":
                loaders[role] = train_loader(data, args.batch_size, collate, args.seed)
            else:
                process = (accelerator.process_index, accelerator.num_processes)
                loaders[role] = eval_loader(data, args.eval_batch_size, collate, *process)
    if not args.eval_only:
        record["identity"] = run_folder.identity(loaders, weights, accelerator)
    if former:
        run_folder.check_is_same(folder, former.get("identity", {}), record["identity"])
        record |= {name: former[name] for name in ("started", "run_id") if name in former}
    if saved:
        started -= saved[0].wall_seconds
        if saved[0].best_epoch:
            run_folder.load_checkpoint(folder, args.model_name, cached=True)  # raises InputError where it is damaged

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
        models = [model]
        del model  # so that `models` alone holds it, and its memory can be used again
        train_what_fits(args, wrap, models, tokenizer, loaders, sem_model, accelerator, record, started, saved)
        # The figures that count come from what stands on disk, which is what will be used.
        accelerator.free_memory()
        clear_device_cache(garbage_collection=True)  # what the accelerator held can only go now
        accelerator.wait_for_everyone()
        try:
            model, tokenizer = run_folder.load_checkpoint(folder, args.model_name, cached=True)
        except InputError as error:  # it was there, and has been lost since
            raise RunError(str(error)) from None
    with memory_for(f"--eval_batch_size {args.eval_batch_size} and {args.final_beams} beams: lower --eval_batch_size"):
        final_pass(args, model.to(device), tokenizer, loaders, held, sem_model, accelerator, record)
    if accelerator.is_main_process:
        with unbroken():
            if args.eval_only:
                record["eval_only"] = vars(args)  # what the final metrics were made with; "args" is how it was trained
            else:
                record |= {
                    "finished": True,
                    "wall_time_seconds": round(time.perf_counter() - started, 2),
                    "peak_ram_mb": run_folder.peak_ram_mb(),
                    "checkpoint_bytes": run_folder.checkpoint_bytes(folder),
                }
            if not args.eval_only or (args.push_to_hub and record["best_epoch"]):
                run_folder.write_model_card(folder, record)
            run_folder.write_run_json(folder, record)
            if not args.eval_only:
                run_folder.remove_last(folder)
    run_folder.report_results(folder, accelerator, record)
    accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        say(f"uploaded: {run_folder.push(folder, args.push_to_hub)}")


def build_loader(data, batch_size, collate, sampler):
    """A DataLoader with a generator of its own.

    To begin a pass it draws from that one, and not from the generator of dropout: a run that is resumed in the middle
    of a pass begins that pass twice.
    """
    pin = torch.cuda.is_available()  # so that a batch is copied while the GPU works on the one before
    return DataLoader(
        data, batch_size, sampler=sampler, collate_fn=collate, generator=torch.Generator(), pin_memory=pin
    )


def train_loader(data, batch_size, collate, seed, processes=1):
    """A DataLoader of the training rows, whose order depends on the seed and the epoch alone.

    processes: how many will share its batches, one after the other. Those of a step are of like length together, and
    hold what one batch of as many times the size would hold in one process.
    """
    return build_loader(data, batch_size, collate, LengthGroupedSampler(data, batch_size * processes, seed))


def eval_loader(data, batch_size, collate, process=0, processes=1):
    """A DataLoader of what one of the processes evaluates of the rows, in order of length.

    A row stands in the same batch whatever the number of processes, so its scores are the same to the last digit. That
    all may have as many batches, some get the last one too, and `predict` drops what it has twice.
    """
    batches = chunks(by_length(data), batch_size)
    batches += batches[-1:] * (-len(batches) % processes)
    return build_loader(data, batch_size, collate, sum(batches[process::processes], []))


def unreadable_tweets(loaders, tokenizer):
    """How many distinct tweets have an <unk> in their prompt."""
    tweets = set()
    for loader in loaders.values():
        for row, ids in zip(loader.dataset.rows, loader.dataset.input_ids, strict=True):
            if tokenizer.unk_token_id in ids:
                tweets.add(tweet_key(row["Tweet"]))
    return len(tweets)


def train_what_fits(args, wrap, models, tokenizer, loaders, sem_model, accelerator, record, started, saved):
    """`train`; with --auto_batch_size once more from the start, with a smaller batch, each time that memory runs out.

    models: a list of the model alone. saved: None, or what `read_loop` gave of the run that is resumed.
    """
    state, schedule_state = saved or (LoopState(batch_size=args.batch_size), None)
    effective_batch = args.batch_size * args.grad_accum_steps

    def smaller():
        if not args.auto_batch_size or state.batch_size == 1:
            advice = "give a smaller model or --max_input_len" if state.batch_size == 1 else "add --auto_batch_size"
            raise RunError(
                f"out of memory with --batch_size {state.batch_size}: {advice}, or lower --batch_size and raise"
                " --grad_accum_steps as much"
            )
        factor = next(n for n in range(2, state.batch_size + 1) if state.batch_size % n == 0)  # 2, if it is even
        return state.batch_size // factor

    @find_executable_batch_size(starting_batch_size=state.batch_size, reduce_batch_size_fn=smaller)
    def attempt(batch_size):
        nonlocal state, schedule_state
        accelerator.gradient_accumulation_steps = effective_batch // batch_size
        if not models:  # memory ran out before: everything starts anew, as if this had been the batch size given
            voice(accelerator)(
                f"out of memory with a batch of {state.batch_size}: starting again with batches of {batch_size},"
                f" {effective_batch // batch_size} a step"
            )
            state, schedule_state = LoopState(batch_size=batch_size), None
            run_folder.end_tracking(accelerator)
            accelerator.free_memory()
            clear_device_cache(garbage_collection=True)  # what the accelerator held can only go now
            set_seed(args.seed)
            model, _ = load_model_and_tokenizer(args.model_name, cached=True)
            models.append(wrap(model, args) if wrap else model)
        train(args, models.pop(), tokenizer, loaders, sem_model, accelerator, record, started, state, schedule_state)

    attempt()


def train(args, model, tokenizer, loaders, sem_model, accelerator, record, started, state, schedule_state):
    """All epochs: train, score the validation split, keep the best epoch, and write down how it goes.

    state: where to begin. schedule_state: None for a new run, or the state of the schedule in last/, from which the
    rest is read too.
    """
    device, say, folder = accelerator.device, voice(accelerator), Path(args.save_dir)
    data, collate = loaders["train"].dataset, loaders["train"].collate_fn
    batches = math.ceil(math.ceil(len(data) / state.batch_size) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches / accelerator.gradient_accumulation_steps)
    use_fast_dropout(model)
    if args.gradient_checkpointing:
        use_gradient_checkpointing(model)
    if device.type == "cpu":
        keep_memory()
    if accelerator.is_main_process and not accelerator.is_fsdp2:  # the estimate knows nothing of shards
        record["estimated_peak_mb"] = estimate_memory(args, model, data, collate, state.batch_size, accelerator)
    hollow = None
    if accelerator.is_fsdp2:
        # What is evaluated and saved: an ordinary model, whose passes no process has to make together with the others.
        hollow = hollow_copy(model, device)
        # One module in place of three with the same weight, of which only one could be sharded.
        model.set_input_embeddings(model.get_input_embeddings())
    optimizer, schedule = build_optimizer(model, args.lr, steps_per_epoch * args.epochs)
    # The schedule is not prepared: it counts optimizer steps, whatever the number of processes.
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, train_loader(data, state.batch_size, collate, args.seed, accelerator.num_processes)
    )
    if accelerator.num_processes > 1:  # dropout of its own for each
        set_seed(args.seed, device_specific=True)
    if schedule_state:
        run_folder.load_last(folder, accelerator, model, optimizer)
        schedule.load_state_dict(schedule_state)
    effective_batch = state.batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    resumed = f" | resumed after step {state.step}" if args.resume else ""
    sharded = ""
    if accelerator.is_fsdp2:
        record["parameters_per_process"] = sum(p.to_local().numel() for p in model.parameters())
        sharded = f" | sharded, {record['parameters_per_process']:,} parameters a process"
    say(f"steps: {steps_per_epoch} an epoch | effective batch {effective_batch}{sharded}{resumed}")
    record["effective_batch_size"] = effective_batch
    if accelerator.is_main_process and not schedule_state:
        with unbroken():
            run_folder.begin(folder, record)
    accelerator.wait_for_everyone()
    if not (folder / "run.json").exists():
        raise RunError(f"--save_dir {folder} is not the same folder in all processes: it must be on a shared disk")
    if report := run_folder.begin_tracking(folder, accelerator, record, state):
        say(f"report: {report}")

    def save():
        state.wall_seconds = time.perf_counter() - started
        loop = {"state": vars(state), "schedule": schedule.state_dict()}
        run_folder.save_last(folder, accelerator, loop, model, optimizer)

    def out_of_patience():
        return args.patience and state.epoch - state.best_epoch >= args.patience

    while state.epoch < args.epochs and not out_of_patience():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            # Several processes leave together: at a step of the epoch, see `train_epoch`, or at its end.
            with unbroken(accelerator) if accelerator.num_processes > 1 else nullcontext():
                with unbroken():
                    rows, train_loss = train_epoch(
                        model, loader, optimizer, schedule, accelerator, state, save, args.save_every
                    )
                seconds = state.epoch_seconds
                peak_vram_mb = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
                say(
                    f"[epoch {state.epoch + 1}] time={seconds:.1f}s | steps/sec={len(rows) / seconds:.2f}"
                    f" | peak VRAM={peak_vram_mb:.0f} MB"
                )
                if hollow:
                    with memory_for("all weights on each device, as the evaluation needs them: give a smaller model"):
                        fill(hollow, model)
                whole = hollow or accelerator.unwrap_model(model)
                with memory_for(f"--eval_batch_size {args.eval_batch_size}: lower it"):
                    metrics, _ = evaluate(
                        whole,
                        loaders["validation"],
                        tokenizer,
                        device,
                        sem_model,
                        beams=args.eval_beams,
                        max_target_len=args.max_target_len,
                        accelerator=accelerator,
                        title=f"epoch {state.epoch + 1}, validation",
                        with_scores=False,
                    )
                with unbroken():
                    say(f"[epoch {state.epoch + 1}] {metrics_line(metrics)}")
                    state.epoch, state.epoch_tokens, state.epoch_seconds = state.epoch + 1, [], 0.0
                    state.epoch_rows.append(
                        {
                            "epoch": state.epoch,
                            "train_loss": train_loss,
                            "val_loss": metrics["val_loss"],
                            "em": metrics["em"],
                            "f1": metrics["f1"],
                            "avg_sem_sim": metrics["avg_sem_sim"],
                            "epoch_seconds": round(seconds, 3),
                            "steps_per_sec": round(len(rows) / seconds, 4),
                            "samples_per_sec": round(len(data) / seconds, 3),
                            "peak_vram_mb": round(peak_vram_mb, 1),
                        }
                    )
                    improved = metrics["f1"] > state.best_f1
                    if improved:
                        state.best_f1, state.best_epoch = metrics["f1"], state.epoch
                    note_progress(record, state)
                    run_folder.report(accelerator, "epoch", state.epoch_rows[-1], state.step)
                    if accelerator.is_main_process:
                        if improved:
                            run_folder.save_checkpoint(folder, whole, tokenizer, record)
                        run_folder.write_table(folder / "metrics.csv", state.epoch_rows)
                        run_folder.write_table(folder / "train_loss.csv", state.step_rows)
                        run_folder.draw_curves(folder, state.epoch_rows, state.step_rows)
                        run_folder.write_run_json(folder, record)
                    if hollow:
                        empty(hollow)
                    # Last, so that what last/ speaks of is there. A run that is killed before makes all of it again.
                    save()
        except KeyboardInterrupt:  # a signal; the state is whole at each point where one is let through
            with unbroken():  # another process's signal may come in later than what it told this one
                save()
            raise
    if out_of_patience():
        say(f"stopped: F1 has not been better than epoch {state.best_epoch}'s for {args.patience} epochs")
    note_progress(record, state)


def voice(accelerator):
    """What to print with: the first process speaks for all. accelerate's own print speaks once on each machine."""
    return print if accelerator.is_main_process else lambda *texts: None


def is_first_process():
    """Whether this is the process that speaks; to be asked where there may be no Accelerator."""
    return os.environ.get("RANK", "0") == "0"


def note_progress(record, state):
    """Put what run.json says about the training into its record."""
    record |= {
        "best_epoch": state.best_epoch,
        "steps": state.step,
        "peak_vram_mb": max(row["peak_vram_mb"] for row in state.epoch_rows),
        "skipped_steps": state.skipped,
        "batch_size_used": state.batch_size,
    }


def final_pass(args, model, tokenizer, loaders, held, sem_model, accelerator, record):
    """Score the checkpoint with --final_beams on validation and on the held-out rows, and answer the test split.

    A test split with answers is scored too. Writes the prediction files, the breakdown and the leaderboard's file, and
    puts the metrics into `record` as "final", "holdout" and "test".
    """
    folder, say = Path(args.save_dir), voice(accelerator)
    options = {"beams": args.final_beams, "max_target_len": args.max_target_len, "accelerator": accelerator}
    results = {}  # {role: (metrics, frame)} of the labeled splits
    for role in ("validation", "holdout", "test"):
        if role not in loaders:
            continue
        loader = loaders[role]
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


def seed_runs(args, wrap):
    """The arguments of each run of --seeds, in SAVE_DIR/seed_N, with --resume for those that were begun before.

    Raises InputError before the first of them starts if one of them cannot be run or gone on with.
    """
    if args.eval_only or args.overwrite:
        raise InputError("--seeds goes with neither --eval_only nor --overwrite: give those with one --seed")
    if args.push_to_hub is not None:
        raise InputError(
            "--seeds does not go with --push_to_hub: a repository holds one run; upload one later (--eval_only)"
        )
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: each seed can be run only once")
    if Path(args.save_dir, "run.json").exists():
        raise InputError(f"--save_dir {args.save_dir} holds a run of its own: give --seeds another folder")
    runs = []
    for seed in args.seeds:
        one, folder = copy.deepcopy(args), Path(args.save_dir, f"seed_{seed}")
        one.seed, one.seeds, one.save_dir, one.resume = seed, None, str(folder), (folder / "run.json").exists()
        if one.resume:
            run_folder.check_can_go_on(folder, "lora" if wrap else "full", vars(one))
        else:
            run_folder.check_is_free(folder)
        runs.append(one)
    return runs


def way_on(args, wrap):
    """What is to be said of a run that ended early: how to go on with it."""
    if args.eval_only:
        return "nothing was trained"
    try:
        former = run_folder.check_can_go_on(args.save_dir, "lora" if wrap else "full", vars(args))
        saved = run_folder.read_loop(args.save_dir, LoopState)
    except InputError:
        return "there is nothing to resume"
    if run_folder.is_finished(former):
        return f"{args.save_dir} holds a finished run"
    if saved is None:
        return "nothing was saved yet, --resume starts from the beginning"
    return f"--resume goes on after step {saved[0].step}"


def run_from_command_line(parser, argv=None, wrap=None):
    """Parse argv and run. Returns the exit code: 0, or another after one line on stderr about why.

    1: a run that had begun could not go on, or be uploaded. 2: something given is wrong, and nothing was begun or
    changed. 130, 143: interrupted by Ctrl-C or SIGTERM.
    """
    args = parser.parse_args(argv)
    try:
        if args.eval_only:
            args = as_it_was_scored(parser, argv, args)
        with signals_noted():
            runs = seed_runs(args, wrap) if args.seeds else [args]
            for args in runs:  # noqa: B007 (what is said below is about the last of them)
                run(args, wrap)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return 0
    except InputError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"error: {error} | {way_on(args, wrap)}"
    except KeyboardInterrupt:
        code, message = 128 + (STOP.signal or signal.SIGINT), f"interrupted: {way_on(args, wrap)}"
    if is_first_process() or code == 1:  # what stops a run that has begun can come up in one process alone
        print(*message.splitlines(), file=sys.stderr)  # a name that it quotes can hold a line break
    return code


def main(argv=None):
    return run_from_command_line(build_parser(__doc__, lr=1e-4, save_dir="flan_t5_tweetqa_ckpt"), argv)


if __name__ == "__main__":
    sys.exit(main())
