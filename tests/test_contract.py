"""A model keeps T5's contract or is refused in one line, before anything is written and with nothing else on the
screen. What would be silently wrong otherwise is the reason for each check."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers
from conftest import SHARED, run_script
from hub_stub import HubStub
from plain import DEMO, TINY_T5, demo_rows, plain_answers, questions_and_tweets
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from helper_functions import InputError, answer, load_model_and_tokenizer

ROWS = demo_rows(8)
SMALL = {"vocab_size": 2000, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2}
SMALL |= {"num_decoder_layers": 2, "decoder_start_token_id": 0}


def copy_demo(folder, **changes):
    """A copy of the demo's model: {file, with _ for the dot: entries to change; None removes one}."""
    shutil.copytree(TINY_T5, folder)
    for name, entries in changes.items():
        path = folder / name.replace("_json", ".json")
        known = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({k: v for k, v in known.items() if v is not None or k not in entries}))
    return folder


def with_weights(folder, change):
    """A copy of the demo's model after change(weights)."""
    weights = load_file(copy_demo(folder) / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def refusal(folder, capfd):
    """The message with which a model folder is refused, if it is one line and all that is printed."""
    capfd.readouterr()
    with pytest.raises(InputError) as caught:
        load_model_and_tokenizer(str(folder))
    message = str(caught.value)
    assert "\n" not in message and "".join(capfd.readouterr()) == ""
    return message.replace(str(folder), "MODEL")


def assert_answers_as_demo(folder):
    model, tokenizer = load_model_and_tokenizer(str(folder))
    plain, its = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    for beams in (1, 3):
        assert answer(model, tokenizer, "cpu", *questions_and_tweets(ROWS), beams=beams) == plain_answers(
            plain, its, ROWS, beams
        )


def data_folder_of(tmp_path, rows=24):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(demo_rows(rows, split)))
    return tmp_path / "data"


def train(base, data, run, *more):
    return run_script(
        "tweet_qa_main.py",
        *("--model_name", base, "--dataset", data, "--sem_model", "none", "--save_dir", run, "--epochs", 1, *more),
    )


# ----------------------------------------------------------------------------------------------- other architectures

