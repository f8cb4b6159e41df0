"""What `tweet_qa_main_lora.py --merge RUN OUT` does: write an adapter merged into its base as an ordinary checkpoint.

    python tweet_qa_main_lora.py --merge flan_t5_tweetqa_ckpt_lora flan_t5_tweetqa_merged

Base + adapter and the merged checkpoint, read back from disk, both answer the run's validation rows. A merged model can
answer differently, since its numbers are rounded at other places: so the answers that changed are counted and written.
"""

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

import pipeline  # noqa: F401, I001 (before the libraries, which look for the home folder)
from helper_functions import PROMPT, InputError, evaluate, load_model_and_tokenizer, quiet_libraries
from pipeline import checkpoint, interrupts, lock, memory, merge, resume, run_folder
from pipeline.arguments import Role, flag, path_or_id, precision_as_typed
from pipeline.devices import device_name
from pipeline.publish import write_model_card
from tweet_qa_main import set_up

MERGE_FLAGS = [  # without a default, so that the record of a run does not have them
    flag(
        "--merge",
        Role.RUNNING,
        nargs=2,
        metavar=("RUN", "OUT"),
        type=path_or_id,
        default=argparse.SUPPRESS,
        help="do not train: merge the adapter of the finished run RUN into its base, write the full model to the new"
        " folder OUT, and say how many answers to the validation rows changed (default: none)",
    ),
    flag(
        "--merge_dtype",
        Role.RUNNING,
        choices=list(merge.DTYPES),
        default=argparse.SUPPRESS,
        help="type of the weights that --merge writes; it adds in float32 (default: fp32)",
    ),
]
# What may be given with --merge. All of it is the run's own by default; its model or data may have moved meanwhile.
ALLOWED = ["merge", "merge_dtype", "model_name", "dataset", "sem_model", "eval_batch_size", "precision"]
ALLOWED += ["final_beams", "max_input_len", "max_target_len", "max_eval_samples"]


def merge_if_asked(parser, argv):
    """Do what --merge asks for. Returns whether it was given.

    parser: the LoRA script's. Raises InputError before anything is written, and RunError if OUT cannot be written.
    """
    given = given_flags(parser, argv)
    if "merge" not in given:
        if "merge_dtype" in given:
            raise InputError("--merge_dtype is the type of what --merge writes: give it with --merge RUN OUT")
        return False
    if wrong := [f"--{name}" for name in given if name not in ALLOWED]:
        raise InputError(f"--merge cannot be combined with {', '.join(wrong)}: omit {'them' if wrong[1:] else 'it'}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--merge needs a single process: start it without accelerate launch")
    quiet_libraries()
    run, out = map(Path, given["merge"])
    record = merge.finished_adapter(run, "--merge")
    check_out(run, out)
    if record["prompt"] != PROMPT:
        raise InputError(f"--merge {run} was trained with another prompt, {record['prompt']!r}: restore PROMPT")
    args = with_the_runs_scoring(parser, argv, run)
    with interrupts.handled(), lock.only_writer(out, flag="--merge: OUT"):
        write_merged(args, record, run, out, given.get("merge_dtype", "fp32"))
    return True


def given_flags(parser, argv):
    """{name: value} of the flags that are on the command line."""
    not_given = object()
    known = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), not_given))
    return {name: value for name, value in vars(parser.parse_args(argv, known)).items() if value is not not_given}


def check_out(run, out):
    """Raise InputError unless OUT is a new or empty folder that can be written to, and not RUN or in it."""
    if out.resolve().is_relative_to(run.resolve()):
        raise InputError(f"--merge: OUT {out} is {run} or inside it: choose another folder")
    run_folder.check_is_empty(out, "--merge: OUT")


def with_the_runs_scoring(parser, argv, run):
    """The arguments with which the run's checkpoint is scored, as --eval_only takes them from run.json: those of the
    run, but for what is on the command line. No row is held out: only validation rows are scored."""
    parser.set_defaults(save_dir=str(run), eval_only=True)
    args = resume.with_the_runs_scoring(parser, argv, parser.parse_args(argv))
    return argparse.Namespace(**vars(args) | {"holdout": 0, "drop_leaked": False})


