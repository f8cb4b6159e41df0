"""The whole T5 family, each in the shape of its real checkpoints: both scripts train it, what they save is read back by
the README's snippets under transformers 5 and 4, and both give the answers that the run wrote down."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pandas as pd
import pytest
from conftest import FOLDER_NAMES, PROJECT, SCRIPTS, TINY, readme_snippets, run_script
from safetensors import safe_open

from benchmarks.standin import write_model, write_standin
from helper_functions import InputError, load_model_and_tokenizer
from pipeline.checkpoint import load_checkpoint
from pipeline.run_folder import RUN_FILES
from tweet_qa_main_lora import add_lora

TRANSFORMERS_4 = PROJECT / ".venv" / "transformers4"

# What the config.json of the real checkpoints have in common, beside their sizes.
COMMON = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dropout_rate": 0.1,
    "initializer_factor": 1.0,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
}
GATED = COMMON | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2, "tie_word_embeddings": False}
# The first T5 does not say that it is tied, how its feed-forward layers are built, or how deep its decoder is.
# What it holds for other tasks must not change how it answers here.
SUMMARIES = {
    "length_penalty": 2.0,
    "min_length": 30,
    "no_repeat_ngram_size": 3,
    "num_beams": 4,
    "prefix": "summarize: ",
}
T5 = COMMON | {"n_positions": 512, "output_past": True, "task_specific_params": {"summarization": SUMMARIES}}
FAMILY = {
    "t5": T5,
    "flan-t5": None,  # flan-t5-small's own config is at hand
    "t5-v1_1": GATED | {"output_past": True, "dropout_rate": 0.0},
    # Three layers of encoder to one of decoder, and a token for each byte.
    "byt5": GATED | {"num_layers": 3, "num_decoder_layers": 1, "vocab_size": 384, "tokenizer_class": "ByT5Tokenizer"},
}
TIED = {"t5": True, "flan-t5": False, "t5-v1_1": False, "byt5": False}
FEED_FORWARD = {"t5": ("wi", "wo"), "flan-t5": ("wi_0", "wi_1", "wo")}
FEED_FORWARD |= {"t5-v1_1": FEED_FORWARD["flan-t5"], "byt5": FEED_FORWARD["flan-t5"]}
CASES = [(family, script) for family in FAMILY for script in SCRIPTS]
each_case = pytest.mark.parametrize(("family", "script"), CASES)
each_family = pytest.mark.parametrize("family", FAMILY)
# What takes a trained model takes minutes: eight runs.
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory, flan_t5_files):
    """{family: folder of a small model with random weights}."""
    from transformers import ByT5Tokenizer

    root, folders = tmp_path_factory.mktemp("family"), {}
    for family, config in FAMILY.items():
        folder = folders[family] = root / family
        if config is None:
            write_standin(folder, flan_t5_files, **TINY)
            continue
        folder.mkdir()
        write_model(folder, config)
        if family == "byt5":
            ByT5Tokenizer().save_pretrained(folder)
        else:  # T5's tokenizer is the same in all of them
            for path in flan_t5_files.glob("*token*"):
                shutil.copyfile(path, folder / path.name)
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory, tweet_qa):
    """{script: data folder} of eight real rows with short prompts and answers, the training rows many times over.

    Prompts of at most 256 bytes and answers of at most 32, so that nothing is cut for ByT5 either. The LoRA script's
    rows have each other's answers: an adapter that did nothing would not know them.
    """
    rows = sorted(json.loads((tweet_qa / "train.json").read_text()), key=lambda row: len(row["Tweet"]))[:200]
    by_answer = {row["Answer"][0]: row for row in rows}
    rows = [by_answer[answer] for answer in sorted(by_answer, key=len)[:8]]
    moved = [row | {"Answer": rows[number - 1]["Answer"]} for number, row in enumerate(rows)]
    folders = {}
    for script, script_rows in zip(SCRIPTS, (rows, moved), strict=True):
        folder = folders[script] = tmp_path_factory.mktemp("data")
        (folder / "train.json").write_text(json.dumps(script_rows * 40))
        (folder / "validation.json").write_text(json.dumps(script_rows))
    return folders


@pytest.fixture(scope="module")
def trained(bases, data, tmp_path_factory):
    """trained(family, script): (the folder of a run, made when it is first asked for, and of its base model).

    The LoRA run's base is what the full one saved: an adapter teaches a model of random weights little.
    """
    root, runs = tmp_path_factory.mktemp("runs"), {}

    def run(family, script):
        folder = root / f"{family} {FOLDER_NAMES[script]}"
        lora = script == "tweet_qa_main_lora.py"
        base = run(family, "tweet_qa_main.py")[0] if lora else bases[family]
        if folder not in runs:
            targets = ("q", "k", "v", "o", *FEED_FORWARD[family], "lm_head")
            adapter = ("--lora_r", 32, "--lora_dropout", 0, "--target_modules", *targets)
            rate = 5e-3 if lora else 3e-3 if family == "byt5" else 1e-2
            runs[folder] = run_script(
                script,
                *("--model_name", base, "--dataset", data[script], "--sem_model", "none", "--save_dir", folder),
                *("--epochs", 2, "--lr", rate, *(adapter if lora else ())),
            )
        assert runs[folder].returncode == 0 and runs[folder].stderr == "", runs[folder].stderr
        return folder, base

    return run


def question_of(folder, base, script):
    """The arguments of `ask` about a run: the README's snippet, but for the names of folders, and what was answered."""
    snippet = readme_snippets()[script].replace("google/flan-t5-small", str(base))
    snippet = snippet.replace(f'"{FOLDER_NAMES[script]}"', repr(str(folder)))
    frame = pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False, dtype=str)
    return {"snippet": snippet, "questions": frame["question"].tolist(), "tweets": frame["tweet"].tolist()}


