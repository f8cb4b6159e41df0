"""--merge: the merged model computes what base + adapter does, whatever the adapter's shape; what is written loads as a
full checkpoint; and the answers that changed are counted as plain peft counts them."""

import json
import shutil
from argparse import Namespace

import pandas as pd
import pytest
import torch
from conftest import FULL, LORA, assert_refused_at, at_call, contents, main_of, run_script
from peft import PeftModel
from plain import TINY_T5, demo_rows, plain_answers, questions_and_tweets
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from helper_functions import (
    InputError,
    TweetQADataset,
    answer,
    build_collate_fn,
    load_model_and_tokenizer,
    load_tweet_qa,
)
from pipeline import merge as merging
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.merge import changed_answers, merge, target_logits_of
from tweet_qa_main_lora import add_lora

DATA = TINY_T5.parent / "tweets"
ALL_LINEAR = ["all-linear"]
# (base, targets, rank, flags): 20 shapes of adapters.
SHAPES = [
    ("untied", ["q", "v"], 1, {}),
    ("untied", ["q", "v"], 4, {}),
    ("untied", ["q", "v"], 16, {"use_rslora": True}),
    ("untied", ["attention"], 4, {}),
    ("untied", ["attention"], 16, {"use_dora": True}),
    ("untied", ALL_LINEAR, 1, {"use_rslora": True}),
    ("untied", ALL_LINEAR, 4, {}),
    ("untied", ALL_LINEAR, 16, {"use_rslora": True, "use_dora": True}),
    ("untied", ["wi_0", "wo"], 4, {"use_dora": True}),
    ("untied", ["q", "v", "lm_head"], 4, {}),
    ("untied", ["q", "v"], 4, {"base_dtype": "bf16"}),
    ("untied", ALL_LINEAR, 16, {"base_dtype": "bf16", "use_dora": True}),
    ("tied", ["q", "v"], 1, {"use_dora": True}),
    ("tied", ["q", "v"], 16, {}),
    ("tied", ["attention"], 4, {"use_rslora": True}),
    ("tied", ALL_LINEAR, 1, {}),
    ("tied", ALL_LINEAR, 16, {"use_rslora": True}),
    ("tied", ["wi", "wo"], 4, {}),
    ("tied", ["wi", "wo"], 16, {"base_dtype": "bf16"}),
    ("tied", ALL_LINEAR, 4, {"base_dtype": "bf16", "use_rslora": True}),
]
FLOAT32, BFLOAT16 = 1e-4, 0.03  # of the largest logit; bfloat16 has 8 bits, and each layer rounds


def as_text(shape):
    base, targets, rank, flags = shape
    return " ".join([base, *targets, f"r={rank}", *(f"{name}={value}" for name, value in flags.items())])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{"untied", "tied": a model folder}: the demo's T5, and a small random T5 with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("bases") / "tied"
    torch.manual_seed(0)
    shape = {"vocab_size": 2000, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_T5 / file, folder / file)
    return {"untied": TINY_T5, "tied": folder}


def random_adapter(base, targets, rank=4, scale=0.1, seed=0, **flags):
    """(PeftModel of the project with random weights, tokenizer, batch of the demo's rows)."""
    model, tokenizer = load_model_and_tokenizer(str(base))
    given = {"lora_r": rank, "lora_alpha": 8, "lora_dropout": 0.05, "use_rslora": False, "use_dora": False}
    given |= {"base_dtype": "fp32", "target_modules": targets} | flags
    model = add_lora(model, Namespace(**given))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
        elif "magnitude" in name:
            weight.data *= 1 + 0.1 * torch.rand_like(weight)
    data = TweetQADataset(load_tweet_qa(str(DATA))["validation"][:8], tokenizer)
    return model, tokenizer, build_collate_fn(tokenizer)([*data])


def record_of(base):
    args = {"model_name": str(base), "dataset": "data", "save_dir": "out"}
    return {"args": args, "method": "full", "final": None, "trainable_parameters": 1, "total_parameters": 1}


def share_of(difference, logits):
    return (difference.abs().max() / logits.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=as_text)
