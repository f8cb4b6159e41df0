"""What this project needs of a checkpoint: T5's architecture, end, pad and start token, and complete weights.

`t5.py` calls these checks while it loads a model. Each raises InputError with one line that names what is wrong and
what to do. What is not checked would give figures that are silently wrong.
"""

import json
import re
import shlex
from pathlib import Path

import torch

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
PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; save_file({name: weight.clone().contiguous()"
    " for path in sys.argv[2:] for name, weight in torch.load(path, map_location='cpu', weights_only=True).items()},"
    " sys.argv[1], {'format': 'pt'})"
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
    if kind not in FAMILY:
        name = OTHERS.get(kind, kind) if isinstance(kind, str) else kind or named[0]
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


def check_weight_files(where, folder, config):
    """Check the weights in a folder before the model is built: their format, and as many layers as config.json says.

    config: the transformers config. A layer too many or too few would otherwise be left out or built at random, and a
    number such as 10**9 would be built until the memory is full. Returns the names of the weights.
    """
    names = set()
    for path in weight_files(where, folder):
        names |= {*weight_names(where, path)}
    for side, layers in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        found = {match[1] for name in names if (match := re.match(rf"{side}\.block\.(\d+)\.", name))}
        if len(found) != layers:
            raise InputError(
                f"{where}: its weights have {len(found)} {side} layers, but its config.json says {layers}: one of the"
                " two files is of another model"
            )
    return names


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


def weight_names(where, path):
    """The names of the weights in a safetensors file, whose header is checked against the file's size."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except Exception as error:
        raise InputError(f"{where}: {path.name} is damaged or incomplete ({reason(error)})") from None


def check_not_pickled(where, folder, wanted):
    """Raise InputError with the command that converts pickled weights in `folder`, if there are any.

    wanted: the path of the safetensors file to be made. Pickled files can run code when they are read, so this project
    never reads them. The command reads them with weights_only=True, which refuses code.
    """
    files = sorted(path for pattern in PICKLED for path in Path(folder).glob(pattern))
    if files:
        command = shlex.join(["python", "-c", CONVERT, str(wanted), *map(str, files)])
        raise InputError(
            f"{where}: its weights are pickled ({files[0].name}), and a pickled file can run code when it is read:"
            f" convert it first, with: {command}"
        )


# --------------------------------------------------------------------------------------------------------- tokenizer


def check_tokenizer(where, tokenizer, config):
    """Check that a tokenizer ends a text as T5's does and that its tokens are those of config.json.

    config: the dict in config.json. Returns the token ids {"pad_token_id", "eos_token_id", "decoder_start_token_id"},
    the last one by T5's rule, the pad token, where config.json does not name it.
    """
    text = "who won"
    ids = tokenizer(text).input_ids
    if tokenizer.decode(ids, skip_special_tokens=True).strip() != text:
        files = "tokenizer_config.json, and tokenizer.json or spiece.model"
        raise InputError(f"{where}: its tokenizer files are missing or damaged ({files})")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or eos is None or pad == eos:
        raise InputError(f"{where}: its tokenizer must have a pad token and, apart from it, an end token, as T5's has")
    for encoded in (ids, tokenizer(text_target=text).input_ids, tokenizer(text, truncation=True, max_length=2).input_ids):
        if encoded[-1] != eos or encoded.count(eos) != 1:
            raise InputError(
                f"{where}: its tokenizer does not end each text with {tokenizer.eos_token}, so a model would never learn"
                ' where an answer ends (check "post_processor" in tokenizer.json): use the original tokenizer'
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
    tied, scaled = head is embeddings, scales_output(where, model, tokenizer)
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


def scales_output(where, model, tokenizer):
    """Whether the model scales what it feeds to lm_head. One pass on a short text, whose logits must be finite."""
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
        raise InputError(f"{where}: the model gives values that are not finite numbers: its files are damaged")
    return not torch.equal(seen["out"], seen["fed"])
