"""Finding and reading the files of a local data folder: JSON, JSON Lines, CSV, TSV, Parquet and Arrow.

Used by `data.py`, which checks the rows. Whatever cannot be read raises InputError, which names the file and the row.
"""

import csv
import io
import json
import re

from pipeline.errors import InputError, one_line

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
FILE_TYPES = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet", "arrow")
# Each column's names, in any case: those of a tuple before those of the next. TweetQA's own come first, then those of
# SQuAD (question, context, answers, id) and of lmqg's question generation data (question, paragraph, answer).
COLUMN_NAMES = {
    "Question": (("question",),),
    "Tweet": (("tweet",), ("context", "paragraph")),
    "Answer": (("answer", "answers"),),
    "qid": (("qid",), ("id",)),
}
_KNOWN_NAMES = {name for groups in COLUMN_NAMES.values() for group in groups for name in group}

_SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
_ORDER = list(_SPLIT_OF)
_SHARD = r"-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?"
_FILE_NAME = re.compile(
    rf"(?P<prefix>.*[-_.])?(?P<name>{'|'.join(_ORDER)})(?P<version>[-_.]?v?\d[\d.]*)?(?:{_SHARD})?"
    rf"\.(?P<ending>{'|'.join(FILE_TYPES)})",
    re.IGNORECASE,
)
_NOT_DATA = re.compile(r"[._].*|(?:state|dataset_info|dataset_infos|dataset_dict)\.json", re.IGNORECASE)
# What is often there in place of the data: how its content begins, and what to say.
_OTHER_CONTENT = {
    b"version https://git-lfs": "is a Git LFS pointer, not the data: run git lfs pull",
    b"PAR1": "is a Parquet file: name it .parquet",
    b"PK\x03\x04": "is an Excel or ZIP file: save it as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an Excel file: save it as CSV (UTF-8)",
    b"\x1f\x8b": "is compressed: unpack it",
    b"<!doctype": "is a web page, not the data: download the file itself",
    b"<html": "is a web page, not the data: download the file itself",
}


# ------------------------------------------------------------------------------------------------------------- files


def read_folder(folder):
    """{split: [(file, list of raw rows), ...]} of a local data folder, and a line about files in subfolders or None.

    A split is one file (train.json), its shards (train-00000-of-00002.parquet, ...), or a folder of that name with one
    of the two, as the hub and `save_to_disk` leave them. If the folder has none, its subfolders are searched.
    """
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"--dataset {folder} {problem}: give a hub id or a folder with train.* and validation.* files")
    found = _find_splits(folder)
    splits = {}
    for split in SPLIT_NAMES:
        groups = found.get(split, [])
        if len(groups) > 1:
            names = " and ".join(_name(group, folder) for group in groups)
            raise InputError(f"{folder} has {names} for one split: remove all but one")
        if groups:
            splits[split] = [(str(path), read_file(path, split)) for path in groups[0]]
        elif split != "test":
            raise InputError(f"--dataset {folder} has no {split} file: {_advice(folder, split)}")
    below = [_name(found[split][0], folder) for split in splits if found[split][0][0].parent != folder]
    return splits, f"files: {', '.join(below)}" if below else None


def _find_splits(folder):
    """{split: [files of the split, ...]}: more than one entry if it is there twice. Files are lists of shards."""
    places = [folder]
    for _ in range(5):  # the hub's cache has its files in datasets--…/snapshots/<commit>/data
        found = {}
        for place in places:
            for split, groups in _splits_in(place).items():
                found.setdefault(split, []).extend(groups)
        if found:
            return found
        below = [path for place in places for path in _entries(place)]
        places = [path for path in below if path.is_dir() and not path.name.startswith(".")][:200]
    return {}


def _splits_in(place):
    """As `_find_splits`, of one folder. Other words in a file's name count only if no file has a split's name alone."""
    exact, loose = {}, {}
    for path in _entries(place):
        if path.name.startswith("."):
            continue
        match = _FILE_NAME.fullmatch(path.name)
        name = match["name"].lower() if match else path.name.lower()
        if name in _SPLIT_OF and path.is_dir() and (files := _files_in(path)):  # train/, or Spark's train.parquet/
            exact[_ORDER.index(name), -1, "", path.name] = files
        elif match:
            groups = loose if match["prefix"] or match["version"] else exact
            which = _ORDER.index(name), FILE_TYPES.index(match["ending"].lower())
            # The shards of a file have the same key.
            groups.setdefault((*which, match["prefix"] or "", match["count"] or path.name), []).append(path)
    splits = {}
    for (number, *_), paths in sorted((exact or loose).items()):
        splits.setdefault(_SPLIT_OF[_ORDER[number]], []).append(_in_order(paths))
    return splits


