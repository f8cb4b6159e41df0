"""A study's plan: the TOML file that `study.py` is given, read, checked, and turned into methods and runs.

The file is checked against the parsers of the training scripts, so that a plan that can be read has only arguments that
these scripts take. Nothing is run or written here.
"""

import argparse
import difflib
import hashlib
import math
import re
import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pipeline.arguments import (
    DEFAULT_MODEL,
    FIXED_IN_A_RUN,
    ROLES,
    Role,
    as_typed,
    path_or_id,
    precision_as_typed,
    with_defaults,
)
from pipeline.errors import InputError, reason

FULL, LORA = "tweet_qa_main.py", "tweet_qa_main_lora.py"
METHODS = {FULL: "full", LORA: "lora"}  # {script: "method" in the run.json that it writes}
BASE = "base"  # "method" of a model that nobody has fine-tuned
# What the study gives to each run by itself.
SET_BY_THE_STUDY = ("save_dir", "seed", "seeds", "resume", "overwrite", "eval_only")
MARGIN_F1 = 2.0
RESERVED = (BASE, "logs")  # folders of the study that no method may have


@dataclass(frozen=True)
class Run:
    """A run of the study: one call of a training script."""

    folder: Path  # --save_dir
    key: str  # the folder below the study's, with "/" on every system
    title: str  # "LoRA, lora_r 4, lr 0.003, seed 0"
    script: str
    arguments: dict  # {name: value} of the command line, without --save_dir and --resume
    method: str  # the title of its Method, or "base"
    axes: dict  # {name: value} of what sets its method apart from others of the same name
    lr: float | None = None  # None: the script's default
    seed: int | None = None


@dataclass(frozen=True)
class Method:
    """A method of the study, which is tuned for itself: a [[method]] with one value of each of its axes."""

    title: str  # "LoRA, lora_r 4"
    name: str  # as in the plan
    key: str  # its folder below the study's
    script: str
    arguments: dict  # {name: value} as in the plan, without lr
    axes: dict  # {name: value} of its axes
    rates: tuple  # learning rates to try, ascending; (): the script's default
    meant: dict  # {name: value} of every argument, as the script parses these

    @property
    def label(self):
        """ "LoRA (lora_r 4)", as a report calls it."""
        return labelled(self.name, self.axes)


def labelled(name, arguments):
    """A method's name with some of its arguments {name: value}."""
    told = ", ".join(f"{key} {as_typed(value)}" for key, value in arguments.items())
    return f"{name} ({told})" if told else name


@dataclass(frozen=True)
class Plan:
    """A plan that was read and checked."""

    path: Path
    folder: Path  # "dir"
    seeds: tuple  # the first one tunes the learning rates
    margin_f1: float  # a loss of up to so many points of F1 counts as none
    methods: tuple  # of Method
    bases: tuple  # Runs that score an untrained model; several if the methods differ in model, data or scoring
    base_keys: dict  # {a Method's key: that of its Run in `bases`}
    axes: tuple  # the names of all axes, for the table

    def run(self, method, lr, seed):
        """The Run of a method at a learning rate (None: the script's default) with a seed."""
        rate = {} if lr is None else {"lr": lr}
        parts = [method.key, *(f"lr={value}" for value in rate.values()), f"seed_{seed}"]
        return Run(
            folder=self.folder.joinpath(*parts),
            key="/".join(parts),
            title=", ".join([method.title, *(f"lr {value}" for value in rate.values()), f"seed {seed}"]),
            script=method.script,
            arguments=method.arguments | rate | {"seed": seed},
            method=method.title,
            axes=method.axes,
            lr=lr,
            seed=seed,
        )


# ---------------------------------------------------------------------------------------------------------- read


