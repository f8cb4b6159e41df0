"""Fine-tune every weight of a T5 model on TweetQA.

    python tweet_qa_main.py --model_name google/flan-t5-small --epochs 5 --batch_size 8 --lr 1e-4 \\
        --save_dir flan_t5_tweetqa_ckpt

Without the hub, give folders: --model_name FOLDER --dataset FOLDER --sem_model FOLDER (or none). For a first short run:
--max_train_samples 64 --max_eval_samples 32 --epochs 2.

After each epoch the validation split is scored, and the best epoch by F1 is kept in --save_dir. At the end that
checkpoint is read back and scored with --final_beams. `tweet_qa_main_lora.py` is the same run with a LoRA adapter.

An interrupted run continues, to the same result, with the same command and --resume.
"""

import argparse
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# torch reads this when it allocates its first large tensor: huge pages are faster to obtain.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
import pipeline  # noqa: F401, I001 (before the libraries, which look for the home folder)

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from helper_functions import (
    PROMPT,
    InputError,
    RunError,
    evaluate,
    load_model_and_tokenizer,
    load_sem_model,
    make_loaders,
    predict,
    quiet_libraries,
    train_loader,
)
from pipeline import checkpoint, devices, figures, interrupts, lock, memory, publish, resume, run_folder, trackers
from pipeline.arguments import build_parser, precision_as_typed, with_defaults
from pipeline.console import describe, show_any_character
from pipeline.data import select_rows
from pipeline.fast_cpu import convert_frozen, keep_memory, use_fast_training
from pipeline.leaderboard import with_leaderboard_scores
from pipeline.metrics import metrics_line
from pipeline.optimizers import build_optimizer, step_if_finite
from pipeline.probe import epoch_column, kept, measure_before, measure_checkpoint, read_probe, tokenized
from pipeline.resume import LoopState
from pipeline.step_plan import plan_steps
from pipeline.t5 import packed_rows, target_logits, use_gradient_checkpointing

MAX_GRAD_NORM = 1.0  # gradients are clipped to it: a rare large one would undo many steps
MAX_SKIPPED = 10  # steps in a row whose loss or gradient is not finite, after which the run stops


def main(argv=None):
    return run_from_command_line(build_parser(__doc__, lr=1e-4, save_dir="flan_t5_tweetqa_ckpt"), argv)


def run_from_command_line(parser, argv=None, wrap=None, instead=None):
    """Parse argv and run. Returns the exit code: 0, or another after one line on stderr that says why.

    wrap: None to train every weight, or a function (model, args) -> PeftModel. instead: None, or a function (parser,
    argv) that does another job in place of a run if argv asks for it, and returns whether it did.
    """
    show_any_character()
    args = parser.parse_args(argv)
    method = "lora" if wrap else "full"
    try:
        if instead and instead(parser, argv):
            return 0
        if args.eval_only:
            args = resume.with_the_runs_scoring(parser, argv, args)
        args = resume.with_the_runs_holdout(args)
        with interrupts.handled():
            for args in resume.seed_runs(args, method) if args.seeds else [args]:  # noqa: B020 (messages name the last)
                run(args, wrap)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return 0
    except InputError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"error: {error} | {resume.how_to_resume(args, method)}"
    except KeyboardInterrupt:
        code, message = interrupts.exit_code(), f"interrupted: {resume.how_to_resume(args, method)}"
    if devices.is_first_process() or code == 1:  # what stops a run can happen in one process alone
        print(*message.splitlines(), file=sys.stderr)  # a name that it quotes can contain a line break
    return code


# ---------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Setup:
    """What every part of a run needs."""

    args: argparse.Namespace
    folder: Path  # --save_dir
    accelerator: Accelerator
    tokenizer: object
    loaders: dict  # {"train", "validation" and, where there are rows, "holdout", "test": DataLoader}
    held_out: list  # the numbers of the held-out rows in the train file, counted from 0
    content: dict  # {argument: hash of what its path or hub id holds}
    sem_model: object  # a SentenceTransformer in the main process, or None
    probe: object  # a tokenized Probe, or None
    say: object  # print in the main process, nothing in the others


