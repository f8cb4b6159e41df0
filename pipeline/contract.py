"""What this project needs of a checkpoint: T5's architecture, end, pad and start token, and complete weights.

`t5.py` calls these checks while it loads a model. Each raises InputError with one line that names what is wrong and
what to do. What is not checked would give figures that are silently wrong.
"""

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM

from pipeline.errors import InputError, reason

# model_type in config.json -> the class of the whole model. ByT5 and CodeT5 are of type t5.
FAMILY = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
    "longt5": "LongT5ForConditionalGeneration",
}
# T5ForConditionalGeneration's name until 2020, and the same model without its head, which can be tied.
ALSO_T5 = {"T5WithLMHeadModel", "T5Model", "MT5Model", "UMT5Model", "LongT5Model"}
# Names of other models as their papers write them; any other is named as config.json does.
OTHERS = {
    "bart": "BART",
    "bert": "BERT",
    "blenderbot": "Blenderbot",
    "gpt2": "GPT-2",
    "led": "LED",
    "llama": "Llama",
    "m2m_100": "M2M100",
    "marian": "Marian",
    "mbart": "mBART",
    "pegasus": "Pegasus",
    "pegasus_x": "PEGASUS-X",
    "prophetnet": "ProphetNet",
    "switch_transformers": "Switch Transformers",
}
# The entries of config.json that describe the network. Every other one is ignored: what an old config.json says about
# the search, about outputs and about other tasks must not reach a run, nor what the run saves.
NETWORK = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "feed_forward_proj"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "dropout_rate"),
    *("initializer_factor", "tie_word_embeddings", "scale_decoder_outputs", "tokenizer_class"),
    *("local_radius", "global_block_size", "encoder_attention_type"),  # LongT5's
)
TOKENIZER_FILES = "tokenizer_config.json, and tokenizer.json or spiece.model"
PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; save_file({name: weight.clone().contiguous()"
    ' for path in sys.argv[2:] for name, weight in torch.load(path, map_location="cpu", weights_only=True).items()},'
    ' sys.argv[1], {"format": "pt"})'
)


# ---------------------------------------------------------------------------------------------------- before loading


def check_architecture(where, config):
    """The model_type of a config.json, if it is a whole model of the T5 family.

    where: the argument and the folder or hub id, which each message starts with. config: the dict in config.json.
    """
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{where}: the architectures in its config.json are not a list of names")
    kind = config.get("model_type")
    if kind is None:
        kind = next((kind for kind, whole in FAMILY.items() if whole in named), None)
        kind = "t5" if ALSO_T5 & {*named} else kind
    if kind is None and not named:
        raise InputError(f"{where}: the model cannot be loaded: its config.json does not name a model_type")
    only = "only T5, mT5, UMT5, LongT5 and ByT5 models can"
    if not isinstance(kind, str) or kind not in FAMILY:
        name = OTHERS.get(kind, kind) if isinstance(kind, str) else (named or [kind])[0]
        raise InputError(f"{where} is a {name} model, which cannot be loaded here: {only}")
    if named and not {*FAMILY.values(), *ALSO_T5} & {*named}:
        part = "an encoder without a decoder" if "Encoder" in named[0] else "not a whole T5 model"
        raise InputError(f"{where} is {part} ({named[0]}), which cannot be loaded here: {only}")
    if config.get("is_encoder_decoder", True) is not True:
        raise InputError(f"{where}: its config.json says that it is not an encoder-decoder, as a T5 is")
    if config.get("quantization_config") is not None:
        raise InputError(f"{where}: its weights are quantized, which cannot be trained: use the original model")
    return kind


def network(config):
    """The entries of a config.json that describe the network, without those that are null."""
    return {name: config[name] for name in NETWORK if config.get(name) is not None}


def check_weight_files(where, folder, config, tied):
    """Check the weights in a folder against config.json: as many layers, the same shapes, embeddings and lm_head.

    config: the transformers config. tied: whether config.json says that lm_head is the embeddings' weight.
    transformers leaves out a layer too many, ties whatever is missing, and would build 10**9 layers.
    """
    shapes = {}
    for path in weight_files(where, folder):
        shapes |= weight_shapes(where, path)
    for side, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        found = {match[1] for name in shapes if (match := re.match(rf"{side}\.block\.(\d+)\.", name))}
        if len(found) != layers:
            raise InputError(
                f"{where}: its weights have {len(found)} {side} layers, but its config.json says {layers}: one of the"
                " two files is of another model"
            )
    with torch.device("meta"):
        expected = AutoModelForSeq2SeqLM.from_config(config).state_dict()
    for name in sorted(shapes.keys() & expected.keys()):
        if shapes[name] != list(expected[name].shape):
            raise InputError(
                f"{where}: its weights do not fit its config.json: {name} has the shape {shapes[name]}, not"
                f" {list(expected[name].shape)}"
            )
    embeddings, head = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}, "lm_head.weight"
    if not embeddings & shapes.keys() and not (tied and head in shapes):
        raise InputError(f"{where}: its weights lack shared.weight")
    # LongT5's checkpoints say that they are not tied, and have the embeddings alone.
    if not tied and head not in shapes and config.model_type != "longt5":
        raise InputError(f"{where}: its weights lack {head}, which is not tied as its config.json says")