def read_plan(path, parsers):
    """The Plan in the TOML file `path`. parsers: {script: its argparse parser} of the scripts that a plan may name.

    Raises InputError with the file and the key for whatever cannot be used.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    try:
        return _plan(path, content, parsers)
    except _Wrong as error:
        raise InputError(f"{path}: {error}") from None


class _Wrong(ValueError):
    """What is wrong in a plan: the key and why, without the file's name."""


def _plan(path, content, parsers):
    """The Plan of a file's content. Raises _Wrong."""
    _check_keys("", content, ["dir", "seeds", "margin_f1", "common", "method"])
    folder, seeds, margin = (content.get(name) for name in ("dir", "seeds", "margin_f1"))
    if not isinstance(folder, str) or not folder.strip():
        raise _Wrong(f"dir: must be the name of a folder, as text, {_not(folder)}")
    try:
        path_or_id(folder)
    except argparse.ArgumentTypeError as error:
        raise _Wrong(f"dir: {error}") from None
    whole = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise _Wrong(f"seeds: must be a list of different whole numbers of at least 0, {_not(seeds)}")
    margin = MARGIN_F1 if margin is None else margin
    if type(margin) not in (int, float) or not 0 <= margin < 100:
        raise _Wrong(f"margin_f1: must be a number of F1 points of at least 0 and below 100, {_not(margin)}")
    common, given = content.get("common", {}), content.get("method")
    if not isinstance(common, dict):
        raise _Wrong(f"common: must be a table [common], {_not(common)}")
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise _Wrong(f"method: must be one or more tables [[method]], {_not(given)}")
    _check_names(given)
    methods = [method for number, each in enumerate(given, 1) for method in _methods(number, each, common, parsers)]
    _check_differ(methods)
    plan = {"path": path, "folder": Path(folder), "seeds": tuple(seeds), "margin_f1": float(margin)}
    axes = tuple(dict.fromkeys(name for method in methods for name in method.axes))
    bases, keys = _bases(Path(folder), methods, parsers)
    return Plan(**plan, methods=tuple(methods), bases=bases, base_keys=keys, axes=axes)


def _methods(number, table, common, parsers):
    """The Methods of a [[method]]: one for each combination of its axes. Raises _Wrong."""
    name = table.get("name")
    if not isinstance(name, str) or not _slug(name) or not name.isprintable():
        raise _Wrong(f"method {number}: name: must be a text with letters or digits, {_not(name)}")
    if _slug(name) in RESERVED:
        raise _Wrong(f'method "{name}": name: the study has a folder of that name itself: choose another one')
    where, script = f'method "{name}": ', table.get("script")
    if not isinstance(script, str):
        raise _Wrong(f"{where}script: must be {' or '.join(parsers)}, {_not(script)}")
    if script not in parsers:
        raise _Wrong(f"{where}script: unknown training script {script}; choose {' or '.join(parsers)}")
    own = {key: value for key, value in table.items() if key not in ("name", "script")}
    parser = parsers[script]
    values, axes = _values(where, own, common, script, parser)
    rates = sorted(values.pop("lr", []))
    for lower, higher in zip(rates, rates[1:], strict=False):
        if higher < 1.01 * lower:
            raise _Wrong(f"{where}lr: {lower} and {higher} are the same rate, or nearly: leave one out")
    methods, names = [], [name for name in values if name in axes]
    for combination in product(*values.values()):
        arguments = dict(zip(values, combination, strict=True))
        chosen = {axis: arguments[axis] for axis in names}
        methods.append(
            Method(
                title=", ".join([name, *(f"{axis} {as_typed(value)}" for axis, value in chosen.items())]),
                name=name,
                key=",".join([_slug(name), *(f"{axis}={_slug(as_typed(value))}" for axis, value in chosen.items())]),
                script=script,
                arguments=arguments,
                axes=chosen,
                rates=tuple(rates),
                meant={"model_name": DEFAULT_MODEL} | _meant(parser, arguments),
            )
        )
    return methods


