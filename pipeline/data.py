"""Loading and checking the rows of a data set, and choosing which are trained on, validated, held out and tested.

`load_tweet_qa` is public through `helper_functions.py`; `select_rows` is what a run uses.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.answers import MISSING, read_references
from pipeline.errors import InputError
from pipeline.hub import ask_hub_once, cannot_load, is_local
from pipeline.read_data import COLUMN_NAMES, SPLIT_NAMES, clean, listed, read_folder
from pipeline.text import UNPAIRED_SURROGATE, has_unpaired_surrogate, tweet_key

COLUMNS = tuple(COLUMN_NAMES)  # Question, Tweet, Answer, qid


def load_tweet_qa(dataset="ucsbnlp/tweet_qa"):
    """Load and check a TweetQA data set.

    dataset: a hub id, or a folder with the files of train, validation (or valid, val, dev, eval) and, if there is one,
        test: `train.json`, JSON Lines, CSV (with commas, semicolons, tabs or bars), TSV, Parquet or Arrow, whole or in
        shards, here, in data/, or in a folder for each split.

    The columns are Question, Tweet, Answer and qid, in any case. SQuAD's and lmqg's are taken too: context or paragraph
    as the tweet, answers ({"text": [...]}) and id; rows without qid or id are numbered. `parse_answer` says how an
    Answer that is a text is read; missing references are left out.

    Returns {"train": rows, "validation": rows, "test": rows}, without "test" if there is none. A row is a dict of
    Question, Tweet and qid (str) and Answer, a list of references (str) that is empty only in test.

    Raises InputError for a row that cannot be used; it names the file and the row (counted from 1, without a CSV's
    header).
    """
    return load_with_note(dataset)[0]


def load_with_note(dataset):
    """(what `load_tweet_qa` returns, a line that says how files and columns were taken, or None if they are as usual).

    The line has no "note: " before it.
    """
    raw_splits, files = read_folder(Path(dataset)) if is_local(dataset) else (_read_hub(dataset), None)
    splits, taken, missing = {}, {}, 0
    for split, parts in raw_splits.items():
        if not any(rows for _, rows in parts):
            raise InputError(f"{parts[0][0]} has no rows: at least one is needed")
        source, how = _columns_of(parts)
        if how:
            taken.setdefault(how, []).append(split)
        splits[split] = []
        for name, rows in parts:
            _check_not_all_in_brackets(rows, source["Answer"], name)
            for number, row in enumerate(rows, start=1):
                new_qid = str(len(splits[split]) + 1) if source["qid"] is None else None
                checked, left_out = _check_row(row, f"{name}, row {number}", source, new_qid, split != "test")
                splits[split].append(checked)
                missing += left_out
    notes = [f"columns of {' and '.join(where)}: {how}" for how, where in taken.items()]
    notes += [files] if files else []
    notes += [f"{missing} missing references were left out"] if missing else []
    return splits, " | ".join(notes) or None


def _read_hub(dataset):
    """{split: [(name, list of raw rows)]} of a hub data set."""
    ask_hub_once(dataset, "dataset")
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        try:
            loaded = datasets.load_dataset(dataset)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # datasets 4 and later do not run loading scripts; the hub has a parquet copy of every public data set.
            loaded = datasets.load_dataset(dataset, revision="refs/convert/parquet")
    except Exception as error:
        raise cannot_load("--dataset", dataset, "data set", error) from None
    found = {split: [name for name in names if name in loaded] for split, names in SPLIT_NAMES.items()}
    missing = [split for split in ("train", "validation") if not found[split]]
    if missing:
        raise InputError(f"--dataset {dataset} has no {' and no '.join(missing)} split")
    for names in found.values():
        if len(names) > 1:
            raise InputError(f"--dataset {dataset} has {' and '.join(names)} for one split: give a folder with one")
    return {split: [(f"{dataset} {names[0]}", loaded[names[0]].to_list())] for split, names in found.items() if names}


def _columns_of(parts):
    """({column: its name in the data}, None or how the columns were taken, in words) for a split's rows.

    A column is taken by TweetQA's name, or else by the one name that stands for it. The name of qid is None if no row
    has one.
    """
    layouts = {tuple(row) for _, rows in parts for row in rows if isinstance(row, dict)}
    keys = {key for layout in layouts for key in layout}
    by_name = {}
    for key in sorted(map(str, keys)):
        by_name.setdefault(clean(key), []).append(key)
    source = {}
    for column, groups in COLUMN_NAMES.items():
        found = [[key for word in group for key in by_name.get(word, [])] for group in groups]
        if column in keys:
            found = [[column]]
        names = next(filter(None, found), [None if column == "qid" and keys else column])
        if len(names) > 1:
            names = " and ".join(map(repr, names))
            raise InputError(f"{parts[0][0]} has the columns {names}: name one of them {column}")
        source[column] = names[0]
    if all(column == name for column, name in source.items()):
        return source, None
    how = [f"{column} = {' '.join(name.split())}" for column, name in source.items() if name in keys]
    return source, ", ".join(how + ["qid = the row's number"] * (source["qid"] is None))


def _check_not_all_in_brackets(rows, column, name):
    """InputError if each Answer is [some words]: a printed list without its quotes, as pandas shows it in a table."""
    if len(rows) >= 5 and all(
        isinstance(row, dict) and isinstance(row.get(column), str) and re.fullmatch(r"\[[^\[\]'\",]+\]", row[column])
        for row in rows
    ):
        raise InputError(
            f"{name}, row 1: 'Answer' is in square brackets, as in every row: write the lists as JSON, with quotes"
        )


def _check_row(row, where, source, new_qid, needs_answer):
    """(a raw row as load_tweet_qa returns it, how many references were missing), or InputError.

    source: see `_columns_of`. new_qid: the qid of a row in a split that has none, or None.
    """
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with the columns {', '.join(COLUMNS)}")
    for column, name in source.items():
        if name not in row and name and (needs_answer or column != "Answer"):
            raise InputError(f"{where} has no column {name!r}: it has {listed(row)}"[:500])
    qid = row[source["qid"]] if new_qid is None else new_qid
    answer, answer_name = row.get(source["Answer"]), source["Answer"]
    if not needs_answer and isinstance(answer, str) and answer.strip() in MISSING:
        answer = None
    try:
        references, missing = read_references(answer)
    except ValueError as error:
        raise InputError(f"{where}: {answer_name!r} {error}") from None
    if needs_answer and not references:
        raise InputError(f"{where}: {answer_name!r} is empty: at least one reference answer is needed")
    checked = {
        "Question": _check_text(row[source["Question"]], where, source["Question"]),
        "Tweet": _check_text(row[source["Tweet"]], where, source["Tweet"]),
        "Answer": [_check_text(reference, where, answer_name, True) for reference in references],
        "qid": _check_text(str(qid) if isinstance(qid, int) else qid, where, source["qid"]),
    }
    return checked, missing


def _check_text(text, where, column, listed=False):
    """The text itself if a tokenizer can read it, else InputError. listed: it is of a list, where "nan" is a text."""
    if not isinstance(text, str):
        missing = "empty (null)" if text is None else "missing (NaN)" if text != text else type(text).__name__
        raise InputError(f"{where}: {column!r} must be text, not {missing}")
    if not text or text.isspace():
        raise InputError(f"{where}: {column!r} is empty: fill it in or remove the row")
    if not text.isascii() and has_unpaired_surrogate(text):
        raise InputError(f"{where}: {column!r} {UNPAIRED_SURROGATE}")
    if not listed and text in MISSING:
        raise InputError(f"{where}: {column!r} is {text}, as pandas writes a missing value: remove the row")
    return text


def hold_out(rows, count, seed, taken=frozenset()):
    """Choose rows to set aside, by tweet: all the rows of a tweet, or none.

    count: how many rows; a few less are chosen if whole tweets do not add up to it. seed: random seed of the choice.
    taken: tweet keys that must not be chosen, such as those of the split that selects the checkpoint.

    Returns the positions of the chosen rows in increasing order. Raises InputError if no training row would be left.
    """
    groups = {}
    for position, row in enumerate(rows):
        groups.setdefault(tweet_key(row["Tweet"]), []).append(position)
    chosen = []
    for key in random.Random(seed).sample(sorted(groups), len(groups)):
        if key not in taken and len(chosen) + len(groups[key]) <= count:
            chosen += groups[key]
    if not chosen or len(chosen) == len(rows) or count >= len(rows):
        raise InputError(f"--holdout {count}: cannot set that many of {len(rows)} training rows aside; give fewer")
    return sorted(chosen)


def check_can_hold_out(rows, count, taken):
    """Raise InputError if fewer than `count` rows have a tweet that is not `taken`: far fewer would be set aside than
    were asked for, and the final figures would be of those few."""
    free = sum(tweet_key(row["Tweet"]) not in taken for row in rows)
    if free < count < len(rows):
        advice = "give fewer" if free else "none can be set aside from these data"
        raise InputError(
            f"--holdout {count}: only {free} of {len(rows)} training rows are about a tweet that is not in validation"
            f" too; {advice}"
        )


def subset(rows, count):
    """Choose a random subset of rows for --train_subset, by tweet: all the rows of a tweet, or none.

    The tweets are put in the order of a hash of their text, and taken from the start for as long as they have at most
    `count` rows together. So the subset depends on nothing but the rows, and a smaller one is a part of a larger one.

    Returns the positions of the chosen rows in increasing order. Raises InputError if there are fewer rows, or if the
    first tweet alone has more.
    """
    if count > len(rows):
        raise InputError(f"--train_subset {count}: there are only {len(rows)} training rows")
    groups = {}
    for position, row in enumerate(rows):
        groups.setdefault(tweet_key(row["Tweet"]), []).append(position)
    chosen = []
    for key in sorted(groups, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if len(chosen) + len(groups[key]) > count:
            break
        chosen += groups[key]
    if not chosen:
        raise InputError(f"--train_subset {count}: a tweet's rows are not divided, and the first tweet has more")
    return sorted(chosen)


def count_repeats(rows):
    """How many rows repeat an earlier one: the same question and answer about the same tweet."""
    distinct = {(row["Question"].casefold(), tweet_key(row["Tweet"]), *row["Answer"][:1]) for row in rows}
    return len(rows) - len(distinct)


@dataclass(frozen=True)
class Selected:
    """The rows of a run."""

    rows: dict  # {"train", "validation", "holdout", "test": rows}; holdout and test can be empty
    held_out: list  # the numbers of the held-out rows in the train file, counted from 0
    note: str  # what was found: one line, after a line "note: ..." if files or columns are not as usual
    sha256: str  # of the rows of the whole data set, whatever files they were in


def select_rows(args):
    """Load the data and choose the rows of each role: a `Selected`."""
    if args.train_subset and args.max_train_samples:
        raise InputError("--train_subset and --max_train_samples both choose the training rows: give one of them")
    splits, taken = load_with_note(args.dataset)
    train = list(enumerate(splits["train"]))
    tweets = {split: [tweet_key(row["Tweet"]) for row in split_rows] for split, split_rows in splits.items()}
    validation_tweets, test_tweets = set(tweets["validation"]), set(tweets.get("test", []))
    train_tweets = set(tweets["train"])
    in_train = [sum(tweet in train_tweets for tweet in tweets.get(split, [])) for split in ("validation", "test")]
    note = (
        f"check: {count_repeats(splits['train'])} training rows repeat | the tweets of {in_train[0]} validation and"
        f" {in_train[1]} test rows are also in train"
    )
    if args.drop_leaked:
        kept = [(n, row) for n, row in train if tweet_key(row["Tweet"]) not in validation_tweets | test_tweets]
        note += f" ({len(train) - len(kept)} training rows dropped)"
        train = kept
        if not train:
            raise InputError("--drop_leaked leaves no training row: every tweet is also in validation or test")
    held = []
    if args.holdout:  # validation selects the checkpoint, so a tweet that it shares would not be unseen
        candidates = [row for _, row in train]
        if not (args.resume or args.eval_only):  # older versions set fewer rows aside
            check_can_hold_out(candidates, args.holdout, validation_tweets)
        places = set(hold_out(candidates, args.holdout, args.holdout_seed, validation_tweets))
        held = [pair for place, pair in enumerate(train) if place in places]
        train = [pair for place, pair in enumerate(train) if place not in places]
    if args.train_subset:
        train = [train[place] for place in subset([row for _, row in train], args.train_subset)]
        about = len({tweet_key(row["Tweet"]) for _, row in train})
        note += f" | --train_subset {args.train_subset}: {len(train)} rows about {about} tweets"
    rows = {
        "train": [row for _, row in train][: args.max_train_samples],
        "validation": splits["validation"][: args.max_eval_samples],
        "holdout": [row for _, row in held],
        "test": splits.get("test", [])[: args.max_eval_samples],
    }
    return Selected(
        rows=rows,
        held_out=[n for n, _ in held],
        note=f"note: {taken}\n{note}" if taken else note,
        sha256=hashlib.sha256(json.dumps(splits).encode()).hexdigest(),
    )
