"""What is saved loads where the README says: checkpoints under transformers 4.57 too, with the same token ids and
answers, and an adapter that plain PEFT saved gives PEFT's own answers."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace

import pandas as pd
import pytest
import torch
from conftest import PROJECT, SHARED, TINY, run_script
from plain import TINY_T5, demo_rows, plain_answers, questions_and_tweets
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.standin import write_model
from helper_functions import (
    InputError,
    TweetQADataset,
    answer,
    build_collate_fn,
    load_model_and_tokenizer,
    load_tweet_qa,
)
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.merge import merge

TRANSFORMERS_4 = PROJECT / ".venv" / "transformers4"
DATA = TINY_T5.parent / "tweets"
ROWS = demo_rows(8)
ASKED = questions_and_tweets(ROWS)
TEXTS = [row["Tweet"] for row in demo_rows(60)] + ["caf\u00e9 \u2460 \ufb01 \U0001f600", "<extra_id_0> a", "", "\t\n"]
BEAMS = (1, 4)


def with_demo_tokenizer(folder):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_T5 / file, folder / file)


def write_tied(folder, kind=T5ForConditionalGeneration, config=T5Config, **more):
    """A small model with random weights, of which lm_head is the embeddings', and the demo's tokenizer."""
    torch.manual_seed(0)
    shape = {"vocab_size": 2000, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    model = kind(config(**shape, decoder_start_token_id=0, **more))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    with_demo_tokenizer(folder)


def write_other_class(folder):
    """The demo's model with a tokenizer of a class that transformers 5 renames, and which pads at the left."""
    shutil.copytree(TINY_T5, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_without_class(folder):
    shutil.copytree(TINY_T5, folder)
    (folder / "tokenizer_config.json").unlink()


def write_byt5(folder):
    folder.mkdir()
    shape = TINY | {"vocab_size": 384, "d_model": 64, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    names = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0}
    write_model(folder, shape | names)
    ByT5Tokenizer().save_pretrained(folder)


MODELS = {
    "the demo's": lambda folder: shutil.copytree(TINY_T5, folder),
    "T5's": None,  # the fixture's
    "ByT5's": write_byt5,
    "PreTrainedTokenizerFast": write_other_class,
    "no class": write_without_class,
    "a tied T5": write_tied,
    "tied, not scaled": lambda folder: write_tied(folder, tie_word_embeddings=False),
    "a tied mT5": lambda folder: write_tied(folder, MT5ForConditionalGeneration, MT5Config),
    "the demo's, merged": lambda folder: shutil.copytree(TINY_T5, folder),
    "a tied T5, merged": write_tied,
}
each_model = pytest.mark.parametrize("name", MODELS)


def look_at(folder):
    """What a folder gives in this process: ids, answers by `answer()`, and answers by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    answers = {str(beams): answer(model, tokenizer, "cpu", *ASKED, beams=beams) for beams in BEAMS}
    plain = {str(beams): plain_answers(model, tokenizer, ROWS, beams) for beams in BEAMS}
    inputs = sorted(tokenizer("who won"))
    return {"ids": tokenizer(TEXTS).input_ids, "answers": answers, "plain": plain, "inputs": inputs}


def look_at_all():
    """What the process under transformers 4 does: from a list of folders on stdin to a dict on stdout."""
    import transformers

    looks = {folder: look_at(folder) for folder in json.load(sys.stdin)}
    json.dump({"version": transformers.__version__} | looks, sys.stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, standin):
    """{name: (folder of a checkpoint as a run saves it, what the model gave before)}."""
    root, folders = tmp_path_factory.mktemp("saved"), {}
    args = Namespace(model_name="base", dataset="data", save_dir="run", seed=0, final_beams=5)
    record = {"args": vars(args), "method": "full", "final": None, "best_epoch": None}
    record |= {"trainable_parameters": 1, "total_parameters": 1}
    for number, (name, write) in enumerate(MODELS.items()):
        base = root / f"base {number}" if write else standin
        if write:
            write(base)
        model, tokenizer = load_model_and_tokenizer(str(base))
        if "merged" in name:
            adapter = plain_peft(root / f"adapter {number}", base, target_modules="all-linear", r=2, lora_alpha=32)
            batch = build_collate_fn(tokenizer)(
                [*TweetQADataset(load_tweet_qa(str(DATA))["validation"][:8], tokenizer)]
            )
            model = merge(load_checkpoint(adapter)[0], batch, "run")
        answers = {str(beams): answer(model, tokenizer, "cpu", *ASKED, beams=beams) for beams in BEAMS}
        folder = root / str(number)
        folder.mkdir()
        save_checkpoint(folder, model, tokenizer, record)
        folders[name] = folder, {"ids": tokenizer(TEXTS).input_ids, "answers": answers}
    return folders


@pytest.fixture(scope="module")
def under_4(saved):
    """What transformers 4 makes of all of them, in one process: it takes long to start."""
    assert TRANSFORMERS_4.is_dir(), f"transformers 4 is not in {TRANSFORMERS_4}: `make test` installs it there"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TRANSFORMERS_4, PROJECT, PROJECT / "tests")))}
    command = [sys.executable, "-c", "import test_saved_loads as t; t.look_at_all()"]
    folders = json.dumps([str(folder) for folder, _ in saved.values()])
    done = subprocess.run(command, input=folders, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    looks = json.loads(done.stdout)
    assert looks["version"] == "4.57.6"
    return looks


def assert_the_same(look, before):
    assert look["ids"] == before["ids"]
    assert look["answers"] == look["plain"] == before["answers"] and len({*look["answers"]["1"]}) > 3
    assert look["inputs"] == ["attention_mask", "input_ids"]  # what T5 takes: generate(**tokenizer(...)) works


@each_model
def test_transformers_5_gives_the_same_ids_and_answers(saved, name):
    folder, before = saved[name]
    assert_the_same(look_at(folder), before)
    model, tokenizer = load_model_and_tokenizer(str(folder))
    assert answer(model, tokenizer, "cpu", *ASKED, beams=4) == before["answers"]["4"]
    assert tokenizer(TEXTS).input_ids == before["ids"] and tokenizer.padding_side == "right"


@each_model
def test_transformers_4_gives_the_same_ids_and_answers(saved, under_4, name):
    folder, before = saved[name]
    assert_the_same(under_4[str(folder)], before)


@each_model
def test_the_tokenizers_class_is_known_to_both(saved, name):
    config = json.loads((saved[name][0] / "tokenizer_config.json").read_text())
    known = {"T5's": "T5Tokenizer", "ByT5's": "ByT5Tokenizer"}
    assert config["tokenizer_class"] == known.get(name, "PreTrainedTokenizerFast")
    assert not isinstance(config.get("extra_special_tokens"), list) and "local_files_only" not in config


# ----------------------------------------------------------------------------------------------------------- adapters

QA = "SEQ_2_SEQ_LM"
ADAPTERS = {
    "lm_head": {"target_modules": ["q", "v", "lm_head"], "r": 4},
    "all-linear": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*decoder.*\.(q|wo)|lm_head"},
    "the embeddings": {"target_modules": ["shared", "q"]},
    "their other names": {"target_modules": ["embed_tokens", "q"]},
    "the whole lm_head": {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
    "all embeddings whole": {"target_modules": ["q"], "modules_to_save": ["shared", "embed_tokens"]},
    "norms whole": {"target_modules": ["q"], "modules_to_save": ["layer_norm", "final_layer_norm"]},
    "embeddings and head share": {"modules_to_save": ["lm_head", "shared"], "ensure_weight_tying": True},
    "single tokens": {"target_modules": ["q", "v"], "trainable_token_indices": {"shared": [5, 6, 700]}},
    "rank-stabilized": {"target_modules": ["q", "v", "wo"], "use_rslora": True, "r": 4},
    "DoRA": {"target_modules": ["q", "v", "lm_head"], "use_dora": True},
    "with a bias": {"target_modules": ["q", "wo"], "lora_bias": True},
    "ranks by name": {"target_modules": ["q", "v"], "rank_pattern": {"decoder.*q": 5}, "alpha_pattern": {"v": 30}},
    "one layer": {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "block"},
    "all but one": {"target_modules": "all-linear", "exclude_modules": ["wo"]},
    "a parameter": {"target_modules": ["q"], "target_parameters": ["lm_head.weight"]},
    "PiSSA": {"target_modules": ["q", "v"], "init_lora_weights": "pissa"},
    "no task": {"target_modules": ["q", "v"], "task_type": None},
    "another task": {"target_modules": ["q", "v"], "task_type": "CAUSAL_LM"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{"untied", "tied": a model folder}."""
    write_tied(tmp_path_factory.mktemp("bases") / "tied", feed_forward_proj="gated-gelu")
    return {"untied": TINY_T5, "tied": tmp_path_factory.getbasetemp() / "bases0" / "tied"}


def plain_peft(folder, base, **save):
    """Write an adapter with random weights as plain PEFT saves it. save: its config, and options of save_pretrained."""
    import peft

    options = {name: save.pop(name) for name in ("save_embedding_layers",) if name in save}
    kind = save.pop("kind", "LoraConfig")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(**{"task_type": QA} | save)
        model = peft.get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(base), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    spread = weight.std() if weight.numel() > 1 else 0
                    weight.add_(torch.randn_like(weight) * 0.3 * (spread or 0.2))
        model.save_pretrained(folder, **options)
    return folder


def peft_answers(folder, base, beams=4):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder)
    return plain_answers(model, AutoTokenizer.from_pretrained(base), ROWS, beams)


