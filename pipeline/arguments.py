"""The command line of both training scripts: each flag with its type, default, help and role.

A flag's role says what it changes. Which flags may differ on --resume, which ones --eval_only takes from the run, and
which ones set two methods apart in a comparison all follow from it, so a new flag needs only its line here (or in
`tweet_qa_main_lora.py`). A flag without a role fails when the module is imported.
"""

import argparse
import math
import os
from enum import Flag, auto

from pipeline.errors import one_line

DEFAULT_MODEL = "google/flan-t5-small"
# A CPU gains nothing from larger batches, and a beam search over 128 rows is slower; a GPU has more to do at once.
EVAL_BATCH_SIZE = {"cpu": 32, "cuda": 64}
WEIGHT_DECAY = 0.01  # of matrices only: norms have one-dimensional weights, and pulling those to zero hurts
WARMUP = 0.06  # share of all steps in which the learning rate rises; without it T5 is unstable in the first steps
# Those of transformers' schedules that need no further argument. The longer cosine and polynomial ones with their
# defaults are cosine and linear again.
SCHEDULES = ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
HOLDOUT_SEED = 42  # the default of --seed, which chose the held-out rows before --holdout_seed did
# What runs did before there were these flags, whose arguments their run.json does not have.
BEFORE = {"weight_decay": 0.01, "warmup_steps": 0.06, "lr_scheduler_type": "linear", "max_steps": None}
BEFORE |= {"optim": "adamw", "label_smoothing_factor": 0.0, "train_subset": None}
BEFORE_IN_LORA = {"use_rslora": False, "use_dora": False}


class Role(Flag):
    """What changes with a flag."""

    TRAINING = auto()  # the trained weights
    ROWS = auto()  # which rows are trained on; runs on different rows are not compared
    SEED = auto()  # the random numbers; runs that differ in nothing else are runs of one method
    SCORING = auto()  # which rows are scored and how; --eval_only repeats what the run did
    MEASURE = auto()  # what a score means; runs with different measures are not compared
    INPUT = auto()  # a model or data set, which may have moved: --resume compares its content, not its name
    COST = auto()  # time or memory, not the result
    RUNNING = auto()  # only how the run proceeds: where it writes, when it saves, what it reports


# Resuming with a different value would change the result.
FIXED_IN_A_RUN = Role.TRAINING | Role.ROWS | Role.SEED | Role.SCORING


class Parser(argparse.ArgumentParser):
    """argparse's parser with one line for a wrong argument, without the usage."""

    def error(self, message):
        said = f"error: {' '.join(message.splitlines())} (--help lists the arguments)\n"
        self.exit(2, said if os.environ.get("RANK", "0") == "0" else None)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each flag that has one, and the description with its line breaks."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------- argument types


def at_least(low):
    """An argparse type: a whole number from `low` up, below 2**32 as the libraries' random generators need it."""

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


