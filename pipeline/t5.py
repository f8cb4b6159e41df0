"""Loading a T5 model and its tokenizer, and everything else that depends on the model being a T5.

`contract.py` has the checks. To use another model family, change these two files and `fast_cpu.py`: what they assume is
an encoder-decoder of transformers whose `generate` takes `encoder_outputs`, and modules named as T5's are.
"""

import copy
import logging
import os
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from pipeline import contract
from pipeline.errors import InputError, reason
from pipeline.fast_cpu import ATTENTION, PACKED, use_fast_kernels
from pipeline.hub import ask_hub_once, cannot_load, is_local
from pipeline.packing import find_rows

# Where a hub repository has pickled weights alone, transformers would take converted ones from anybody's pull request.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

LABEL_PAD = -100  # the target id that torch's cross entropy and transformers leave out of the loss


def load_model_and_tokenizer(model_name, cached=False, flag="--model_name"):
    """Load a T5 model in float32 and its tokenizer.

    model_name: a hub id or a folder with config, safetensors weights and tokenizer. No code and no pickled weights
        from there are ever run. The checkpoint's generation_config.json is not read, see `search`.
    cached: True for a hub id that this run has loaded before, so that a hub that fails meanwhile does not matter.
    flag: the argument that an error message names.

    Returns (model in eval mode on the CPU, tokenizer). Raises InputError for what cannot be loaded completely, or does
    not keep T5's contract (`contract.py`).
    """
    where = f"{flag} {model_name}"
    if is_local(model_name) and not Path(model_name).is_dir():
        raise InputError(f"{where}: this folder does not exist; give a hub id or a model folder")
    if Path(model_name, "adapter_config.json").exists():
        raise InputError(f"{where} is a LoRA adapter: give the folder or hub id of its base model")
    if is_local(model_name) and not Path(model_name, "config.json").is_file():
        raise InputError(f"{where}: the model in this folder cannot be loaded (it has no config.json)")
    if not is_local(model_name) and not cached:
        ask_hub_once(model_name, "model")
    try:
        with silence():
            return _load(where, model_name, cached)
    except InputError:
        raise
    except Exception as error:
        if not is_local(model_name) and "safetensors" in str(error):
            contract.check_not_pickled_on_hub(where, model_name)
        raise cannot_load(flag, model_name, "model", error) from None


def _load(where, model_name, cached):
    # trust_remote_code: by default transformers asks at the terminal whether to run code in the folder.
    options = {"local_files_only": cached, "trust_remote_code": False}
    said, _ = PretrainedConfig.get_config_dict(model_name, local_files_only=cached)
    kind = contract.check_architecture(where, said)
    config = AutoConfig.for_model(kind, **contract.network(said))
    with _tokenizer_errors(where):
        contract.check_can_read_vocabulary(where, Path(model_name))
        tokenizer = _load_tokenizer(model_name, config, options)
        ids = contract.check_tokenizer(where, tokenizer, said)
    for name, value in ids.items():
        setattr(config, name, value)
    model, report = _load_weights(where, model_name, config, said, options)
    tied, scaled = contract.check_model(where, model, tokenizer, report)
    # transformers 5 says "tied" of every T5. Saved like that, transformers 4 would tie the separate lm_head of a
    # flan-t5 or t5-v1_1 again, silently, and answer nonsense. It also scales the output of what is said to be tied.
    model.config.tie_word_embeddings = tied and scaled
    use_fast_kernels(model)
    return model, tokenizer