def run(args, wrap=None):
    """One whole run: train and evaluate, or only evaluate; README.md describes the folder that it writes.

    args: the parsed command line. wrap: see `run_from_command_line`.
    Raises InputError before anything is written if an argument or an input cannot be used, RunError for what stops a
    run that has started, and KeyboardInterrupt for a signal.
    """
    started = time.perf_counter()
    quiet_libraries()
    if [args.eval_only, args.resume, args.overwrite].count(True) > 1:
        raise InputError("--eval_only, --resume and --overwrite exclude each other: use only one of them")
    trackers.check_tracker(args.report_to)
    if args.push_to_hub is not None:
        publish.check_can_push(args.push_to_hub)
    # Of several processes the first one holds the lock for all. A folder that must exist already is not created.
    must_be_there = args.resume or (args.eval_only and (wrap or not args.model_name))
    there = Path(args.save_dir).is_dir() or not must_be_there
    with lock.only_writer(args.save_dir) if there and devices.is_first_process() else nullcontext():
        if args.eval_only:
            evaluate_only(args, wrap)
        else:
            train_and_evaluate(args, wrap, started)


def train_and_evaluate(args, wrap, started):
    """Train, keep the best epoch, and score it once more from disk. started: perf_counter() when the run started."""
    folder, method = Path(args.save_dir), "lora" if wrap else "full"
    former, saved = resume.former_run(args, method)
    if former and run_folder.is_finished(former):
        return resume.say_nothing_to_resume(args)
    setup, model, note = set_up(args, lambda args: fresh_model(args, wrap))
    args, accelerator = setup.args, setup.accelerator
    start = run_folder.describe_run(setup, method, model, PROMPT)
    start |= {"identity": resume.identity(setup), "train_rows": len(setup.loaders["train"].dataset)}
    if former:
        start |= resume.same_start(folder, former, start)
    if saved:
        started -= saved.state.wall_seconds
        if saved.state.best_epoch:
            checkpoint.load_checkpoint(folder, args.model_name, cached=True)  # raises InputError if it is damaged
        kept(folder, former, setup.probe)  # the same
    plan = plan_steps(args, start["train_rows"], accelerator.num_processes, saved.state.batch_size if saved else None)
    describe(setup, start, args.model_name, note)
    while True:
        try:
            training = train(setup, model, plan, start=start, started=started, saved=saved)
            break
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        # Outside of `except`, whose error would keep the memory. Restart as if the smaller batch size had been given.
        smaller = plan.with_smaller_batches(allowed=args.auto_batch_size)
        setup.say(
            f"out of memory with a batch of {plan.batch_size}: restarting with batches of {smaller.batch_size},"
            f" {smaller.accumulation} per step"
        )
        plan, model, saved = smaller, None, None
        trackers.end_tracking(accelerator)
        memory.free_memory(accelerator)
        set_seed(args.seed)
        model, *_ = fresh_model(args, wrap, cached=True)

    # The final figures are of the checkpoint on disk, which is what will be used.
    model = None
    memory.free_memory(accelerator)
    accelerator.wait_for_everyone()
    try:
        model, _ = checkpoint.load_checkpoint(folder, args.model_name, cached=True)
    except InputError as error:  # it was complete before the training, and has been damaged since
        raise RunError(str(error)) from None
    results, record = final_evaluation(setup, model, start | training), None
    if accelerator.is_main_process:
        end = {
            "finished": True,
            "wall_time_seconds": round(time.perf_counter() - started, 2),
            "peak_ram_mb": max(training["peak_ram_mb"], run_folder.peak_ram_mb() or 0) or None,
            "checkpoint_bytes": checkpoint.checkpoint_bytes(folder),
        }
        record = run_folder.run_record(start, training=training, results=results, end=end)
        with interrupts.deferred():
            publish.write_model_card(folder, record)
            run_folder.write_run_json(folder, record)
            run_folder.remove_last(folder)
    trackers.report_results(folder, accelerator, record)
    publish.upload(setup)