def number(is_right, what):
    """An argparse type: a number for which the function `is_right` is true; `what` says which numbers those are."""

    def parse(text):
        try:
            if is_right(float(text)):
                return float(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a number {what}, not {text!r}")

    return parse


positive_float = number(lambda x: 0 < x < math.inf, "above 0")
rate = number(lambda x: 0 <= x < 1, "of at least 0 and below 1")
not_negative = number(lambda x: 0 <= x < math.inf, "of at least 0")
steps_or_share = number(
    lambda x: 0 <= x < 1 or (x < 2**32 and x == int(x)), "of steps, or a share of all steps below 1"
)


def path_or_id(text):
    """An argparse type: a string that can be a path or a hub id. Whether it exists is checked where it is used."""
    try:
        text.encode("utf-8")  # it is printed, and written to run.json
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, no permission, a NUL byte, not UTF-8
        raise argparse.ArgumentTypeError(f"cannot be used: {one_line(error)}") from None
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


# ------------------------------------------------------------------------------------------------------ the flags

ROLES = {}  # {argument's name: Role} of every flag that `flag` has declared


def flag(name, role, also=(), **options):
    """Declare a flag. name: with its dashes. role: a Role. also: other names for it, with dashes; run.json has `name`.
    options: those of argparse's add_argument."""
    if not (isinstance(role, Role) and role):
        raise TypeError(f"{name} needs a Role")
    ROLES[name.removeprefix("--")] = role
    return (name, *also), options


T, S = Role.TRAINING, Role.SCORING
FLAGS = [
    flag("--model_name", Role.INPUT, type=path_or_id, help=f"T5 model: hub id or folder (default: {DEFAULT_MODEL})"),
    flag(
        "--dataset",
        Role.INPUT | S,
        type=path_or_id,
        default="ucsbnlp/tweet_qa",
        help="data set: hub id or folder of train/validation/test files",
    ),
    flag(
        "--save_dir",
        Role.RUNNING,
        type=path_or_id,
        help="run folder to write; must be new or empty, unless --resume, --overwrite, --eval_only or --seeds is given",
    ),
    flag("--resume", Role.RUNNING, action="store_true", help="resume the interrupted run in --save_dir"),
    flag(
        "--overwrite", Role.RUNNING, action="store_true", help="replace the run in --save_dir, after checking the input"
    ),
    flag(
        "--save_every", Role.RUNNING, type=at_least(0), default=0, help="steps between saves; 0: after each epoch only"
    ),
    flag(
        "--seeds",
        Role.RUNNING,
        type=at_least(0),
        nargs="+",
        help="one run for each seed, in SAVE_DIR/seed_N (default: --seed)",
    ),
    flag(
        "--eval_only",
        Role.RUNNING,
        action="store_true",
        help="do not train: evaluate the checkpoint in --save_dir or, in a new folder, --model_name as it is",
    ),
    flag("--epochs", T, type=at_least(1), default=5, help="passes over the training rows"),
    flag("--max_steps", T, type=at_least(1), help="stop after N optimizer steps, in place of --epochs (default: none)"),
    flag("--batch_size", T, type=at_least(1), default=8, help="training examples per forward pass"),
    flag("--grad_accum_steps", T, type=at_least(1), default=1, help="batches per optimizer step"),
    flag(
        "--auto_batch_size",
        Role.RUNNING,
        action="store_true",
        help="if memory runs out, restart with half the batch size and twice --grad_accum_steps",
    ),
    flag(
        "--gradient_checkpointing",
        Role.COST,
        action="store_true",
        help="less memory, more time: compute activations twice",
    ),
    flag("--lr", T, type=positive_float, help="peak learning rate"),
    flag(
        "--warmup_steps",
        T,
        also=["--warmup"],
        type=steps_or_share,
        default=WARMUP,
        help="steps in which the learning rate rises to --lr; below 1: their share of all steps",
    ),
    flag(
        "--lr_scheduler_type",
        T,
        choices=SCHEDULES,
        default="linear",
        help="how the learning rate falls after the warm-up, linear and cosine to 0; constant has no warm-up",
    ),
    flag(
        "--optim",
        T,
        also=["--optimizer"],
        choices=["adamw", "adafactor"],
        default="adamw",
        help="optimizer; adafactor keeps far less state, and uses --lr as adamw does",
    ),
    flag(
        "--weight_decay",
        T,
        type=not_negative,
        default=WEIGHT_DECAY,
        help="decay of the trained matrices; one-dimensional weights, such as norms, are not decayed",
    ),
    flag(
        "--label_smoothing_factor",
        T,
        also=["--label_smoothing"],
        type=rate,
        default=0.0,
        help="share of a target's probability that all tokens get, in the training loss only",
    ),
    flag(
        "--precision",
        T | S,
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="auto: bf16 on a GPU that supports it, fp32 elsewhere",
    ),
    flag(
        "--seed",
        Role.SEED | S,
        type=at_least(0),
        default=42,
        help="random seed for data order, dropout and adapter initialization",
    ),
    flag(
        "--patience",
        T,
        type=at_least(0),
        default=0,
        help="stop after N epochs without an improvement in F1; 0: never",
    ),
    flag(
        "--eval_batch_size",
        Role.RUNNING,
        type=at_least(1),
        help="validation examples per batch (default: {cpu} on a CPU, {cuda} on a GPU)".format(**EVAL_BATCH_SIZE),
    ),
    flag("--eval_beams", T, type=at_least(1), default=1, help="beams of the evaluation after each epoch; 1 is greedy"),
    flag("--final_beams", S | Role.MEASURE, type=at_least(1), default=5, help="beams of the final evaluation"),
    flag(
        "--max_input_len",
        T | S | Role.MEASURE,
        type=at_least(8),
        default=256,
        help="maximum tokens of a prompt; TweetQA's longest has 141, or 449 bytes for ByT5",
    ),
    flag(
        "--max_target_len",
        T | S | Role.MEASURE,
        type=at_least(2),
        default=32,
        help="maximum tokens of an answer, in training and generation; TweetQA's longest has 33, or 69 bytes for ByT5",
    ),
    flag(
        "--sem_model",
        Role.INPUT | S | Role.MEASURE,
        type=path_or_id,
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="model for semantic similarity: hub id, folder, or none",
    ),
    flag("--max_train_samples", Role.ROWS, type=at_least(1), help="train on the first N rows only (default: all)"),
    flag(
        "--train_subset",
        T,
        type=at_least(1),
        help="train on a random subset of at most N rows, whole tweets, the same in all runs; a smaller one is part of"
        " a larger one (default: all)",
    ),
    flag("--max_eval_samples", S, type=at_least(1), help="evaluate the first N rows of each split only (default: all)"),
    flag(
        "--holdout",
        Role.ROWS | S,
        type=at_least(0),
        default=0,
        help="training rows to set aside, by tweet, and score at the end",
    ),
    flag(
        "--holdout_seed",
        Role.ROWS | S,
        type=at_least(0),
        default=HOLDOUT_SEED,
        help="random seed for the choice of the --holdout rows",
    ),
    flag(
        "--drop_leaked",
        Role.ROWS | S,
        action="store_true",
        help="drop training rows whose tweet is also in validation or test",
    ),
    flag(
        "--probe",
        Role.INPUT | Role.RUNNING,  # it changes no weights and tells no methods apart, but a run keeps one probe
        type=path_or_id,
        help="measure what the model forgets on this file of prompts and targets, as in probes/ (default: none)",
    ),
    flag(
        "--report_to",
        Role.RUNNING,
        choices=["tensorboard", "wandb", "trackio", "none"],
        default="none",
        help="experiment tracker that also receives losses, metrics, arguments and plots",
    ),
    flag(
        "--push_to_hub",
        Role.RUNNING,
        metavar="REPO",
        help="upload the finished run to this hub repository (default: none)",
    ),
]


def build_parser(description, lr, save_dir, more=(), title=None):
    """The parser of a training script.

    lr, save_dir: the defaults in which the scripts differ. more: declared flags that only this script has, shown in
    --help under `title`.
    """
    parser = Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    for names, options in FLAGS:
        parser.add_argument(*names, **options)
    group = parser.add_argument_group(title) if more else parser
    for names, options in more:
        group.add_argument(*names, **options)
    parser.set_defaults(lr=lr, save_dir=save_dir)
    return parser


def with_defaults(args, device):
    """The arguments with the defaults that only a started run knows. device: "cpu", "cuda", ..."""
    eval_batch_size = args.eval_batch_size or EVAL_BATCH_SIZE.get(device, EVAL_BATCH_SIZE["cpu"])
    model_name = args.model_name or (None if args.eval_only else DEFAULT_MODEL)  # an adapter names its base
    return argparse.Namespace(**vars(args) | {"eval_batch_size": eval_batch_size, "model_name": model_name})


# -------------------------------------------------------------------------------------------- what follows from roles


def with_role(role, without=None):
    """The names of the flags that have any part of `role` and no part of `without`, in the order of --help."""
    return [name for name, own in ROLES.items() if own & role and not (without and own & without)]


def may_differ_on_resume(name):
    """Whether a run may be resumed with another value of this argument."""
    return name in ROLES and not (ROLES[name] & FIXED_IN_A_RUN and not ROLES[name] & Role.INPUT)


def sets_methods_apart(name):
    """Whether runs with different values of this argument are different methods. A name that no flag has any more is
    one that an older version recorded: such runs are told apart."""
    return name not in ROLES or not ROLES[name] & (Role.RUNNING | Role.SEED)


def as_run(args):
    """The arguments in a run.json of any version, with what its run did where it did not know a flag yet."""
    return BEFORE | (BEFORE_IN_LORA if "lora_r" in args else {}) | args


def precision_as_typed(name):
    """accelerate's name of a precision, as --precision has it."""
    return "fp32" if name == "no" else name


def as_typed(value):
    """The value of an argument as one types it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