def weight_files(where, folder):
    """The safetensors files of a model folder. Raises InputError if there are none, or if one is missing."""
    folder = Path(folder)
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        check_not_pickled(where, folder, whole)
        raise InputError(f"{where}: the model in this folder cannot be loaded (it has no {whole.name})")
    try:
        files = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        files = [folder / name for name in files]
    except Exception as error:  # any JSON can be in the file
        raise InputError(f"{where}: {index.name} cannot be read ({reason(error)})") from None
    for path in files:
        if not path.is_file() or path.parent != folder:
            raise InputError(f"{where}: {path.name}, which {index.name} names, is missing")
    return files


def weight_shapes(where, path):
    """{name: shape as a list} of a safetensors file, whose header is checked against the file's size."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise InputError(f"{where}: {path.name} is damaged or incomplete ({reason(error)})") from None


def check_not_pickled(where, folder, wanted):
    """Raise InputError with the command that converts the pickled weights in `folder`, if there are any.

    wanted: the path of the safetensors file to be made. Pickled files can run code when they are read, so this project
    never reads them. The command reads them with weights_only=True, which refuses code.
    """
    files = sorted(path for pattern in PICKLED for path in Path(folder).glob(pattern))
    if files:
        raise InputError(f"{pickled(where, files[0].name)}: convert it first, with: {convert_command(wanted, files)}")


def check_not_pickled_on_hub(where, repo):
    """The same for a hub id whose weights could not be downloaded: the command also downloads them."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    names = [name for name in HfApi().list_repo_files(repo) if any(fnmatch(name, pattern) for pattern in PICKLED)]
    if names:
        folder = Path(repo.split("/")[-1])
        download = shlex.join(["hf", "download", repo, "--local-dir", str(folder)])
        convert = convert_command(folder / "model.safetensors", [folder / name for name in sorted(names)])
        raise InputError(
            f"{pickled(where, min(names))}: download and convert it first, with: {download} && {convert}; then give the"
            f" folder {folder}"
        )


def pickled(where, name):
    return f"{where}: its weights are pickled ({name}), and a pickled file can run code when it is read"


def convert_command(wanted, files):
    return shlex.join(["python", "-c", CONVERT, str(wanted), *map(str, files)])


# --------------------------------------------------------------------------------------------------------- tokenizer


def check_can_read_vocabulary(where, folder):
    """Check that a vocabulary in sentencepiece's format, the only one in older T5 checkpoints, can be read."""
    path = folder / "spiece.model"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return
    try:
        import google.protobuf  # noqa: F401 (transformers needs it)
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise InputError(f"{where}: to read its {path.name}, pip install sentencepiece protobuf") from None
    try:
        SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        raise InputError(f"{where}: its {path.name} is damaged ({reason(error)})") from None


