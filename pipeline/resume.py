"""What --resume needs: the folder last/ with weights, optimizer and random states, and what must not change meanwhile.

The training loop saves it after each epoch, and every --save_every steps.
"""

import argparse
import copy
import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open

from pipeline.arguments import (
    HOLDOUT_SEED,
    ROLES,
    Role,
    as_run,
    as_typed,
    may_differ_on_resume,
    precision_as_typed,
    with_role,
)
from pipeline.checkpoint import has_checkpoint
from pipeline.devices import is_first_process
from pipeline.errors import InputError, reason
from pipeline.publish import upload_command
from pipeline.run_folder import (
    check_is_free,
    check_outlives_overwriting,
    is_finished,
    peak_ram_mb,
    read_run_json,
    remove_last,
    writing_folder,
)

SIMILARITY = "similarity model (--sem_model)"  # a name of `identity`


@dataclass
class LoopState:
    """Where the training loop is; --resume needs this, the weights, the optimizer and the random states."""

    epoch: int = 0  # epochs finished, their evaluation included
    step: int = 0  # optimizer steps done, skipped ones included: the schedule counts them
    best_f1: float = -1.0
    best_epoch: int = 0
    batch_size: int = 0  # --batch_size, or what --auto_batch_size made of it
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    epoch_rows: list = field(default_factory=list)  # of metrics.csv
    step_rows: list = field(default_factory=list)  # of train_loss.csv
    epoch_tokens: list = field(default_factory=list)  # target tokens of each step of the current epoch
    epoch_seconds: float = 0.0  # the current epoch has taken so far
    wall_seconds: float = 0.0  # the run has taken so far
    peak_ram_mb: float = 0.0  # of the processes that have made it so far; 0.0 on systems that do not tell

    def note_cost(self, wall_seconds):
        """Note what the run has taken so far: seconds, and this process's memory if a former one did not take more."""
        self.wall_seconds = wall_seconds
        self.peak_ram_mb = max(self.peak_ram_mb, peak_ram_mb() or 0.0)

    def progress(self):
        """What run.json says of the training so far; there is at least one finished epoch."""
        return {
            "best_epoch": self.best_epoch,
            "steps": self.step,
            "peak_vram_mb": max(row["peak_vram_mb"] for row in self.epoch_rows),
            "skipped_steps": self.skipped,
            "batch_size_used": self.batch_size,
        }


@dataclass(frozen=True)
class Saved:
    """What last/loop.json says of an interrupted run."""

    state: LoopState
    schedule: dict  # the state of the learning rate's schedule
    optimizer: dict | None = None  # see `describe_optimizer`; None if an older version started the run


def save_last(folder, accelerator, loop, model=None, optimizer=None):
    """Save what --resume needs as the folder last/, completely or not at all. Every process must call this.

    loop: the loop's state, in types that JSON has. accelerate's save_state saves the rest: the trained weights (of a
    PeftModel: only the adapter), the optimizer, the scaler of fp16 and the random states.
    model, optimizer: the prepared ones, needed if the model is sharded.
    """
    last, beside, older = (Path(folder, name) for name in ("last", ".tmp-last", ".old-last"))

    def keep_trained(models, weights, _):
        for i, model in enumerate(models):
            weights[i] = {name: weights[i][name] for name in _trained(model)}

    hook = accelerator.register_save_state_pre_hook(keep_trained)
    try:
        with writing_folder(beside) if accelerator.is_main_process else nullcontext():
            accelerator.wait_for_everyone()
            if accelerator.is_fsdp2:
                _save_sharded(beside, accelerator, model, optimizer)
            else:
                accelerator.save_state(beside)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (beside / "loop.json").write_text(json.dumps(loop), encoding="utf-8")
                # A folder cannot be renamed over another. Between the two renames the older one can still be found.
                if last.exists():
                    shutil.rmtree(older, ignore_errors=True)
                    last.rename(older)
                beside.rename(last)
                shutil.rmtree(older, ignore_errors=True)
    finally:
        hook.remove()


def describe_optimizer(optimizer):
    """What run.json says of an optimizer: its class and the settings of its groups of weights, without learning rates.

    torch restores the settings together with the state: a resumed run would use those it was started with.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper, or torch's own
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "groups": json.loads(json.dumps(groups, default=str))}


def check_optimizer(folder, saved, optimizer):
    """Raise InputError if a resumed run's optimizer is not the one that it was started with."""
    now = describe_optimizer(optimizer)
    if saved.optimizer not in (None, now):
        raise InputError(
            f"--save_dir {folder} was started with another optimizer or other settings ({saved.optimizer['class']}, now"
            f" {now['class']}): restore build_optimizer, or choose another folder"
        )