def test_merged_logits_are_those_of_plain_pefts_adapter(tmp_path, bases, shape):
    base, targets, rank, flags = shape
    model, tokenizer, batch = random_adapter(bases[base], targets, rank, **flags)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    bf16 = flags.get("base_dtype") == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    plain = AutoModelForSeq2SeqLM.from_pretrained(bases[base], dtype=dtype)
    untrained = target_logits_of(plain.eval(), batch)
    wanted = target_logits_of(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval(), batch)
    assert share_of(wanted - untrained, wanted) > 0.05  # the adapter does something

    merged = merge(model, batch, "run")
    assert not hasattr(merged, "peft_config") and {weight.dtype for weight in merged.parameters()} == {torch.float32}
    limit = BFLOAT16 if bf16 else FLOAT32
    assert share_of(target_logits_of(merged, batch) - wanted, wanted) < limit
    for name, dtype, rounding in (("fp32", torch.float32, 0), ("bf16", torch.bfloat16, BFLOAT16)):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name, merged.to(dtype), tokenizer, record_of(bases[base]))
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        read = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        assert share_of(target_logits_of(read, batch) - wanted, wanted) < limit + rounding


def test_the_sum_is_not_rounded_to_a_bf16_bases_type(bases):
    """What peft's merge into the base as it is would do."""
    flags = {"base_dtype": "bf16", "scale": 0.01}
    matrix = "decoder.block.0.layer.0.SelfAttention.q"
    model, _, batch = random_adapter(bases["untied"], ["q"], **flags)
    layer = model.get_base_model().get_submodule(matrix)
    wanted = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    assert (wanted.bfloat16().float() - wanted).abs().max() > 1e-4
    torch.testing.assert_close(merge(model, batch, "run").get_submodule(matrix).weight, wanted, rtol=0, atol=1e-7)


# ----------------------------------------------------------------------------------------------- what cannot be merged


def test_an_adapter_of_a_shared_lm_head_is_refused(bases):
    model, _, batch = random_adapter(bases["tied"], ["q", "lm_head"])
    with pytest.raises(InputError, match="^run: its adapter cannot be merged: the merged model's logits would differ"):
        merge(model, batch, "run")


def test_merged_weights_that_are_not_finite_are_refused(bases):
    model, _, batch = random_adapter(bases["untied"], ["q", "v"])
    layer = model.get_base_model().get_submodule("decoder.block.0.layer.0.SelfAttention.q")
    layer.lora_A["default"].weight.data.fill_(1e30)
    layer.lora_B["default"].weight.data.fill_(1e30)
    with pytest.raises(InputError, match="^run: its adapter cannot be merged .*NaNs detected in the merged weights"):
        merge(model, batch, "run")


def test_changed_answers_are_the_rows_that_differ():
    frame = pd.DataFrame({"qid": list("abc"), "question": list("xyz"), "references": [["1"]] * 3, "f1": 1.0})
    changed = changed_answers(frame.assign(prediction=["1", "2", "3"]), frame.assign(prediction=["1", "4", "3 "]))
    assert changed.to_dict("records") == [
        {"qid": "b", "question": "y", "references": ["1"], "adapter_answer": "2", "merged_answer": "4"},
        {"qid": "c", "question": "z", "references": ["1"], "adapter_answer": "3", "merged_answer": "3 "},
    ]
    assert changed_answers(frame.assign(prediction="1"), frame.assign(prediction="1")).empty


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def noisy(made_once, demo_runs):
    """The LoRA run with noise in place of its adapter, the same on every machine: with it, rounding to bfloat16 changes
    some answers, and the last digits of float32 change none."""

    def make(folder):
        shutil.copytree(demo_runs / "lora", folder / "run")
        path = folder / "run" / "adapter_model.safetensors"
        torch.manual_seed(2)
        weights = {name: 0.1 * torch.randn_like(weight) for name, weight in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})

    return made_once("noisy", make)[0] / "run"


