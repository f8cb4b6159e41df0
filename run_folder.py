"""Everything about what a run leaves on disk: writing it safely, curves, tables, model card, and reading it back.

Every file is written beside its place and renamed into it, so a run that is killed at any moment leaves either the
older file or the newer one, never half of one. The same goes for the folder last/, from which --resume goes on.

helper_functions, and with it torch, is imported by the functions that need it: `compare_runs.py` reads finished runs
with what is left, and need not wait for it.
"""

import csv
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from uuid import uuid4

from safetensors import SafetensorError, safe_open

# The versions that run.json records: what a result can depend on.
LIBRARIES = [
    *("torch", "transformers", "tokenizers", "safetensors", "datasets", "sentence-transformers", "peft", "accelerate"),
    *("pandas", "matplotlib"),
]
TRAIN_COLOUR, VALIDATION_COLOUR = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, told apart by every reader


# All that a run writes at the root of its folder: what --overwrite removes. Weights first, so that no half of a
# checkpoint is left behind; run.json, which says that the folder is a run's, is not removed but replaced.
RUN_FILES = (
    *("model.safetensors", "adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
    *("metrics.csv", "train_loss.csv", "loss_curve.png", "val_f1_curve.png", "val_sem_sim_curve.png"),
    *("validation_predictions.csv", "holdout_predictions.csv", "test_predictions.csv", "test_answers.json"),
    *("breakdown.csv", "breakdown.png", "README.md"),
)
# What a run that was killed can leave beside its place.
UNRENAMED = {".tmp-last", ".tmp-checkpoint", *(f".tmp-{name}" for name in ("run.json", *RUN_FILES))}
# What may differ when a run is resumed: where it writes and is reported, how it starts, what it saves when and holds in
# memory. --model_name and --dataset are compared by what they hold, see `identity`; all others change the result.
HARMLESS_ARGUMENTS = (
    *("save_dir", "resume", "overwrite", "seeds", "eval_only", "save_every", "eval_batch_size", "auto_batch_size"),
    *("gradient_checkpointing", "report_to", "push_to_hub", "model_name", "dataset"),
)
TRACKER_FOLDERS = ("tensorboard", "wandb")  # below the run folder; trackio has a place of its own for all runs
PLOTS = ("loss_curve", "val_f1_curve", "val_sem_sim_curve", "breakdown")
# What is not uploaded: files that hold the data set's rows, and all that stands in a folder of its own.
NOT_UPLOADED = ("*predictions.csv", "test_answers.json", "*/*")


def input_error(message):
    """An InputError with this message. What is wrong is rare: only then is it worth the import of its class."""
    from helper_functions import InputError

    return InputError(message)


def check_is_free(folder, overwrite=False):
    """Raise InputError unless a new run may be written to `folder`.

    It is missing or empty, and can be made; with `overwrite` it may hold a former run, but nothing else will do.
    """
    folder = Path(folder)
    holds_run = (folder / "run.json").is_file()
    if holds_run and not overwrite:
        raise input_error(
            f"--save_dir {folder} holds a former run: go on with it (--resume), replace it (--overwrite), or give"
            " another folder"
        )
    if not holds_run and folder.is_dir() and any(path.name not in UNRENAMED for path in folder.iterdir()):
        raise input_error(f"--save_dir {folder} holds other files: give another folder, or remove that one first")
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise input_error(f"--save_dir {folder}: {nearest} is not a folder; give another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise input_error(f"--save_dir {folder}: {nearest} cannot be written to; give another folder")


def check_outlives_overwriting(folder, **inputs):
    """Raise InputError if one of the inputs {flag: hub id or path} stands in `folder`, which is to be overwritten."""
    for flag, name in inputs.items():
        if name and os.path.exists(name) and Path(name).resolve().is_relative_to(Path(folder).resolve()):
            raise input_error(f"--{flag} {name} stands in --save_dir {folder}, which --overwrite would remove")


def check_can_go_on(folder, method, args):
    """Raise InputError unless `folder` holds a run that these arguments would go on with; returns its run.json.

    method: "full" or "lora". args: {name: value} of the command line.
    """
    run = read_run_json(folder)
    if run is None:
        raise input_error(f"--save_dir {folder} holds no run to resume (no run.json): start it without --resume")
    if run["method"] != method:
        script = {"full": "tweet_qa_main.py", "lora": "tweet_qa_main_lora.py"}.get(run["method"], "another script")
        raise input_error(f"--save_dir {folder} holds a run of {script}: resume it with that one")
    differing = [
        f"--{name} {_as_typed(value)} (was {_as_typed(run['args'][name])})"
        for name, value in args.items()
        if name not in HARMLESS_ARGUMENTS and name in run["args"] and run["args"][name] != value
    ]
    if differing:
        raise input_error(
            f"--save_dir {folder} holds a run that would end otherwise with {', '.join(differing)}: give its own"
            " arguments, or another folder"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise input_error(f"--save_dir {folder} cannot be written to")
    return run


def check_is_same(folder, former, now):
    """Raise InputError if the two `identity`s differ, that of the run in `folder` and that of the one to go on."""
    differing = []
    for name in {**former, **now}:
        then, new = former.get(name), now.get(name)
        if then != new:
            is_hash = len(str(then)) == len(hashlib.sha256().hexdigest())
            differing.append(name if is_hash or then is None else f"{name} (was {then}, is {new})")
    if differing:
        raise input_error(f"--save_dir {folder} holds a run that began with other {', '.join(differing)}")


def is_finished(run):
    """Whether the run of this run.json has come to its end, so that there is nothing to resume."""
    return run.get("finished", True)


def check_holds_checkpoint(folder):
    """Raise InputError unless `folder` holds a checkpoint to evaluate, a whole model or an adapter."""
    folder = Path(folder)
    if not folder.is_dir():
        raise input_error(f"--save_dir {folder}: there is no such folder; --eval_only needs one with a checkpoint")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise input_error(f"--save_dir {folder} holds no checkpoint (no config.json, no adapter_config.json)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise input_error(f"--save_dir {folder} cannot be written to; copy it to a place of your own")


@contextmanager
def writing(path):
    """Yield a path beside `path` to write to; once that is done without an error, rename it to `path`.

    Raises RunError where the disk is full, the folder has gone, or the like; what stood at `path` stays as it was.
    """
    path = Path(path)
    beside = path.with_name(f".tmp-{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def _writing_folder(path):
    """Yield a new folder to write to, and remove it if it is still there in the end. Raises RunError, see `writing`."""
    try:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()  # without its parents: a run folder that was deleted meanwhile is not made again
        yield path
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors, and RuntimeError from torch.save
        raise _cannot_write(path, error) from None
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _cannot_write(path, error):
    from helper_functions import RunError, one_line

    return RunError(f"{path} cannot be written ({one_line(error)})")


# --------------------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(folder, model, tokenizer, run):
    """Save weights (of a PeftModel: the adapter alone), tokenizer and model card at the root of `folder`.

    Apart from the weights, the files are the same for each epoch, and the weights are one file that is renamed last:
    so the folder always holds one whole checkpoint, or on the way to the first one none that loads.
    """
    with _writing_folder(Path(folder, ".tmp-checkpoint")) as beside:
        if hasattr(model, "peft_config"):
            # Not "auto": that asks the hub whether the vocabulary was changed, and it never is here.
            model.save_pretrained(beside, save_embedding_layers=False)
        else:
            model.save_pretrained(beside, max_shard_size="1TB")
        tokenizer.save_pretrained(beside)
        let_transformers_4_read(beside / "tokenizer_config.json")
        write_model_card(beside, run)
        for path in sorted(beside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, Path(folder, path.name))


def let_transformers_4_read(tokenizer_config):
    """Name T5's sentinels in tokenizer_config.json as transformers 4 and 5 both read them.

    transformers 5 writes them as a list `extra_special_tokens`, for which transformers 4 wants a dict, and crashes.
    """
    config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        tokenizer_config.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_checkpoint(folder, model_name=None, cached=False, base_dtype="fp32"):
    """(model, tokenizer) of a run folder: the whole model, or the adapter on its base.

    model_name: the base model of an adapter, a hub id or a folder; None for the one that the adapter names. It is held
    in the type that run.json says it was trained on (--base_dtype), or in base_dtype where that says nothing.
    cached: whether this run has loaded that base before. Raises InputError for what cannot be loaded.
    """
    from helper_functions import InputError, hold_in_bf16, load_model_and_tokenizer, one_line

    if not Path(folder, "adapter_config.json").exists():
        return load_model_and_tokenizer(str(folder), flag="--save_dir")
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    weights = Path(folder, "adapter_model.safetensors")
    if not weights.is_file():  # peft would look for pickled weights next
        raise input_error(
            f"--save_dir {folder}: the adapter in this folder cannot be loaded (it has no {weights.name})"
        )
    run = read_run_json(folder) or {}
    try:
        config = PeftConfig.from_pretrained(folder)
        if config.peft_type != "LORA":
            raise input_error(f"--save_dir {folder} holds an adapter of type {config.peft_type.value}, not LORA")
        base_name = model_name or config.base_model_name_or_path
        base, tokenizer = load_model_and_tokenizer(base_name, cached)
        # ByT5's tokenizer is not a fast one and has no tokenizer.json.
        files = ["tokenizer_config.json", *(["tokenizer.json"] if tokenizer.is_fast else [])]
        missing = [name for name in files if not Path(folder, name).is_file()]
        if run and missing:  # an adapter of someone else's may come without them
            raise input_error(f"--save_dir {folder}: its tokenizer files are missing ({', '.join(missing)})")
        if run.get("identity", {}).get("weights (--model_name)") not in (None, weights_sha256(base)):
            raise input_error(f"--save_dir {folder}: its adapter was trained on another base than {base_name}")
        if run.get("args", {}).get("base_dtype", base_dtype) == "bf16":
            hold_in_bf16(base)
        model = PeftModel.from_pretrained(base, folder)
        with safe_open(weights, "pt") as file:
            # Of a foreign adapter peft leaves out what it does not know, and keeps fresh weights for what is missing.
            if set(file.keys()) != set(get_peft_model_state_dict(model, save_embedding_layers=False)):
                raise input_error(
                    f"--save_dir {folder}: the weights of its adapter do not fit --model_name {base_name}"
                )
        return model, tokenizer
    except InputError:
        raise
    except Exception as error:  # whatever peft says of a config or weights that are not its own
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise input_error(f"--save_dir {folder}: the adapter in this folder cannot be loaded ({reason})") from None


def checkpoint_bytes(folder):
    """Bytes of the weights at the folder's root: the whole model, or the adapter alone."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


# --------------------------------------------------------------------------------------------- last/, for --resume


def begin(folder, record):
    """Make `folder` a new run's: remove what a former run of ours left there, and nothing else, and write run.json."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_last(folder)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
        for name in TRACKER_FOLDERS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    write_run_json(folder, record)


def save_last(folder, accelerator, loop, model=None, optimizer=None):
    """Save what --resume needs as the folder last/, all of it or nothing. To be called by every process.

    loop: what JSON can hold of the loop's state. The rest goes through accelerate's save_state: the weights that are
    trained (of a PeftModel: the adapter alone), the optimizer, the scaler of fp16 and the random generators.
    model, optimizer: the prepared ones, needed where the model is sharded.
    """
    last, beside, older = (Path(folder, name) for name in ("last", ".tmp-last", ".old-last"))

    def keep_trained(models, weights, _):
        for i, model in enumerate(models):
            weights[i] = {name: weights[i][name] for name in _trained(model)}

    hook = accelerator.register_save_state_pre_hook(keep_trained)
    try:
        with _writing_folder(beside) if accelerator.is_main_process else nullcontext():
            accelerator.wait_for_everyone()
            if accelerator.is_fsdp2:
                _save_sharded(beside, accelerator, model, optimizer)
            else:
                accelerator.save_state(beside)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (beside / "loop.json").write_text(json.dumps(loop), encoding="utf-8")
                # A folder cannot be renamed over another. Between the two renames the older one is there to be found.
                if last.exists():
                    shutil.rmtree(older, ignore_errors=True)
                    last.rename(older)
                beside.rename(last)
                shutil.rmtree(older, ignore_errors=True)
    finally:
        hook.remove()


def find_last(folder):
    """The folder that `save_last` saved last in a run folder, or None."""
    return next((path for path in (Path(folder, "last"), Path(folder, ".old-last")) if path.is_dir()), None)


def read_loop(folder, state_class):
    """(loop state, state of the schedule) as `save_last` saved them, or None where nothing was saved yet.

    state_class: the dataclass of the loop's state. Raises InputError.
    """
    last = find_last(folder)
    if last is None:
        return None
    try:
        loop = json.loads((last / "loop.json").read_text(encoding="utf-8"))
        state = state_class(**loop["state"])
        defaults = vars(state_class())
        wrong = [name for name, value in vars(state).items() if type(value) is not type(defaults[name])]
        if wrong:
            raise ValueError(f"wrong type of {', '.join(wrong)}")
        return state, loop["schedule"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _cannot_resume(last / "loop.json", error) from None


def load_last(folder, accelerator, model, optimizer=None):
    """Put what `save_last` saved into the prepared model, its optimizer, the scaler and the random generators.

    optimizer: the prepared one, needed where the model is sharded.
    Nothing is unpickled but tensors and numbers. Raises InputError for what is damaged or of another model.
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
            # Not strict: what is not trained is not saved, and that nothing else is missing was checked above.
            accelerator.load_state(last, strict=False, load_kwargs={"weights_only": True})
        # accelerate goes on in silence where it cannot read the random states, which hold its `step` too.
        if accelerator.step is None:
            raise ValueError("its random states cannot be read")
    except Exception as error:  # each library has its own for what is cut off, missing or forged
        raise _cannot_resume(last, error) from None


def _save_sharded(folder, accelerator, model, optimizer):
    """accelerate's save_state for a sharded model, but the files of `save_last`. Its own are all weights, those of an
    adapter's base too, or shards that are read by unpickling. The first process gathers everything on the CPU.
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
    """accelerate's load_state of what `_save_sharded` saved: every process reads the files, and keeps its shards."""
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


def remove_last(folder):
    """Remove last/ and whatever a run that was killed can have left half-written."""
    for name in ("last", ".old-last", *UNRENAMED):
        path = Path(folder, name)
        if path.is_file():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _trained(model):
    """{name: weight} of what is trained; weights that are shared are named once."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _cannot_resume(path, error):
    from helper_functions import one_line

    reason = f"{type(error).__name__}: {one_line(error)}"
    return input_error(f"{path} cannot be resumed from ({reason}); --overwrite starts the run again")


def identity(loaders, weights, accelerator):
    """What a run must still have in common with its beginning when it is resumed, beside its arguments.

    loaders: {role: DataLoader over a TweetQADataset}. weights: the `weights_sha256` of the model it starts from.
    Returns {name: a value for JSON}.
    """
    rows = {}
    for role, loader in loaders.items():
        data = loader.dataset
        content = json.dumps([data.rows, data.input_ids, data.labels]).encode()
        rows[f"{role} rows (--dataset)"] = hashlib.sha256(content).hexdigest()
    return rows | {
        "weights (--model_name)": weights,
        "precision": accelerator.mixed_precision,
        "number of processes": accelerator.num_processes,
        **({"sharding": "FSDP2"} if accelerator.is_fsdp2 else {}),
    }


def weights_sha256(model):
    """A hash of the first 1024 values of each weight: what tells one checkpoint from another within moments."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ tables, run.json


def write_table(path, rows):
    """Write rows (a list of dicts, or a DataFrame) as CSV. Floats are written in full, so they read back the same."""
    import pandas as pd

    with writing(path) as beside:
        pd.DataFrame(rows).to_csv(beside, index=False, lineterminator="\n")


def write_predictions(path, frame):
    """Write the frame of `evaluate` as CSV; `references` becomes a JSON list, which `load_tweet_qa` could read too."""
    references = [json.dumps(refs, ensure_ascii=False) for refs in frame["references"]]
    write_table(path, frame.assign(references=references))


def write_test_answers(path, rows, predictions):
    """Write the leaderboard's file: a list of {"qid", "Answer"}, one a row in row order, repeated qids included."""
    answers = [{"qid": row["qid"], "Answer": text} for row, text in zip(rows, predictions, strict=True)]
    with writing(path) as beside:
        beside.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_run_json(folder):
    """The record of the run in `folder`, or None if there is no run.json. Raises InputError for one that is damaged."""
    path = Path(folder, "run.json")
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run["args"], dict) or not isinstance(run["method"], str):
            raise ValueError("it is no record of a run")
        return run
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        from helper_functions import one_line

        raise input_error(f"{path} cannot be read ({type(error).__name__}: {one_line(error)})") from None


def write_run_json(folder, run):
    """Write run.json, the record of the run: see `new_run` for its fields."""
    with writing(Path(folder, "run.json")) as beside:
        beside.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def new_run(method, args, device, model):
    """The record of a run that starts now, as run.json holds it. What only the end can tell is None until then.

    method: "full" or "lora". args: the parsed command line. device: a torch.device. model: the model to be trained.
    """
    import torch

    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "method": method,
        "args": dict(vars(args)),
        "versions": {"python": sys.version.split()[0]} | {library: version(library) for library in LIBRARIES},
        "git_commit": git_commit(),
        "run_id": uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
        "device": device_name,
        "seed": args.seed,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "best_epoch": None,
        "final": None,
        "wall_time_seconds": None,
        "estimated_peak_mb": None,
        "peak_ram_mb": None,
        "peak_vram_mb": None,
        "checkpoint_bytes": None,
    }


def git_commit():
    """The commit of the code that runs, "-dirty" behind it if tracked files were changed since; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def peak_ram_mb():
    """The most memory (MB, resident) that this process has held so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)  # macOS counts bytes, Linux kilobytes


# ---------------------------------------------------------------------------------------------------- read a run

# What is read of a finished run, for `compare_runs.py`: fields of run.json and columns of its tables.
METRICS = ["f1", "em", "avg_sem_sim", "bleu1", "rougeL", "meteor"]
TEXTS = ["method", "device", "args.model_name", "args.dataset", "scoring.sem_model"]
COUNTS = ["trainable_parameters", "total_parameters", "checkpoint_bytes", "best_epoch", "scoring.final_beams"]
COUNTS += ["scoring.max_input_len", "scoring.max_target_len", "args.epochs"]
NUMBERS = ["args.seed", "args.patience", "final.f1", "final.em"]
NUMBERS_OR_NULL = ["peak_vram_mb", "peak_ram_mb", *(f"final.{name}" for name in METRICS)]
EPOCH_COLUMNS = ["epoch", "f1", "epoch_seconds", "steps_per_sec"]
EXAMPLE_COLUMNS = ["qid", "question", "tweet", "references", "prediction", "em", "f1", "sem_sim", "question_type"]


def read_run(folder):
    """The finished run in `folder`: (record, epochs, examples), checked against each other.

    record: run.json; its "scoring" holds the arguments that the final metrics were made with, those of a later
    --eval_only if there was one. epochs: metrics.csv. examples: validation_predictions.csv, the references as lists,
    sem_sim NaN where it was not measured. Both are DataFrames.

    Raises InputError if there is no run, or one that has not finished or whose files are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise input_error(f"{folder}: there is no such folder; give one that a training script wrote (--save_dir)")
    record = read_run_json(folder)
    if record is None:
        problem = "is not the record of a run" if (folder / "run.json").exists() else "is missing"
        raise input_error(f"{folder / 'run.json'} {problem}: give a folder that a training script wrote (--save_dir)")
    _check_record(folder, record)

    path, best = folder / "metrics.csv", record["best_epoch"]
    epochs = _read_table(path, EPOCH_COLUMNS)
    for name in EPOCH_COLUMNS:
        epochs[name] = _numbers(path, epochs[name], 0, 1 if name == "f1" else math.inf)
    args = record["args"]
    ended = min(args["epochs"], best + args["patience"]) if args["patience"] else args["epochs"]
    if list(epochs["epoch"]) != list(range(1, ended + 1)):
        raise input_error(f"{path} was cut off or changed: epochs 1 to {ended} should be there, in order")

    path, final = folder / "validation_predictions.csv", record["final"]
    examples = _read_table(path, EXAMPLE_COLUMNS)
    examples["references"] = [_parse_references(path, *entry) for entry in enumerate(examples["references"], start=1)]
    for name, mean, low in (("f1", final["f1"], 0), ("em", final["em"], 0), ("sem_sim", final["avg_sem_sim"], -1)):
        if mean is None:
            examples[name] = math.nan
            continue
        examples[name] = _numbers(path, examples[name], low, 1)
        if not math.isclose(examples[name].mean(), mean, abs_tol=1e-6):
            found = f"the mean {name} of its {len(examples)} rows is {examples[name].mean():.4f}"
            raise input_error(f"{path} was cut off or changed: {found}, but run.json says {mean:.4f}")
    return record, epochs, examples


def _check_record(folder, record):
    """Raise InputError unless run.json is that of a training run that has finished, and holds what is read of it."""

    def is_number(value):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

    record["scoring"] = record.get("eval_only") or record["args"]
    if isinstance(record["args"], dict) and record["args"].get("eval_only"):
        raise input_error(f"{folder} holds a checkpoint that was only scored (--eval_only), not a training run")
    if record.get("final") is None or record.get("wall_time_seconds") is None or (folder / "last").exists():
        raise input_error(f"{folder} holds a run that has not finished: let it end first, or leave it out")
    held = ["holdout.metrics.f1"] if record.get("holdout") else []
    for names, wanted, is_right in (
        (TEXTS, "text", lambda value: isinstance(value, str)),
        (COUNTS, "a number above 0", lambda value: is_number(value) and value > 0),
        (NUMBERS + held, "a number", is_number),
        (NUMBERS_OR_NULL, "a number or null", lambda value: value is None or is_number(value)),
    ):
        for name in names:
            value = record
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if not is_right(value):
                name = name.replace("scoring", "eval_only" if record.get("eval_only") else "args")
                raise input_error(f"{folder / 'run.json'}: {name} must be {wanted}, not {json.dumps(value):.80}")
    if record["method"] not in ("full", "lora"):
        raise input_error(f"{folder / 'run.json'}: method must be full or lora, not {record['method']!r:.80}")
    record["final"] = {name: record["final"].get(name) for name in METRICS}  # null for one that is missing


def _read_table(path, columns):
    """`columns` of a CSV file that a run wrote, as text. Raises InputError unless the file is there and whole."""
    import pandas as pd

    try:
        text = path.read_bytes().decode("utf-8")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = list(reader)
    except FileNotFoundError:
        raise input_error(f"{path} is missing: the run folder is not whole") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise input_error(f"{path} was cut off or changed ({error})") from None
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise input_error(f"{path} has no column {missing[0]}: it was cut off or changed")
    broken = [number for number, row in enumerate(rows, start=1) if None in row or None in row.values()]
    if broken or not rows or not text.endswith("\n"):
        raise input_error(f"{path} was cut off or changed: row {broken[0] if broken else len(rows)} is not whole")
    return pd.DataFrame(rows)[columns]


def _numbers(path, column, low, high):
    """A column of `_read_table` as floats. Raises InputError if one is not a number from `low` to `high`."""
    import numpy as np
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(float)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= low) & (values <= high)))
    if len(wrong):
        raise input_error(f"{path}, row {wrong[0] + 1}: {column.name} cannot be {column[wrong[0]]!r:.80}")
    return values


def _parse_references(path, number, text):
    """The references of row `number`: a list of strings, written as JSON."""
    try:
        references = json.loads(text)
        if references and isinstance(references, list) and all(isinstance(each, str) for each in references):
            return references
    except (ValueError, RecursionError):
        pass
    raise input_error(f"{path}, row {number}: references must be a list of texts as JSON, not {text!r:.80}")


# -------------------------------------------------------------------------------------------------------- curves


def draw_curves(folder, epochs, steps):
    """Draw loss_curve.png, val_f1_curve.png and, if similarity was measured, val_sem_sim_curve.png.

    epochs: the rows of metrics.csv so far. steps: the rows of train_loss.csv so far.
    """
    import pandas as pd

    folder = Path(folder)
    last_steps = {row["epoch"]: row["step"] for row in steps}  # the step at which each epoch ended
    figure, axes = _new_axes("Loss", "optimizer step", "cross entropy of a target token (nats)")
    x, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    axes.plot(x, losses, color=TRAIN_COLOUR, alpha=0.3, linewidth=0.8, label="training, each step")
    window = max(1, len(losses) // 30)  # wide enough to be smooth, narrow enough not to lag behind
    mean = pd.Series(losses).rolling(window, min_periods=1).mean()
    axes.plot(x, mean, color=TRAIN_COLOUR, linewidth=1.8, label=f"training, mean of {window}" if window > 1 else None)
    axes.plot(
        [last_steps[row["epoch"]] for row in epochs],
        [row["val_loss"] for row in epochs],
        color=VALIDATION_COLOUR,
        marker="o",
        label="validation",
    )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, folder / "loss_curve.png")
    _draw_metric(folder / "val_f1_curve.png", epochs, "f1", "Validation F1", "token F1")
    if epochs[-1]["avg_sem_sim"] is not None:
        title = "Validation semantic similarity"
        _draw_metric(folder / "val_sem_sim_curve.png", epochs, "avg_sem_sim", title, "mean cosine similarity")


def _draw_metric(path, epochs, key, title, label):
    figure, axes = _new_axes(title, "epoch", label)
    x, y = [row["epoch"] for row in epochs], [row[key] for row in epochs]
    axes.plot(x, y, color=VALIDATION_COLOUR, marker="o")
    best = max(range(len(y)), key=y.__getitem__)
    axes.annotate(f"best {y[best]:.3f}", (x[best], y[best]), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_xlim(min(x) - 0.5, max(x) + 0.5)
    low, high = min(y), max(y)
    room = 0.15 * (high - low) or 0.05
    axes.set_ylim(low - room if low < 0 else max(0, low - room), high + room)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, path)


def _new_axes(title, x_label, y_label):
    from matplotlib.figure import Figure  # without pyplot: no windows, no state that outlives the drawing

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path):
    with writing(path) as beside:
        figure.savefig(beside, format="png")


# ----------------------------------------------------------------------------------------------------- breakdown

WELL_POPULATED = 20  # below that, a slice's interval is too wide to tell it from the others


def breakdown(frame):
    """Where the model fails: scores by slices of the examples.

    frame: a frame of `evaluate`. Returns a DataFrame with a row a slice: feature, value, count, em and f1 with the
    bounds of their 95 % intervals (em_low, em_high, ...), sem_sim. The worst F1 of the well populated slices stands
    first; the slices of fewer than WELL_POPULATED examples come after all of those, the same way.
    """
    import pandas as pd

    slices = {"question": frame["question_type"], "answer length": _answer_lengths(frame)}
    slices["span"] = _stands_in_tweet(frame).map({True: "answer in the tweet", False: "answer not in the tweet"})
    for name in ("hashtag", "handle", "url", "number", "emoji"):
        slices[name] = frame[f"has_{name}"].map({True: f"with {name}", False: f"without {name}"})
    rows = []
    for feature, values in slices.items():
        if values.nunique() == 1:  # says nothing beside the other side
            continue
        for value, part in frame.groupby(values):
            row = {"feature": feature, "value": value, "count": len(part)}
            for metric in ("em", "f1"):
                low, high = _mean_interval(part[metric].to_numpy())
                row |= {metric: part[metric].mean(), f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row | {"sem_sim": part["sem_sim"].mean()})
    columns = "feature value count em em_low em_high f1 f1_low f1_high sem_sim".split()
    table = pd.DataFrame(rows, columns=columns)
    small = table["count"] < WELL_POPULATED
    return (
        table.assign(small=small).sort_values(["small", "f1", "feature"]).drop(columns="small").reset_index(drop=True)
    )


def _answer_lengths(frame):
    """The number of words of each example's first reference, in four classes."""
    import pandas as pd

    words = frame["references"].map(lambda references: len(references[0].split()))
    return pd.cut(words, [0, 1, 2, 5, 10**9], labels=["1 word", "2 words", "3-5 words", "6+ words"]).astype(str)


def _stands_in_tweet(frame):
    """Whether one of the references stands in the tweet, word for word once both are normalized."""
    from helper_functions import normalize_answer

    def stands(row):
        tweet = f" {normalize_answer(row['tweet'])} "
        return any(f" {normalize_answer(reference)} " in tweet for reference in row["references"])

    return frame[["tweet", "references"]].apply(stands, axis=1)


def _mean_interval(values, resamples=2000):
    """Bounds of the 95 % percentile bootstrap interval of a mean (Efron, 1979), with a fixed seed."""
    import numpy as np

    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return low, high


def draw_breakdown(path, table, overall):
    """Draw a breakdown: F1 of each slice with its interval, in the table's order, and the `overall` F1 as a line."""
    figure, axes = _new_axes("F1 by slice of the validation split, 95 % intervals", "token F1", "")
    figure.set_size_inches(7.5, 1.4 + 0.27 * len(table))
    places = range(len(table))
    for place, row in zip(places, table.to_dict("records"), strict=True):
        colour = VALIDATION_COLOUR if row["count"] >= WELL_POPULATED else "#999999"
        axes.plot([row["f1_low"], row["f1_high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot(row["f1"], place, "o", color=colour)
    axes.axvline(overall, color=TRAIN_COLOUR, linestyle="--", linewidth=1.2, zorder=0)
    side = {"ha": "left", "xytext": (5, 0)} if overall < 0.7 else {"ha": "right", "xytext": (-5, 0)}
    text = f"all examples: {overall:.3f}"
    axes.annotate(text, (overall, -0.8), color=TRAIN_COLOUR, va="center", textcoords="offset points", **side)
    names = [
        f"{row['feature']}: {row['value']}" if row["feature"] in ("question", "answer length") else row["value"]
        for row in table.to_dict("records")
    ]
    axes.set_yticks(places, [f"{name} ({n})" for name, n in zip(names, table["count"], strict=True)])
    axes.set_ylim(len(table) - 0.4, -1.2)  # the worst on top
    axes.set_xlim(-0.02, 1.02)
    if (table["count"] < WELL_POPULATED).any():
        axes.set_xlabel(f"token F1 (grey: fewer than {WELL_POPULATED} examples)")
    _save(figure, path)


# ---------------------------------------------------------------------------------------------------- model card


def write_model_card(folder, run):
    """Write the folder's README.md, the model card: base model, data, arguments, metrics, how to load.

    For an adapter the fields that peft put into the card's header are kept.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from helper_functions import _is_local

    args, final, scored = run["args"], run["final"], run.get("eval_only") or run["args"]
    path = Path(folder, "README.md")
    data = ModelCard.load(path, ignore_metadata_errors=True).data if path.exists() else ModelCardData()
    local = _is_local(args["model_name"])
    data.base_model = None if local else args["model_name"]  # the hub takes only ids of its own here
    data.library_name = "peft" if run["method"] == "lora" else "transformers"
    data.language = "en"
    tags = [tag for tag in data.tags or [] if not (local and tag.startswith("base_model:"))]
    data.tags = sorted({*tags, "question-answering", "tweet_qa", "t5"})
    data.metrics = ["f1", "exact_match"]
    if not _is_local(args["dataset"]):
        data.datasets = [args["dataset"]]
    trained = f"{run['trainable_parameters']:,} of {run['total_parameters']:,} parameters trained"
    method = "a LoRA adapter" if run["method"] == "lora" else "a full fine-tune"
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {args['model_name']} on TweetQA",
        "",
        f"This is {method} of `{args['model_name']}` for question answering over tweets ({trained}), on the data set"
        f" `{args['dataset']}`. The input is `Question: …\\nTweet: …\\nAnswer:`, the output the answer.",
        "",
        "## Results",
        "",
    ]
    if final is None:
        lines += ["The run that writes this folder has not finished yet.", ""]
    else:
        lines += [
            f"Validation split of `{scored['dataset']}`, best epoch ({run['best_epoch']}), {scored['final_beams']}"
            " beams. The epoch was chosen by F1 on a validation split, so the figures are a little optimistic.",
            "",
            "| metric | value |",
            "| --- | --- |",
            *_metric_rows(final),
            "",
        ]
        if run.get("holdout"):
            held = f"{len(run['holdout']['rows'])} rows of train that were set aside, by tweet, before training:"
            lines += [held, "", "| metric | value |", "| --- | --- |", *_metric_rows(run["holdout"]["metrics"]), ""]
    lines += ["## How to load", "", "```python", *_loading_snippet(run).splitlines(), "```", ""]
    lines += ["## Arguments", "", "| argument | value |", "| --- | --- |"]
    lines += [f"| `--{name}` | {_as_typed(value)} |" for name, value in args.items()]
    with writing(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _metric_rows(metrics):
    return [f"| {name} | {'not measured' if value is None else f'{value:.4f}'} |" for name, value in metrics.items()]


def _as_typed(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _loading_snippet(run):
    args = run.get("eval_only") or run["args"]
    name = args.get("push_to_hub") or Path(args["save_dir"]).name
    if run["method"] == "full":
        return f"""\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForSeq2SeqLM.from_pretrained({name!r})"""
    dtype = ', dtype="bfloat16"' if run["args"].get("base_dtype") == "bf16" else ""
    return f"""\
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
base = AutoModelForSeq2SeqLM.from_pretrained({run["args"]["model_name"]!r}{dtype})
model = PeftModel.from_pretrained(base, {name!r})"""


# -------------------------------------------------------------------------------------------- trackers, --report_to


def check_tracker(name):
    """Raise InputError unless --report_to's tracker is installed and, for wandb, has an account to log to."""
    if name == "none":
        return
    from accelerate.tracking import get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise input_error(f"--report_to {name} needs a library that is not installed: pip install {name}")
    if name == "wandb":
        import wandb

        settings = wandb.setup(wandb.Settings(silent=True)).settings
        if settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise input_error("--report_to wandb: nobody is logged in; `wandb login` first, or set WANDB_MODE=offline")


def begin_tracking(folder, accelerator, record, state):
    """Begin to log to the tracker that the accelerator was given, or go on with it after the step that `state` tells.

    TensorBoard writes to FOLDER/tensorboard; in a run that is resumed it hides what was noted after that step. wandb
    writes to FOLDER/wandb, and goes on under the same id; its server takes no step that it has. trackio goes on with
    its last run of the folder's name. A step that is done once more stands twice in trackio, and in wandb's files of
    WANDB_MODE=offline.

    Returns how to look at it, None without a tracker and in all processes but the main one. Raises RunError.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return None
    tracker, name, step = str(accelerator.log_with[0]), Path(folder).absolute().name, state.step
    config = {"method": record["method"], **record["args"]}
    config = {key: value if isinstance(value, int | float) else _as_typed(value) for key, value in config.items()}
    options = {}
    if tracker == "tensorboard" and step:
        options, config = {"purge_step": step + 1}, None  # it has the arguments already
    elif tracker == "wandb":
        import wandb

        settings = wandb.Settings(silent=True, console="off", reinit="finish_previous")
        # With the batch size: a run that --auto_batch_size starts again begins to count its steps again.
        run_id = f"{record['run_id']}-{state.batch_size}"
        options = {"name": name, "dir": str(folder), "id": run_id, "resume": "allow", "settings": settings}
    elif tracker == "trackio":
        options = {"name": name, "resume": "allow" if step else "never", "embed": False}
    with _reporting(accelerator):
        # TensorBoard's folder is named after the project.
        project = "tensorboard" if tracker == "tensorboard" else "tweet_qa"
        accelerator.init_trackers(project, config, {tracker: options})
    if tracker == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(folder))}"
    if tracker == "trackio":
        return f"trackio show --project {project}"
    return accelerator.trackers[0].run.url or f"wandb sync {shlex.quote(str(folder))}/wandb/*"


def report(accelerator, part, values, step):
    """Log the values {name: number or None} as PART/NAME, if there is a tracker. Raises RunError."""
    if accelerator.trackers and values:
        with _reporting(accelerator):
            accelerator.log({f"{part}/{name}": value for name, value in values.items() if value is not None}, step)


def report_results(folder, accelerator, record):
    """Log the final metrics and, where the tracker takes images, the plots; then end the tracking. Raises RunError."""
    for tracker in accelerator.trackers:
        for part in ("final", "holdout", "test"):
            metrics = record.get(part, {})
            report(accelerator, part, metrics.get("metrics", metrics), record["steps"])
        if hasattr(tracker, "log_images"):
            import numpy as np
            from PIL import Image

            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for path in (Path(folder, f"{name}.png") for name in PLOTS):
                if path.exists():
                    with _reporting(accelerator):
                        image = np.asarray(Image.open(path).convert("RGB"))
                        tracker.log_images({path.stem: image[None]}, step=record["steps"], **layout)
    end_tracking(accelerator)


def end_tracking(accelerator):
    """Let the tracker write what it still holds. Raises RunError."""
    while accelerator.trackers:
        with _reporting(accelerator):
            tracker = accelerator.trackers.pop()
            tracker.finish()
            if tracker.name == "trackio":  # else it ends the run once more, and says so, when Python exits
                import trackio

                trackio.finish()


@contextmanager
def _reporting(accelerator):
    """Keep what the tracker prints off the screen; raise RunError where it fails."""
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except Exception as error:  # each tracker has its own
        from helper_functions import RunError, one_line

        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RunError(
            f"--report_to {accelerator.log_with[0]} failed ({reason}); --report_to none does without"
        ) from None


# ------------------------------------------------------------------------------------------- upload, --push_to_hub


def check_can_push(repo):
    """Raise InputError unless the hub answers and takes the token with which `repo` will be written to."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        from helper_functions import one_line

        raise input_error(f"--push_to_hub {repo}: {one_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise input_error(f"--push_to_hub {repo}: HF_HUB_OFFLINE is set, so that nothing can be uploaded")
    if not get_token():
        raise input_error(f"--push_to_hub {repo} needs a token: `hf auth login` first, or set HF_TOKEN")
    try:
        token = _who_am_i().get("auth", {}).get("accessToken", {})
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise input_error(
                f"--push_to_hub {repo}: the hub refuses the token; `hf auth login` sets another"
            ) from None
        raise input_error(f"--push_to_hub {repo}: the hub answers {error.response.status_code}; try later") from None
    except Exception as error:  # only its name: the message of a malformed header would quote the token
        raise input_error(f"--push_to_hub {repo}: the hub cannot be reached ({type(error).__name__})") from None
    if token.get("role") == "read":
        raise input_error(f"--push_to_hub {repo}: the token may only read; one that may write is needed")


def _who_am_i(seconds=8):
    """What the hub says of the token. Raises what the hub's library does, and TimeoutError where no answer comes."""
    from huggingface_hub import HfApi

    answers = []

    def ask():
        try:
            answers.append(HfApi().whoami())
        except Exception as error:
            answers.append(error)

    thread = Thread(target=ask, daemon=True)  # no timeout of the library's bounds the look-up of the host's name
    thread.start()
    thread.join(seconds)
    if not answers:
        raise TimeoutError("no answer")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def push(folder, repo):
    """Upload checkpoint, model card, run.json, curves and tables to `repo`, which is made where it is missing.

    Returns its address. Raises RunError, which says how it can be done later.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.utils import disable_progress_bars

    from helper_functions import RunError, one_line

    constants.HF_HUB_OFFLINE = False  # it was, or the run would not have begun; a hub that failed meanwhile sets it
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        _who_am_i()  # an upload has no time limit: none is begun where nobody answers
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        files = [name for name in (*RUN_FILES, "run.json") if not any(fnmatch(name, p) for p in NOT_UPLOADED)]
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload a TweetQA run"
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RunError(f"the upload failed ({reason}); {upload_command(folder, repo)} repeats it") from None
    return str(address)


def upload_command(folder, repo):
    """The command that uploads what `push` does."""
    exclude = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repo, str(folder), ".", *exclude])
