"""Weights, tokenizer and model card of a run: saved, and loaded back.

Used by the training script after each improvement, and by whatever evaluates a run folder.
"""

import hashlib
import json
import os
from pathlib import Path

from safetensors import safe_open

from pipeline.errors import InputError, reason
from pipeline.publish import write_model_card
from pipeline.run_folder import read_run_json, writing_folder
from pipeline.t5 import hold_in_bf16, load_model_and_tokenizer


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
        tokenizer.save_pretrained(beside)
        let_transformers_4_read(beside / "tokenizer_config.json")
        write_model_card(beside, run)
        for path in sorted(beside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, Path(folder, path.name))


def let_transformers_4_read(tokenizer_config):
    """Name T5's sentinels in tokenizer_config.json as transformers 4 and 5 both read them.

    transformers 5 writes them as a list `extra_special_tokens`; transformers 4 expects a dict there, and crashes.
    """
    config = json.loads(tokenizer_config.read_text(encoding="utf-8"))
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
        tokenizer_config.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_checkpoint(folder, model_name=None, cached=False, base_dtype="fp32"):
    """(model, tokenizer) of a run folder: the whole model, or the adapter on its base.

    model_name: the base model of an adapter, a hub id or a folder; None for the one that the adapter names. Its type is
    the --base_dtype in run.json, or base_dtype if there is none. cached: whether this run has loaded that base before.
    Raises InputError for what cannot be loaded.
    """
    if not Path(folder, "adapter_config.json").exists():
        return load_model_and_tokenizer(str(folder), flag="--save_dir")
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    weights = Path(folder, "adapter_model.safetensors")
    if not weights.is_file():  # peft would look for pickled weights
        raise InputError(f"--save_dir {folder}: the adapter in this folder cannot be loaded (it has no {weights.name})")
    run = read_run_json(folder) or {}
    try:
        config = PeftConfig.from_pretrained(folder)
        if config.peft_type != "LORA":
            raise InputError(f"--save_dir {folder} has an adapter of type {config.peft_type.value}, not LORA")
        base_name = model_name or config.base_model_name_or_path
        base, tokenizer = load_model_and_tokenizer(base_name, cached)
        # ByT5's tokenizer is not a fast one and has no tokenizer.json.
        files = ["tokenizer_config.json", *(["tokenizer.json"] if tokenizer.is_fast else [])]
        missing = [name for name in files if not Path(folder, name).is_file()]
        if run and missing:  # an adapter of another origin may come without them
            raise InputError(f"--save_dir {folder}: its tokenizer files are missing ({', '.join(missing)})")
        if run.get("identity", {}).get("weights (--model_name)") not in (None, weights_sha256(base)):
            raise InputError(f"--save_dir {folder}: its adapter was trained on another base than {base_name}")
        if run.get("args", {}).get("base_dtype", base_dtype) == "bf16":
            hold_in_bf16(base)
        model = PeftModel.from_pretrained(base, folder)
        with safe_open(weights, "pt") as file:
            # peft ignores weights that it does not know, and leaves random weights where some are missing.
            if set(file.keys()) != set(get_peft_model_state_dict(model, save_embedding_layers=False)):
                raise InputError(f"--save_dir {folder}: the weights of its adapter do not fit --model_name {base_name}")
        return model, tokenizer
    except InputError:
        raise
    except Exception as error:  # peft raises many kinds for a config or weights that are not its own
        raise InputError(
            f"--save_dir {folder}: the adapter in this folder cannot be loaded ({reason(error)})"
        ) from None


def checkpoint_bytes(folder):
    """Bytes of the weights at the folder's root: the whole model, or only the adapter."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def check_has_checkpoint(folder):
    """Raise InputError unless `folder` has a checkpoint to evaluate, a whole model or an adapter."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--save_dir {folder}: there is no such folder; --eval_only needs one with a checkpoint")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"--save_dir {folder} has no checkpoint (no config.json, no adapter_config.json)")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--save_dir {folder} is not writable; copy it to a folder that is")


def weights_sha256(model):
    """A hash of the first 1024 values of each weight: it identifies a checkpoint within moments."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:1024].cpu().numpy().tobytes())
    return digest.hexdigest()