SHAPE = {"vocab_size": 2000, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
SHAPE |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
OTHERS = {
    "BartForConditionalGeneration": (SHAPE, "is a BART model"),
    "MBartForConditionalGeneration": (SHAPE, "is a mBART model"),
    "PegasusForConditionalGeneration": (SHAPE, "is a Pegasus model"),
    "MarianMTModel": (SHAPE | {"pad_token_id": 1, "decoder_start_token_id": 1}, "is a Marian model"),
    "SwitchTransformersForConditionalGeneration": (SMALL | {"num_experts": 2}, "is a Switch Transformers model"),
    "GPT2LMHeadModel": ({"vocab_size": 2000, "n_embd": 16, "n_layer": 1, "n_head": 2}, "is a GPT-2 model"),
    "T5EncoderModel": (SMALL, "is an encoder without a decoder (T5EncoderModel)"),
    "MT5EncoderModel": (SMALL, "is an encoder without a decoder (MT5EncoderModel)"),
    "T5ForSequenceClassification": (SMALL, "is not a whole T5 model (T5ForSequenceClassification)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_by_name(tmp_path, capfd, monkeypatch, name):
    """Before its weights are read, which would take minutes for a large one."""
    shape, message = OTHERS[name]
    kind = getattr(transformers, name)
    folder = tmp_path / "other"
    kind(kind.config_class(**shape)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_T5 / file, folder / file)
    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", None)
    ending = ", which cannot be loaded here: only T5, mT5, UMT5, LongT5 and ByT5 models can"
    assert refusal(folder, capfd) == f"--model_name MODEL {message}{ending}"


def test_a_run_ends_with_the_name_alone(tmp_path):
    base = copy_demo(tmp_path / "base", config_json={"model_type": "bart", "architectures": ["BartModel"]})
    done = train(base, data_folder_of(tmp_path), tmp_path / "run")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: --model_name ") and done.stderr.count("\n") == 1
    assert "is a BART model" in done.stderr and "BART" not in done.stdout


def test_on_the_hub_its_weights_are_not_even_downloaded(tmp_path):
    base = copy_demo(tmp_path / "base", config_json={"model_type": "pegasus", "architectures": None})
    with HubStub(models={"some/pegasus": base}) as hub:
        environ = hub.environ(tmp_path / "hf")
        code = "from helper_functions import load_model_and_tokenizer as load; load('some/pegasus')"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, cwd=DEMO.parent
        )
        assert "--model_name some/pegasus is a Pegasus model" in done.stderr.splitlines()[-1]
        assert not [path for _, path, _ in hub.requests if "safetensors" in path]


@pytest.mark.parametrize("names", [["T5WithLMHeadModel"], ["T5Model"], None, []])
def test_other_names_of_the_same_architecture_load(tmp_path, names):
    """The first T5's class had another name, and some configs name none."""
    assert_answers_as_demo(copy_demo(tmp_path / "model", config_json={"architectures": names}))


def test_a_config_without_model_type_is_known_by_its_class(tmp_path, capfd):
    assert_answers_as_demo(copy_demo(tmp_path / "model", config_json={"model_type": None}))
    neither = copy_demo(tmp_path / "neither", config_json={"model_type": None, "architectures": None})
    assert "its config.json does not name a model_type" in refusal(neither, capfd)


# ------------------------------------------------------------------------------------------ the family, and its ties


def write_relative(folder, kind, more, untied=None):
    """A small model of T5's family with random weights and the demo's tokenizer. untied: what config.json says then."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**SMALL, **more))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    if untied:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | untied))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_T5 / file, folder / file)
    return folder


GLOBAL = {"encoder_attention_type": "transient-global", "local_radius": 7, "global_block_size": 4}
RELATIVES = {
    "mT5": ("MT5ForConditionalGeneration", {}, None),
    "mT5 untied": ("MT5ForConditionalGeneration", {}, {"tie_word_embeddings": False}),
    "UMT5": ("UMT5ForConditionalGeneration", {}, None),
    "LongT5": ("LongT5ForConditionalGeneration", {"local_radius": 7}, None),
    "LongT5 v1.1": ("LongT5ForConditionalGeneration", GLOBAL | {"tie_word_embeddings": False}, None),
    "T5 v1.1, made by transformers 5": ("T5ForConditionalGeneration", {"tie_word_embeddings": False}, None),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_the_family_answers_as_transformers_does_and_trains(tmp_path, name):
    """The loss of the first step is that of transformers alone, with dropout's share of it left out."""
    kind, more, untied = RELATIVES[name]
    base = write_relative(tmp_path / "base", getattr(transformers, kind), more | {"dropout_rate": 0.0}, untied)
    model, tokenizer = load_model_and_tokenizer(str(base))
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    for beams in (1, 3):
        answers = answer(model, tokenizer, "cpu", *questions_and_tweets(ROWS), beams=beams)
        assert answers == plain_answers(plain, tokenizer, ROWS, beams) and len({*answers}) > 3
    run = tmp_path / "run"
    done = train(base, data_folder_of(tmp_path, 8), run, "--batch_size", 8, "--lr", 1e-3)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = demo_rows(8, "train")
    from helper_functions import build_prompt

    batch = tokenizer(
        [build_prompt(row["Question"], row["Tweet"]) for row in rows],
        text_target=[row["Answer"][0] if isinstance(row["Answer"], list) else row["Answer"] for row in rows],
        padding=True,
        return_tensors="pt",
    )
    batch["labels"][batch["labels"] == 0] = -100
    first = pd.read_csv(run / "train_loss.csv")["loss"].iloc[0]
    assert first == pytest.approx(plain(**batch).loss.item(), rel=1e-4)


def test_an_untied_umt5_is_refused(tmp_path, capfd):
    """transformers 5 scales its output as if it were tied, so its losses and beam searches are of another model."""
    kind = transformers.UMT5ForConditionalGeneration
    folder = write_relative(tmp_path / "base", kind, {}, {"tie_word_embeddings": False})
    assert "scales the output of every UMT5" in refusal(folder, capfd)


def test_a_config_that_contradicts_the_lm_head_is_refused(tmp_path, capfd):
    tied = copy_demo(tmp_path / "tied", config_json={"tie_word_embeddings": True, "scale_decoder_outputs": True})
    assert "its config.json does not say tie_word_embeddings false" in refusal(tied, capfd)
    headless = with_weights(tmp_path / "headless", lambda weights: weights.pop("lm_head.weight"))
    assert "its weights lack lm_head.weight" in refusal(headless, capfd)


# --------------------------------------------------------------------------------------------------- special tokens


def test_a_tokenizer_that_does_not_end_a_text_is_refused(tmp_path, capfd):
    """Its model would never learn where an answer ends: F1 0.48 in place of 0.66, without a word."""
    folder = copy_demo(tmp_path / "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    message = "--model_name MODEL: its tokenizer does not end each text with </s>"
    for single in (None, [{"Sequence": {"id": "A", "type_id": 0}}], "twice"):
        changed = json.loads(json.dumps(tokenizer))
        if single is None:
            changed["post_processor"] = None
        elif single == "twice":
            changed["post_processor"]["single"] += changed["post_processor"]["single"][1:]
        else:
            changed["post_processor"]["single"] = single
        path.write_text(json.dumps(changed))
        assert refusal(folder, capfd).startswith(message)
        data = tmp_path / "data" if (tmp_path / "data").exists() else data_folder_of(tmp_path)
    done = train(folder, data, tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("tokenizer_config_json", {"pad_token": None}, "must have a pad token and, apart from it, an end token"),
        ("tokenizer_config_json", {"eos_token": None}, "must have a pad token and, apart from it, an end token"),
        ("tokenizer_config_json", {"pad_token": "</s>"}, "must have a pad token and, apart from it, an end token"),
        ("config_json", {"eos_token_id": 7}, "its config.json says eos_token_id 7, but its tokenizer's is 1"),
        ("config_json", {"eos_token_id": [1, 7]}, "its config.json says eos_token_id [1, 7], but its tokenizer's is 1"),
        ("config_json", {"pad_token_id": 3}, "its config.json says pad_token_id 3, but its tokenizer's is 0"),
        ("config_json", {"decoder_start_token_id": 2000}, "decoder_start_token_id 2000 in its config.json is not"),
        ("config_json", {"decoder_start_token_id": "<pad>"}, "decoder_start_token_id <pad> in its config.json is not"),
        (
            "tokenizer_config_json",
            {"additional_special_tokens": ["<a>"]},
            "has more pieces than the model has embeddings",
        ),
        ("config_json", {"is_encoder_decoder": False}, "says that it is not an encoder-decoder"),
        ("config_json", {"quantization_config": {"load_in_8bit": True}}, "its weights are quantized"),
        ("config_json", {"dropout_rate": 1.0}, "dropout_rate 1.0 in its config.json is not below 1"),
        ("config_json", {"layer_norm_epsilon": float("nan")}, "its output is not finite numbers"),
    ],
)
def test_what_else_the_json_files_must_say(tmp_path, capfd, file, entries, message):
    assert message in refusal(copy_demo(tmp_path / "model", **{file: entries}), capfd)


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("config_json", {"decoder_start_token_id": None}),
        ("config_json", {"decoder_start_token_id": None, "pad_token_id": None, "eos_token_id": None}),
        ("config_json", {"eos_token_id": [1]}),
        ("config_json", {"use_cache": False, "return_dict": False, "output_hidden_states": True}),
        ("tokenizer_config_json", {"padding_side": "left", "truncation_side": "left"}),
        ("tokenizer_config_json", {"model_input_names": ["input_ids"], "model_max_length": 3}),
        ("tokenizer_json", {"truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0}}),
    ],
)
def test_what_a_run_can_put_right_changes_nothing(tmp_path, file, entries):
    """T5's rule where a token id is missing; sides, names and lengths are the run's own."""
    folder = copy_demo(tmp_path / "model", **{file: entries})
    if "truncation" in entries:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["truncation"]["direction"] = "Right"
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_answers_as_demo(folder)
    _, tokenizer = load_model_and_tokenizer(str(folder))
    padded = tokenizer.pad({"input_ids": [[5, 1], [5, 6, 7, 1]]})
    assert padded["input_ids"] == [[5, 1, 0, 0], [5, 6, 7, 1]] and padded["attention_mask"][0] == [1, 1, 0, 0]


def test_a_model_without_a_start_token_trains_as_one_with_it(tmp_path):
    """The handed case, and what it is made of: the losses of every step are the same."""
    data = data_folder_of(tmp_path)
    bases = {"with": TINY_T5, "without": copy_demo(tmp_path / "without")}
    config = json.loads((TINY_T5 / "config.json").read_text()) | {"decoder_start_token_id": None}
    case = SHARED / "cases" / "05_config_without_start_token" / "config.json"
    (bases["without"] / "config.json").write_text(case.read_text() if case.exists() else json.dumps(config))
    (bases["without"] / "generation_config.json").unlink()
    losses = []
    for name, base in bases.items():
        done = train(base, data, tmp_path / f"run {name}")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        losses.append(pd.read_csv(tmp_path / f"run {name}" / "train_loss.csv")["loss"].tolist())
    assert losses[0] == losses[1]
    saved = json.loads((tmp_path / "run without" / "config.json").read_text())
    assert saved["decoder_start_token_id"] == saved["pad_token_id"] == 0


def test_a_tokenizer_json_is_read_as_it_is_written(tmp_path):
    """Without its tokenizer_config.json transformers 5 takes its vocabulary alone, and would not lower the case."""
    folder = copy_demo(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    _, tokenizer = load_model_and_tokenizer(str(folder))
    texts = ["The ROCKETS won 3-1!!", *(row["Tweet"] for row in demo_rows(50))]
    written = AutoTokenizer.from_pretrained(TINY_T5)
    assert AutoTokenizer.from_pretrained(folder)(texts).input_ids != written(texts).input_ids
    assert tokenizer(texts).input_ids == written(texts).input_ids
    assert_answers_as_demo(folder)


# -------------------------------------------------------------------------------------------------------- spiece.model


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A spiece.model with T5's settings and 1,900 pieces: with T5's 100 sentinels it fits the demo's model."""
    import sentencepiece

    texts = [text for row in demo_rows(1000, "train") for text in questions_and_tweets([row])]
    prefix = tmp_path_factory.mktemp("spiece") / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for [text] in texts),
        **{"model_prefix": str(prefix), "vocab_size": 400, "model_type": "unigram", "minloglevel": 2},
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False},
    )
    return prefix.with_suffix(".model")