def _meant(parser, arguments):
    """{name: value} of every argument that has one, typed or by default."""
    return {name: value for name, value in vars(parse(parser, words(arguments))).items() if value is not None}


def _values(where, own, common, script, parser):
    """({argument: its values}, the arguments that are axes) of a [[method]] and of [common]. Raises _Wrong."""
    values, axes = {}, set()
    for place, part in (("[common]: ", common), (where, own)):
        seen = {}
        for key, value in part.items():
            flag = _flag(place, key, script, parser)
            name = flag.dest
            if seen.setdefault(name, key) != key:
                raise _Wrong(f"{place}{key}: is the same argument as {seen[name]}: give one of them")
            listed = [_checked(f"{place}{key}: ", parser, flag, each) for each in _axis(f"{place}{key}: ", flag, value)]
            values[name] = listed
            axes = axes | {name} if _is_axis(flag, value) else axes - {name}
    return values, axes - {"lr"}


def _check_keys(where, table, known):
    """Raise _Wrong for a key that is not in `known`."""
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise _Wrong(f"{where}{key}: unknown key" + (f" (did you mean {near[0]}?)" if near else ""))


def _flag(where, key, script, parser):
    """The parser's action for a key of the plan. Raises _Wrong."""
    flags = {name.removeprefix("--"): flag for flag in parser._actions for name in flag.option_strings}
    flags = {name: flag for name, flag in flags.items() if flag.dest in ROLES}
    if key in SET_BY_THE_STUDY:
        raise _Wrong(f"{where}{key}: the study sets it for each run: leave it out")
    if key == "push_to_hub":
        raise _Wrong(f"{where}{key}: a study uploads nothing, as a repository has one run: upload one later")
    if key in ("merge", "merge_dtype"):
        raise _Wrong(f"{where}{key}: a study merges nothing: merge a run later (tweet_qa_main_lora.py --merge)")
    if key not in flags:
        near = difflib.get_close_matches(key, flags, n=1)
        more = f" (did you mean {near[0]}?)" if near else ""
        raise _Wrong(f"{where}{key}: {script} has no such argument{more}")
    return flags[key]


def _is_axis(flag, value):
    """Whether a value of the plan is a list of values; for a flag that takes several words that is a list of lists."""
    return isinstance(value, list) and (flag.nargs != "+" or any(isinstance(each, list) for each in value))


def _axis(where, flag, value):
    """The values of a key: those of an axis, or the only one. Raises _Wrong."""
    values = value if _is_axis(flag, value) else [value]
    if not values or (flag.nargs == "+" and any(each == [] for each in values)):
        raise _Wrong(f"{where}the list is empty")
    for position, each in enumerate(values):
        if any(each == other and type(each) is type(other) for other in values[:position]):
            raise _Wrong(f"{where}{as_typed(each)} is in the list twice")
    return values


def _checked(where, parser, flag, value):
    """A value as the script's own parser understands it. Raises _Wrong if the parser refuses it."""
    if flag.nargs == 0:
        if not isinstance(value, bool):
            raise _Wrong(f"{where}must be true or false, {_not(value)}")
        return value
    several = flag.nargs == "+"
    words = value if several and isinstance(value, list) else [value]
    for word in words:
        if isinstance(word, bool) or not isinstance(word, str | int | float):
            raise _Wrong(f"{where}must be {'texts or numbers' if several else 'a text or a number'}, {_not(word)}")
    parsed = getattr(parse(parser, [flag.option_strings[0], *map(str, words)], where), flag.dest)
    for word, meant in zip(words, parsed if several else [parsed], strict=True):
        if isinstance(word, str) != isinstance(meant, str):
            kind = "a text, in quotes" if isinstance(meant, str) else "a number, without quotes"
            raise _Wrong(f"{where}must be {kind}, {_not(word)}")
    return parsed