def _load_weights(where, model_name, config, said, options):
    tied, local = said.get("tie_word_embeddings") is not False, is_local(model_name)
    # A hub id's config.json is in the cache by now, and its weights will be beside it.
    config_file = (
        Path(model_name, "config.json") if local else cached_file(model_name, "config.json", local_files_only=True)
    )
    folder = Path(config_file).parent
    if local:
        contract.check_weight_files(where, folder, config, tied)
    try:
        loaded = AutoModelForSeq2SeqLM.from_pretrained(
            model_name,
            config=config,
            generation_config=GenerationConfig(
                pad_token_id=config.pad_token_id,
                eos_token_id=config.eos_token_id,
                decoder_start_token_id=config.decoder_start_token_id,
            ),
            dtype=torch.float32,  # training keeps full-precision weights, whatever type the checkpoint was saved in
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception:
        if (folder / "model.safetensors").is_file():  # a better reason, if that is it
            contract.check_weight_files(where, folder, config, tied)
        raise
    if not local:
        contract.check_weight_files(where, folder, config, tied)
    return loaded


def _load_tokenizer(model_name, config, options):
    tokenizer = AutoTokenizer.from_pretrained(model_name, config=config, **options)
    path = cached_file(
        model_name,
        "tokenizer.json",
        local_files_only=options["local_files_only"],
        _raise_exceptions_for_missing_entries=False,
    )
    if path and not contract.reads_as_written(tokenizer, path):
        # transformers 5 builds some classes, such as T5Tokenizer, from the vocabulary in tokenizer.json alone. A
        # tokenizer.json that also lowers the case, say, would give other ids than those the model was trained with.
        names = ("eos_token", "pad_token", "unk_token", "model_max_length")
        named = {name: value for name in names if (value := getattr(tokenizer, name, None))}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, **named)
    tokenizer.padding_side = tokenizer.truncation_side = "right"  # labels padded at the left would train nothing
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


@contextmanager
def _tokenizer_errors(where):
    """Turn whatever a damaged tokenizer raises into an InputError, and show nothing of it.

    The tokenizers library is written in Rust. Its panics are no Exception in Python, and it prints past sys.stdout and
    sys.stderr: so both file descriptors lead to nowhere meanwhile.
    """
    null, kept = os.open(os.devnull, os.O_WRONLY), {}
    for number in (1, 2):
        with suppress(OSError):  # this process was started without it
            kept[number] = os.dup(number)
            os.dup2(null, number)
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"{where}: its tokenizer files are missing or damaged ({contract.TOKENIZER_FILES}): {reason(error)}"
        ) from None
    finally:
        for number, copied in kept.items():
            os.dup2(copied, number)
            os.close(copied)
        os.close(null)


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


@contextmanager
def eval_mode(model):
    """Put the model into eval mode, and each of its modules back into its former mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def matrices_to_adapt(model, names):
    """The names of a T5's matrices that --target_modules means, without repeats.

    names: the matrices' own names; `attention`: those of self- and cross-attention; `all-linear`: every one but
    lm_head, as peft means it. Raises InputError for another name.
    """
    there = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    inner = sorted(there - {"lm_head"})  # the output layer is adapted only if it is named
    short = {"all-linear": inner, "attention": [name for name in inner if name in ("q", "k", "v", "o")]}
    unknown = [name for name in names if name not in there and name not in short]
    if unknown:
        offered = f"this model has {', '.join(inner)}; all-linear and attention are short for several"
        raise InputError(f"--target_modules {' '.join(unknown)}: {offered}")
    return list(dict.fromkeys(each for name in names for each in short.get(name, [name])))


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


def can_be_packed(model):
    """Whether the model's attention works on packed batches. That of LongT5 and UMT5 does not."""
    config = whole_of(model).config
    return config.model_type in PACKED and config._attn_implementation == ATTENTION


def packed_rows(model, batch):
    """Where the real tokens of a training batch are, for `target_logits`: see `packing.py`. None where the model cannot
    be packed, and on a GPU, which would have to be waited for."""
    if not batch["labels"].is_cpu or not can_be_packed(model):
        return None
    return find_rows(batch, LABEL_PAD, whole_of(model).config.num_heads)


def whole_of(model):
    """The model of transformers in a PeftModel, or in what accelerate has wrapped for several processes."""
    return next(module for module in model.modules() if hasattr(module, "prepare_decoder_input_ids_from_labels"))