def assert_answers_as_peft(folder, base):
    before = answer(*load_model_and_tokenizer(str(base)), "cpu", *ASKED, beams=4)
    answers = answer(*load_checkpoint(folder), "cpu", *ASKED, beams=4)
    assert answers == peft_answers(folder, base)
    assert answers != before  # the adapter does something


@pytest.mark.parametrize("base", ["untied", "tied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_plain_peft_answers_as_peft_does(tmp_path, bases, base, name):
    folder = plain_peft(tmp_path / "adapter", bases[base], **{"r": 2, "lora_alpha": 32} | ADAPTERS[name])
    assert_answers_as_peft(folder, bases[base])


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_embeddings_that_were_saved_too_count(tmp_path, bases, base):
    config = {"target_modules": ["q", "v"], "lora_alpha": 64}
    folder = plain_peft(tmp_path / "adapter", bases[base], **config, save_embedding_layers=True)
    weights = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.shared.weight" in weights
    weights["base_model.model.shared.weight"] *= 1.5
    save_file(weights, folder / "adapter_model.safetensors")
    assert_answers_as_peft(folder, bases[base])


def test_eval_only_scores_the_handed_adapter_with_pefts_answers(tmp_path):
    """`lm_head` among the targets, made as the case says; it was refused for weights that do not fit."""
    script = SHARED / "cases" / "07_adapter_with_lm_head" / "make_adapter.py"
    folder = tmp_path / "adapter"
    if script.exists():
        subprocess.run([sys.executable, script, TINY_T5, folder], check=True, capture_output=True)
    else:
        plain_peft(folder, TINY_T5, target_modules=["q", "v", "lm_head"], r=4)
    with torch.no_grad():  # as it was made it changes nothing
        weights = load_file(folder / "adapter_model.safetensors")
        torch.manual_seed(2)
        for name in weights:
            if "lora_" in name:
                weights[name] = torch.randn_like(weights[name]) * 0.1
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(ROWS))
    done = run_script(
        "tweet_qa_main_lora.py",
        *("--eval_only", "--save_dir", folder, "--dataset", tmp_path / "data", "--sem_model", "none"),
        *("--final_beams", 4),
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    frame = pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False, dtype=str)
    assert frame["prediction"].tolist() == peft_answers(folder, TINY_T5)


def refusal(folder, capfd, **options):
    capfd.readouterr()
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder, **options)
    assert "\n" not in str(caught.value) and "".join(capfd.readouterr()) == ""
    return str(caught.value).replace(str(folder), "RUN")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "IA3Config", "target_modules": ["k"], "feedforward_modules": []}, "an adapter of type IA3, not LORA"),
        ({"kind": "PrefixTuningConfig", "num_virtual_tokens": 3}, "an adapter of type PREFIX_TUNING, not LORA"),
        ({"target_modules": ["q"], "task_type": "SEQ_CLS"}, "an adapter for the task SEQ_CLS, which does not answer"),
        ({"target_modules": ["q"], "init_lora_weights": "pissa_niter_4"}, "changes its base at random whenever"),
        (
            {"target_modules": ["q", "shared", "lm_head"], "ensure_weight_tying": True},
            "PEFT ignores its base_model.model.",
        ),
    ],
)
def test_what_cannot_be_scored_right_is_refused_for_its_reason(tmp_path, capfd, config, message):
    plain_peft(tmp_path / "adapter", TINY_T5, **config)
    assert message in refusal(tmp_path / "adapter", capfd)


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


A = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(A), f"the weights of its adapter do not fit --model_name {TINY_T5}: it has no {A}"),
        (lambda w: w.update({A.replace("q.", "z."): w[A].clone()}), f"PEFT ignores its {A.replace('q.', 'z.')}"),
        (lambda w: w[A].fill_(float("nan")), f"its adapter are damaged ({A} has values that are not finite numbers)"),
        (lambda w: w.update({A: w[A][:, :7].clone()}), "size mismatch for base_model.model.encoder.block.0.layer.0"),
    ],
)
def test_the_weights_of_an_adapter_must_be_complete(tmp_path, capfd, change, message):
    folder = plain_peft(tmp_path / "adapter", TINY_T5, target_modules=["q", "lm_head"])
    change_weights(folder, change)
    assert message in refusal(folder, capfd)


def test_a_resized_vocabulary_is_named(tmp_path, capfd):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5)
    base.resize_token_embeddings(2010)
    model = get_peft_model(base, LoraConfig(task_type=QA, target_modules=["q"]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    message = refusal(tmp_path / "adapter", capfd)
    assert "size mismatch for base_model.model.shared" in message and "2010" in message


def test_an_adapter_that_names_no_base(tmp_path, capfd):
    folder = plain_peft(tmp_path / "adapter", TINY_T5, target_modules=["q"])
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert (
        refusal(folder, capfd) == "--save_dir RUN: its adapter does not name its base model: give it with --model_name"
    )
    assert answer(*load_checkpoint(folder, str(TINY_T5)), "cpu", *ASKED, beams=4) == peft_answers(folder, TINY_T5)


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(tmp_path, capfd):
    folder = plain_peft(tmp_path / "adapter", TINY_T5, target_modules=["q", "lm_head"], lora_alpha=32)
    answers = peft_answers(folder, TINY_T5)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    message = refusal(folder, capfd).replace("RUN", str(folder))
    assert "its weights are pickled (adapter_model.bin)" in message
    command = message.split(" with: ")[1].replace("python", shlex.quote(sys.executable), 1)
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0
    assert answer(*load_checkpoint(folder), "cpu", *ASKED, beams=4) == answers