def evaluate_only(args, wrap):
    """Score the checkpoint in --save_dir, of a run or of another origin, and write the results there.

    If there is none, score --model_name as it is, in a new folder: the run of method "base", to compare others with.
    """
    folder = Path(args.save_dir)
    former = run_folder.read_run_json(folder)
    untrained = resume.scores_untrained(args, former, "lora" if wrap else "full")
    if not untrained:
        checkpoint.check_has_checkpoint(folder)
    if former and former["prompt"] != PROMPT:
        made = "scored" if untrained else "trained"
        raise InputError(f"--save_dir {folder} was {made} with another prompt, {former['prompt']!r}: restore PROMPT")

    def load(args):
        if untrained:
            return fresh_model(args, wrap=None)
        base_dtype = getattr(args, "base_dtype", "fp32")
        return *checkpoint.load_checkpoint(folder, args.model_name, base_dtype=base_dtype), None

    setup, model, note = set_up(args, load)
    args = setup.args
    if untrained:
        record = run_folder.describe_run(setup, "base", model, PROMPT)
        resume.check_same_model(args, former, record)
    elif former:
        record = former
        if args.holdout:
            resume.check_were_held_out(args, setup.held_out, former)
    else:  # the checkpoint comes from elsewhere, so it has no record yet
        start = run_folder.describe_run(setup, "lora" if hasattr(model, "peft_config") else "full", model, PROMPT)
        record = run_folder.run_record(start, end={"finished": True})
    record = record | kept(folder, former, setup.probe)
    describe(setup, record, args.model_name if untrained else folder, note)
    main_process = setup.accelerator.is_main_process
    if untrained and main_process and not former:
        run_folder.begin(folder, run_folder.run_record(record))
    results = final_evaluation(setup, model, record)
    if main_process:
        # "args" stays as the checkpoint was trained; "eval_only" is what the new results were computed with.
        end = {"eval_only": vars(args) | {"content": setup.content}}
        end |= {"finished": True, "checkpoint_bytes": 0} if untrained else {}
        record = run_folder.run_record(record, results=results, end=end)
        with interrupts.deferred():
            if args.push_to_hub and record["best_epoch"]:
                publish.write_model_card(folder, record)
            run_folder.write_scored(folder, record, setup.loaders)
    publish.upload(setup)


def set_up(args, load):
    """What both kinds of run need: (Setup, model, line about the data).

    load: a function (args) -> (model, tokenizer, hash). The args of the Setup have the defaults that depend on the
    device.
    """
    accelerator = devices.make_accelerator(args)
    device = accelerator.device
    args = with_defaults(args, device.type)
    selected = select_rows(args)
    probe = read_probe(args.probe) if args.probe else None  # before the models are loaded
    sem_model = load_sem_model(args.sem_model, device) if accelerator.is_main_process else None
    set_seed(args.seed)
    model, tokenizer, weights = load(args)
    content = {"model_name": weights, "dataset": selected.sha256}
    content["sem_model"] = checkpoint.weights_sha256(sem_model) if sem_model else None
    setup = Setup(
        args=args,
        folder=Path(args.save_dir),
        accelerator=accelerator,
        tokenizer=tokenizer,
        loaders=make_loaders(selected.rows, tokenizer, args, accelerator),
        held_out=selected.held_out,
        content={name: value for name, value in content.items() if value},
        sem_model=sem_model,
        probe=tokenized(probe, tokenizer, args.max_input_len) if probe else None,
        say=accelerator.on_main_process(print),
    )
    return setup, model, selected.note