def target_logits(model, batch, packed=None):
    """(logits, labels) of a batch for the loss: float (tokens, vocabulary) and int64 (tokens,), -100 where none counts.

    model: a T5 model or a PeftModel, as it is or wrapped for several processes. packed: of `packed_rows`; with it
    nothing is computed at the padding.
    """
    whole = whole_of(model)
    source, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    target = whole.prepare_decoder_input_ids_from_labels(labels)
    more = {}
    if packed is not None:
        source, target = packed.sources.pack(source), packed.targets.pack(target)
        labels = packed.targets.pack(labels, fill=LABEL_PAD)
        mask, more = None, {"packed": packed}  # which reaches the attention function, with the masks
    logits = model(
        input_ids=source,
        attention_mask=mask,
        decoder_input_ids=target,
        use_cache=False,  # a copy of keys and values that only a search uses
        **more,
    ).logits
    return logits.flatten(0, 1), labels.flatten()


class _AtTokens(torch.nn.Module):
    """The output layer, at some tokens alone."""

    def __init__(self, layer, chosen):
        super().__init__()
        self.layer, self.chosen = layer, chosen

    def forward(self, hidden):
        return self.layer(hidden[self.chosen])


def logits_at(model, chosen, **inputs):
    """The logits (n, vocabulary) of a T5 model or PeftModel where `chosen`, booleans (batch, length), is True.

    inputs: the model's. Half of a batch's targets can be padding, and the output layer is the largest product. A
    shallow copy of the model computes it, so that threads can share the model itself.
    """
    whole = copy.copy(next(module for module in model.modules() if "lm_head" in module._modules))
    if "forward" in vars(whole):  # accelerate's, for mixed precision: it would compute with the model itself
        return model(**inputs).logits[chosen]
    whole._modules = whole._modules | {"lm_head": _AtTokens(whole.lm_head, chosen)}
    return whole(**inputs).logits


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


def start_token(model):
    """The token id that an answer starts from: by T5's rule the pad token, where the config does not name one.

    Raises InputError for a PeftModel whose adapter is a prompt, which the encoder alone would not see.
    """
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:
        raise InputError(f"this adapter is of type {adapter.peft_type.value}, not LORA: it cannot be evaluated here")
    start = getattr(model.config, "decoder_start_token_id", None)
    start = model.config.pad_token_id if start is None else start
    if start is None:
        raise InputError("the model's config names neither decoder_start_token_id nor pad_token_id, which is 0 in T5")
    return start


def search(model, tokenizer, *, beams, max_target_len, **inputs):
    """Beam search, or greedy with one beam: int64 (batch, answer length), without the start token, and -100 behind the
    end of an answer. A pad token that the model chose itself is a token of its answer.

    inputs: for `generate`. The search is this project's: nothing of the model's generation_config takes part in it.
    `generate` would fill whatever `settings` leaves open from there, such as forced tokens or a shortest length. So it
    gets a shallow copy of the model, with the same weights and modules; the model itself is not changed, and threads
    can share it.
    """
    from transformers import GenerationMixin  # imports accelerate, which takes long

    settings = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_target_len,
        use_cache=True,
        decoder_start_token_id=start_token(model),
        pad_token_id=tokenizer.pad_token_id,
        # The end that training teaches: the tokenizer ends each target with it.
        eos_token_id=model.config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )
    whole = copy.copy(next(module for module in model.modules() if isinstance(module, GenerationMixin)))
    whole.generation_config = settings
    ids = GenerationMixin.generate(whole, generation_config=settings, **inputs)[:, 1:]
    # By place: transformers fills up shorter answers with end tokens in some cases, and a model may choose to pad.
    ended = (ids == settings.eos_token_id).cumsum(1).roll(1, dims=1)
    ended[:, 0] = 0
    return ids.masked_fill(ended > 0, LABEL_PAD)
