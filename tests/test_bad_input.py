"""Each bad input ends the run with one line that names it, exit code 2, no traceback, and nothing written."""

import json
import os
import shutil

import pytest
import torch
from conftest import FULL, LORA, SCRIPTS, main_of, run_script
from safetensors.torch import load_file, save_file

from helper_functions import load_model_and_tokenizer

ROW = {"Question": "who won?", "Tweet": "The Rockets won!", "Answer": ["the rockets"], "qid": "1"}


@pytest.fixture
def place(tmp_path, monkeypatch, standin):
    """A working folder with good data in data/ and a good model in model/; arguments may name them relatively."""
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps([ROW, ROW]))
    (tmp_path / "model").symlink_to(standin)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_below(folder):
    return {
        (str(path.relative_to(folder)), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir() and "__pycache__" not in str(path)
    }


def assert_refused(place, capfd, message, *arguments, script=FULL):
    """Run the script's main() in the folder and check how it ends."""
    given = {"--model_name": "model", "--dataset": "data", "--sem_model": "none", "--save_dir": "run", "--epochs": "1"}
    flags = [arg for arg in arguments if arg.startswith("--")]
    argv = [word for flag, value in given.items() if flag not in flags for word in (flag, value)]
    before = files_below(place)
    capfd.readouterr()
    try:
        code = main_of(script)([*argv, *map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert message in err
    assert files_below(place) == before and not (place / "run").exists()


ARGUMENTS = {
    "an unknown argument": (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    "no epochs": (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, not '0'"),
    "half an epoch": (["--epochs", "1.5"], "argument --epochs: must be a whole number of at least 1, not '1.5'"),
    "a batch of none": (["--batch_size", "-8"], "argument --batch_size: must be a whole number of at least 1"),
    "a learning rate of 0": (["--lr", "0"], "argument --lr: must be a number above 0, not '0'"),
    "a learning rate that is no number": (["--lr", "nan"], "argument --lr: must be a number above 0, not 'nan'"),
    "an infinite learning rate": (["--lr", "inf"], "argument --lr: must be a number above 0, not 'inf'"),
    "no accumulation": (["--grad_accum_steps", "0"], "argument --grad_accum_steps"),
    "no beams": (["--final_beams", "0"], "argument --final_beams"),
    "a negative seed": (["--seed", "-1"], "argument --seed: must be a whole number of at least 0"),
    "a seed that numpy cannot take": (["--seed", "4294967296"], "argument --seed: must be below 2**32"),
    "negative patience": (["--patience", "-1"], "argument --patience"),
    "an unknown precision": (["--precision", "int8"], "argument --precision: invalid choice: 'int8'"),
    "a flag without its value": (["--lr"], "argument --lr: expected one argument"),
    "too short a target": (["--max_target_len", "1"], "argument --max_target_len"),
    "a tracker that is none": (["--report_to", "paper"], "argument --report_to: invalid choice: 'paper'"),
    "no samples": (["--max_train_samples", "0"], "argument --max_train_samples"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_arguments(place, capfd, case, script):
    arguments, message = ARGUMENTS[case]
    assert_refused(place, capfd, message, *arguments, script=script)


LORA_ARGUMENTS = {
    "rank 0": (["--lora_r", "0"], "argument --lora_r: must be a whole number of at least 1"),
    "alpha 0": (["--lora_alpha", "0"], "argument --lora_alpha: must be a whole number of at least 1"),
    "all dropped": (["--lora_dropout", "1"], "argument --lora_dropout: must be a number of at least 0 and below 1"),
    "no matrices": (["--target_modules"], "argument --target_modules: expected at least one argument"),
    "unknown matrices": (
        ["--target_modules", "q", "query", "value"],
        "--target_modules query value: this model has k, o, q, v, wi_0, wi_1, wo; all-linear and attention are short",
    ),
}


@pytest.mark.parametrize("case", LORA_ARGUMENTS)
def test_wrong_lora_arguments(place, capfd, case):
    arguments, message = LORA_ARGUMENTS[case]
    assert_refused(place, capfd, message, *arguments, script=LORA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is allowed where there is a GPU")
def test_float16_without_a_gpu(place, capfd):
    assert_refused(place, capfd, "--precision fp16 needs a CUDA GPU: use fp32 or bf16", "--precision", "fp16")


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_data(place, capfd, script):
    (place / "data" / "validation.json").write_text(json.dumps([ROW, ROW, ROW | {"Tweet": None}]))
    assert_refused(place, capfd, "validation.json, row 3: 'Tweet' must be text", script=script)
    assert_refused(place, capfd, "--dataset nowhere does not exist", "--dataset", "./nowhere", script=script)


def copy_model(place, name, without=()):
    shutil.copytree(place / "model", place / name, ignore=shutil.ignore_patterns(*without))
    return place / name


def test_wrong_models(place, capfd, minilm):
    def refused(name, message):
        assert_refused(place, capfd, message, "--model_name", name)

    refused("./nowhere", "--model_name ./nowhere: this folder does not exist")
    refused("data/train.json", "--model_name data/train.json: this folder does not exist")
    (place / "empty").mkdir()
    refused("empty", "--model_name empty: the model in this folder cannot be loaded")
    copy_model(place, "no_weights", without=["*.safetensors"])
    refused("no_weights", "--model_name no_weights: the model in this folder cannot be loaded")
    copy_model(place, "no_tokenizer", without=["*token*"])
    refused("no_tokenizer", "--model_name no_tokenizer: its tokenizer files are missing")
    refused(str(minilm), "is a BERT model, which cannot be loaded here")

    whole = (place / "model" / "model.safetensors").read_bytes()
    (copy_model(place, "cut_off") / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("cut_off", "--model_name cut_off: model.safetensors is damaged or incomplete (SafetensorError")

    weights = load_file(place / "model" / "model.safetensors")
    del weights["decoder.final_layer_norm.weight"]
    save_file(weights, copy_model(place, "lacking") / "model.safetensors", metadata={"format": "pt"})
    refused("lacking", "--model_name lacking: its weights lack decoder.final_layer_norm.weight")

    config = json.loads((place / "model" / "config.json").read_text())
    (copy_model(place, "other_shape") / "config.json").write_text(json.dumps(config | {"d_ff": 7}))
    refused("other_shape", "--model_name other_shape: its weights do not fit its config.json: decoder.block.0")

    # Pickled weights could run code, so they are not even looked at.
    pickled = copy_model(place, "pickled", without=["*.safetensors"])
    torch.save(load_file(place / "model" / "model.safetensors"), pickled / "pytorch_model.bin")
    refused("pickled", "--model_name pickled: its weights are pickled (pytorch_model.bin)")

    (copy_model(place, "adapter") / "adapter_config.json").write_text("{}")
    refused("adapter", "--model_name adapter is a LoRA adapter: give the folder or hub id of its base model")


def test_a_wrong_similarity_model(place, capfd):
    message = "--sem_model ./nowhere is not a sentence-transformers folder"
    assert_refused(place, capfd, message, "--sem_model", "./nowhere")
    assert_refused(place, capfd, "--sem_model model is not a sentence-transformers folder", "--sem_model", "model")
    (place / "broken").mkdir()
    (place / "broken" / "modules.json").write_text("[{")
    assert_refused(place, capfd, "--sem_model broken: the similarity model in this folder", "--sem_model", "broken")


def test_pickled_weights_of_a_similarity_model_are_not_loaded(place, capfd, minilm):
    shutil.copytree(minilm, place / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(minilm / "model.safetensors"), place / "pickled" / "pytorch_model.bin")
    message = "--sem_model pickled: the similarity model in this folder cannot be loaded"
    assert_refused(place, capfd, message, "--sem_model", "pickled")


@pytest.mark.parametrize("script", SCRIPTS)
def test_code_in_a_model_folder_is_not_run(place, capfd, script):
    """Not as the model, not as the tokenizer; the folder loads as the plain T5 that it is, or not at all."""
    code = "import pathlib\npathlib.Path('ran').touch()\nclass Own:\n    pass\n"
    auto_map = {"AutoConfig": "own.Own", "AutoModelForSeq2SeqLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for name, config in (("plain", {}), ("unknown", {"model_type": "own"})):
        folder = copy_model(place, name)
        (folder / "own.py").write_text(code)
        for file in ("config.json", "tokenizer_config.json"):
            held = json.loads((folder / file).read_text())
            (folder / file).write_text(json.dumps(held | config | {"auto_map": auto_map}))
    assert_refused(place, capfd, "cannot be loaded", "--model_name", "unknown", script=script)
    assert_refused(place, capfd, "--save_dir unknown", "--eval_only", "--save_dir", "unknown", script=script)
    load_model_and_tokenizer("plain")
    assert not (place / "ran").exists()


def test_a_save_dir_that_is_taken(place, capfd):
    (place / "old").mkdir()
    (place / "old" / "run.json").write_text("{}")
    (place / "other").mkdir()
    (place / "other" / "thesis.txt").write_text("do not lose me")
    assert_refused(place, capfd, "--save_dir old already has a run", "--save_dir", "old")
    assert_refused(
        place, capfd, "--save_dir other contains thesis.txt, which no run has written", "--save_dir", "other"
    )
    message = "other/thesis.txt is not a folder"
    assert_refused(place, capfd, message, "--save_dir", "other/thesis.txt")
    assert_refused(place, capfd, message, "--save_dir", "other/thesis.txt/run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_only_of_what_is_no_checkpoint(place, capfd, minilm, script):
    def refused(folder, message):
        assert_refused(place, capfd, message, "--eval_only", "--save_dir", folder, script=script)

    if script == LORA:  # the other script scores the model itself in a new folder
        refused("nowhere", "--save_dir nowhere: this folder does not exist; --eval_only needs one with a checkpoint")
    refused("data", "data has no checkpoint" if script == LORA else "data contains train.json and 1 more, which no run")
    refused(str(minilm), "is a BERT model, which cannot be loaded here")
    weights = copy_model(place, "cut_off") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("cut_off", "--save_dir cut_off: model.safetensors is damaged or incomplete (SafetensorError")
    (copy_model(place, "bad_record") / "run.json").write_text("{")
    refused("bad_record", "run.json cannot be read")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    refused("adapter", "--save_dir adapter: the adapter in this folder cannot be loaded")


def test_a_holdout_or_a_dropping_that_leaves_nothing(place, capfd):
    assert_refused(
        place,
        capfd,
        "--holdout 1: only 0 of 2 training rows are about a tweet that is not in validation",
        "--holdout",
        "1",
    )
    assert_refused(place, capfd, "--drop_leaked leaves no training row", "--drop_leaked")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_save_dir_that_cannot_be_written(place, capfd):
    (place / "locked").mkdir(mode=0o500)
    assert_refused(place, capfd, "locked cannot be written to; give another folder", "--save_dir", "locked/run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_as_a_user_sees_it(place, script):
    """The same in a process of its own, once from scratch: for a wrong argument, a wrong row and a wrong model."""
    good = {"--model_name": "model", "--dataset": "data", "--sem_model": "none", "--save_dir": "run"}
    (place / "bad").mkdir()
    for split in ("train", "validation"):
        (place / "bad" / f"{split}.json").write_text(json.dumps([ROW | {"Answer": 3}]))
    for wrong in ({"--lr": "fast"}, {"--dataset": "bad"}, {"--model_name": "./gone"}):
        argv = [word for pair in (good | wrong).items() for word in pair]
        done = run_script(script, *argv, fresh=script == FULL and "--lr" in wrong)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert not (place / "run").exists()