def fresh_model(args, wrap, cached=False):
    """(model as it will be trained, tokenizer, hash of its first weights). cached: see `load_checkpoint`."""
    model, tokenizer = load_model_and_tokenizer(args.model_name, cached=cached)
    weights = checkpoint.weights_sha256(model)
    return wrap(model, args) if wrap else model, tokenizer, weights


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Prepared:
    """What is trained and with what, as accelerate prepared it."""

    model: torch.nn.Module
    loader: DataLoader
    optimizer: object
    schedule: object
    hollow: torch.nn.Module | None  # of a sharded model: a copy that gets its weights for each evaluation
    max_steps: int | None = None  # optimizer steps of the whole run, if they are fewer than those of its epochs
    label_smoothing: float = 0.0  # share of a target's probability that all tokens of the vocabulary get


def train(setup, model, plan, *, start, started, saved=None):
    """All epochs: train, score the validation split, keep the best epoch, and write how it goes.

    model: on the CPU, as it will be trained. plan: a StepPlan. start: what run.json says of the run. started: when it
    started. saved: None for a new run, or a `resume.Saved`; the rest of last/ is read here.
    Returns what run.json says of the training.
    """
    args, accelerator, folder, say = setup.args, setup.accelerator, setup.folder, setup.say
    state = saved.state if saved else LoopState(batch_size=plan.batch_size)
    prepared, known = prepare(setup, model, plan)
    if saved:
        resume.check_optimizer(folder, saved, prepared.optimizer)
        resume.load_last(folder, accelerator, prepared.model, prepared.optimizer)
        prepared.schedule.load_state_dict(saved.schedule)
    sharded = ""
    if accelerator.is_fsdp2:
        known["parameters_per_process"] = sum(p.to_local().numel() for p in prepared.model.parameters())
        sharded = f" | sharded, {known['parameters_per_process']:,} parameters per process"
    resumed = f" | resumed after step {state.step}" if args.resume else ""
    in_all = f", {plan.total_steps} in all" if plan.max_steps else ""
    effective = f"effective batch {plan.effective_batch_size}"
    say(f"steps: {plan.steps_per_epoch} per epoch{in_all} | {effective}{sharded}{resumed}")

    with interrupts.deferred():
        if accelerator.is_main_process and not saved:
            run_folder.begin(folder, run_folder.run_record(start, training=known))
        if setup.probe and not saved:
            known["probe"] = measure_before(setup, prepared, run_folder.run_record(start, training=known))
        accelerator.wait_for_everyone()
        if not (folder / "run.json").exists():
            raise RunError(f"--save_dir {folder} is not the same folder in all processes: it must be on a shared disk")
        if where := trackers.begin_tracking(folder, accelerator, start, state):
            say(f"report: {where}")

        def save():
            state.note_cost(time.perf_counter() - started)
            loop = {"state": vars(state), "schedule": prepared.schedule.state_dict()}
            resume.save_last(folder, accelerator, loop, prepared.model, prepared.optimizer)

        def out_of_patience():
            return args.patience and state.epoch - state.best_epoch >= args.patience

        while state.epoch < plan.epochs and not out_of_patience():
            try:
                train_and_score_epoch(setup, prepared, state, start=start | known, started=started, save=save)
            except KeyboardInterrupt:  # raised where the state is complete
                save()
                raise
            interrupts.check(accelerator)
    if out_of_patience():
        say(f"stopped: F1 has not improved on epoch {state.best_epoch} for {args.patience} epochs")
    return known | state.progress() | {"peak_ram_mb": state.peak_ram_mb}