def with_spiece(folder, spiece):
    copy_demo(folder)
    for path in folder.glob("token*"):
        path.unlink()
    shutil.copyfile(spiece, folder / "spiece.model")
    return folder


def test_spiece_model_alone_gives_the_ids_of_its_tokenizer_json(tmp_path, spiece):
    import sentencepiece

    folder = with_spiece(tmp_path / "model", spiece)
    _, tokenizer = load_model_and_tokenizer(str(folder))
    texts = [row["Tweet"] for row in demo_rows(100)] + ["Caf\u00e9 \u2460  \ufb01ne\ttabs \U0001f600", ""]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    ids = tokenizer(texts).input_ids
    assert ids == [pieces.encode(text) + [1] for text in texts]
    last = pieces.get_piece_size() + 99  # T5's sentinels come after the pieces, the last one first
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>"]) == [0, 1, 2, last]
    tokenizer.save_pretrained(folder)
    (folder / "spiece.model").unlink()
    _, converted = load_model_and_tokenizer(str(folder))
    assert (folder / "tokenizer.json").exists() and converted(texts).input_ids == ids


def test_a_run_from_spiece_model_alone(tmp_path, spiece):
    run = tmp_path / "run"
    done = train(with_spiece(tmp_path / "model", spiece), data_folder_of(tmp_path), run)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (run / "tokenizer.json").exists() and not (run / "spiece.model").exists()
    load_model_and_tokenizer(str(run))