def write_merged(args, record, run, out, dtype):
    """Merge, write, read back, score both, and put the files into `out`, the weights last: it gets all or nothing."""

    def load_adapter(args):
        return *checkpoint.load_checkpoint(run, args.model_name), None

    setup, model, _ = set_up(args, load_adapter)
    args, say, device = setup.args, setup.say, setup.accelerator.device
    batch = {name: part.to(device) for name, part in next(iter(setup.loaders["validation"])).items()}
    base = model.get_base_model().config._name_or_path
    say(f"merging: {run} into {args.model_name or base}, {dtype}")
    with memory.memory_for("the model's weights in float32: merge on a machine with more"):
        merged = merge.merge(model.to(device), batch, f"--merge {run}").cpu().to(merge.DTYPES[dtype])
    record = record | {"method": "full", "merged": True, "final": None, "holdout": None}
    record["eval_only"] = vars(args) | {"save_dir": str(out)}
    with run_folder.writing_folder(out / run_folder.MERGING) as beside:
        checkpoint.save_checkpoint(beside, merged, setup.tokenizer, record)
        del model, merged
        model, _ = load_model_and_tokenizer(str(beside), flag="--merge: OUT")
        after = score(setup, model, batch, "merged")
        model, *_ = load_adapter(args)
        before = score(setup, model, batch, "adapter")
        changed = merge.changed_answers(before["frame"], after["frame"])
        run_folder.write_predictions(beside / "merge_changed_answers.csv", changed)
        told = {"run": str(run), "dtype": dtype} | report(setup, before, after, changed)
        run_folder.write_json(beside / "merge.json", told)
        write_model_card(beside, record | {"final": after["metrics"]})
        with interrupts.deferred():
            for path in sorted(beside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, out / path.name)
    say(
        f"merged: {len(changed)} of {told['rows']} answers differ from the adapter's |"
        f" F1 {told['f1_adapter']:.4f} -> {told['f1_merged']:.4f} |"
        f" EM {told['em_adapter']:.4f} -> {told['em_merged']:.4f} | {out}"
    )


def score(setup, model, batch, title):
    """What a model makes of the run's validation rows: {"metrics", "frame": of `evaluate`, "logits": of `batch`}."""
    args, accelerator = setup.args, setup.accelerator
    model = model.to(accelerator.device).eval()
    given = (model, setup.loaders["validation"], setup.tokenizer, accelerator.device, setup.sem_model)
    options = {"beams": args.final_beams, "max_target_len": args.max_target_len, "accelerator": accelerator}
    with memory.memory_for(f"--eval_batch_size {args.eval_batch_size} and {args.final_beams} beams: lower one"):
        metrics, frame = evaluate(*given, **options, title=title, with_scores=False)
        with accelerator.autocast():
            logits = merge.target_logits_of(model, batch)
    return {"metrics": metrics, "frame": frame, "logits": logits}


def report(setup, before, after, changed):
    """What merge.json says of both: a dict. before, after: of `score`. changed: of `merge.changed_answers`."""
    args, accelerator = setup.args, setup.accelerator
    told = {"rows": len(after["frame"]), "answers_changed": len(changed)}
    for name in after["metrics"]:
        told |= {f"{name}_adapter": before["metrics"][name], f"{name}_merged": after["metrics"][name]}
    return told | {
        # Of the target's tokens in the batch with the longest prompts; both as they are used, in their own types.
        "max_logit_difference": merge.max_difference(before["logits"], after["logits"]),
        "largest_logit": before["logits"].abs().max().item(),
        "final_beams": args.final_beams,
        "dataset": args.dataset,
        "device": device_name(accelerator.device),
        "precision": precision_as_typed(accelerator.mixed_precision),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": run_folder.versions(),
        "git_commit": run_folder.git_commit(),
    }
