"""Reading and checking the rows of a data set, and choosing which rows are trained on, validated, held out and tested.

`load_tweet_qa` is public through `helper_functions.py`; `select_rows` is what a run uses.
"""

import ast
import csv
import io
import json
import random
import re
from pathlib import Path

from pipeline.errors import InputError, one_line
from pipeline.hub import ask_hub_once, cannot_load, is_local
from pipeline.text import tweet_key

COLUMNS = ("Question", "Tweet", "Answer", "qid")
SPLIT_FILES = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}
FILE_TYPES = ("json", "jsonl", "csv", "parquet")


def load_tweet_qa(dataset="ucsbnlp/tweet_qa"):
    """Load and check a TweetQA data set.

    dataset: a hub id, or a folder with `train.*`, `validation.*` (or `dev.*`) and, if there is one, `test.*`, each
        a JSON, JSON Lines, CSV or Parquet file with the columns Question, Tweet, Answer and qid.

    Returns {"train": rows, "validation": rows, "test": rows}, without "test" if there is none. A row is a dict of
    Question, Tweet and qid (str) and Answer, a list of references (str) that is empty only in test.

    Raises InputError for a row that cannot be used; it names the file and the row (counted from 1, without a CSV's
    header).
    """
    raw_splits = _read_folder(Path(dataset)) if is_local(dataset) else _read_hub(dataset)
    splits = {}
    for split, (name, raw_rows) in raw_splits.items():
        if not raw_rows:
            raise InputError(f"{name} has no rows: at least one is needed")
        splits[split] = [
            _check_row(row, f"{name}, row {number}", split != "test") for number, row in enumerate(raw_rows, start=1)
        ]
    return splits


def _read_folder(folder):
    """{split: (file, list of raw rows)} of a local data folder."""
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"--dataset {folder} {problem}: give a hub id or a folder with train.* and validation.* files")
    splits = {}
    for split, stems in SPLIT_FILES.items():
        paths = [p for stem in stems for p in (folder / f"{stem}.{ending}" for ending in FILE_TYPES) if p.exists()]
        if len(paths) > 1:
            raise InputError(f"{folder} has {' and '.join(p.name for p in paths)} for one split: remove all but one")
        if paths:
            splits[split] = (str(paths[0]), _read_file(paths[0]))
        elif split != "test":
            raise InputError(f"--dataset {folder} has no {stems[0]} file: add {stems[0]}.({'|'.join(FILE_TYPES)})")
    return splits


def _read_file(path):
    """The rows of one data file, not checked yet: a list of dicts."""
    if not path.is_file():
        raise InputError(
            f"{path} is not a file: a {path.suffix[1:]} file with the columns {', '.join(COLUMNS)} is needed"
        )
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as parquet:
                return parquet.read().to_pylist()
        text = path.read_bytes().decode("utf-8-sig")  # -sig: a byte order mark is not part of the first column's name
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({one_line(error)}): save it as UTF-8") from None
    except Exception as error:  # pyarrow has its own exceptions, and is imported only where it is needed
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    if path.suffix == ".csv":
        return _parse_csv(text, path)
    return _parse_json(text, path)


def _parse_csv(text, path):
    """Rows of a CSV file with a header. Python's own reader, since pandas fills or shifts rows of a wrong length."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a field over 128 kB
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, row {len(rows) + 1} has more or fewer fields than the header's {len(reader.fieldnames)}: "
                    "quote fields that contain commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path}, row {len(rows) + 1} is not valid CSV: {one_line(error)}") from None
    return rows


def _parse_json(text, path):
    """Rows of a JSON file (one list of objects) or of JSON Lines (one object per line, also under the name .json)."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix == ".json" and not text.lstrip().startswith("{"):
            raise InputError(f"{path} is not valid JSON: {one_line(error)}") from None
    else:
        if isinstance(rows, list) and path.suffix == ".json":
            return rows
    rows = []
    for line in text.split("\n"):  # not splitlines(), which also splits at characters that JSON allows in a string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, row {len(rows) + 1} is not valid JSON: {one_line(error)}") from None
    return rows


def _read_hub(dataset):
    """{split: (name, list of raw rows)} of a hub data set."""
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
    missing = {"train", "validation"} - set(loaded)
    if missing:
        raise InputError(f"--dataset {dataset} has no {' and no '.join(sorted(missing))} split")
    return {split: (f"{dataset} {split}", loaded[split].to_list()) for split in SPLIT_FILES if split in loaded}


def _check_row(row, where, needs_answer):
    """A raw row as load_tweet_qa returns it, or InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with the columns {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if column not in row and (needs_answer or column != "Answer"):
            raise InputError(f"{where} has no column {column!r}: it has {', '.join(map(str, row)) or 'none'}"[:500])
    qid = row["qid"] if not isinstance(row["qid"], int) else str(row["qid"])
    checked = {
        "Question": _check_text(row["Question"], f"{where}: 'Question'"),
        "Tweet": _check_text(row["Tweet"], f"{where}: 'Tweet'"),
        "Answer": [],
        "qid": _check_text(qid, f"{where}: 'qid'"),
    }
    answer = row.get("Answer")
    if isinstance(answer, str):
        answer = parse_answer(answer)
    if answer is None or answer == [] or answer == [""]:
        if needs_answer:
            raise InputError(f"{where}: 'Answer' is empty: at least one reference answer is needed")
        return checked
    if not isinstance(answer, list):
        raise InputError(f"{where}: 'Answer' must be text or a list of texts, not {type(answer).__name__}")
    checked["Answer"] = [_check_text(reference, f"{where}: 'Answer'") for reference in answer]
    return checked


def _check_text(text, where):
    """The text itself if a tokenizer can read it, else InputError."""
    if not isinstance(text, str):
        raise InputError(f"{where} must be text, not {'empty (null)' if text is None else type(text).__name__}")
    if not text.strip():
        raise InputError(f"{where} is empty: fill it in or remove the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where} contains an unpaired surrogate, which is not a valid character: fix the text"
        ) from None
    return text


def parse_answer(text):
    """The references in an Answer that is a string: those of a list written as text, or else the string itself.

    Lists are read as JSON, Python and numpy print them. numpy prints no commas (['a' 'b']), which Python would read as
    the one string 'ab', so each quoted piece is read separately.
    """
    try:
        references = json.loads(text)
        if isinstance(references, list):
            return references
    except (ValueError, RecursionError):
        pass
    quoted = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    if re.fullmatch(rf"\[\s*{quoted}(?:[\s,]+{quoted})*[\s,]*\]", text.strip(), flags=re.DOTALL):
        try:
            return [ast.literal_eval(piece) for piece in re.findall(quoted, text, flags=re.DOTALL)]
        except (SyntaxError, ValueError):
            pass
    return [text]


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


def count_repeats(rows):
    """How many rows repeat an earlier one: the same question and answer about the same tweet."""
    distinct = {(row["Question"].casefold(), tweet_key(row["Tweet"]), *row["Answer"][:1]) for row in rows}
    return len(rows) - len(distinct)


def select_rows(args):
    """Load the data and choose the rows of each role.

    Returns ({"train", "validation", "holdout", "test": rows}, the numbers of the held-out rows in the train file
    counted from 0, a line that says what was found). holdout and test can be empty.
    """
    splits = load_tweet_qa(args.dataset)
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