def find_last(folder):
    """The newest folder that `save_last` saved in a run folder, or None."""
    return next((path for path in (Path(folder, "last"), Path(folder, ".old-last")) if path.is_dir()), None)


def read_loop(folder):
    """What `save_last` saved of the loop, as a `Saved`, or None if nothing was saved yet. Raises InputError."""
    last = find_last(folder)
    if last is None:
        return None
    try:
        loop = json.loads((last / "loop.json").read_text(encoding="utf-8"))
        state = LoopState(**loop["state"])
        defaults = vars(LoopState())
        wrong = [name for name, value in vars(state).items() if type(value) is not type(defaults[name])]
        if wrong:
            raise ValueError(f"wrong type of {', '.join(wrong)}")
        return Saved(state, loop["schedule"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _cannot_resume(last / "loop.json", error) from None


def load_last(folder, accelerator, model, optimizer=None):
    """Put what `save_last` saved into the prepared model, its optimizer, the scaler and the random generators.

    optimizer: the prepared one, needed if the model is sharded.
    Only tensors and numbers are unpickled. Raises InputError if the files are damaged or of another model.
    """
    last = find_last(folder)
    try:
        with safe_open(last / "model.safetensors", "pt") as file:
            saved = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        trained = _trained(accelerator.unwrap_model(model))
        if saved != {name: list(weight.shape) for name, weight in trained.items()}:
            raise ValueError("its weights are not those that this model trains")
        accelerator.step = None
        if accelerator.is_fsdp2:
            _load_sharded(last, accelerator, model, optimizer)
        else:
            # Not strict: frozen weights are not saved, and that no other weight is missing was checked above.
            accelerator.load_state(last, strict=False, load_kwargs={"weights_only": True})
        # accelerate continues silently if it cannot read the random states, which contain its `step` too.
        if accelerator.step is None:
            raise ValueError("its random states cannot be read")
    except Exception as error:  # each library has its own for what is truncated, missing or forged
        raise _cannot_resume(last, error) from None


def _save_sharded(folder, accelerator, model, optimizer):
    """accelerate's save_state for a sharded model, with the files of `save_last`. accelerate would save all weights,
    the base's too, or shards that are read by unpickling. The first process gathers everything on the CPU.
    """
    from accelerate.checkpointing import save_accelerator_state
    from accelerate.utils import save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    weights = {}
    for name, shard in _trained(model).items():
        whole = shard.detach().full_tensor()  # of all processes together
        if accelerator.is_main_process:
            weights[name] = whole.cpu()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    save(get_optimizer_state_dict(model, optimizer.optimizer, options=options), folder / "optimizer.bin")
    save_accelerator_state(folder, [weights], [], [], [], accelerator.process_index, accelerator.step)


def _load_sharded(folder, accelerator, model, optimizer):
    """accelerate's load_state of what `_save_sharded` saved: every process reads the files and keeps its shards."""
    import torch
    from accelerate.checkpointing import load_accelerator_state
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    weights, not_strict = load_file(folder / "model.safetensors"), StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, weights, options=not_strict)  # for the reason in `load_last`
    state = torch.load(folder / "optimizer.bin", mmap=True, weights_only=True)
    set_optimizer_state_dict(model, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))
    loaded = load_accelerator_state(folder, [], [], [], [], accelerator.process_index)
    accelerator.step = loaded.get("step")