def parse(parser, words, where=""):
    """The Namespace of command-line words. Raises _Wrong, which begins with `where`, if the parser refuses them."""

    def refuse(message):
        raise _Wrong(where + re.sub(r"^argument \S+: ", "", " ".join(message.split())))

    parser.error, before = refuse, parser.error
    try:
        return parser.parse_args(words)
    finally:
        parser.error = before


def _check_names(tables):
    """Raise _Wrong if two [[method]] have one name."""
    names = {}
    for table in tables:
        name = table.get("name")
        if isinstance(name, str) and names.setdefault(_slug(name), table) is not table:
            other = names[_slug(name)]["name"]
            raise _Wrong(f'method "{name}": name: another method is called "{other}": rename one of them')


def _check_differ(methods):
    """Raise _Wrong if two methods have one folder, or the same arguments apart from the learning rate."""
    keys, meant = {}, {}
    for method in methods:
        where = f'method "{method.name}": '
        if method.key in keys:
            raise _Wrong(f"{where}two values of an axis make one folder, {method.key}: change one of them")
        keys[method.key] = method
        same = str((method.script, sorted((name, value) for name, value in method.meant.items() if name != "lr")))
        if same in meant:
            other = meant[same].title
            raise _Wrong(f'{where}has the same arguments as "{other}": leave one out, or put all lr into one list')
        meant[same] = method


def _bases(folder, methods, parsers):
    """(the Runs that score the untrained model, one for each set of model, data and scoring that the methods have;
    {a method's key: the key of its Run})."""

    def of_untrained(arguments):
        return {name: value for name, value in arguments.items() if _matters_untrained(name, parsers)}

    found = {}  # {what is meant: (as the plan types it, the methods)}: a default that is written out is the same
    for method in methods:
        typed = of_untrained({"model_name": DEFAULT_MODEL} | method.arguments)
        _, own = found.setdefault(str(sorted(of_untrained(method.meant).items())), (typed, []))
        own.append(method.key)
    sets = [typed for typed, _ in found.values()]
    differing = list(dict.fromkeys(name for each in sets for name in each))
    differing = [name for name in differing if len({as_typed(each.get(name)) for each in sets}) > 1]
    runs = []
    for arguments in sets:
        axes = {name: arguments[name] for name in differing if name in arguments}
        key = ",".join([BASE, *(f"{name}={_slug(as_typed(value))}" for name, value in axes.items())])
        title = ", ".join(["untrained model", *(f"{name} {as_typed(value)}" for name, value in axes.items())])
        runs.append(Run(folder / key, key, title, FULL, arguments | {"eval_only": True}, BASE, axes))
    return tuple(runs), {method: run.key for run, (_, own) in zip(runs, found.values(), strict=True) for method in own}


def _matters_untrained(name, parsers):
    """Whether an argument says which untrained model is scored and how, and the script that does it knows it."""
    known = {flag.dest for flag in parsers[FULL]._actions} - {"probe"}  # each run measures it before training
    matters = ROLES[name] & (Role.INPUT | Role.SCORING | Role.MEASURE)
    return name in known and (bool(matters) or name == "eval_batch_size")


def words(arguments):
    """The command-line words of {name: value}."""
    found = []
    for name, value in arguments.items():
        if value is True:
            found.append(f"--{name}")
        elif value is not False and value is not None:
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def _slug(text):
    """A text as a part of a folder's name: lower case, without spaces and separators."""
    return re.sub(r"[^\w.+]+", "-", text.lower()).strip("-.")[-80:]


def _not(value):
    """What a value is, as the end of a message."""
    kinds = {list: "a list", dict: "a table", type(None): "nothing"}
    return f"not {kinds.get(type(value)) or ascii(value) if not isinstance(value, str) else repr(value)}"


# ------------------------------------------------------------------------------------------------ an existing folder