def prepare(setup, model, plan):
    """(Prepared, what run.json says of it). model: on the CPU, as it will be trained. plan: a StepPlan."""
    args, accelerator = setup.args, setup.accelerator
    data, collate = setup.loaders["train"].dataset, setup.loaders["train"].collate_fn
    accelerator.gradient_accumulation_steps = plan.accumulation
    use_fast_training(model, alone=accelerator.num_processes == 1, autocast=devices.bf16_on_cpu(accelerator))
    if args.gradient_checkpointing:
        use_gradient_checkpointing(model)
    if accelerator.device.type == "cpu":
        keep_memory()
    loader = train_loader(data, plan.batch_size, collate, args.seed)
    options = {n: getattr(args, n) for n in ("optim", "weight_decay", "warmup_steps", "lr_scheduler_type")}
    known = {"effective_batch_size": plan.effective_batch_size, "epochs": plan.epochs}
    if accelerator.is_main_process and not accelerator.is_fsdp2:  # the estimate does not know about shards
        known["estimated_peak_mb"] = memory.estimate_memory(
            model,
            loader,
            accelerator,
            make_optimizer=lambda twin: build_optimizer(twin, args.lr, plan.total_steps, **options)[0],
            checkpointing=args.gradient_checkpointing,
        )
    hollow = None
    if accelerator.is_fsdp2:
        hollow = devices.hollow_copy(model, accelerator.device)
        # One module in place of three with the same weight, of which only one could be sharded.
        model.set_input_embeddings(model.get_input_embeddings())
    optimizer, schedule = build_optimizer(model, args.lr, plan.total_steps, **options)
    known["optimizer"] = resume.describe_optimizer(optimizer)
    # The schedule is not prepared: it counts optimizer steps, whatever the number of processes.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if accelerator.num_processes > 1:  # each process draws its own dropout
        set_seed(args.seed, device_specific=True)
    return Prepared(model, loader, optimizer, schedule, hollow, plan.max_steps, args.label_smoothing_factor), known


def train_and_score_epoch(setup, prepared, state, *, start, started, save):
    """Train one epoch, score the validation split, and write metrics, curves and, if F1 improved, the checkpoint.

    start: what run.json says of the run so far. started: when it started, see `train`. save: a function that saves
    what --resume needs.
    """
    args, accelerator, folder, say = setup.args, setup.accelerator, setup.folder, setup.say
    device, number = accelerator.device, state.epoch + 1
    devices.reset_peak_vram(device)
    rows, train_loss = train_epoch(prepared, accelerator, state, save, args.save_every)
    seconds, peak_vram = state.epoch_seconds, devices.peak_vram_mb(device)
    say(f"[epoch {number}] time={seconds:.1f}s | steps/sec={len(rows) / seconds:.2f} | peak VRAM={peak_vram:.0f} MB")
    whole = devices.whole_model(prepared.model, prepared.hollow, accelerator)
    given = (whole, setup.loaders["validation"], setup.tokenizer, device, setup.sem_model)
    options = {"beams": args.eval_beams, "max_target_len": args.max_target_len, "accelerator": accelerator}
    with memory.memory_for(f"--eval_batch_size {args.eval_batch_size}: lower it"):
        metrics, _ = evaluate(*given, **options, title=f"epoch {number}, validation", with_scores=False)
    say(f"[epoch {number}] {metrics_line(metrics)}")

    # --max_steps can end the last epoch early.
    examples = min(len(prepared.loader.dataset), len(rows) * start["effective_batch_size"])
    # What is logged for an epoch: a row of metrics.csv, and `epoch/...` in a tracker.
    row = {
        "epoch": number,
        "train_loss": train_loss,
        **metrics,
        "epoch_seconds": round(seconds, 3),
        "steps_per_sec": round(len(rows) / seconds, 4),
        "samples_per_sec": round(examples / seconds, 3),
        "peak_vram_mb": round(peak_vram, 1),
        "seconds_since_start": round(time.perf_counter() - started, 3),
        **epoch_column(setup, whole),
    }
    state.epoch, state.epoch_tokens, state.epoch_seconds = number, [], 0.0
    state.epoch_rows.append(row)
    improved = metrics["f1"] > state.best_f1
    if improved:
        state.best_f1, state.best_epoch = metrics["f1"], number
    trackers.report(accelerator, "epoch", row, state.step)
    if accelerator.is_main_process:
        record = run_folder.run_record(start, training=state.progress())
        if improved:
            checkpoint.save_checkpoint(folder, whole, setup.tokenizer, record)
        figures.write_epochs(folder, state.epoch_rows, state.step_rows)
        run_folder.write_run_json(folder, record)
    devices.empty(prepared.hollow)
    save()  # last, so that the files that last/ relies on exist; a run that is killed before repeats all of this