def test_a_spiece_model_that_cannot_be_read(tmp_path, capfd, monkeypatch, spiece):
    folder = with_spiece(tmp_path / "model", spiece)
    (folder / "spiece.model").write_bytes(spiece.read_bytes()[:3000])
    assert "MODEL: its spiece.model is damaged (" in refusal(folder, capfd)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert refusal(folder, capfd).endswith("to read its spiece.model, pip install sentencepiece protobuf")


# ------------------------------------------------------------------------------------------------------------ weights


def add_layer(weights):
    added = {name.replace("block.2.", "block.3."): weight for name, weight in weights.items() if "block.2." in name}
    weights |= {name: weight.clone() for name, weight in added.items()}


def set_value(name, value):
    return lambda weights: weights[name].view(-1)[7:8].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_layer, "its weights have 4 encoder layers, but its config.json says 3"),
        (lambda w: w.pop("shared.weight"), "its weights lack shared.weight"),
        (lambda w: w.pop("encoder.final_layer_norm.weight"), "its weights lack encoder.final_layer_norm.weight"),
        (set_value("shared.weight", float("nan")), "its weights are damaged (shared.weight has values that are not"),
        (set_value("lm_head.weight", float("-inf")), "its weights are damaged (lm_head.weight has values that are not"),
        (
            lambda w: w.update({"encoder.block.0.layer.0.gate.weight": torch.ones(2)}),
            "its config.json, which leaves out",
        ),
        (
            lambda w: w.update({"shared.weight": w["shared.weight"][:1990]}),
            "shared.weight has the shape [1990, 128], not",
        ),
    ],
)
def test_weights_must_be_complete(tmp_path, capfd, change, message):
    assert message in refusal(with_weights(tmp_path / "model", change), capfd)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_layers": 2}, "its weights have 3 encoder layers, but its config.json says 2"),
        ({"num_decoder_layers": 10**9}, "its weights have 2 decoder layers, but its config.json says 1000000000"),
        ({"d_ff": 200}, "has the shape [256, 128], not [200, 128]"),
        ({"num_heads": 2, "d_kv": 64}, "relative_attention_bias.weight has the shape [32, 4], not [32, 2]"),
        ({"feed_forward_proj": "relu"}, "its weights lack decoder.block.0.layer.2.DenseReluDense.wi.weight"),
    ],
)
def test_weights_must_fit_the_config(tmp_path, capfd, entries, message):
    assert message in refusal(copy_demo(tmp_path / "model", config_json=entries), capfd)