def recount(run, out, rows, beams):
    """{qid: (adapter's, merged model's answer)} where they differ, by plain peft and transformers."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_T5)
    adapter = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), run)
    merged = AutoModelForSeq2SeqLM.from_pretrained(out, dtype=torch.float32)
    answers = [plain_answers(model, tokenizer, rows, beams) for model in (adapter, merged)]
    return {row["qid"]: pair for row, *pair in zip(rows, *answers, strict=True) if pair[0] != pair[1]}


def assert_counted_as_plain_peft(said, run, out, rows, beams):
    told = json.loads((out / "merge.json").read_text())
    written = pd.read_csv(out / "merge_changed_answers.csv", keep_default_na=False, dtype=str)
    found = recount(run, out, rows, beams)
    assert list(written) == ["qid", "question", "references", "adapter_answer", "merged_answer"]
    assert {row.qid: [row.adapter_answer, row.merged_answer] for row in written.itertuples()} == found
    assert told["answers_changed"] == len(written) == len(found) and told["rows"] == len(rows)
    f1 = f"F1 {told['f1_adapter']:.4f} -> {told['f1_merged']:.4f}"
    line = f"merged: {len(found)} of {len(rows)} answers differ from the adapter's | {f1} |"
    assert said.splitlines()[-1].startswith(line) and said.rstrip().endswith(f"| {out}")
    return told


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_changed_answers_are_those_that_plain_peft_finds(tmp_path, demo_runs, noisy, dtype):
    out, before = tmp_path / "new" / "out", contents(noisy)
    done = run_script(LORA, "--merge", noisy, out, "--merge_dtype", dtype)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = assert_counted_as_plain_peft(done.stdout, noisy, out, demo_rows(40), beams=2)
    assert told["dtype"] == dtype and told["final_beams"] == 2 and told["run"] == str(noisy)
    assert (told["answers_changed"] > 0) == (dtype == "bf16")  # else the test would compare nothing with nothing
    assert contents(noisy) == before and not [path for path in out.iterdir() if path.name.startswith(".")]


def test_what_was_merged_is_an_ordinary_checkpoint(tmp_path, demo_runs):
    out = tmp_path / "out"
    done = run_script(LORA, "--merge", demo_runs / "lora", out)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    told = json.loads((out / "merge.json").read_text())
    final = json.loads((demo_runs / "lora" / "run.json").read_text())["final"]
    assert (told["f1_adapter"], told["em_adapter"]) == (final["f1"], final["em"])
    assert told["dtype"] == "fp32" and 0 <= told["max_logit_difference"] < FLOAT32 * told["largest_logit"]
    card = (out / "README.md").read_text()
    assert "a LoRA adapter, merged into its base," in card and "PeftModel" not in card
    assert f"| F1 | {told['f1_merged']:.4f} |" in card

    asked = questions_and_tweets(demo_rows(8))
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSeq2SeqLM.from_pretrained(out)
    assert answer(model, tokenizer, "cpu", *asked) == answer(*load_checkpoint(demo_runs / "lora"), "cpu", *asked)
    given = ("--dataset", demo_runs / "data", "--sem_model", "none", "--final_beams", 2)
    done = run_script(FULL, "--eval_only", "--save_dir", out, *given)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    scored = json.loads((out / "run.json").read_text())
    assert scored["method"] == "full" and scored["final"]["f1"] == told["f1_merged"]


def test_a_runs_record_does_not_have_the_flags_of_merge(demo_runs):
    args = json.loads((demo_runs / "lora" / "run.json").read_text())["args"]
    assert "lora_r" in args and not {"merge", "merge_dtype"} & args.keys()


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_the_demos_adapter_is_counted_as_plain_peft_counts(tmp_path, base_dtype):
    run = tmp_path / "run"
    done = run_script(
        *(LORA, "--model_name", TINY_T5, "--dataset", DATA, "--sem_model", "none", "--base_dtype", base_dtype),
        *("--epochs", 1, "--lr", 3e-3, "--target_modules", "all-linear", "--save_dir", run),
    )
    assert done.returncode == 0, done.stderr
    for dtype in ("fp32", "bf16"):
        done = run_script(LORA, "--merge", run, tmp_path / dtype, "--merge_dtype", dtype)
        assert done.returncode == 0, done.stderr
        if base_dtype == "fp32":
            assert_counted_as_plain_peft(done.stdout, run, tmp_path / dtype, demo_rows(240), beams=5)
        told = json.loads((tmp_path / dtype / "merge.json").read_text())
        assert told["rows"] == 240 and abs(told["f1_adapter"] - told["f1_merged"]) < 0.02


# ---------------------------------------------------------------------------------------------------------- refusals


def change_record(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def filled(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def damage(run):
    weights = load_file(run / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, run / "adapter_model.safetensors", {"format": "pt"})


BAD = {  # {what is wrong: (a change of `run` in the folder, RUN, OUT, more arguments, the message)}
    "no folder": (None, "none", "out", [], "--merge FOLDER/none: this folder does not exist"),
    "no run": (
        lambda run: (run / "run.json").unlink(),
        "run",
        "out",
        [],
        "FOLDER/run has no run (no run.json)",
    ),
    "a full run": (lambda run: change_record(run, method="full"), "run", "out", [], "run has no adapter"),
    "no adapter": (lambda run: (run / "adapter_config.json").unlink(), "run", "out", [], "run has no adapter"),
    "no weights": (
        lambda run: (run / "adapter_model.safetensors").unlink(),
        "run",
        "out",
        [],
        "it has no adapter",
    ),
    "unfinished": (lambda run: change_record(run, finished=False), "run", "out", [], "a run that is not finished"),
    "last/": (lambda run: (run / "last").mkdir(), "run", "out", [], "a run that is not finished"),
    "another prompt": (lambda run: change_record(run, prompt="Q"), "run", "out", [], "with another prompt, 'Q'"),
    "damaged": (damage, "run", "out", [], "the weights of its adapter are damaged"),
    "OUT is used": (lambda run: filled(run.parent / "out"), "run", "out", [], "OUT FOLDER/out contains notes.txt"),
    "OUT is RUN": (None, "run", "run", [], "OUT FOLDER/run is FOLDER/run or inside it"),
    "OUT in RUN": (None, "run", "run/merged", [], "OUT FOLDER/run/merged is FOLDER/run or inside it"),
    "OUT is a file": (lambda run: (run.parent / "out").write_text(""), "run", "out", [], "out is not a folder"),
    "OUT below a file": (lambda run: (run.parent / "out").write_text(""), "run", "out/a", [], "out is not a folder"),
    "--resume": (None, "run", "out", ["--resume"], "--merge cannot be combined with --resume: omit it"),
    "--seeds": (None, "run", "out", ["--seeds", "1"], "--merge cannot be combined with --seeds"),
    "--overwrite": (None, "run", "out", ["--overwrite"], "--merge cannot be combined with --overwrite"),
    "--eval_only": (None, "run", "out", ["--eval_only"], "--merge cannot be combined with --eval_only"),
    "--holdout": (None, "run", "out", ["--holdout", "0", "--lr", "1"], "with --lr, --holdout: omit them"),
    "the default": (None, "run", "out", ["--lora_r", "8"], "--merge cannot be combined with --lora_r"),
    "no data": (None, "run", "out", ["--dataset", "FOLDER/none"], "--dataset FOLDER/none"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tmp_path, capfd, demo_runs, wrong):
    change, run, out, more, message = BAD[wrong]
    shutil.copytree(demo_runs / "lora", tmp_path / "run")
    if change:
        change(tmp_path / "run")
    argv = ["--merge", f"{tmp_path}/{run}", f"{tmp_path}/{out}", *(w.replace("FOLDER", str(tmp_path)) for w in more)]
    there = sorted(tmp_path.iterdir())
    assert_refused_at(capfd, tmp_path, LORA, argv, message.replace("FOLDER", str(tmp_path)))
    assert sorted(tmp_path.iterdir()) == there


def test_the_type_alone_and_several_processes_are_refused(tmp_path, capfd, demo_runs, monkeypatch):
    assert_refused_at(capfd, tmp_path, LORA, ["--merge_dtype", "bf16"], "give it with --merge RUN OUT")
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--merge", str(demo_runs / "lora"), str(tmp_path / "out")]
    assert_refused_at(capfd, tmp_path, LORA, argv, "--merge needs a single process")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), None, "interrupted: nothing was trained"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_a_merge_that_is_stopped_leaves_nothing(tmp_path, capfd, demo_runs, without_java, error, code, message):
    def stop():
        raise error

    with at_call(merging, "changed_answers", 1, stop):
        ended = main_of(LORA)(["--merge", str(demo_runs / "lora"), str(tmp_path / "out")])
    assert ended == code if code else ended not in (0, 2)
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not [*tmp_path.iterdir()]