def check_fits(plan, run, record, parsers):
    """Raise InputError if the run that is in a Run's folder was made, or scored again, with other arguments than the
    plan gives it.

    record: its run.json. What a run may change on --resume may differ, except for the names of model and data: a
    finished run's are not looked at again.
    """
    method = BASE if run.method == BASE else METHODS[run.script]
    if record["method"] != method:
        raise InputError(
            f"{plan.path}: {run.folder} has a run of method {record['method']}, not {method}: choose another dir, or"
            " remove that folder"
        )
    if method != BASE:
        _check_probe(plan, run, record)
    given = with_defaults(parse(parsers[run.script], words(run.arguments)), "cpu")
    decides = Role.INPUT | Role.SCORING | Role.MEASURE if method == BASE else FIXED_IN_A_RUN | Role.INPUT | Role.MEASURE
    for name, value in vars(given).items():
        # An older version, which did not have every argument, did what the default does.
        before = record["args"].get(name, parsers[run.script].get_default(name))
        if not ROLES[name] & decides or before == value or name == "probe" or (method == BASE and name == "seed"):
            continue
        if _is_same_input(name, before, value):
            continue
        raise InputError(
            f"{plan.path}: {run.folder} was started with {name} {as_typed(before)}, and the plan has"
            f" {as_typed(value)}: restore it, choose another dir, or remove that folder"
        )
    _check_scored_so(plan, run, record, vars(given))


def _is_same_input(name, one, other):
    """Whether two values of an argument are paths of the same model or data."""
    return ROLES[name] & Role.INPUT and None not in (one, other) and Path(one).resolve() == Path(other).resolve()


def _check_scored_so(plan, run, record, given):
    """Raise InputError if the scores of a trained run are of an --eval_only with other arguments than the plan's:
    rates would be compared by scores that mean different things. given: {name: value} of the plan's arguments."""
    last, used = record.get("eval_only"), record.get("identity", {}).get("precision")
    if not last or run.method == BASE:
        return
    for name, value in given.items():
        if name not in record["args"]:  # an older version, which did what the scoring has repeated
            continue
        scored = last.get(name, value)
        known = [part.get("content", {}).get(name) for part in (record, last)]
        same = known[0] == known[1] if all(known) else scored == value or _is_same_input(name, scored, value)
        if name == "precision" and {scored, value} == {"auto", precision_as_typed(used)}:
            same = True
        if ROLES[name] & (Role.SCORING | Role.MEASURE) and not ROLES[name] & Role.SEED and not same:
            raise InputError(
                f"{plan.path}: {run.folder} was scored again (--eval_only) with {name} {as_typed(scored)}, and the plan"
                f" has {as_typed(value)}: score it again as the plan has it, or remove that folder"
            )


def _check_probe(plan, run, record):
    """Raise InputError unless a run measures the probe that the plan gives it: a study compares no others.

    A finished run may have measured one that the plan does not ask for.
    """
    ours, theirs = run.arguments.get("probe"), record["args"].get("probe")
    known = (record.get("probe") or {}).get("sha256")
    if ours is None:
        if theirs is None or record.get("finished", True):
            return
        said = f"was started with probe {theirs}, and the plan has none: restore it"
    elif theirs is None:
        said = f"was started without a probe, and the plan has {ours}: leave it out"
    else:
        try:
            content = hashlib.sha256(Path(ours).read_bytes()).hexdigest()
        except OSError:
            return  # a finished run needs the file no more, and another one will say what is wrong with it
        if known in (None, content):
            return
        said = f"measured another content of the probe than {ours} has now: restore it"
    raise InputError(f"{plan.path}: {run.folder} {said}, choose another dir, or remove that folder")


def f1_of(record):
    """The F1 (out of 100) by which learning rates are compared, or None if the run of this run.json is not finished.

    It is that of validation with --final_beams, the figure that each table and picture shows.
    """
    if not record or not record.get("finished", True) or not record.get("final"):
        return None
    f1 = record["final"].get("f1")
    return 100 * f1 if isinstance(f1, int | float) and math.isfinite(f1) else None