def ask(snippet, questions, tweets):
    """Run a snippet that loads a model, ask that model, and say whether its lm_head is tied, in fact and by config."""
    space = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(snippet, space)
    model = space["model"]
    answers = space["answer"](model, space["tokenizer"], "cpu", questions, tweets)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {"answers": answers, "tied": tied, "config": model.config.tie_word_embeddings}


def ask_all():
    """What the process under transformers 4 does: from a dict of questions on stdin to one of answers on stdout."""
    import peft
    import transformers

    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    json.dump(versions | {name: ask(**case) for name, case in json.load(sys.stdin).items()}, sys.stdout)


@pytest.fixture(scope="module")
def under_4(trained):
    """What transformers 4 makes of all the runs, in one process: it takes long to start."""
    assert TRANSFORMERS_4.is_dir(), f"transformers 4 is not in {TRANSFORMERS_4}: `make test` installs it there"
    cases = {f"{family} {script}": question_of(*trained(family, script), script) for family, script in CASES}
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TRANSFORMERS_4, PROJECT, PROJECT / "tests")))}
    command = [sys.executable, "-c", "import test_family; test_family.ask_all()"]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["transformers"], result["peft"]) == ("4.57.6", "0.18.1")
    return result


def predictions_of(folder):
    frame = pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False, dtype=str)
    return frame["prediction"].tolist()


@slow
@each_case
def test_each_shape_trains_and_answers(trained, family, script):
    folder, _ = trained(family, script)
    run = json.loads((folder / "run.json").read_text())
    assert run["finished"] and run["skipped_steps"] == 0
    assert run["final"]["f1"] > 0.3  # so its answers say something: they are no noise that any weights would give
    assert len(set(predictions_of(folder)) - {""}) >= 3
    steps = pd.read_csv(folder / "train_loss.csv")["loss"]
    assert steps.iloc[-1] < steps.iloc[0] / 2
    assert {path.name for path in folder.iterdir()} <= {"run.json", *RUN_FILES}  # what --overwrite removes


@slow
@each_case
def test_transformers_5_gives_the_answers_that_the_run_wrote(trained, family, script):
    result = ask(**question_of(*trained(family, script), script))
    assert result["answers"] == predictions_of(trained(family, script)[0])
    assert result["tied"] is TIED[family]


@slow
@each_case
def test_transformers_4_gives_the_answers_that_the_run_wrote(trained, under_4, family, script):
    result = under_4[f"{family} {script}"]
    assert result["answers"] == predictions_of(trained(family, script)[0])
    assert result["tied"] is result["config"] is TIED[family]


@slow
@each_family
def test_a_full_checkpoint_says_what_its_weights_are(trained, family):
    folder, _ = trained(family, "tweet_qa_main.py")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is TIED[family]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert ("lm_head.weight" in weights.keys()) is not TIED[family]  # noqa: SIM118


@each_family
def test_unknown_target_modules_are_answered_with_those_that_exist(bases, family):
    """The feed-forward matrices go by the names of the model at hand: wi of the first T5 are wi_0 and wi_1 later."""
    model, _ = load_model_and_tokenizer(str(bases[family]))
    other = "wi_0" if family == "t5" else "wi"
    there = ", ".join(sorted(["q", "k", "v", "o", *FEED_FORWARD[family]]))
    options = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "base_dtype": "fp32"}
    options |= {"use_rslora": False, "use_dora": False}
    args = Namespace(**options, target_modules=["q", other])
    with pytest.raises(InputError, match=f"^--target_modules {other}: this model has {there}; all-linear "):
        add_lora(model, args)
    args.target_modules = ["q", *FEED_FORWARD[family]]
    adapted = {
        name.split(".lora_A")[0].rsplit(".")[-1]
        for name, _ in add_lora(model, args).named_parameters()
        if "lora_A" in name
    }
    assert adapted == set(args.target_modules)


@slow
@pytest.mark.parametrize(
    ("family", "file"),
    [("flan-t5", "tokenizer.json"), ("flan-t5", "tokenizer_config.json"), ("byt5", "tokenizer_config.json")],
)
def test_an_adapter_without_its_tokenizer_is_refused(trained, tmp_path, family, file):
    folder = shutil.copytree(trained(family, "tweet_qa_main_lora.py")[0], tmp_path / "run")
    load_checkpoint(folder)
    (folder / file).unlink()
    with pytest.raises(InputError, match=rf"its tokenizer files are missing \({file}\)"):
        load_checkpoint(folder)


def test_a_model_without_its_tokenizer_is_refused(bases, tmp_path):
    """Bytes need no file, so a ByT5 folder is whole as long as something in it says that it is one."""
    folder = shutil.copytree(bases["byt5"], tmp_path / "byt5")
    for path in folder.glob("*token*"):
        path.unlink()
    _, tokenizer = load_model_and_tokenizer(str(folder))
    assert tokenizer("é").input_ids == [0xC3 + 3, 0xA9 + 3, 1]
    config = json.loads((folder / "config.json").read_text())
    del config["tokenizer_class"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its tokenizer files are missing"):
        load_model_and_tokenizer(str(folder))
