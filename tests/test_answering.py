"""benchmarks/answering.py: all models answer the same in turns, and its file says what was measured."""

import json
import shutil

import pytest
import torch
from plain import demo_rows, questions_and_tweets

from benchmarks import answering
from helper_functions import answer
from pipeline.checkpoint import load_checkpoint

ROWS = 12
KEYS = {"label", "folder", "kind", "rows_per_second", "rows_per_second_of_rounds", "delay_ms", "delay_ms_quartiles"}


@pytest.fixture(scope="module")
def measured(demo_runs, tmp_path_factory):
    """(what the file says, what was printed, [(kind, questions, options)] of all calls of `answer`)."""
    out, calls, kinds = tmp_path_factory.mktemp("answering") / "new" / "out.json", [], {}

    def noted(model, tokenizer, device, question, tweet, **options):
        adapter = hasattr(model, "peft_config")
        kind = "adapter" if adapter else kinds.setdefault(id(model), "merged" if kinds else "full")
        calls.append((kind, question, options))
        return answer(model, tokenizer, device, question, tweet, **options)

    argv = [str(out), f"all={demo_runs / 'full'}", f"LoRA={demo_runs / 'lora'}", "--rows", str(ROWS)]
    argv += ["--rounds", "2", "--questions", "5"]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(answering, "answer", noted)
        patch.setattr("builtins.print", lambda text, **_: said.append(text))
        assert answering.main(argv) == 0
    return json.loads(out.read_text()), "\n".join(said), calls


def test_the_file_says_what_was_measured(measured, demo_runs):
    found, said, _ = measured
    names = {"machine", "date", "commit", "threads", "rows", "beams", "questions", "rounds", "contenders"}
    assert found.keys() == names and found["threads"] == torch.get_num_threads()
    assert (found["rows"], found["beams"], found["questions"], found["rounds"]) == (ROWS, 2, 5, 2)
    contenders = found["contenders"]
    assert [(each["label"], each["kind"]) for each in contenders] == [
        ("all", "full"),
        ("LoRA", "adapter"),
        ("LoRA", "merged"),
    ]
    assert [each["folder"] for each in contenders] == [str(demo_runs / name) for name in ("full", "lora", "lora")]
    for each in contenders:
        assert each.keys() == KEYS | ({"answers_changed"} if each["kind"] == "merged" else set())
        low, high = each["delay_ms_quartiles"]
        assert 0 < low <= each["delay_ms"] <= high and len(each["rows_per_second_of_rounds"]) == 2
        assert (
            min(each["rows_per_second_of_rounds"]) <= each["rows_per_second"] <= max(each["rows_per_second_of_rounds"])
        )
        assert f"| {each['label']} | {answering.KINDS[each['kind']]} | {each['rows_per_second']:.1f} |" in said
    assert f"{contenders[2]['answers_changed']} of {ROWS}" in said


def test_all_answer_the_same_in_turns_and_the_order_alternates(measured):
    _, _, calls = measured
    kinds = ["full", "adapter", "merged"]
    timed = calls[6:]  # each was warmed up by a batch and a question
    rounds, singles = timed[:6], timed[6:]
    assert [kind for kind, _, _ in rounds] == kinds + kinds[::-1]
    assert all(len(questions) == ROWS for _, questions, _ in rounds)
    assert [kind for kind, _, _ in singles] == kinds + kinds[::-1] + kinds + kinds[::-1] + kinds
    asked = demo_rows(5)
    assert [question for _, question, _ in singles] == [row["Question"] for row in asked for _ in kinds]
    assert all(options["beams"] == 2 for _, _, options in calls)


def test_the_changed_answers_are_counted_against_the_adapters(demo_runs):
    model, tokenizer = load_checkpoint(demo_runs / "lora")
    pair = [answering.Contender("a", "", kind, model, tokenizer, {"beams": 2}) for kind in ("adapter", "merged")]
    answering.measure(pair, demo_rows(6), "cpu", rounds=1, questions=2)
    assert pair[0].answers == answer(model, tokenizer, "cpu", *questions_and_tweets(demo_rows(6)), beams=2)
    assert answering.figures(pair[1], pair)["answers_changed"] == 0
    pair[1].answers = [*pair[1].answers[:4], "x", "y"]
    assert answering.figures(pair[1], pair)["answers_changed"] == 2


def changed(demo_runs, folder, **values):
    shutil.copytree(demo_runs / "lora", folder)
    record = json.loads((folder / "run.json").read_text())
    record["args"] |= values.pop("args", {})
    (folder / "run.json").write_text(json.dumps(record | values))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["FULL"], "FULL: give each run as LABEL=FOLDER"),
        (["a=FULL", "a=LORA"], "a=LORA: two runs have the label a"),
        (["a=FULL", "b=TMP/none"], "b=TMP/none: TMP/none has no finished run of a training script"),
        (["a=TMP/unfinished"], "a=TMP/unfinished: TMP/unfinished has no finished run of a training script"),
        (["a=TMP/base"], "TMP/base has no finished run of a training script"),
        (["a=FULL", "b=TMP/beams"], "a=FULL b=TMP/beams: these runs have different numbers of beams (--final_beams)"),
        (["a=FULL", "b=TMP/data"], "a=FULL b=TMP/data: these runs have different data (--dataset)"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path, capfd, demo_runs, given, message):
    changed(demo_runs, tmp_path / "unfinished", finished=False)
    changed(demo_runs, tmp_path / "base", method="base")
    changed(demo_runs, tmp_path / "beams", args={"final_beams": 3})
    changed(demo_runs, tmp_path / "data", content={"dataset": "another"})

    def placed(text):
        for name, folder in (("FULL", demo_runs / "full"), ("LORA", demo_runs / "lora"), ("TMP", tmp_path)):
            text = text.replace(name, str(folder))
        return text

    assert answering.main([str(tmp_path / "out.json"), *map(placed, given)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: {placed(message)}" if message[0] != "T" else "error: a=")
    assert placed(message) in err and not (tmp_path / "out.json").exists()


def test_a_file_that_cannot_be_written_is_refused_before_any_model_is_loaded(tmp_path, capfd, demo_runs, monkeypatch):
    monkeypatch.setattr(answering, "load_contenders", None)
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "out.json"):
        assert answering.main([str(out), f"a={demo_runs / 'full'}"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and " is a folder" in err or " is not a folder" in err
