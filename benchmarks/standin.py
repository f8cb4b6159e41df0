"""A T5 with random weights in the shape of a real checkpoint, for machines that do not have the real weights."""

import json
import shutil

import torch
from safetensors.torch import save_file
from transformers import T5Config, T5ForConditionalGeneration

# google/flan-t5-small's, as its config.json has it. 77.0 M parameters.
FLAN_T5_SMALL = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_ff": 1024,
    "d_kv": 64,
    "num_heads": 6,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "tie_word_embeddings": False,
}


def write_standin(folder, files, seed=0, **shape):
    """Write a T5 with random weights that is built like flan-t5-small's real checkpoint. Returns the folder.

    files: a folder with config.json and tokenizer, which are copied. shape: values to change in that config.
    """
    folder.mkdir(parents=True)
    for path in files.iterdir():
        shutil.copyfile(path, folder / path.name)
    write_model(folder, json.loads((files / "config.json").read_text()) | shape, seed)
    return folder


def write_model(folder, config, seed=0):
    """Write a T5 with random weights and this config.json, the dict `config`, into the folder.

    T5ForConditionalGeneration(config) always ties lm_head to shared in transformers 5. Real checkpoints with
    tie_word_embeddings false have a separate lm_head.weight, so the file is written tensor by tensor. Tied ones have no
    lm_head.weight.
    """
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    weights = T5ForConditionalGeneration(T5Config(**config)).state_dict()
    again = ("embed_tokens.weight", "lm_head.weight")  # shared.weight under other names
    weights = {name: tensor.clone() for name, tensor in weights.items() if not name.endswith(again)}
    if not config.get("tie_word_embeddings", True):
        weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"]) * config["d_model"] ** -0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