def _trained(model):
    """{name: weight} of the trained weights; shared weights are named once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _cannot_resume(path, error):
    return InputError(f"{path} cannot be resumed from ({reason(error)}); --overwrite starts the run again")


def identity(setup):
    """What must be the same when a run is resumed, besides its arguments: {name: a value for JSON}.

    setup: the run's Setup.
    """
    rows = {}
    for role, loader in setup.loaders.items():
        data = loader.dataset
        content = json.dumps([data.rows, data.input_ids, data.labels]).encode()
        rows[f"{role} rows (--dataset)"] = hashlib.sha256(content).hexdigest()
    return rows | {
        "weights (--model_name)": setup.content["model_name"],
        "device": setup.accelerator.device.type,
        "precision": setup.accelerator.mixed_precision,
        "number of processes": setup.accelerator.num_processes,
        "order of the training rows": "random",  # older versions grouped them by length and did not record it
        **({"sharding": "FSDP2"} if setup.accelerator.is_fsdp2 else {}),
        **({SIMILARITY: setup.content["sem_model"]} if "sem_model" in setup.content else {}),
        **({"probe (--probe)": setup.probe.sha256} if setup.probe else {}),
    }


def former_run(args, method):
    """(run.json, Saved) of the run that --resume continues; (None, None) for a new run. Saved is None if nothing was.

    Raises InputError if the run cannot be resumed with these arguments, or a new one cannot be written to --save_dir.
    """
    folder = Path(args.save_dir)
    if args.resume:
        former = check_can_resume(folder, method, vars(args))
        saved = None if is_finished(former) else read_loop(folder)
        return former, replace(saved, optimizer=former.get("optimizer")) if saved else None
    check_is_free(folder, args.overwrite)
    if args.overwrite:
        inputs = {name: getattr(args, name) for name in with_role(Role.INPUT)}
        check_outlives_overwriting(folder, inputs)
    return None, None


def check_can_resume(folder, method, args):
    """Raise InputError unless `folder` has a run that can be resumed with these arguments; returns its run.json.

    method: "full" or "lora". args: {name: value} of the command line.
    """
    run = read_run_json(folder)
    if run is None:
        raise InputError(f"--save_dir {folder} has no run to resume (no run.json): start it without --resume")
    if run["method"] == "base":
        raise InputError(f"--save_dir {folder} has the scores of an untrained model: there is nothing to resume")
    if run["method"] != method:
        script = {"full": "tweet_qa_main.py", "lora": "tweet_qa_main_lora.py"}.get(run["method"], "another script")
        raise InputError(f"--save_dir {folder} has a run of {script}: resume it with that script")
    before = as_run(run["args"])
    differing = [
        f"--{name} {as_typed(value)} (was {as_typed(before[name])})"
        for name, value in args.items()
        if name in before and before[name] != value
        if not may_differ_on_resume(name)
        or (name == "sem_model" and (value == "none" or SIMILARITY not in run.get("identity", {})))
    ]
    if differing:
        raise InputError(
            f"--save_dir {folder} was started with different settings ({', '.join(differing)}): repeat them, or choose"
            " another folder"
        )
    return run


def same_start(folder, former, now):
    """What a resumed run keeps of the record of its start: {name: value}.

    former: its run.json. now: the record of this start. Raises InputError if the run had another `identity` or prompt.
    """
    if former["prompt"] != now["prompt"]:
        raise InputError(
            f"--save_dir {folder} was started with another prompt, {former['prompt']!r}: restore PROMPT, or choose"
            " another folder"
        )
    before, now = former.get("identity", {}), now["identity"]
    if "device" not in before:  # older versions recorded only its name, which for a GPU is that of a product
        name = str(former.get("device", now["device"])).split(":")[0]
        before = before | {"device": name if name in ("cpu", "mps") else "cuda"}
    differing = []
    for name in {**before, **now}:
        then, new = before.get(name), now.get(name)
        # Only the main process loads the similarity model, and older versions did not record what it holds.
        if then != new and not (name == SIMILARITY and None in (then, new)):
            is_hash = len(str(then)) == len(hashlib.sha256().hexdigest())
            values = f" (was {precision_as_typed(then)}, is {precision_as_typed(new)})"
            differing.append(name if is_hash or then is None else name + values)
    if differing:
        raise InputError(
            f"--save_dir {folder} was started with different {', '.join(differing)}: restore what it was started with,"
            " or choose another folder"
        )
    return {name: former[name] for name in ("started", "run_id", "probe") if name in former}


def seed_runs(args, method):
    """The arguments of each run of --seeds, in SAVE_DIR/seed_N, with --resume for those that were started before.

    Raises InputError before the first of them starts if one of them can be neither started nor resumed.
    """
    if args.eval_only or args.overwrite:
        raise InputError("--seeds cannot be combined with --eval_only or --overwrite: use a single --seed")
    if args.push_to_hub is not None:
        raise InputError(
            "--seeds cannot be combined with --push_to_hub: a repository has one run; upload one later (--eval_only)"
        )
    if len(set(args.seeds)) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: each seed can be run only once")
    if Path(args.save_dir, "run.json").exists():
        raise InputError(f"--save_dir {args.save_dir} is itself a run: choose another folder for --seeds")
    runs = []
    for seed in args.seeds:
        one, folder = copy.deepcopy(args), Path(args.save_dir, f"seed_{seed}")
        one.seed, one.seeds, one.save_dir, one.resume = seed, None, str(folder), (folder / "run.json").exists()
        one = with_the_runs_holdout(one)
        if one.resume:
            check_can_resume(folder, method, vars(one))
        else:
            check_is_free(folder)
        runs.append(one)
    return runs


def how_to_resume(args, method):
    """How to resume a run that ended early, as the end of a message."""
    if args.eval_only or "merge" in args:
        return "nothing was trained"
    try:
        former = check_can_resume(args.save_dir, method, vars(args))
        saved = read_loop(args.save_dir)
    except InputError:
        return "there is nothing to resume"
    if is_finished(former):
        return f"{args.save_dir} has a finished run"
    if saved is None:
        return "nothing was saved yet, --resume starts from the beginning"
    return f"--resume continues after step {saved.state.step}"


def say_nothing_to_resume(args):
    """Print that the run in --save_dir is finished, and how to upload it if --push_to_hub was given."""
    remove_last(args.save_dir)  # in case the run was killed in its very last moment
    upload = f"; upload it with: {upload_command(args.save_dir, args.push_to_hub)}" if args.push_to_hub else ""
    if is_first_process():
        print(f"{args.save_dir} has this run, and it is finished: there is nothing to resume{upload}")


def with_the_runs_scoring(parser, argv, args):
    """The arguments of --eval_only: what decides which rows are scored and how, and is not on the command line, is
    taken from the run in --save_dir."""
    run = read_run_json(args.save_dir)
    if not run:
        return args
    names = with_role(Role.SCORING) + (["model_name"] if run["method"] == "base" else [])
    known = {name: run["args"][name] for name in names if run["args"].get(name) is not None}
    parser.set_defaults(**{name: value for name, value in known.items() if name in vars(args)})
    args = parser.parse_args(argv)
    if "base_dtype" in args and "base_dtype" in known:  # the checkpoint is loaded with it, whatever is given
        args.base_dtype = known["base_dtype"]
    return args


def with_the_runs_holdout(args):
    """The arguments of --resume and --eval_only, with the seed by which the run in --save_dir chose its held-out rows.

    That was its --seed before there was --holdout_seed.
    """
    run = read_run_json(args.save_dir) if args.resume or args.eval_only else None
    before = run["args"] if run else {}
    if before.get("holdout") and "holdout_seed" not in before and args.holdout_seed == HOLDOUT_SEED:
        return argparse.Namespace(**vars(args) | {"holdout_seed": before.get("seed", HOLDOUT_SEED)})
    return args


def scores_untrained(args, former, method):
    """Whether --eval_only scores --model_name itself, in a separate folder, and not a checkpoint in --save_dir.

    former: the run.json in --save_dir, or None. method: "full" or "lora", of the script. Raises InputError if neither
    can be done.
    """
    folder = Path(args.save_dir)
    again = former is not None and former["method"] == "base"
    if again and method == "lora":
        raise InputError(f"--save_dir {folder} has the scores of a model without an adapter: use tweet_qa_main.py")
    if not again and (former or has_checkpoint(folder) or not args.model_name or method == "lora"):
        return False  # what is missing there is said by the check of the checkpoint
    if args.push_to_hub is not None:
        raise InputError("--push_to_hub: a model that was only scored is not uploaded, since nothing was trained")
    if not again:
        check_is_free(folder)
    return True


def check_same_model(args, former, record):
    """Raise InputError if the untrained model that was scored in --save_dir is not the one that is scored again.

    former: the run.json there, or None. record: what is known of the model now.
    """
    if former and former.get("content", {}).get("model_name") != record["content"]["model_name"]:
        raise InputError(
            f"--save_dir {args.save_dir} has the scores of another model than --model_name {args.model_name}: choose"
            " another folder"
        )


def check_were_held_out(args, held_out, run):
    """Raise InputError unless the rows that --eval_only would score as held out are those that the run set aside.

    held_out: their numbers in the train file. run: its run.json.
    """
    before = (run.get("holdout") or {}).get("rows", held_out)  # missing if the run was interrupted
    chosen_by = [name for name in with_role(Role.ROWS) if Role.SCORING & ROLES[name]]
    given = {"holdout_seed": run["args"].get("seed")} | run["args"]  # older runs chose them by --seed
    if held_out != before or any(given.get(name) != getattr(args, name) for name in chosen_by):
        raise InputError(
            f"--holdout {args.holdout}: these are not the rows that the run set aside before training; omit --holdout,"
            " --holdout_seed and --drop_leaked, or give --holdout 0 to score none"
        )