def _files_in(folder):
    """The data files of a folder that is one split; InputError if they are not the shards of one file."""
    state = folder / "state.json"
    if state.is_file():  # save_to_disk
        try:
            return [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{state} cannot be read: save the data set again") from None
    files = [path for path in _entries(folder) if path.suffix[1:].lower() in FILE_TYPES and path.is_file()]
    files = [path for path in files if not _NOT_DATA.fullmatch(path.name)]
    if len({re.sub(r"\d+", "0", path.name) for path in files}) > 1:
        names = " and ".join(path.name for path in files[:3])
        raise InputError(f"{folder} has {names} for one split: remove all but one")
    return files


def _in_order(paths):
    """The shards of a split by number; InputError if one is missing."""
    shards = {}
    for path in paths:
        if match := re.fullmatch(rf".*{_SHARD}\.\w+", path.name):
            if (number := int(match["number"])) in shards:
                raise InputError(f"{path.parent} has {shards[number].name} and {path.name} for one shard: remove one")
            shards[number] = path
            count = int(match["count"])
    if not shards:
        return sorted(paths, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])
    if missing := set(range(count)) - set(shards):
        raise InputError(f"{paths[0].parent} has {paths[0].name}, but not shard {min(missing)} of {count}: add it")
    return [shards[number] for number in sorted(shards)]


def _entries(folder):
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"--dataset: {folder} cannot be read: {one_line(error)}") from None


def _name(paths, folder):
    """The files of a split as a message names them."""
    name = str(paths[0].relative_to(folder))
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def _advice(folder, split):
    """What to do about a split that is not there."""
    if (folder / "state.json").is_file():
        return "it is one split, saved with save_to_disk: save a DatasetDict with train and validation"
    names = SPLIT_NAMES[split]
    others = [path.name for path in _entries(folder) if path.is_file() and path.name.lower().startswith(names)]
    others = [name for name in others if name.lower().split(".")[0] in names and not _FILE_NAME.fullmatch(name)]
    also = f" ({others[0]} is of a type that is not read)" if others else ""
    return f"add {split}.(json|jsonl|csv|parquet){also}"


def read_file(path, split):
    """The rows of one data file, not checked yet: a list of dicts, where the file is as it should be."""
    if not path.is_file():
        columns = ", ".join(COLUMN_NAMES)
        raise InputError(f"{path} is not a file: a {path.suffix[1:]} file with the columns {columns} is needed")
    ending = path.suffix[1:].lower()
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
        for content, problem in _OTHER_CONTENT.items():
            if start.lower().startswith(content.lower()) and not (content == b"PAR1" and ending == "parquet"):
                raise InputError(f"{path} {problem}")
        if ending in ("parquet", "arrow"):
            return _read_table(path, ending)
        content = path.read_bytes()
    except InputError:
        raise
    except Exception as error:  # pyarrow has its own exceptions, and is imported only where it is needed
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    encoding = json.detect_encoding(content)  # by the byte order mark (which is left out) or by zero bytes
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise InputError(f"{path} is not {name} text ({one_line(error)}): save it as UTF-8") from None
    if ending in ("csv", "tsv"):
        return _parse_csv(text, path, "\t,;|" if ending == "tsv" else ",;\t|")
    return _parse_json(text, path, split)


def _read_table(path, ending):
    if ending == "parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as parquet:
            return parquet.read().to_pylist()
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        with (pyarrow.ipc.open_file if is_file_format else pyarrow.ipc.open_stream)(file) as reader:
            return reader.read_all().to_pylist()


# --------------------------------------------------------------------------------------------------------------- CSV