def train_epoch(prepared, accelerator, state, save=None, save_every=0):
    """Train on every example once, or on the rest of an epoch that state.epoch_tokens says has begun. An epoch ends
    early at the last of --max_steps.

    Returns the epoch's rows of train_loss.csv, which are in `state` too, and its mean loss (nats per token).

    A step whose loss or gradient is not finite changes nothing but the learning rate, which continues as planned.
    Raises RunError after MAX_SKIPPED such steps in a row.

    save: a function that saves the state, called every `save_every` steps (0: never). After a signal, the step is
    finished and KeyboardInterrupt raised, with `state` as a save needs it.
    """
    prepared.model.train()
    measured, noted = [], time.perf_counter()  # `measured` stays on the device: reading it would wait for the device
    size = accelerator.gradient_accumulation_steps
    steps, done = math.ceil(len(prepared.loader) / size), len(state.epoch_tokens)
    prepared.loader.set_epoch(state.epoch)  # the order of the examples depends on the seed and this number alone
    batches = devices.counted_batches(prepared.loader, done * size, accelerator)
    groups = iter(lambda: list(islice(batches, size)), [])  # those of a step; the last one can be shorter
    if prepared.max_steps:
        steps = min(steps, prepared.max_steps - (state.step - done))
        groups = islice(groups, steps - done)
    bar_off = None if accelerator.is_main_process else True  # None: only where stderr is a terminal
    title = f"epoch {state.epoch + 1}"
    for group in tqdm(groups, title, steps, initial=done, leave=False, delay=1, unit="step", disable=bar_off):
        lr = prepared.schedule.get_last_lr()[0]
        measured.append((lr, train_step(prepared, group, accelerator)))

        step = state.step + len(measured)
        due = save_every > 0 and step % save_every == 0
        note = due or step % MAX_SKIPPED == 0 or len(state.epoch_tokens) + len(measured) == steps
        # Several processes must leave at the same step, and asking the others means waiting for them.
        stop = (note or accelerator.num_processes == 1) and interrupts.anyone_interrupted(accelerator)
        if note or stop:
            note_steps(state, measured, accelerator)
            measured = []
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


def train_step(prepared, group, accelerator):
    """One optimizer step on a group of (batch, target tokens that count in it).

    Its loss is the mean over all target tokens of the group, in all processes: the same step as one large batch makes,
    also for a last group of fewer batches. Returns a tensor (3,): loss (nats per token), norm of the gradient before
    clipping, tokens.
    """
    model, optimizer = prepared.model, prepared.optimizer
    step_tokens = accelerator.reduce(sum(tokens for _, tokens in group))  # over all processes
    step_loss = 0
    for position, (batch, tokens) in enumerate(group, start=1):
        with accelerator.no_sync(model) if position < len(group) else nullcontext():
            with accelerator.autocast():  # a sharded model does not do it by itself
                logits_and_labels = target_logits(model, batch, packed_rows(model, batch))
                mean_loss = F.cross_entropy(*logits_and_labels, label_smoothing=prepared.label_smoothing)
            loss = mean_loss * tokens / step_tokens
            # backward() divides by the accumulation steps and averages over processes; this loss needs neither.
            accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
        step_loss = step_loss + loss.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    if accelerator.is_fsdp2:
        grad_norm = grad_norm.full_tensor()
    step_loss = accelerator.reduce(step_loss)
    step_if_finite(optimizer, step_loss.isfinite() & grad_norm.isfinite(), accelerator.scaler)
    prepared.schedule.step()
    optimizer.zero_grad()
    return torch.stack([step_loss, grad_norm, step_tokens])


