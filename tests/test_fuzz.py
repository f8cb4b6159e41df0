"""Whatever is given, a run is refused with one line and exit code 2 before it writes anything, or can begin.

Data files and arguments are made up by hypothesis. Up to the point where a model would be loaded a case runs as in
`main()`; nothing after it depends on what is in the data but for its text, which test_data.py covers.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from conftest import LORA, PROJECT, SCRIPTS, main_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tweet_qa_main

COLUMNS = ("Question", "Tweet", "Answer", "qid")
ROW = {"Question": "who won?", "Tweet": "The Rockets won!", "Answer": ["the rockets"], "qid": "1"}


def cases(count):
    """So many cases of a test, the same ones each time."""
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Begun(Exception):
    """The input was taken, and the model would be loaded next."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def outcome(script, argv, monkeypatch, capsys):
    """Run main() up to the loading of the model: "begun", or "refused" after exactly one line."""

    def begin(*args, **kwargs):
        raise Begun

    capsys.readouterr()
    AcceleratorState._reset_state(True)  # its precision is otherwise that of the first run in a process
    with monkeypatch.context() as patch:
        patch.setattr(tweet_qa_main, "load_model_and_tokenizer", begin)
        patch.setattr(tweet_qa_main, "load_sem_model", lambda *_: None)
        try:
            code = main_of(script)(argv)
        except Begun:
            return "begun"
        except SystemExit as exit:
            code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (code, out)
    assert err.startswith("error: ") and len(err.splitlines()) == err.count("\n") == 1, err
    err.encode("utf-8")  # what a terminal cannot show would end in a traceback there
    return "refused"


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------- data files

# Every character, lone surrogates and NUL bytes among them; the long ones are repeated, which hypothesis cannot do.
TEXT = st.one_of(
    st.text(st.characters(), max_size=20),
    st.sampled_from(
        ["", " \n", "\ufeffwho?", "\x00", "\ud83d", 'a "quoted", text', "[sic]", "['a', b]", "nan", "é" * 9]
    ),
    st.builds(lambda text, n: text * n, st.text(min_size=1, max_size=3), st.sampled_from([1000, 400_000])),
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=6
)
GOOD_ROW = st.fixed_dictionaries(
    {
        "Question": st.just("who?"),
        "Tweet": st.sampled_from(["a b", "c"]),
        "Answer": st.sampled_from([["x"], "x", "['x']"]),
    }
    | {"qid": st.sampled_from(["1", "2", 3])}
)
CHANGED_ROW = st.builds(
    lambda row, changes: row | changes, GOOD_ROW, st.dictionaries(st.sampled_from(COLUMNS), VALUE, max_size=2)
)
EXTRA_ROW = st.builds(lambda row, more: more | row, GOOD_ROW, st.dictionaries(TEXT, VALUE, max_size=2))
SHORT_ROW = st.builds(lambda row, gone: {k: v for k, v in row.items() if k != gone}, GOOD_ROW, st.sampled_from(COLUMNS))
ROWS = st.lists(st.one_of(GOOD_ROW, GOOD_ROW, CHANGED_ROW, EXTRA_ROW, SHORT_ROW, VALUE), max_size=4)


def as_json(rows):
    return json.dumps(rows).encode()


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass")


def as_csv(rows):
    """With every quoting that Python knows; a value that is no text is written as pandas would."""
    rows = [row for row in rows if isinstance(row, dict)]
    file = io.StringIO(newline="")
    names = list({name: None for row in rows for name in row}) or list(COLUMNS)
    quoting = [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC][len(rows) % 3]
    writer = csv.DictWriter(file, names, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows):
    file = io.BytesIO()
    try:
        pd.DataFrame([row for row in rows if isinstance(row, dict)]).to_parquet(file)
    except Exception:  # pyarrow does not take every mixture of types
        pd.DataFrame([ROW]).to_parquet(file)
    return file.getvalue()


WRITERS = {"json": as_json, "jsonl": as_lines, "csv": as_csv, "parquet": as_parquet}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"]


@st.composite
def data_file(draw):
    """(name's ending, content): of good or bad rows in one of the formats, perhaps damaged; None for a directory."""
    ending = draw(st.sampled_from(list(WRITERS)))
    content = WRITERS[ending](draw(ROWS))
    damage = draw(st.sampled_from(["none", "none", "none", "encoding", "cut", "byte", "insert", "random", "folder"]))
    if damage == "encoding":
        text = content.decode("utf-8", "replace")
        content = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    elif damage == "cut":
        content = content[: draw(st.integers(0, 60))]
    elif damage == "byte" and content:
        place = draw(st.integers(0, min(len(content), 300) - 1))
        content = content[:place] + draw(st.binary(min_size=1, max_size=1)) + content[place + 1 :]
    elif damage == "insert":
        place = draw(st.integers(0, min(len(content), 300)))
        content = (
            content[:place]
            + draw(st.sampled_from([b"\x00", b'"', b"\r", b"\n", b",", b"\xef\xbb\xbf", b"]"]))
            + content[place:]
        )
    elif damage == "random":
        content = draw(st.binary(max_size=60))
    return ending, None if damage == "folder" else content


