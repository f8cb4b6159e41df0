"""Weights, tokenizer and model card of a run: saved, and loaded back.

Used by the training script after each improvement, and by whatever evaluates a run folder.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.contract import check_not_pickled, check_pass, weight_shapes
from pipeline.errors import InputError, reason
from pipeline.publish import write_model_card
from pipeline.run_folder import read_run_json, writing_folder
from pipeline.t5 import hold_in_bf16, load_model_and_tokenizer, silence

WEIGHTS = "adapter_model.safetensors"  # of an adapter, as PEFT names it


def save_checkpoint(folder, model, tokenizer, run):
    """Save weights (of a PeftModel: only the adapter), tokenizer and model card at the root of `folder`.

    Apart from the weights, the files are the same after each epoch, and the weights are one file that is renamed last.
    So the folder always has one complete checkpoint, or before the first one is complete, none that loads.
    """
    with writing_folder(Path(folder, ".tmp-checkpoint")) as beside:
        if hasattr(model, "peft_config"):
            # "auto" would ask the hub whether the vocabulary was changed, which never happens here.
            model.save_pretrained(beside, save_embedding_layers=False)
        else:
            model.save_pretrained(beside, max_shard_size="1TB")
            if not model.config.tie_word_embeddings:
                write_lm_head(beside / "model.safetensors")
        tokenizer.save_pretrained(beside)
        let_transformers_4_read(beside / "tokenizer_config.json")
        write_model_card(beside, run)
        for path in sorted(beside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, Path(folder, path.name))


def write_lm_head(path):
    """Add lm_head.weight to the weights of a model that shares it with the embeddings but does not scale its output.

    transformers 4 scales the output of every model whose lm_head is shared. Transformers 5 reads the weights in `path`
    as before: it ties an lm_head that equals the embeddings.
    """
    with safe_open(path, "pt") as file:
        shared = "lm_head.weight" not in file.keys()  # noqa: SIM118 (not a dict)
    if shared:
        weights = load_file(path)
        save_file(weights | {"lm_head.weight": weights["shared.weight"].clone()}, path, {"format": "pt"})


def let_transformers_4_read(tokenizer_config):
    """Write tokenizer_config.json so that transformers 4 and 5 both read it, with the same token ids.

    transformers 5 names classes that transformers 4 does not know, or whose namesakes there change what tokenizer.json
    says; PreTrainedTokenizerFast takes it as it is, in both. It writes T5's sentinels as a list `extra_special_tokens`,
    where transformers 4 expects a dict, and crashes.
    """
    config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if tokenizer_config.with_name("tokenizer.json").is_file() and config.get("tokenizer_class") != "T5Tokenizer":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]  # T5 takes no token_type_ids
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        config.pop(name, None)
    tokenizer_config.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_checkpoint(folder, model_name=None, cached=False, base_dtype="fp32"):
    """(model, tokenizer) of a run folder: the whole model, or the adapter on its base.

    model_name: the base model of an adapter, a hub id or a folder; None for the one that the adapter names. Its type is
    the --base_dtype in run.json, or base_dtype if there is none. cached: whether this run has loaded that base before.
    Raises InputError for what cannot be loaded.
    """
    if not Path(folder, "adapter_config.json").exists():
        return load_model_and_tokenizer(str(folder), flag="--save_dir")
    where = f"--save_dir {folder}"
    weights = Path(folder, WEIGHTS)
    if not weights.is_file():  # peft would look for pickled weights
        check_not_pickled(where, folder, weights)
        raise InputError(f"{where}: the adapter in this folder cannot be loaded (it has no {WEIGHTS})")
    weight_shapes(where, weights)
    run = read_run_json(folder) or {}
    try:
        with silence():
            config = _adapter_config(where, folder)
        base_name = model_name or config.base_model_name_or_path
        if not base_name:
            raise InputError(f"{where}: its adapter does not name its base model: give it with --model_name")
        base, tokenizer = load_model_and_tokenizer(base_name, cached)
        # ByT5's tokenizer is not a fast one and has no tokenizer.json.
        files = ["tokenizer_config.json", *(["tokenizer.json"] if tokenizer.is_fast else [])]
        missing = [name for name in files if not Path(folder, name).is_file()]
        if run and missing:  # an adapter of another origin may come without them
            raise InputError(f"{where}: its tokenizer files are missing ({', '.join(missing)})")
        if run.get("identity", {}).get("weights (--model_name)") not in (None, weights_sha256(base)):
            raise InputError(f"{where}: its adapter was trained on another base than {base_name}")
        if run.get("args", {}).get("base_dtype", base_dtype) == "bf16":
            hold_in_bf16(base)
        with silence():
            model = _with_adapter(where, folder, base, base_name)
            check_pass(where, model, tokenizer)
        return model, tokenizer
    except InputError:
        raise
    except Exception as error:  # peft raises many kinds for a config or weights that are not its own
        raise InputError(f"{where}: the adapter in this folder cannot be loaded ({reason(error)})") from None


def _adapter_config(where, folder):
    """The PeftConfig of a folder, if it is of a LoRA adapter that answers as it was trained to."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != "LORA":
        raise InputError(f"{where} has an adapter of type {config.peft_type.value}, not LORA")
    if config.task_type not in (None, "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION"):
        raise InputError(f"{where} has an adapter for the task {config.task_type}, which does not answer in words")
    if str(config.init_lora_weights).startswith("pissa_niter_"):
        raise InputError(
            f"{where} has an adapter with init_lora_weights {config.init_lora_weights}, which changes its base at"
            " random whenever it is loaded: save it as an ordinary LoRA (path_initial_model_for_weight_conversion)"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise InputError(f"{where} has an activated LoRA (alora_invocation_tokens), which a T5 cannot use")
    return config


def _with_adapter(where, folder, base, base_name):
    """The PeftModel of the adapter in `folder`, if its weights are all that PEFT needs and none that PEFT ignores."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    tied = base.config.tie_word_embeddings
    # As transformers reads it: whether adapters of the embeddings and of lm_head share weights depends on it.
    base.config.tie_word_embeddings = type(base.config)(tie_word_embeddings=tied).tie_word_embeddings
    model = PeftModel.from_pretrained(base, folder)
    base.config.tie_word_embeddings = tied
    # PEFT leaves random weights where some are missing, and ignores those that it does not know. What it needs is what
    # it would save without the embeddings, which it adds if they are among the targets or were resized.
    weights = load_file(Path(folder, WEIGHTS))
    missing = {*get_peft_model_state_dict(model, save_embedding_layers=False)} - {*weights}
    unknown = set_peft_model_state_dict(model, weights).unexpected_keys
    for wrong, why in ((missing, "it has no"), (unknown, "PEFT ignores its")):
        if wrong:
            raise InputError(
                f"{where}: the weights of its adapter do not fit --model_name {base_name}: {why} {min(wrong)}"
            )
    for name, weight in weights.items():
        if not torch.isfinite(weight.sum()):
            raise InputError(
                f"{where}: the weights of its adapter are damaged ({name} has values that are not finite numbers)"
            )
    return model


def checkpoint_bytes(folder):
    """Bytes of the weights at the folder's root: the whole model, or only the adapter."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def has_checkpoint(folder):
    """Whether `folder` has a checkpoint to evaluate, a whole model or an adapter."""
    return any(Path(folder, name).is_file() for name in ("config.json", "adapter_config.json"))


def check_has_checkpoint(folder):
    """Raise InputError unless `folder` has a checkpoint to evaluate, and can be written to."""
    folder = Path(folder)
    or_name = "to score a model as it is, give tweet_qa_main.py --model_name and a new folder"
    if not folder.is_dir():
        raise InputError(
            f"--save_dir {folder}: this folder does not exist; --eval_only needs one with a checkpoint ({or_name})"
        )
    if not has_checkpoint(folder):
        raise InputError(f"--save_dir {folder} has no checkpoint (no config.json, no adapter_config.json); {or_name}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--save_dir {folder} is not writable; copy it to a folder that is")


def weights_sha256(model):
    """A hash of the first 1024 values of each weight: it identifies a checkpoint within moments."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()
