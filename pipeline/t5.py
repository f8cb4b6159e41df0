"""Loading a T5 model and its tokenizer, and everything else that depends on the model being a T5.

`contract.py` has the checks. To use another model family, change these two files and `fast_cpu.py`: what they assume is
an encoder-decoder of transformers whose `generate` takes `encoder_outputs`, and modules named as T5's are.
"""

import copy
import importlib.util
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_logging

from pipeline import contract
from pipeline.errors import InputError
from pipeline.fast_cpu import use_torch_kernels
from pipeline.hub import ask_hub_once, cannot_load, is_local

LABEL_PAD = -100  # the target id that torch's cross entropy and transformers leave out of the loss


def load_model_and_tokenizer(model_name, cached=False, flag="--model_name"):
    """Load a T5 model in float32 and its tokenizer.

    model_name: a hub id or a folder with config, safetensors weights and tokenizer. No code and no pickled weights
        from there are ever run. The checkpoint's generation_config.json is not read, see `search_settings`.
    cached: True for a hub id that this run has loaded before, so that a hub that fails meanwhile does not matter.
    flag: the argument that an error message names.

    Returns (model in eval mode on the CPU, tokenizer). Raises InputError for what cannot be loaded completely, or does
    not keep T5's contract (`contract.py`).
    """
    where = f"{flag} {model_name}"
    if is_local(model_name) and not Path(model_name).is_dir():
        raise InputError(f"{where}: there is no such folder; give a hub id or a model folder")
    if Path(model_name, "adapter_config.json").exists():
        raise InputError(f"{where} is a LoRA adapter: give the folder or hub id of its base model")
    if not is_local(model_name) and not cached:
        ask_hub_once(model_name, "model")
    try:
        with silence():
            return _load(where, model_name, cached)
    except InputError:
        raise
    except Exception as error:
        raise cannot_load(flag, model_name, "model", error) from None


def _load(where, model_name, cached):
    # trust_remote_code: by default transformers asks at the terminal whether to run code in the folder.
    options = {"local_files_only": cached, "trust_remote_code": False}
    said, _ = PretrainedConfig.get_config_dict(model_name, local_files_only=cached)
    kind = contract.check_architecture(where, said)
    config = AutoConfig.for_model(kind, **contract.network(said))
    tokenizer = AutoTokenizer.from_pretrained(model_name, config=config, **options)
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # labels padded at the left would train nothing
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    ids = contract.check_tokenizer(where, tokenizer, said)
    for name, value in ids.items():
        setattr(config, name, value)
    if is_local(model_name):
        contract.check_weight_files(where, model_name, config)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        model_name,
        config=config,
        generation_config=GenerationConfig(**ids),
        dtype=torch.float32,  # training keeps full-precision weights, whatever type the checkpoint was saved in
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    tied, scaled = contract.check_model(where, model, tokenizer, report)
    # transformers 5 says "tied" of every T5. Saved like that, transformers 4 would tie the separate lm_head of a
    # flan-t5 or t5-v1_1 again, silently, and answer nonsense. It also scales the output of what is said to be tied.
    model.config.tie_word_embeddings = tied and scaled
    use_torch_kernels(model)
    return model, tokenizer


@contextmanager
def silence():
    """Keep what torch, transformers and others log, warn and draw about a checkpoint off the screen."""
    disabled, bar = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bar:
            transformers_logging.enable_progress_bar()


def hold_in_bf16(model):
    """Convert a frozen model, such as the base of an adapter, to bfloat16: half the memory. Its logits stay float32, so
    that a loss keeps its digits."""
    model.to(torch.bfloat16)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.float())


def use_gradient_checkpointing(model, **options):
    """Keep only each layer's input for the backward pass, and compute the rest a second time.

    The same gradients, bit for bit on the CPU: the second time a layer draws the same random numbers. Nothing changes
    in eval mode. options: for torch.utils.checkpoint.checkpoint.
    """
    # Reentrant checkpointing needs inputs that require a gradient, and those of a LoRA model's first layer do not.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})


class SearchCache(EncoderDecoderCache):
    """The keys and values of a beam search. Those of the cross-attention are not reordered with the beams.

    They depend on the encoder alone, and no beam ever leaves its example: reordering them at each token, as the cache
    of transformers does, takes half of a search's time and changes nothing.
    """

    def reorder_cache(self, beam_idx):
        self.self_attention_cache.reorder_cache(beam_idx)


def encoder_output(encoded):
    """What T5 takes as encoder_outputs: `encoded`, (batch, input length, width), in a new object."""
    return BaseModelOutput(last_hidden_state=encoded)