def test_half_precision_and_shards_load(tmp_path):
    """float16 weights are read as float32; several files are one model, and all of them must be there."""
    half = with_weights(tmp_path / "half", lambda w: w.update({name: weight.half() for name, weight in w.items()}))
    assert {weight.dtype for weight in load_model_and_tokenizer(str(half))[0].parameters()} == {torch.float32}
    folder = copy_demo(tmp_path / "shards")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="2MB")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_answers_as_demo(folder)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(InputError, match="model-00002-of-0000.*, which model.safetensors.index.json names, is missing"):
        load_model_and_tokenizer(str(folder))


# ------------------------------------------------------------------------------------------------------------ pickled


def pickle_weights(folder, files=1):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number in range(files):
        name = "pytorch_model.bin" if files == 1 else f"pytorch_model-{number + 1:05}-of-{files:05}.bin"
        torch.save({key: weights[key] for key in names[number::files]}, folder / name)
    return folder


def command_in(message):
    command = message.split(" with: ")[1]
    return command.replace("python", shlex.quote(sys.executable), 1)


@pytest.mark.parametrize("files", [1, 3])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path, capfd, files):
    folder = pickle_weights(copy_demo(tmp_path / "my model's"), files)
    message = refusal(folder, capfd)
    assert message.startswith("--model_name MODEL: its weights are pickled (pytorch_model") and "MODEL" in message
    command = command_in(message.replace("MODEL", str(folder)))
    assert subprocess.run(command, shell=True, capture_output=True, cwd=tmp_path).returncode == 0
    assert_answers_as_demo(folder)


def test_a_tied_model_with_its_weight_under_four_names_converts(tmp_path, capfd):
    """As the first T5's checkpoints are pickled."""
    folder = write_relative(tmp_path / "tied", transformers.T5ForConditionalGeneration, {})
    model, tokenizer = load_model_and_tokenizer(str(folder))
    answers = answer(model, tokenizer, "cpu", *questions_and_tweets(ROWS))
    torch.save(AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    command = command_in(refusal(folder, capfd).replace("MODEL", str(folder)))
    assert subprocess.run(command, shell=True, capture_output=True).returncode == 0
    model, tokenizer = load_model_and_tokenizer(str(folder))
    assert model.lm_head.weight is model.shared.weight
    assert answer(model, tokenizer, "cpu", *questions_and_tweets(ROWS)) == answers


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_command_does_not_run_code_that_is_pickled(tmp_path, capfd):
    folder = copy_demo(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    command = command_in(refusal(folder, capfd).replace("MODEL", str(folder)))
    assert subprocess.run(command, shell=True, capture_output=True).returncode != 0
    assert not (tmp_path / "ran").exists() and not (folder / "model.safetensors").exists()


@pytest.mark.slow
def test_pickled_weights_on_the_hub(tmp_path):
    base = pickle_weights(copy_demo(tmp_path / "base"))
    with HubStub(models={"some/t5": base}) as hub:
        code = "from helper_functions import load_model_and_tokenizer as load; load('some/t5')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.environ(tmp_path / "hf"),
            **{"capture_output": True, "text": True, "cwd": DEMO.parent},
        )
    message = done.stderr.splitlines()[-1]
    assert "--model_name some/t5: its weights are pickled (pytorch_model.bin)" in message
    assert "hf download some/t5 --local-dir t5 && python -c " in message and message.endswith("then give the folder t5")


def test_a_panic_of_the_tokenizers_library_is_not_seen(tmp_path, capfd, flan_t5_files, standin):
    """It is no Exception, and is printed past sys.stderr."""
    folder = shutil.copytree(standin, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refusal(folder, capfd)
    assert "its tokenizer files are missing or damaged (" in message and "PanicException" in message
