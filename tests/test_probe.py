"""A probe measures what a model forgets: exactly, without touching the training, and with an interval that covers."""

import hashlib
import importlib
import json
import random
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import (
    FULL,
    LORA,
    PROJECT,
    SCRIPTS,
    arguments,
    assert_refused_at,
    assert_same_end,
    main_of,
    run_script,
    signal_at_step,
)
from plain import TINY_T5, demo_rows
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import compare_runs
from helper_functions import InputError, load_model_and_tokenizer
from pipeline.fast_cpu import use_fast_training
from pipeline.probe import change, line_losses, mean_losses, read_probe, read_probe_losses, tokenized
from pipeline.run_folder import read_run, write_run_json, write_table
from tweet_qa_main_lora import add_lora

pytestmark = pytest.mark.usefixtures("without_java")
PROBES = PROJECT / "probes"
LINES = [
    {"prompt": "who won? the rockets won", "target": "the rockets"},
    {"prompt": "Is snow cold? Answer yes or no.", "target": "yes"},
    {"prompt": "The baker <extra_id_0> bread.", "target": "<extra_id_0> sells <extra_id_1>"},
    {"prompt": "Make it plural: a child", "target": "children"},
]


def write_probe(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def demo():
    """(the demo's T5, its tokenizer, the demo's tokenized probe)."""
    model, tokenizer = load_model_and_tokenizer(str(TINY_T5))
    return model, tokenizer, tokenized(read_probe(PROBES / "demo.jsonl"), tokenizer, 256)


# ------------------------------------------------------------------------------------------------------ the file

GOOD = '{"prompt": "a", "target": "b"}'
WITH_KIND = '{"prompt": "a", "target": "b", "kind": "c"}'


@pytest.mark.parametrize(
    "lines, messages",
    [
        ([GOOD, "{"], ["line 2 is not valid JSON"]),
        ([GOOD, "", "[1]"], ["line 3 is not an object"]),
        ([GOOD, "[" * 100_000], ["line 2 is not valid JSON"]),
        (['{"prompt": "a"}', GOOD], ["line 1 has no target"]),
        ([GOOD, '{"target": "a"}'], ["line 2 has no prompt"]),
        ([GOOD, '{"prompt": " ", "target": "b"}'], ["line 2", "prompt", "not empty"]),
        ([GOOD, '{"prompt": "a", "target": 3}'], ["line 2", "target", "must be a text"]),
        ([GOOD, r'{"prompt": "a", "target": "\ud800"}'], ["line 2", "target", "surrogate"]),
        ([GOOD, '{"prompt": "a", "target": "b", "kinds": "c"}'], ["line 2 has the key 'kinds'"]),
        ([GOOD, WITH_KIND], ["line 2 has a kind, but line 1 has none"]),
        ([WITH_KIND, GOOD], ["line 2 has no kind, but line 1 has one"]),
        ([GOOD, '{"prompt": "a", "target": "b", "kind": null}'], ["line 2", "kind", "must be a text"]),
        ([], ["has 0 lines", "at least two"]),
        ([GOOD], ["has 1 lines", "at least two"]),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_with_its_number(tmp_path, lines, messages):
    path = write_probe(tmp_path / "probe.jsonl", lines)
    with pytest.raises(InputError) as refused:
        read_probe(path)
    for message in [str(path), *messages]:
        assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path, content, message in (("none", None, "cannot be read"), ("latin", b"\xe9\n", "is not UTF-8")):
        if content:
            (tmp_path / path).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_probe(tmp_path / path)
    with pytest.raises(InputError, match="cannot be read"):
        read_probe(tmp_path)


def test_lines_keep_their_numbers_and_texts(tmp_path):
    text = f'\ufeff{GOOD}\r\n\r\n  \n{{"prompt": "x\u2028y", "target": "z"}}'
    path = tmp_path / "probe.jsonl"
    path.write_bytes(text.encode())
    probe = read_probe(path)
    assert [(line.number, line.prompt, line.target, line.kind) for line in probe.lines] == [
        (1, "a", "b", ""),
        (4, "x\u2028y", "z", ""),
    ]
    assert probe.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name, words, message", [("prompt", 40, "--max_input_len 32"), ("target", 600, "than 512")])
def test_a_line_that_is_too_long_is_refused_and_not_cut(tmp_path, demo, name, words, message):
    long = {"prompt": "a", "target": "b"} | {name: "five " * words}
    with pytest.raises(InputError, match=f"line 3: its {name} has .*{message}"):
        tokenized(read_probe(write_probe(tmp_path / "probe.jsonl", [GOOD, "", long])), demo[1], 32)


# --------------------------------------------------------------------------------------------------- the measure


def test_the_loss_is_what_plain_transformers_computes(demo):
    model, tokenizer, probe = demo
    losses = line_losses(model, probe, pad=tokenizer.pad_token_id)
    plain, plain_tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(TINY_T5).eval(),
        AutoTokenizer.from_pretrained(TINY_T5),
    )
    expected, tokens = [], []
    for line in probe.lines:
        inputs = plain_tokenizer(line.prompt, return_tensors="pt")
        labels = plain_tokenizer(text_target=line.target, return_tensors="pt").input_ids
        assert labels[0, -1] == plain_tokenizer.eos_token_id
        with torch.no_grad():
            given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
            expected.append(plain(**given, labels=labels).loss.item() * labels.numel())
        tokens.append(labels.numel())
    assert tokens == [len(line.labels) for line in probe.lines]
    assert sum(losses) / sum(tokens) == pytest.approx(sum(expected) / sum(tokens), rel=1e-6)
    # float32 rounds a logit to about 1e-6, whatever the loss: some lines here have a loss of 0.003 nats.
    for ours, theirs, count in zip(losses, expected, tokens, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6 * count)
    other_batches = line_losses(model, probe, pad=tokenizer.pad_token_id, batch_size=7)
    assert other_batches == pytest.approx(losses, rel=1e-6, abs=1e-4) and sum(other_batches) == pytest.approx(
        sum(losses)
    )


def test_measuring_draws_no_random_number_and_leaves_the_mode(demo):
    model, tokenizer, probe = demo
    probe = type(probe)(probe.file, probe.sha256, probe.lines[:4])
    losses = line_losses(model, probe, pad=tokenizer.pad_token_id)
    model.train()
    try:
        before = torch.get_rng_state()
        assert line_losses(model, probe, pad=tokenizer.pad_token_id) == losses
        assert model.training and torch.equal(torch.get_rng_state(), before)
    finally:
        model.eval()


def test_a_prepared_model_is_measured_in_float32_whatever_the_precision(demo):
    """accelerate gives a model that it prepares for bf16 a forward that computes in bf16."""
    model, tokenizer, probe = demo
    probe = type(probe)(probe.file, probe.sha256, probe.lines[:4])
    losses, forward = line_losses(model, probe, pad=tokenizer.pad_token_id), model.forward
    try:
        model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
        ids = torch.tensor([probe.lines[0].input_ids])
        assert not torch.equal(model(input_ids=ids, labels=ids).logits, forward(input_ids=ids, labels=ids).logits)
        assert line_losses(model, probe, pad=tokenizer.pad_token_id) == losses
    finally:
        del model.forward


def test_an_adapter_switched_off_gives_the_figure_of_its_base_exactly(demo):
    _, tokenizer, probe = demo
    base, _ = load_model_and_tokenizer(str(TINY_T5))
    before = line_losses(base, probe, pad=tokenizer.pad_token_id)
    options = {"lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q", "v", "wo"]}
    torch.manual_seed(0)
    model = add_lora(base, Namespace(**options, base_dtype="fp32", use_rslora=False, use_dora=False))
    use_fast_training(model, alone=True)
    assert line_losses(model, probe, pad=tokenizer.pad_token_id) == before  # B is 0: the untrained model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    texts = tokenizer(["who won? the rockets won", "where? in town"], padding=True, return_tensors="pt")
    labels = tokenizer(["the rockets", "in town"], padding=True, return_tensors="pt").input_ids
    model.train()
    for _ in range(3):
        model(input_ids=texts.input_ids, attention_mask=texts.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = line_losses(model, probe, pad=tokenizer.pad_token_id)
    assert max(abs(ours - theirs) for ours, theirs in zip(trained, before, strict=True)) > 0.01
    with model.disable_adapter():
        assert line_losses(model, probe, pad=tokenizer.pad_token_id) == before


# ------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def probe_file(made_once):
    kinds = ["a", "b", "b", "a"]
    lines = [line | {"kind": kind} for line, kind in zip(LINES, kinds, strict=True)]
    return made_once("probe", lambda folder: write_probe(folder / "probe.jsonl", lines) and None)[0] / "probe.jsonl"


@pytest.fixture(scope="module")
def probed(made_once, place, probe_file):
    """The folder of the run of `whole[FULL]`, with a probe."""

    def make(folder):
        done = run_script(FULL, *arguments(place, FULL, folder / "run", "--probe", probe_file))
        assert done.returncode == 0, done.stderr
        (folder / "said.txt").write_text(done.stdout)

    return made_once("probed", make)[0] / "run"


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def without_probe(folder, copy):
    """A copy of a run folder without all that a probe adds to it."""
    shutil.copytree(folder, copy)
    (copy / "probe_losses.csv").unlink()
    epochs = pd.read_csv(copy / "metrics.csv", float_precision="round_trip").drop(columns="probe_loss")
    write_table(copy / "metrics.csv", epochs)
    record = record_of(copy)
    del record["probe"], record["identity"]["probe (--probe)"]
    write_run_json(copy, record)
    return copy


def test_a_probe_changes_nothing_else_in_a_run(whole, probed, tmp_path):
    assert "probe" not in record_of(whole[FULL]) and "probe_loss" not in (whole[FULL] / "metrics.csv").read_text()
    assert not (whole[FULL] / "probe_losses.csv").exists()
    assert_same_end(FULL, without_probe(probed, tmp_path / "copy"), whole[FULL])


def test_a_run_records_the_loss_before_training_after_each_epoch_and_of_the_checkpoint(place, probed, probe_file):
    def measured(path):
        model, tokenizer = load_model_and_tokenizer(str(path))
        probe = tokenized(read_probe(probe_file), tokenizer, 256)
        return probe, line_losses(model, probe, pad=tokenizer.pad_token_id)

    probe, before = measured(place / "model")
    _, final = measured(probed)
    record, table = record_of(probed)["probe"], read_probe_losses(probed)
    assert record["file"] == str(probe_file) and record["sha256"] == probe.sha256
    assert (record["lines"], record["target_tokens"]) == (4, probe.target_tokens)
    assert table["line"].tolist() == [1, 2, 3, 4] and table["kind"].tolist() == ["a", "b", "b", "a"]
    assert table["before"].tolist() == pytest.approx(before, rel=1e-6)
    assert table["final"].tolist() == pytest.approx(final, rel=1e-6)
    for name, losses in (("before", before), ("final", final)):
        assert record[name]["loss"] == pytest.approx(sum(losses) / probe.target_tokens, rel=1e-6)
        own = [n for n, line in enumerate(probe.lines) if line.kind == "b"]
        tokens = sum(len(probe.lines[n].labels) for n in own)
        assert record[name]["kinds"]["b"] == pytest.approx(sum(losses[n] for n in own) / tokens, rel=1e-6)
        assert list(record[name]["kinds"]) == ["a", "b"]
    epochs = read_run(probed)[1]
    assert record["final"]["loss"] == pytest.approx(epochs["probe_loss"].iloc[-1], rel=1e-6)  # the last is the best
    assert epochs["probe_loss"].nunique() == 3 and record["before"]["loss"] not in epochs["probe_loss"].tolist()


@pytest.mark.slow
def test_a_resumed_run_with_a_probe_ends_as_one_that_nothing_interrupted(place, probed, probe_file, tmp_path, capfd):
    folder, moved = tmp_path / "run", shutil.copy(probe_file, tmp_path / "renamed.jsonl")
    with signal_at_step(8):
        assert main_of(FULL)(arguments(place, FULL, folder, "--probe", probe_file)) == 143
    before = record_of(folder)["probe"]
    assert before["before"] == record_of(probed)["probe"]["before"] and "final" not in before
    other = write_probe(tmp_path / "other.jsonl", LINES[:3])
    for given in (["--probe", other], []):
        argv = arguments(place, FULL, folder, "--resume", *given)
        assert_refused_at(capfd, folder, FULL, argv, "was started with different probe (--probe)")
    (folder / "probe_losses.csv").rename(tmp_path / "losses")
    argv = arguments(place, FULL, folder, "--resume", "--probe", moved)
    assert_refused_at(capfd, folder, FULL, argv, "probe_losses.csv is missing")
    (tmp_path / "losses").rename(folder / "probe_losses.csv")
    assert main_of(FULL)(argv) == 0
    said = capfd.readouterr().out
    assert "before training" not in said and re.search(r"\[final\].*\n(.*\n)*\[probe\] loss=\d", said)
    assert_same_end(FULL, folder, probed)
    assert record_of(folder)["probe"] == record_of(probed)["probe"] | {"file": str(moved)}
    assert (folder / "probe_losses.csv").read_bytes() == (probed / "probe_losses.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_in_bf16_on_a_cpu_the_loss_is_near_that_in_float32(place, probe_file, tmp_path, script):
    """LoRA's frozen matrices are in bfloat16 there, so it is measured in that type."""
    losses = []
    for precision in ("fp32", "bf16"):
        more = ("--probe", probe_file, "--precision", precision, "--epochs", 1, "--max_train_samples", 4)
        AcceleratorState._reset_state(True)  # its precision is otherwise that of the first run in a process
        try:
            assert main_of(script)(arguments(place, script, tmp_path / precision, *more)) == 0
        finally:
            AcceleratorState._reset_state(True)
        losses.append(record_of(tmp_path / precision)["probe"]["before"]["loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_the_console_shows_the_loss_before_and_after_beside_the_usual_lines(probed):
    said = (probed.parent / "said.txt").read_text()
    lines = [line for line in said.splitlines() if line.startswith("[")]
    number = r"-?\d+\.\d{4}"
    epochs = [
        [rf"\[epoch {n}\] time=\S+ \| steps/sec=\S+ \| peak VRAM=\S+ MB", rf"\[epoch {n}\] val_loss=\S+ F1=\S+ avg\S+"]
        for n in (1, 2, 3)
    ]
    patterns = [
        rf"\[probe\] before training: loss={number}",
        *sum(epochs, []),
        r"\[final\] .*",
        rf"\[probe\] loss={number} \(before {number}, change [+-]\d+\.\d{{4}}, 95 % interval {number} to {number}\)",
    ]
    assert len(lines) == len(patterns)
    assert all(re.fullmatch(*pair) for pair in zip(patterns, lines, strict=True)), lines


def test_a_bad_probe_ends_a_run_before_it_starts(place, tmp_path, capfd):
    probe = write_probe(tmp_path / "probe.jsonl", [*LINES, {"prompt": "no target"}])
    (tmp_path / "runs").mkdir()
    argv = arguments(place, FULL, tmp_path / "runs" / "run", "--probe", probe)
    assert_refused_at(capfd, tmp_path / "runs", FULL, argv, f"--probe {probe}, line 5 has no target")


def test_overwriting_a_run_removes_its_losses_but_never_the_probe(place, probed, tmp_path, capfd):
    folder = shutil.copytree(probed, tmp_path / "run")
    inside = write_probe(folder / "mine.jsonl", LINES)
    argv = arguments(place, FULL, folder, "--overwrite", "--probe", inside)
    assert_refused_at(capfd, folder, FULL, argv, "is inside --save_dir")
    inside.unlink()
    with signal_at_step(1):
        assert main_of(FULL)(arguments(place, FULL, folder, "--overwrite")) == 143
    assert not (folder / "probe_losses.csv").exists() and "probe" not in record_of(folder)


# ---------------------------------------------------------------------------------------------- scored only


def scoring(place, folder, *more):
    given = ["--eval_only", "--save_dir", folder, "--dataset", place / "data", "--sem_model", "none", *more]
    return [str(word) for word in [*given, "--final_beams", 1]]


def test_an_untrained_model_has_the_loss_before_training_alone(place, probed, probe_file, tmp_path, capfd):
    folder = tmp_path / "base"
    assert main_of(FULL)(scoring(place, folder, "--model_name", place / "model", "--probe", probe_file)) == 0
    record = record_of(folder)["probe"]
    assert (
        record["before"]["loss"] == pytest.approx(record_of(probed)["probe"]["before"]["loss"])
        and "final" not in record
    )
    assert read_probe_losses(folder)["final"].isna().all()
    assert main_of(FULL)(["--eval_only", "--save_dir", str(folder)]) == 0  # scored again, without a probe
    assert record_of(folder)["probe"] == record
    other = write_probe(tmp_path / "other.jsonl", LINES[:3])
    argv = scoring(place, folder, "--probe", other)
    assert_refused_at(capfd, folder, FULL, argv, "is not the probe of the run in --save_dir")


def test_scoring_a_run_again_keeps_its_loss_before_training(place, whole, probed, probe_file, tmp_path, capfd):
    folder = shutil.copytree(probed, tmp_path / "run")
    for given in ([], ["--probe", probe_file]):
        assert main_of(FULL)(scoring(place, folder, *given)) == 0
        assert record_of(folder)["probe"] == record_of(probed)["probe"]
        assert (folder / "probe_losses.csv").read_bytes() == (probed / "probe_losses.csv").read_bytes()
    other = write_probe(tmp_path / "other.jsonl", LINES[:3])
    argv = scoring(place, folder, "--probe", other)
    assert_refused_at(capfd, folder, FULL, argv, "is not the probe of the run in --save_dir")
    # A run without a probe: its loss before training is not known.
    folder = shutil.copytree(whole[FULL], tmp_path / "unprobed")
    assert main_of(FULL)(scoring(place, folder, "--probe", probe_file)) == 0
    record, table = record_of(folder)["probe"], read_probe_losses(folder)
    assert "before" not in record and record["final"]["loss"] == mean_losses(table, "final")["loss"]
    with pytest.raises(InputError, match="both before and after"):
        change(table)


@pytest.mark.slow
def test_a_probe_neither_sets_methods_apart_nor_makes_runs_incomparable(whole, probed, tmp_path):
    """One run without a probe, and two with different ones: three seeds of one method."""
    runs = [whole[FULL]]
    for seed, sha256 in ((7, "a" * 64), (8, "b" * 64)):
        runs.append(shutil.copytree(probed, tmp_path / str(seed)))
        record = record_of(runs[-1])
        record["args"] |= {"seed": seed, "probe": f"{sha256}.jsonl"}
        record["probe"]["sha256"] = record["identity"]["probe (--probe)"] = sha256
        write_run_json(runs[-1], record)
    argv = [*map(str, runs), str(whole[LORA]), "--out", str(tmp_path / "out")]
    assert compare_runs.main(argv) == 0
    assert pd.read_csv(tmp_path / "out" / "comparison.csv")["runs"].tolist() == [3, 1]


@pytest.mark.parametrize("damage", ["row", "number", "mean"])
def test_a_damaged_table_of_losses_is_refused(probed, tmp_path, damage):
    folder = shutil.copytree(probed, tmp_path / "run")
    path = folder / "probe_losses.csv"
    lines = path.read_text().splitlines(keepends=True)
    wrong = {"row": lines[2][:4], "number": lines[2].replace("2,", "x,", 1), "mean": "2,b,2,1.0,1.0\n"}
    path.write_text("".join([*lines[:2], wrong[damage], *([] if damage == "row" else lines[3:])]))
    with pytest.raises(InputError, match="probe_losses.csv"):
        read_probe_losses(folder)


# ------------------------------------------------------------------------------------------------- the interval


def table_of(before, final, tokens):
    return pd.DataFrame({"target_tokens": tokens, "before": before, "final": final})


def test_the_change_is_that_of_the_mean_loss_of_a_token():
    table = table_of([1.0, 2.0, 9.0, 2.0, 5.0], [2.0, 2.5, 10.0, 4.0, 5.0], [1, 2, 10, 3, 4])
    rise, low, high = change(table)
    assert rise == pytest.approx(4.5 / 20) and low < rise < high
    assert change(table.assign(final=table["before"])) == (0, 0, 0)
    assert change(table.assign(final=table["before"] + table["target_tokens"])) == pytest.approx((1, 1, 1))
    for broken in (table.head(1), table.assign(before=float("nan"))):
        with pytest.raises(InputError, match="both before and after"):
            change(broken)


@pytest.mark.parametrize("lines", [60, 200])
def test_the_interval_of_a_change_covers_the_true_one_as_often_as_it_says(lines, monkeypatch):
    """Exponential changes of lines of 2 to 40 tokens, larger in longer lines: very skewed. The true change is 0.1."""
    monkeypatch.setattr("pipeline.statistics.ratio_interval.__defaults__", (500,))
    rng, hits, studies = np.random.default_rng(0), 0, 1000
    for _ in range(studies):
        tokens = 1 + rng.geometric(0.2, lines)
        rise = tokens * (0.5 * (rng.exponential(size=lines) - 1) + 0.1)
        _, low, high = change(table_of(0.0, rise, tokens))
        hits += low <= 0.1 <= high
    assert 0.93 <= hits / studies <= 0.97


# ------------------------------------------------------------------------------------------------ shipped probes


def shipped(name):
    return [json.loads(line) for line in (PROBES / name).read_text().splitlines()]


def pretraining():
    """The modules of demo/ and probes/ that draw the demo's text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(PROBES), str(PROJECT / "demo"), *sys.path])
        return importlib.import_module("make_demo"), importlib.import_module("pretraining_text")


def test_the_demos_probe_is_what_its_script_draws(tmp_path):
    make_demo, _ = pretraining()
    make_demo.main(["--out", str(tmp_path / "demo.jsonl")])
    assert (tmp_path / "demo.jsonl").read_bytes() == (PROBES / "demo.jsonl").read_bytes()
    lines = shipped("demo.jsonl")
    assert [line["kind"] for line in lines] == ["span filling"] * 60 + ["reading"] * 60
    tweets = {
        text
        for split in ("train", "validation", "test")
        for row in demo_rows(None, split)
        for text in row.values()
        if isinstance(text, str)
    }
    assert not tweets & {text for line in lines for text in (line["prompt"], line["prompt"].split(" | ")[-1])}


def pretraining_lines(steps):
    """The pairs of the first steps of each stage of the pretraining, 32 for a step, as demo/pretrain.py draws them."""
    _, text = pretraining()
    for stage, count in enumerate(steps):
        drawn = text.PretrainingText(random.Random("0 text" + stage * " 2"), stage)
        yield from (drawn.draw(step) for step in range(count) for _ in range(32))


@pytest.mark.parametrize("steps", [(0, 0, 100, 200), pytest.param((5000, 7000, 3000, 200), marks=pytest.mark.slow)])
def test_no_line_of_the_demos_probe_was_pretrained_on(steps):
    own = {(line["prompt"], line["target"]) for line in shipped("demo.jsonl")}
    prompts, drawn = {prompt for prompt, _ in own}, 0
    for prompt, _ in pretraining_lines(steps):
        drawn += 1
        assert prompt not in prompts
    assert drawn == 32 * sum(steps)


def test_the_demos_model_knows_what_its_probe_asks(demo):
    """With the targets of other lines the loss is far higher: of reading 8 nats in place of 0.06."""
    model, tokenizer, probe = demo
    lines, shuffled = probe.lines, []
    for kind in ("span filling", "reading"):
        own = [line for line in lines if line.kind == kind]
        shuffled += [
            type(a)(a.number, *"abc", a.input_ids, b.labels) for a, b in zip(own, own[1:] + own[:1], strict=True)
        ]
    losses = line_losses(model, probe, pad=tokenizer.pad_token_id)
    wrong = line_losses(model, type(probe)("", "", tuple(shuffled)), pad=tokenizer.pad_token_id)
    assert sum(losses[60:]) * 20 < sum(wrong[60:]) and sum(losses[:60]) < 0.95 * sum(wrong[:60])


def real_tokenizer(request):
    """flan-t5-small's, whose vocabulary all T5s share, or the demo's where it is not here."""
    try:
        return request.getfixturevalue("tokenizer")
    except pytest.skip.Exception:
        return AutoTokenizer.from_pretrained(TINY_T5)


@pytest.mark.parametrize("name", ["flan_t5.jsonl", "t5.jsonl", "demo.jsonl"])
def test_the_lines_of_a_shipped_probe_are_distinct_and_fit(request, name):
    lines = shipped(name)
    assert len({line["prompt"] for line in lines}) == len(lines)
    tokenizer = AutoTokenizer.from_pretrained(TINY_T5) if name == "demo.jsonl" else real_tokenizer(request)
    probe = tokenized(read_probe(PROBES / name), tokenizer, 256)
    assert all(len(line.labels) <= 64 for line in probe.lines)
    assert all(text == text.strip() for line in lines for text in line.values())
    if "flan" not in name:
        for line in probe.lines:
            spans = re.findall(r"<extra_id_\d+>", line.prompt)
            ids = tokenizer.convert_tokens_to_ids(spans)
            assert [token for token in line.input_ids if token in ids] == ids and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("name, lines", [("t5.jsonl", 100), ("demo.jsonl", 60)])
def test_a_span_filling_line_is_a_text_with_gaps_and_what_fills_them(name, lines):
    filled = [line for line in shipped(name) if line.get("kind", "span filling") == "span filling"]
    assert len(filled) == lines
    for line in filled:
        asked = re.findall(r"<extra_id_(\d+)>", line["prompt"])
        parts = re.split(r"<extra_id_(\d+)>", line["target"])
        before, numbers, spans = parts[0], parts[1::2], [part.strip() for part in parts[2::2]]
        assert before == "" and spans[-1] == "" and all(spans[:-1])
        assert asked == numbers[:-1] == [str(n) for n in range(len(asked))] and numbers[-1] == str(len(asked))
        text = re.sub(r"<extra_id_(\d+)>", lambda match, spans=spans: spans[int(match[1])], line["prompt"])
        assert "<extra_id" not in text and "  " not in text
        if name == "t5.jsonl":
            assert 2 <= len(asked) <= 3 and re.fullmatch(r"[A-Z0-9].*[.!?]", text)


def test_flan_t5s_probe_has_forty_lines_of_each_kind():
    lines = shipped("flan_t5.jsonl")
    kinds = [line["kind"] for line in lines]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ["sentiment", "entailment", "reading", "yes/no", "rewriting"], 40
    )
    for kind in ("yes/no", "entailment", "sentiment"):  # no answer is right more often than not by much
        answers = [line["target"] for line in lines if line["kind"] == kind]
        assert max(map(answers.count, answers)) <= 22
    assert {line["target"] for line in lines if line["kind"] == "yes/no"} == {"yes", "no"}