def reads_as_written(tokenizer, path):
    """Whether a tokenizer gives the ids that the tokenizer.json at `path` gives, on a text with all that can differ."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(path))
    written.no_truncation()
    written.no_padding()
    text = " Who WON 2-1?  The caf\u00e9's 3rd @nba\u2026\n\u2460 \ufb01\tx \U0001f600 who won, 1945?"
    return tokenizer(text).input_ids == written.encode(text).ids


def check_tokenizer(where, tokenizer, config):
    """Check that a tokenizer ends a text as T5's does and that its tokens are those of config.json.

    config: the dict in config.json. Returns the token ids {"pad_token_id", "eos_token_id", "decoder_start_token_id"},
    the last one by T5's rule, the pad token, where config.json does not name it.
    """
    text = "who won"
    ids = tokenizer(text).input_ids
    if tokenizer.decode(ids, skip_special_tokens=True).strip() != text:
        raise InputError(f"{where}: its tokenizer files are missing or damaged ({TOKENIZER_FILES})")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        raise InputError(f"{where}: its tokenizer must have a pad token and, apart from it, an end token, as T5's has")
    targets, cut = tokenizer(text_target=text).input_ids, tokenizer(text, truncation=True, max_length=2).input_ids
    unknown = tokenizer(f"{text} \ue000 \U0010fffd").input_ids  # private characters, which no vocabulary has
    for encoded in (ids, targets, cut, unknown):
        if encoded[-1] != eos or encoded.count(eos) != 1:
            raise InputError(
                f"{where}: its tokenizer does not end each text with {tokenizer.eos_token}, so no model can learn where"
                ' an answer ends (check "post_processor" in tokenizer.json): use the original tokenizer'
            )
    for name, value in (("pad_token_id", pad), ("eos_token_id", eos)):
        said = config.get(name)
        if said is not None and said != value and said != [value]:
            raise InputError(
                f"{where}: its config.json says {name} {said}, but its tokenizer's is {value}: one of the two files is"
                " of another model"
            )
    start = config.get("decoder_start_token_id")
    start = pad if start is None else start
    if type(start) is not int or start not in range(config.get("vocab_size") or start + 1):
        raise InputError(f"{where}: decoder_start_token_id {start} in its config.json is not one of its tokens")
    return {"pad_token_id": pad, "eos_token_id": eos, "decoder_start_token_id": start}


# ------------------------------------------------------------------------------------------------------------- model


def check_model(where, model, tokenizer, report):
    """Check that all weights of a loaded model came from its files, are finite, and fit the tokenizer and each other.

    report: the loading info of transformers, which builds missing weights at random and drops unknown ones.
    Returns whether lm_head is tied to the embeddings and whether the model scales what it feeds to lm_head.
    """
    if report["missing_keys"]:
        raise InputError(f"{where}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    left_out = sorted(name for name in report["unexpected_keys"] if name.startswith(("encoder.", "decoder.")))
    if left_out:
        raise InputError(f"{where}: its weights do not fit its config.json, which leaves out {', '.join(left_out[:3])}")
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if max(tokenizer.get_vocab().values()) >= min(len(embeddings), len(head)):
        raise InputError(
            f"{where}: its tokenizer has more pieces than the model has embeddings ({len(embeddings)}): use the"
            " tokenizer that belongs to the model"
        )
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or not torch.isfinite(weight.sum()):  # NaN and infinity stay in a sum
            raise InputError(f"{where}: its weights are damaged ({name} has values that are not finite numbers)")
    if not 0 <= model.config.dropout_rate < 1:
        raise InputError(f"{where}: dropout_rate {model.config.dropout_rate} in its config.json is not below 1")
    tied, scaled = head is embeddings, check_pass(where, model, tokenizer)
    if scaled and not tied:
        if model.config.model_type == "umt5":
            raise InputError(
                f"{where} cannot be loaded here: this version of transformers scales the output of every UMT5, also of"
                " one with its own lm_head, so its losses and searches would be wrong"
            )
        raise InputError(
            f"{where}: its config.json does not say tie_word_embeddings false, but its weights have an lm_head.weight"
            " other than the embeddings: one of the two files is of another model"
        )
    return tied, scaled


def check_pass(where, model, tokenizer):
    """Check that one pass gives finite logits. Returns whether the model scales what it feeds to lm_head."""
    seen = {}
    hooks = [
        model.get_decoder().register_forward_hook(lambda module, inputs, out: seen.update(out=out.last_hidden_state)),
        model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.update(fed=inputs[0])),
    ]
    try:
        ids = torch.tensor([tokenizer("who won").input_ids])
        with torch.inference_mode():
            logits = model(input_ids=ids, labels=ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.isfinite(logits).all():
        raise InputError(f"{where}: its output is not finite numbers: its files are damaged")
    return not torch.equal(seen["out"], seen["fed"])