def _parse_csv(text, path, delimiters):
    """Rows of a CSV file with a header. Python's own reader, since pandas fills or shifts rows of a wrong length.

    delimiters: those to try. The one with which the header has most of the known columns is the file's; Excel can name
    it in a line before the header (sep=;).
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses a field over 128 kB
    text = text.lstrip("\r\n")
    if named := re.match(r'"?sep=([^\r\n"])"?[^\S\t\r\n]*(?:\r\n|\n|\r)', text, re.IGNORECASE):
        text, delimiters = text[named.end() :], named[1]
    if text[:1] in ("[", "{"):
        raise InputError(f"{path} is JSON: name it .json")
    headers = {delimiter: _csv_header(text, delimiter) for delimiter in delimiters}
    delimiter = max(headers, key=lambda one: sum(clean(name) in _KNOWN_NAMES for name in headers[one]))
    header = headers[delimiter]
    if twice := [name for name in header if name and clean(name) in _KNOWN_NAMES and header.count(name) > 1]:
        raise InputError(f"{path} has the column {twice[0]!r} twice: rename or remove one")
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])  # a blank behind each delimiter
    options = {"delimiter": delimiter, "strict": True, "skipinitialspace": spaced}
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, row {len(rows) + 1} has more or fewer fields than the header's {len(reader.fieldnames)}: "
                    f"quote fields that contain {_DELIMITER_NAMES.get(delimiter, repr(delimiter))}"
                )
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path}, row {len(rows) + 1} is not valid CSV: {one_line(error)}") from None
    return rows


_DELIMITER_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs"}


def _csv_header(text, delimiter):
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


# -------------------------------------------------------------------------------------------------------------- JSON


def _parse_json(text, path, split):
    """Rows of a JSON file, or of JSON Lines, whatever of the two the file is called.

    A JSON file is a list of objects, or one object in which the rows can only be in one place, see `_rows_of_object`.
    In JSON Lines, an object may also take several lines.
    """
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() == ".json" and not text.lstrip().startswith("{"):
            raise InputError(f"{path} is not valid JSON: {one_line(error)}") from None
        whole = _parse_json_lines(text, path)
    if isinstance(whole, str):  # json.dump(frame.to_json())
        return _parse_json(whole, path, split)
    if isinstance(whole, dict):
        whole = _rows_of_object(whole, path, split)
    if not isinstance(whole, list):
        raise InputError(f"{path} is one {type(whole).__name__}, not a list of rows")
    return _flatten(whole, path)


def _parse_json_lines(text, path):
    rows, place = [], 0
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    while (place := blank.match(text, place).end()) < len(text):
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, row {len(rows) + 1} is not valid JSON: {one_line(error)}") from None
        rows.append(row)
    return rows


def _rows_of_object(whole, path, split):
    """The rows in one JSON object, which is the whole file: a list of dicts.

    Read are a single row, a list under data, rows, examples, records or the split's name, any list of objects if it is
    the only one, and what pandas and `datasets` write: columns (lists or {index: value}), {index: row}, split, table.
    """
    names = {clean(name): name for name in whole}
    texts = _KNOWN_NAMES - {"id", "qid"}
    if any(name in texts and not isinstance(whole[original], (list, dict)) for name, original in names.items()):
        return [whole]
    if "paragraphs" in names or "qas" in names:  # one article, or one paragraph, of SQuAD
        return [whole]
    columns = {original: whole[original] for name, original in names.items() if name in _KNOWN_NAMES}
    if "question" in names and (by_index := _as_columns(columns, path)) is not None:
        return by_index
    columns = whole.get("columns")
    if isinstance(columns, list) and isinstance(whole.get("data"), list):  # pandas' orient="split"
        if any(not isinstance(row, list) or len(row) != len(columns) for row in whole["data"]):
            raise InputError(f"{path}: not every row in 'data' has a value for each of its {len(columns)} columns")
        return [dict(zip(map(str, columns), row, strict=True)) for row in whole["data"]]
    splits = [name for name in names if name in _SPLIT_OF and isinstance(whole[names[name]], (list, dict))]
    if len(splits) > 1:
        raise InputError(f"{path} has the splits {' and '.join(splits)}: write each to a separate file")
    if splits and _SPLIT_OF[splits[0]] != split:
        raise InputError(f"{path} is the {split} file, and has the split {splits[0]!r}: rename one of them")
    keys = splits or [name for name in ("data", "rows", "examples", "records") if name in names]
    if len(keys) == 1:
        rows = whole[names[keys[0]]]
        if isinstance(rows, dict):
            return _rows_of_object(rows, path, split)
        return rows if isinstance(rows, list) else [whole]
    if whole and all(isinstance(row, dict) and "question" in map(clean, row) for row in whole.values()):
        return [{"qid": key} | row if "id" not in row else row for key, row in whole.items()]  # {qid or index: row}
    lists = [rows for rows in whole.values() if rows and isinstance(rows, list) and isinstance(rows[0], dict)]
    if len(lists) == 1 and not keys:
        return lists[0]
    raise InputError(
        f"{path} is one object, not a list of rows: write a list of objects (it has {listed(whole)})"[:500]
    )


def _as_columns(columns, path):
    """Rows of {column: [value, ...]} or {column: {index: value}}, or None if it is neither."""
    first = next(iter(columns.values()))
    kind = type(first)
    if kind not in (list, dict) or any(type(values) is not kind for values in columns.values()):
        return None
    keys = range(len(first)) if kind is list else list(first)
    for name, values in columns.items():
        if len(values) != len(keys) or (kind is dict and values.keys() != first.keys()):
            raise InputError(f"{path}: its columns {next(iter(columns))!r} and {name!r} do not have the same rows")
    return [{name: values[key] for name, values in columns.items()} for key in keys]


def _flatten(rows, path):
    """Rows that are nested in others: SQuAD's {"paragraphs": [{"context", "qas"}]}, and {"row": {...}} of the hub's
    data viewer. Other rows stay as they are."""
    if not any(isinstance(row, dict) and ("paragraphs" in row or "qas" in row or "row" in row) for row in rows):
        return rows
    flat = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, dict) and isinstance(row.get("row"), dict):
            if cut := row.get("truncated_cells"):
                raise InputError(f"{path}, row {number}: the viewer cut off {cut}: download the data set's files")
            flat.append(row["row"])
        elif isinstance(row, dict) and isinstance(row.get("paragraphs"), list):
            flat += _flatten(row["paragraphs"], path)
        elif isinstance(row, dict) and isinstance(row.get("qas"), list):
            outer = {name: value for name, value in row.items() if name != "qas"}
            flat += [outer | entry if isinstance(entry, dict) else entry for entry in row["qas"]]
        else:
            flat.append(row)
    return flat


def clean(name):
    """The name of a column, a key or a split without case, blanks and a byte order mark."""
    return name.replace("\ufeff", "").strip().casefold() if isinstance(name, str) else ""


def listed(names):
    """Names of columns or keys for a message, in which every character can be printed."""
    return ", ".join(map(str, names)).encode("utf-8", "replace").decode() or "none"