def write(folder, stem, ending, content):
    path = folder / f"{stem}.{ending}"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


CHOICES = ["--drop_leaked", "--holdout=1", "--max_train_samples=1", "--max_eval_samples=2"]
any_files = given(
    train=data_file(),
    validation=st.none() | data_file(),
    test=st.none() | data_file(),
    more=st.lists(st.sampled_from(CHOICES), unique=True),
)


@cases(100)
@any_files
def test_data_files(place, monkeypatch, capsys, train, validation, test, more):
    check_data_files(place, monkeypatch, capsys, LORA, train, validation, test, more)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@cases(520)
@any_files
def test_many_data_files(place, monkeypatch, capsys, script, train, validation, test, more):
    check_data_files(place, monkeypatch, capsys, script, train, validation, test, more)


def check_data_files(place, monkeypatch, capsys, script, train, validation, test, more):
    folder = Path(tempfile.mkdtemp(dir=place))
    write(folder, "train", *train)
    write(folder, "validation", *(validation or ("json", as_json([ROW | {"Tweet": "another"}]))))
    if test:
        write(folder, "test", *test)
    before = listing(place)
    argv = ["--dataset", str(folder), "--save_dir", str(place / "run"), "--sem_model", "none", "--model_name", "model"]
    outcome(script, argv + more, monkeypatch, capsys)
    assert listing(place) == before
    shutil.rmtree(folder)


# ----------------------------------------------------------------------------------------------------- arguments

NUMBER = st.one_of(
    st.integers(-3, 3).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=6),
    st.sampled_from(["1e5", "1_000", "٣", " 7", "0x10", "9" * 5000, "1e400", "-0", "--lr"]),
)
FOLDER = st.sampled_from(
    [
        "good",
        "good",
        "good/train.json",
        "./nowhere",
        "run/../good",
        "",
        ".",
        "no such/hub/id",
        "a\x00b",
        "x" * 5000,
        "\ud83d",
    ]
)
NUMBERS = (
    "epochs batch_size grad_accum_steps lr seed patience eval_batch_size eval_beams final_beams max_input_len"
    " max_target_len max_train_samples max_eval_samples holdout save_every lora_r lora_alpha lora_dropout"
).split(" ")
ARGUMENT = st.one_of(
    st.tuples(st.sampled_from(NUMBERS).map(lambda name: f"--{name}"), NUMBER).map(list),
    st.tuples(st.sampled_from(["--dataset", "--save_dir"]), FOLDER).map(list),
    st.sampled_from(["--resume", "--overwrite", "--eval_only", "--drop_leaked", "--auto_batch_size"]).map(
        lambda f: [f]
    ),
    st.tuples(st.just("--seeds"), st.lists(NUMBER, max_size=3)).map(lambda pair: [pair[0], *pair[1]]),
    st.tuples(st.just("--precision"), st.sampled_from(["auto", "fp32", "bf16", "int8", ""])).map(list),
    st.lists(st.text(max_size=20).filter(lambda text: "-h" not in text), min_size=1, max_size=2),
)


any_arguments = given(given_arguments=st.lists(ARGUMENT, min_size=1, max_size=4))


@pytest.mark.parametrize("script", SCRIPTS)
@cases(100)
@any_arguments
def test_argument_combinations(place, monkeypatch, capsys, script, given_arguments):
    check_arguments(place, monkeypatch, capsys, script, given_arguments)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@cases(520)
@any_arguments
def test_many_argument_combinations(place, monkeypatch, capsys, script, given_arguments):
    check_arguments(place, monkeypatch, capsys, script, given_arguments)


def check_arguments(place, monkeypatch, capsys, script, given_arguments):
    base = place / "arguments"
    if not base.exists():
        (base / "good").mkdir(parents=True)
        rows = [ROW | {"Tweet": f"tweet {n}"} for n in range(4)]
        for split, part in {"train": rows[:3], "validation": rows[3:]}.items():
            (base / "good" / f"{split}.json").write_bytes(as_json(part))
    monkeypatch.chdir(base)
    before = listing(base)
    argv = ["--dataset", "good", "--save_dir", "run", "--sem_model", "none", "--model_name", "model"]
    outcome(script, argv + [word for words in given_arguments for word in words], monkeypatch, capsys)
    assert listing(base) == before


def test_the_console_can_show_what_is_refused(tmp_path):
    """Half a surrogate pair in a name reaches argv where a file name is no UTF-8; the error must not fail on it."""
    command = [sys.executable, str(PROJECT / "tweet_qa_main.py"), "--dataset", b"./caf\xe9", "--save_dir", b"run\xe9"]
    done = subprocess.run([os.fsencode(word) for word in command], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and done.stdout == b"", done.stderr
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1 and not list(tmp_path.iterdir())