def note_steps(state, measured, accelerator):
    """Move what was measured in the last steps from the device into `state`. Raises RunError, see `train_epoch`.

    measured: [(learning rate, tensor of `train_step`)]. A new value of a step is returned there and unpacked here.
    """
    values = torch.stack([values for _, values in measured]).tolist() if measured else []
    for (lr, _), (loss, grad_norm, tokens) in zip(measured, values, strict=True):
        state.step += 1
        # What is logged for a step: a row of train_loss.csv, and `train/...` in a tracker.
        row = {"step": state.step, "epoch": state.epoch + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        state.step_rows.append(row)
        state.epoch_tokens.append(tokens)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        trackers.report(accelerator, "train", row, state.step)
        if state.skipped_in_a_row == MAX_SKIPPED:
            used = f"learning rate {lr:.3g}, precision {precision_as_typed(accelerator.mixed_precision)}"
            raise RunError(
                f"loss or gradient was not finite in {MAX_SKIPPED} steps in a row, the last one step {state.step}"
                f" ({used}): start again (--overwrite) with a lower --lr or another --precision"
            )


# -------------------------------------------------------------------------------------------------- final evaluation


def final_evaluation(setup, model, record):
    """Score the checkpoint with --final_beams on validation and on the held-out rows, and answer the test split.

    model: as it was read from disk. record: what run.json says of it so far. A test split with answers is scored too.
    Writes the prediction files, the breakdown and the leaderboard's file. Returns what run.json says of it: {"final":
    metrics and, where there are rows, "holdout": {"rows", "metrics"}, "test": metrics, "answers_per_second" and, with
    --probe, "probe"}; {} in all processes but the main one.
    """
    args, accelerator, folder, say = setup.args, setup.accelerator, setup.folder, setup.say
    options = {"beams": args.final_beams, "max_target_len": args.max_target_len, "accelerator": accelerator}
    model = model.to(accelerator.device)
    if devices.bf16_on_cpu(accelerator):
        convert_frozen(model)
    scored, answered, began = {}, 0, time.perf_counter()  # scored: {role: (metrics, frame)} of the labeled splits
    with memory.memory_for(
        f"--eval_batch_size {args.eval_batch_size} and {args.final_beams} beams: lower --eval_batch_size"
    ):
        for role in [role for role in ("validation", "holdout", "test") if role in setup.loaders]:
            loader = setup.loaders[role]
            answered += len(loader.dataset)
            given = (model, loader, setup.tokenizer, accelerator.device)
            if loader.dataset.labels is None:
                answers = predict(*given, **options, title=role)["prediction"]
            else:
                scored[role] = evaluate(*given, setup.sem_model, **options, title=role)
                answers = scored[role][1]["prediction"]
            if role == "test" and accelerator.is_main_process:
                run_folder.write_test_answers(folder / "test_answers.json", loader.dataset.rows, answers)
    if not accelerator.is_main_process:
        return {}

    results = {"answers_per_second": round(answered / (time.perf_counter() - began), 3)}
    scored = with_leaderboard_scores(scored)
    epoch = f" | epoch {record['best_epoch']}" if record.get("best_epoch") else ""
    for role, (metrics, frame) in scored.items():
        title = "final" if role == "validation" else role
        say(f"[{title}] {metrics_line(metrics, final=True)}{epoch}, {args.final_beams} beams | {folder}")
        results[title] = {"rows": setup.held_out, "metrics": metrics} if role == "holdout" else metrics
        run_folder.write_predictions(folder / f"{role}_predictions.csv", frame)
    metrics, frame = scored["validation"]
    figures.write_breakdown(folder, frame, metrics["f1"])
    return results | measure_checkpoint(setup, model, record)


if __name__ == "__main__":
    sys.exit(main())
