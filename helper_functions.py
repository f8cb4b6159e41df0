"""What both training scripts and a notebook share, in the order the data flows:
load -> prompt -> tokenize -> batch -> decode -> score -> `answer()`.

In a notebook:

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from helper_functions import answer

    tokenizer = AutoTokenizer.from_pretrained("flan_t5_tweetqa_ckpt")
    model = AutoModelForSeq2SeqLM.from_pretrained("flan_t5_tweetqa_ckpt")
    answer(model, tokenizer, "cpu", "who won?", "The Rockets won again! @nba")

Only torch and transformers are imported here; what else is needed is imported by the function that needs it, so that
importing this file stays cheap.
"""

import ast
import copy
import csv
import io
import json
import logging
import math
import os
import random
import re
import shutil
import string
import sys
import threading
import warnings
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
)

COLUMNS = ("Question", "Tweet", "Answer", "qid")
SPLIT_FILES = {"train": ("train",), "validation": ("validation", "dev"), "test": ("test",)}
FILE_TYPES = ("json", "jsonl", "csv", "parquet")
LABEL_PAD = -100  # the target id that torch's cross entropy and transformers leave out of the loss


class InputError(ValueError):
    """Something the user gave is wrong: the message is one line that names it and says what to do."""


class RunError(Exception):
    """A run that has begun cannot go on: the message is one line that says why."""


def one_line(error):
    """The message of an exception as one line of at most 300 characters, for a message of ours that quotes it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def quiet_libraries():
    """Keep the libraries' own bars, notices and deprecation warnings off the screen (errors still show)."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("accelerate", "datasets", "httpx", "huggingface_hub", "peft", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# ---------------------------------------------------------------------------------------------------------- load


def load_tweet_qa(dataset="ucsbnlp/tweet_qa"):
    """Load and check a TweetQA data set.

    dataset: a hub id, or a folder that holds `train.*`, `validation.*` (or `dev.*`) and, if there is one, `test.*`,
        each a JSON, JSON Lines, CSV or Parquet file with the columns Question, Tweet, Answer and qid.

    Returns {"train": rows, "validation": rows, "test": rows}, "test" only where there is one. A row is a dict of
    Question, Tweet and qid (str) and Answer, which is always a list of references here (str), empty only in test.

    Raises InputError, naming the file and the row (counted from 1, without a CSV's header), for what cannot be used.
    """
    raw_splits = _read_folder(Path(dataset)) if _is_local(dataset) else _read_hub(dataset)
    splits = {}
    for split, (name, raw_rows) in raw_splits.items():
        if not raw_rows:
            raise InputError(f"{name} has no rows: at least one is needed")
        splits[split] = [
            _check_row(row, f"{name}, row {number}", split != "test") for number, row in enumerate(raw_rows, start=1)
        ]
    return splits


def _is_local(name):
    """Whether a --model_name, --dataset or --sem_model is meant as a path here, and not as a hub id like user/name."""
    return os.path.exists(name) or not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", name)


def _ask_hub_once(name, repo_type, seconds=8):
    """Let every library use only what is cached if the hub does not answer a question about a repository.

    Left to themselves they ask again and again: over a minute with no network, and without end where a firewall
    swallows the question. The thread is there because no timeout bounds the look-up of the host's name.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    answered = []

    def ask():
        try:
            huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=seconds)
            answered.append(True)
        except HfHubHTTPError as error:  # "no such repository" is an answer, "service unavailable" is none
            answered.append(error.response.status_code < 500)
        except Exception:  # a refused connection, no such host, time out, offline mode: each library has its own
            answered.append(False)

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)
        if answered != [True]:
            os.environ["HF_HUB_OFFLINE"] = "1"
            huggingface_hub.constants.HF_HUB_OFFLINE = True
            if "datasets" in sys.modules:  # it took its own copy when it was imported
                sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _cannot_load(flag, name, what, error):
    """The InputError for a model or data set that a library refused to load."""
    reason = f"{type(error).__name__}: {one_line(error)}"
    if _is_local(name):
        return InputError(f"{flag} {name}: the {what} in this folder cannot be loaded ({reason})")
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "the hub cannot be reached, or HF_HUB_OFFLINE is set, and it is not in the cache"
    return InputError(f"{flag} {name}: the {what} could not be fetched; give {flag} a local folder ({reason})")


def _read_folder(folder):
    """{split: (file, list of raw rows)} of a local data folder."""
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"--dataset {folder} {problem}: give a hub id or a folder with train.* and validation.* files")
    splits = {}
    for split, stems in SPLIT_FILES.items():
        paths = [p for stem in stems for p in (folder / f"{stem}.{ending}" for ending in FILE_TYPES) if p.exists()]
        if len(paths) > 1:
            raise InputError(
                f"{folder} holds {' and '.join(p.name for p in paths)} for one split: leave only one there"
            )
        if paths:
            splits[split] = (str(paths[0]), _read_file(paths[0]))
        elif split != "test":
            raise InputError(f"--dataset {folder} has no {stems[0]} file: add {stems[0]}.({'|'.join(FILE_TYPES)})")
    return splits


def _read_file(path):
    """The rows of one data file, as they stand there: a list of dicts."""
    if not path.is_file():
        raise InputError(
            f"{path} is not a file: a {path.suffix[1:]} file with the columns {', '.join(COLUMNS)} is needed"
        )
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(path) as parquet:
                return parquet.read().to_pylist()
        text = path.read_bytes().decode("utf-8-sig")  # -sig: a byte order mark is not part of the first column's name
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({one_line(error)}): save it as UTF-8") from None
    except Exception as error:  # pyarrow has its own family of exceptions, and imports are kept lazy
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    if path.suffix == ".csv":
        return _parse_csv(text, path)
    return _parse_json(text, path)


def _parse_csv(text, path):
    """Rows of a CSV file with a header. Python's own reader, since pandas fills or shifts rows of a wrong length."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a field over 128 kB
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{path}, row {len(rows) + 1} has more or fewer fields than the header's {len(reader.fieldnames)}: "
                    "quote fields that hold commas"
                )
            rows.append(row)
    except csv.Error as error:
        raise InputError(f"{path}, row {len(rows) + 1} is not valid CSV: {one_line(error)}") from None
    return rows


def _parse_json(text, path):
    """Rows of a JSON file (one list of objects) or of JSON Lines (an object a line, also under the name .json)."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix == ".json" and not text.lstrip().startswith("{"):
            raise InputError(f"{path} is not valid JSON: {one_line(error)}") from None
    else:
        if isinstance(rows, list) and path.suffix == ".json":
            return rows
    rows = []
    for line in text.split("\n"):  # not splitlines(), which also splits at characters that JSON allows in a string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, row {len(rows) + 1} is not valid JSON: {one_line(error)}") from None
    return rows


def _read_hub(dataset):
    """{split: (name, list of raw rows)} of a hub data set."""
    _ask_hub_once(dataset, "dataset")
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        try:
            loaded = datasets.load_dataset(dataset)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # datasets 4 and later run no loading scripts; the hub keeps a parquet copy of every public data set.
            loaded = datasets.load_dataset(dataset, revision="refs/convert/parquet")
    except Exception as error:
        raise _cannot_load("--dataset", dataset, "data set", error) from None
    missing = {"train", "validation"} - set(loaded)
    if missing:
        raise InputError(f"--dataset {dataset} has no {' and no '.join(sorted(missing))} split")
    return {split: (f"{dataset} {split}", loaded[split].to_list()) for split in SPLIT_FILES if split in loaded}


def _check_row(row, where, needs_answer):
    """A raw row as load_tweet_qa returns it, or InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object with the columns {', '.join(COLUMNS)}")
    for column in COLUMNS:
        if column not in row and (needs_answer or column != "Answer"):
            raise InputError(f"{where} has no column {column!r}: it has {', '.join(map(str, row)) or 'none'}"[:500])
    qid = row["qid"] if not isinstance(row["qid"], int) else str(row["qid"])
    checked = {
        "Question": _check_text(row["Question"], f"{where}: 'Question'"),
        "Tweet": _check_text(row["Tweet"], f"{where}: 'Tweet'"),
        "Answer": [],
        "qid": _check_text(qid, f"{where}: 'qid'"),
    }
    answer = row.get("Answer")
    if isinstance(answer, str):
        answer = _parse_answer(answer)
    if answer is None or answer == [] or answer == [""]:
        if needs_answer:
            raise InputError(f"{where}: 'Answer' is empty: at least one reference answer is needed")
        return checked
    if not isinstance(answer, list):
        raise InputError(f"{where}: 'Answer' must be text or a list of texts, not {type(answer).__name__}")
    checked["Answer"] = [_check_text(reference, f"{where}: 'Answer'") for reference in answer]
    return checked


def _check_text(text, where):
    """The text itself if a tokenizer can read it, else InputError."""
    if not isinstance(text, str):
        raise InputError(f"{where} must be text, not {'empty (null)' if text is None else type(text).__name__}")
    if not text.strip():
        raise InputError(f"{where} is empty: fill it in or remove the row")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where} holds half of a surrogate pair, which is no character: mend the text") from None
    return text


def _parse_answer(text):
    """The references in an Answer that is a string: those of a list written as text, else the string alone.

    Lists are read as JSON, Python or numpy write them. numpy writes no commas (['a' 'b']), which Python would read as
    the one string 'ab', so each quoted piece is read on its own.
    """
    try:
        references = json.loads(text)
        if isinstance(references, list):
            return references
    except (ValueError, RecursionError):
        pass
    quoted = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    if re.fullmatch(rf"\[\s*{quoted}(?:[\s,]+{quoted})*[\s,]*\]", text.strip(), flags=re.DOTALL):
        try:
            return [ast.literal_eval(piece) for piece in re.findall(quoted, text, flags=re.DOTALL)]
        except (SyntaxError, ValueError):
            pass
    return [text]


def tweet_key(tweet):
    """What makes two tweets the same one: their text without case and spacing."""
    return " ".join(tweet.split()).casefold()


def hold_out(rows, count, seed, taken=frozenset()):
    """Choose rows to set aside, by tweet: all the rows of a tweet, or none.

    count: how many rows; a few less are chosen where whole tweets do not add up to it. seed: of the choice.
    taken: tweet keys that may not be chosen, such as those of the split that the checkpoint is chosen on.

    Returns the positions of the chosen rows in increasing order. Raises InputError if nothing would be left.
    """
    groups = {}
    for position, row in enumerate(rows):
        groups.setdefault(tweet_key(row["Tweet"]), []).append(position)
    chosen = []
    for key in random.Random(seed).sample(sorted(groups), len(groups)):
        if key not in taken and len(chosen) + len(groups[key]) <= count:
            chosen += groups[key]
    if not chosen or len(chosen) == len(rows) or count >= len(rows):
        raise InputError(f"--holdout {count}: cannot set that many of {len(rows)} training rows aside; give fewer")
    return sorted(chosen)


def count_repeats(rows):
    """How many rows say again what an earlier row says: the same question and answer about the same tweet."""
    distinct = {(row["Question"].casefold(), tweet_key(row["Tweet"]), *row["Answer"][:1]) for row in rows}
    return len(rows) - len(distinct)


def load_model_and_tokenizer(model_name, cached=False, flag="--model_name"):
    """Load a T5 model in float32 and its tokenizer.

    model_name: a hub id or a folder with config, safetensors weights and tokenizer. No code and no pickled weights
        from there are ever run.
    cached: True for a hub id that this run has loaded before, so that a hub that fails meanwhile does not matter.
    flag: the argument that an error message names.

    Returns (model in eval mode on the CPU, tokenizer). Raises InputError for what cannot be loaded completely.
    """
    if _is_local(model_name) and not Path(model_name).is_dir():
        raise InputError(f"{flag} {model_name}: there is no such folder; give a hub id or a model folder")
    if Path(model_name, "adapter_config.json").exists():
        raise InputError(f"{flag} {model_name} is a LoRA adapter: give the folder or hub id of its base model")
    if not _is_local(model_name) and not cached:
        _ask_hub_once(model_name, "model")
    try:
        # trust_remote_code: left out, transformers would ask at the terminal whether to run the code in the folder.
        tokenizer = AutoTokenizer.from_pretrained(model_name, local_files_only=cached, trust_remote_code=False)
        # float32: training keeps full-precision weights, whatever type the checkpoint was saved in.
        model, report = AutoModelForSeq2SeqLM.from_pretrained(
            model_name,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=cached,
            trust_remote_code=False,
        )
    except Exception as error:
        raise _cannot_load(flag, model_name, "model", error) from None
    # transformers fills what is missing with random weights, and builds an empty vocabulary for a missing tokenizer.
    if report["missing_keys"]:
        raise InputError(f"{flag} {model_name}: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    if tokenizer.decode(tokenizer("who won").input_ids, skip_special_tokens=True).strip() != "who won":
        files = "tokenizer_config.json, and tokenizer.json or spiece.model"
        raise InputError(f"{flag} {model_name}: its tokenizer files are missing ({files})")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise InputError(f"{flag} {model_name}: its tokenizer has more pieces than the model has embeddings")
    # transformers 5 says "tied" of every T5. Saved like that, transformers 4 would tie the separate lm_head of a
    # flan-t5 or t5-v1_1 again, silently, and answer nonsense: so the config says what the weights are.
    model.config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    use_torch_kernels(model)
    return model, tokenizer


def use_torch_kernels(model):
    """Let torch compute T5's norm and GELU in one operation each, where transformers spells them out in many.

    The same numbers up to the last digits, in a tenth less time. Weights, their names and the config stay as they are.
    """
    from transformers.activations import NewGELUActivation
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, T5LayerNorm):
                norm = torch.nn.RMSNorm(part.weight.shape, eps=part.variance_epsilon)
                norm.weight = part.weight
                setattr(module, name, norm.train(part.training))
            elif isinstance(part, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh").train(part.training))


def fast_dropout(x, p):
    """torch's dropout of a tensor on the CPU with cheaper random numbers, which take up to a sixth of a step there.

    x: floats in any shape. p: probability above 0 and below 1. Each element takes 16 bits of a 64-bit draw, so p is
    rounded to 1/65536.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty_like(x)  # as floats, which are multiplied several times as fast as truth values are chosen by
    torch.ge(bits[: x.numel()].view(x.shape), dropped - 2**15, out=kept)
    return x * kept.mul_(2**16 / (2**16 - dropped))


class FastDropout(torch.nn.Dropout):
    """torch's Dropout, on the CPU by `fast_dropout`."""

    def forward(self, x):
        return fast_dropout(x, self.p) if self.training and x.is_cpu and 0 < self.p < 1 else super().forward(x)


def fast_dropout_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, position_bias=None, **options
):
    """An attention function for transformers: SDPA, and in training on the CPU its formula with `fast_dropout`.

    query: (batch, heads, queries, d). key, value: (batch, heads, keys, d). attention_mask: None or booleans, (batch, 1,
    queries or 1, keys). position_bias: (1, heads, queries, keys). Returns (batch, queries, heads, d) and None.

    In float32 only: with bf16 weights a run would take 150 MB more at its peak, and bf16 is there to save memory.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    in_float32_on_cpu = query.is_cpu and query.dtype == torch.float32
    if not (0 < dropout < 1 and in_float32_on_cpu and position_bias is not None):
        options |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    scores = torch.add(position_bias, query @ key.transpose(2, 3), alpha=scaling)
    if attention_mask is None and module.is_causal:  # SDPA is told so and gets no mask
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores = scores + torch.where(attention_mask, 0.0, torch.finfo(scores.dtype).min)
    return (fast_dropout(scores.softmax(-1), dropout) @ value).transpose(1, 2), None


def use_fast_dropout(model):
    """Have every dropout of a T5 model or PeftModel made by `fast_dropout`, that of an adapter and of attention too."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("fast_dropout", fast_dropout_attention)
    AttentionMaskInterface.register("fast_dropout", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel):  # transformers 5.17 does not tell encoder and decoder by itself
            module.set_attn_implementation("fast_dropout")
        for name, part in module.named_children():
            if type(part) is torch.nn.Dropout:
                setattr(module, name, FastDropout(part.p).train(part.training))


def use_gradient_checkpointing(model, **options):
    """Let the model keep only the input of each of its layers for the backward pass, and compute the rest once more.

    The same gradients, bit for bit on the CPU: the second time a layer draws the random numbers of the first. Nothing
    changes in eval mode. options: for torch.utils.checkpoint.checkpoint.
    """
    # Not reentrant: that would need inputs that require a gradient, and those of a LoRA model's first layer do not.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **options})


def hold_in_bf16(model):
    """Hold the weights of a model that is not to be trained itself, such as the base of an adapter, in bfloat16: half
    the memory. Its logits are float32 all the same, so that a loss keeps its digits."""
    model.to(torch.bfloat16)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits.float())


def load_sem_model(name, device):
    """The sentence-transformers model `name` (hub id or folder) on `device`, or None for "none".

    Raises InputError if it cannot be loaded.
    """
    if name == "none":
        return None
    if _is_local(name) and not Path(name, "modules.json").is_file():
        raise InputError(f"--sem_model {name} is no sentence-transformers folder (no modules.json); or give none")
    if not _is_local(name):
        _ask_hub_once(name, "model")
    from sentence_transformers import SentenceTransformer

    try:
        # Neither code nor pickled weights from there, as for the T5 model.
        return SentenceTransformer(
            name, device=str(device), trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:
        raise _cannot_load("--sem_model", name, "similarity model", error) from None


# ------------------------------------------------------------------------------------- prompt, tokenize, batch


def build_prompt(question, tweet):
    """The model's input text. T5's tokenizer turns the line breaks into spaces."""
    return f"Question: {question}\nTweet: {tweet}\nAnswer:"


class TweetQADataset(torch.utils.data.Dataset):
    """Tokenized examples of a split; everything is tokenized once, here.

    rows: rows of `load_tweet_qa`; the first reference is the target. Where a row has none, as in an unlabeled test
        split, the data set has no `labels` at all: it can be predicted, but not trained on or scored.
    max_input_len, max_target_len: the most tokens of a prompt and of a target, end token included; what is longer is
        cut at its end. `cut_inputs` and `cut_targets` count those.

    An item is a dict of `input_ids` and `labels` (lists of int, without padding) and `index`, its row's position.
    """

    def __init__(self, rows, tokenizer, max_input_len=256, max_target_len=32):
        self.rows = rows
        prompts = [build_prompt(row["Question"], row["Tweet"]) for row in rows]
        self.input_ids, self.cut_inputs = _tokenize(tokenizer, max_input_len, "text", prompts)
        self.labels, self.cut_targets = None, 0
        if all(row["Answer"] for row in rows):
            targets = [row["Answer"][0] for row in rows]
            self.labels, self.cut_targets = _tokenize(tokenizer, max_target_len, "text_target", targets)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        item = {"input_ids": self.input_ids[index], "index": index}
        return item if self.labels is None else item | {"labels": self.labels[index]}


def _tokenize(tokenizer, max_length, kind, texts):
    """(lists of token ids cut to max_length, how many were cut). kind: "text" or, for answers, "text_target"."""
    ids, cut = [], 0
    for some in chunks(texts, 1000):  # what the tokenizer makes beside the ids takes five times as much memory
        whole = tokenizer(**{kind: some}, verbose=False).input_ids
        too_long = sum(len(one) > max_length for one in whole)
        ids += tokenizer(**{kind: some}, truncation=True, max_length=max_length).input_ids if too_long else whole
        cut += too_long
    return ids, cut


class LengthGroupedSampler(torch.utils.data.Sampler):
    """A random order of a `TweetQADataset` in which the examples of a batch have like lengths and need little padding.

    The examples are shuffled, then cut into windows of `WINDOW` batches, or a tenth of them all where those are few.
    A window is sorted by the length of the prompt, each `STRIP` batches of it (at most a third) then by the length of
    the target, and the window's batches are shuffled.

    data: a TweetQADataset with labels. batch_size: of the loader. seed: with the epoch that `set_epoch` sets, it alone
    decides the order. Every example comes exactly once; a last batch of fewer comes last.
    """

    # On TweetQA with batches of 8: 3 % of the prompts' tokens and 11 % of the targets' are padding, of 21 % and 45 %
    # in a random order. A window holds a thousand examples then, so a batch still is a random draw among like lengths.
    WINDOW, STRIP = 200, 12

    def __init__(self, data, batch_size, seed=0):
        self.data, self.batch_size, self.seed, self.epoch = data, batch_size, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(self.data)), len(self.data))
        rest = order[len(order) - len(order) % self.batch_size :]
        order = order[: len(order) - len(rest)]
        # The larger the windows, the more alike are a batch's examples, and the batches of all epochs. In windows of a
        # quarter of its few rows the demo's T5 learned worse than in a random order, in windows of a tenth as well.
        batches_a_window = max(1, min(self.WINDOW, len(order) // (10 * self.batch_size)))
        batches_a_strip = max(1, min(self.STRIP, batches_a_window // 3))
        for window in chunks(order, batches_a_window * self.batch_size):
            window.sort(key=lambda index: len(self.data.input_ids[index]))
            batches = []
            for strip in chunks(window, batches_a_strip * self.batch_size):
                strip.sort(key=lambda index: len(self.data.labels[index]))
                batches += chunks(strip, self.batch_size)
            rng.shuffle(batches)
            for batch in batches:
                yield from batch
        yield from rest


def chunks(items, size):
    """A list in lists of `size`, the last one shorter if need be."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def by_length(data):
    """The positions of a TweetQADataset's examples, longest prompt first: the order in which a pass for evaluation pads
    least, and in which memory runs out in the first batch if it does at all."""
    return sorted(range(len(data)), key=lambda index: -len(data.input_ids[index]))


def build_collate_fn(tokenizer, pad_to_multiple_of=None):
    """A collate function for items of `TweetQADataset`.

    It returns a dict of int64 tensors: `input_ids` and `attention_mask` (batch, longest prompt), `labels` (batch,
    longest target; padded with -100, which the loss leaves out) and `index` (batch).
    """
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=LABEL_PAD, pad_to_multiple_of=pad_to_multiple_of)


# -------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Within this context, count the bytes of what operations make and what is still in use of it.

    weights: tensors that were there before, and whose gradients are told apart. `peak` is the most bytes at one moment,
    `peak_gradients` what of them were gradients of the weights.
    """

    def __init__(self, weights):
        super().__init__()
        self.weights, self.now, self.peak, self.peak_gradients = weights, 0, 0, 0
        self.known = weakref.WeakSet(weight.untyped_storage() for weight in weights)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:  # a view shares that of another tensor
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, count):
        self.now += count
        if self.now > self.peak:
            gradients = [weight.grad for weight in self.weights if weight.grad is not None]
            self.peak, self.peak_gradients = self.now, sum(gradient.nbytes for gradient in gradients)


def largest_batch(model, sampler):
    """The positions of the examples of that batch of an epoch with which a training step takes most memory.

    model: a T5 model or a PeftModel. sampler: the run's LengthGroupedSampler.
    """
    data = sampler.data
    # What is kept of a token: the numbers that each matrix of its side makes of it.
    encoder = {module for module in model.get_encoder().modules() if isinstance(module, torch.nn.Linear)}
    decoder = {module for module in model.modules() if isinstance(module, torch.nn.Linear)} - encoder
    kept = [sum(matrix.out_features for matrix in side) for side in (encoder, decoder)]

    def size(batch):
        lengths = [max(len(ids[index]) for index in batch) for ids in (data.input_ids, data.labels)]
        return len(batch) * (lengths[0] * kept[0] + lengths[1] * kept[1])

    return max(chunks(list(sampler), sampler.batch_size), key=size)


def training_memory(model, batch, device, autocast=nullcontext, accumulate=False):
    """The bytes that training takes at its peak: {"weights", "gradients", "optimizer", "activations"}.

    model: as it will be trained, with adapter, dropout and gradient checkpointing, on the CPU. batch: its largest one,
    as the collate function makes it. device: the one to train on. autocast: the context manager of mixed precision.
    accumulate: whether a step has several batches, so that gradients are held in its forward passes.

    The steps are made with a copy of the model whose tensors have shape, type and device but no memory, and what lives
    at each moment is counted: no formula has to know what the model keeps. It takes a second or two, whatever the
    size, and draws no random number. Not counted is what belongs to the process, see `memory_of`.
    """

    def without_memory(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    with FakeTensorMode():
        twins = {id(buffer): without_memory(buffer) for buffer in model.buffers()}
        for weight in model.parameters():
            twins[id(weight)] = torch.nn.Parameter(without_memory(weight), weight.requires_grad)
        twin = copy.deepcopy(model, twins).train()  # takes them for copies that it has made already
        if any(getattr(module, "gradient_checkpointing", False) for module in twin.modules()):
            use_gradient_checkpointing(twin, preserve_rng_state=False)  # there is none to preserve
        given = {name: without_memory(batch[name]) for name in ("input_ids", "attention_mask", "labels")}
        weights = list(twin.parameters())
        with LiveBytes(weights + list(twin.buffers())) as live:
            for _ in range(2 if accumulate else 1):
                with autocast():
                    loss = twin(**given, use_cache=False).loss
                loss.backward()
                del loss
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": live.peak_gradients,
        "optimizer": 2 * trained,  # AdamW's two moments, which are there from the second step on
        "activations": live.peak - live.peak_gradients,
    }


def memory_of(device):
    """(bytes that this process holds on the device, bytes that it can hold there at most, with what is free now).

    On CUDA that is what torch holds, which `peak VRAM` counts too; elsewhere the resident memory of the process.
    """
    if device.type == "cuda":
        reserved, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
        return torch.cuda.memory_allocated(device), reserved + free
    import psutil

    held = psutil.Process().memory_info().rss
    return held, held + psutil.virtual_memory().available


# --------------------------------------------------------------------------------------------------------- score


def normalize_answer(text):
    """SQuAD's normalization: lower case, no ASCII punctuation, no English articles, single spaces.

    Rajpurkar et al., 2016, https://aclanthology.org/D16-1264 (the official evaluation script).
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction, references):
    """1.0 if the normalized prediction equals one of the normalized references, else 0.0. A blank prediction is 0.0."""
    if not prediction.strip():
        return 0.0
    return max(float(normalize_answer(prediction) == normalize_answer(r)) for r in _reference_list(references))


def token_f1(prediction, references):
    """Token F1 as SQuAD defines it, in [0, 1], the best over the references.

    F1 = 2 P R / (P + R), with P and R the shares of the prediction's and of the reference's normalized words that
    they have in common, counted with multiplicity. Where normalization leaves nothing of one of them, F1 is 1.0 if
    it leaves nothing of the other either (SQuAD 2's rule). A blank prediction is 0.0.
    """
    if not prediction.strip():
        return 0.0
    words = normalize_answer(prediction).split()
    return max(_word_f1(words, normalize_answer(reference).split()) for reference in _reference_list(references))


def _word_f1(predicted, gold):
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))  # 2PR / (P + R), written out


def _reference_list(references):
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a list of at least one string, not {references!r}")
    return references


def semantic_similarity(sem_model, predictions, references):
    """Cosine of the sentence embeddings of prediction and reference, the best over an example's references.

    sem_model: a SentenceTransformer. predictions: a list of n strings. references: a list of n lists of strings.
    Returns n floats in [-1, 1]; a blank prediction gets 0.0. Each distinct string is encoded once, and references that
    come again, as after each epoch, not once more.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)} examples")
    answered = [i for i, prediction in enumerate(predictions) if prediction.strip()]
    scores = [0.0] * len(predictions)
    if not answered:
        return scores
    predicted = _embed(sem_model, {predictions[i] for i in answered})
    gold = _embed_once(sem_model, frozenset(text for texts in references for text in _reference_list(texts)))
    for i in answered:
        best = max(float(predicted[predictions[i]] @ gold[reference]) for reference in references[i])
        scores[i] = min(max(best, -1.0), 1.0)  # rounding can leave a unit vector's square just above 1
    return scores


def _embed(sem_model, texts):
    """{text: unit embedding} of distinct texts, in sorted order so that the same texts always share a batch."""
    texts = sorted(texts)
    vectors = sem_model.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return dict(zip(texts, vectors, strict=True))


# The references of validation, held-out rows and test; all of a split's at once, so that the same ones share a batch
# whatever was asked before.
_embed_once = lru_cache(maxsize=3)(_embed)


def leaderboard_scores(predictions, references):
    """BLEU-1, ROUGE-L and METEOR of each example, as TweetQA's official evaluation script (tweetqa_eval.py) has them.

    predictions: a list of n strings. references: a list of n lists of strings, all of which count at once.
    Returns {"bleu1": [...], "rougeL": [...], "meteor": [...]}, n floats in [0, 1] each. METEOR needs Java: where none
    runs, the key "meteor" is missing. A blank prediction gets 0.0 in all three.

    Both sides are normalized by `normalize_answer`, then scored by the components that the script uses:
    bleu1: Papineni et al., 2002, https://aclanthology.org/P02-1040, nltk's sentence_bleu for unigrams: precision,
        clipped by the reference that has most of a word, times the brevity penalty against the reference of nearest
        length.
    rougeL: Lin, 2004, https://aclanthology.org/W04-1013, pycocoevalcap's Rouge: F with beta = 1.2 of the longest common
        subsequence, from the best precision and the best recall over the references, not always of the same one.
        Where normalization leaves nothing of the prediction ("!") and nothing of a reference, it is 1.0.
    meteor: Denkowski and Lavie, 2014, https://aclanthology.org/W14-3348, pycocoevalcap's Meteor (version 1.5, English,
        with its stems, synonyms and paraphrases), the best over the references.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)} examples")
    # {index: the normalized texts}, without the blank predictions: the form that pycocoevalcap takes.
    answered = [i for i, prediction in enumerate(predictions) if prediction.strip()]
    predicted = {i: [normalize_answer(predictions[i])] for i in answered}
    gold = {i: [normalize_answer(reference) for reference in _reference_list(references[i])] for i in answered}
    columns = {
        "bleu1": _bleu1_scores(predicted, gold),
        "rougeL": _rouge_scores(predicted, gold),
        "meteor": _meteor_scores(predicted, gold),
    }
    return {
        name: [column.get(i, 0.0) for i in range(len(predictions))]
        for name, column in columns.items()
        if column is not None
    }


def _bleu1_scores(predicted, gold):
    """{index: BLEU-1} of normalized texts."""
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of each answer without a common bigram, though their weight is 0
        return {
            i: float(sentence_bleu([text.split() for text in gold[i]], text.split(), weights=(1, 0, 0, 0)))
            for i, [text] in predicted.items()
        }


def _rouge_scores(predicted, gold):
    """{index: ROUGE-L} of normalized texts."""
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    return {i: rouge.calc_score(texts, gold[i]) for i, texts in predicted.items()}


def _meteor_scores(predicted, gold):
    """{index: METEOR} of normalized texts, or None where Java is missing or does not run. It loads for seconds."""
    if not shutil.which("java"):
        return None
    if not predicted:  # METEOR takes an empty list for an error
        return {}
    try:
        with _meteor() as meteor:
            _, scores = meteor.compute_score(gold, predicted)
    except UnicodeError:  # half of a surrogate pair: a fault of the text, not of Java
        raise
    except (OSError, ValueError):  # it could not be started, or ended and left no number to read
        return None
    return dict(zip(predicted, scores, strict=True))


@contextmanager
def _meteor():
    """A pycocoevalcap Meteor whose Java process is gone afterwards, whatever happens, Ctrl-C included."""
    from pycocoevalcap.meteor.meteor import Meteor

    before = os.environ.get("JAVA_TOOL_OPTIONS")
    # Where the system's language writes 0,5 for a half, METEOR fails to read its own numbers.
    os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} -Duser.language=en -Duser.country=US"
    try:
        meteor = Meteor()
    finally:
        del os.environ["JAVA_TOOL_OPTIONS"]
        if before is not None:
            os.environ["JAVA_TOOL_OPTIONS"] = before
    try:
        yield meteor
    finally:
        # Its own clean-up, __del__, waits for ever for a lock that compute_score keeps when it is interrupted.
        meteor.lock = threading.Lock()
        meteor.meteor_p.kill()
        meteor.meteor_p.communicate()  # closes the pipes and waits for the end


# Pictographs, dingbats, transport signs, flags and the clocks and stars that phones draw in colour. Letters and
# typographic signs such as the copyright sign are left out on purpose.
_EMOJI = re.compile("[\u231a\u231b\u23e9-\u23fa\u2600-\u27bf\u2b05-\u2b55\U0001f000-\U0001faff]")
_QUESTION_WORDS = {"what", "who", "how", "where", "why", "which", "when", "whose"}


def question_type(question):
    """The first question word of a question ("what", "who", "how", "where", "why", "which", "when", "whose"), or
    "other". "Who's", "whos" and "whom" count as "who", "what's" and "whats" as "what"."""
    for word in re.findall(r"[a-z]+", re.sub(r"['’]", "", question.lower())):
        for form in (word, word.removesuffix("s"), word.removesuffix("m")):
            if form in _QUESTION_WORDS:
                return form
    return "other"


def tweet_features(tweet):
    """What a tweet holds: a dict of the five booleans that the predictions file reports."""
    without_urls = re.sub(r"https?://\S+|www\.\S+|pic\.twitter\.com\S*", " ", tweet)
    return {
        "has_hashtag": bool(re.search(r"(?<!\w)[#＃]\w", without_urls)),
        "has_handle": bool(re.search(r"(?<!\w)@\w", without_urls)),
        "has_url": without_urls != tweet,
        "has_number": bool(re.search(r"\d", without_urls)),
        "has_emoji": bool(_EMOJI.search(tweet)),
    }


# -------------------------------------------------------------------------------------------- decode and evaluate


@contextmanager
def eval_mode(model):
    """Put the model into eval mode, and every one of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class SearchCache(EncoderDecoderCache):
    """The keys and values of a beam search, in which those of the cross-attention stay where they are.

    They come from the encoder alone, and no beam ever leaves its example: to reorder them with the beams at each token,
    as the cache of transformers does, takes half of a search's time and changes nothing.
    """

    def reorder_cache(self, beam_idx):
        self.self_attention_cache.reorder_cache(beam_idx)


def encoder_output(encoded):
    """What T5 takes as encoder_outputs: `encoded`, (batch, input length, width), in an object of its own."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=encoded)


def decode_batch(model, tokenizer, encoded, mask, beams, max_target_len, cross=None):
    """Beam search over a batch.

    encoded: the encoder's output, (batch, input length, width). mask: its attention mask, (batch, input length).
    beams: 1 is greedy. max_target_len: the most tokens of an answer, end token included. cross: see `token_log_probs`.

    Returns (answers, token_ids): stripped strings, and int64 (batch, answer length), padded with -100.
    """
    if cross is None:
        cross = DynamicCache()
        token_log_probs(model, encoded, mask, mask.new_full((len(mask), 1), LABEL_PAD), cross)
    if beams > 1:
        cross = copy.deepcopy(cross)
        cross.batch_repeat_interleave(beams)
    token_ids = model.generate(
        # generate repeats the tensors in its encoder_outputs for each beam, in place: so it gets an object of its own.
        encoder_outputs=encoder_output(encoded),
        attention_mask=mask,
        past_key_values=SearchCache(DynamicCache(), cross),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=max_target_len,
    )[:, 1:]  # without the token that every answer starts from
    answers = [text.strip() for text in tokenizer.batch_decode(token_ids, skip_special_tokens=True)]
    return answers, token_ids.masked_fill(token_ids == tokenizer.pad_token_id, LABEL_PAD)


def token_log_probs(model, encoded, mask, labels, cross):
    """The log-probability (nats) of each token of `labels` given the input and the tokens before it.

    encoded, mask: as in `decode_batch`. labels: int64 (batch, length), padded with -100. Returns float32 of the same
    shape, 0 at the padding.

    cross: the cross-attention's keys and values of this input, which the first pass of the decoder over it puts into
    an empty DynamicCache, and which each later pass and search need not compute again.
    """
    logits = model(
        encoder_outputs=encoder_output(encoded),
        attention_mask=mask,
        labels=labels,
        past_key_values=EncoderDecoderCache(DynamicCache(), cross),
    ).logits
    tokens = labels != LABEL_PAD  # most of a batch's targets are padding: their softmax over the vocabulary is spared
    scores = torch.zeros(labels.shape, device=labels.device)
    scores[tokens] = -F.cross_entropy(logits[tokens].float(), labels[tokens], reduction="none")
    return scores


def predict(
    model,
    loader,
    tokenizer,
    device,
    beams=1,
    max_target_len=32,
    accelerator=None,
    title="predict",
    with_scores=True,
):
    """Answers of a model to a split, labeled or not; the arguments are those of `evaluate`.

    Returns a DataFrame with a row an example, in the data set's order: `prediction`; `token_logprob`, the mean
    log-probability (nats) of the prediction's tokens, end token included, which is the beam search's own score at its
    default length penalty of 1, or NaN without `with_scores`, which saves a pass of the decoder; `loss`, the summed
    cross entropy of the target's `target_tokens` tokens, both 0 where there is no target.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    encoder = model.get_encoder()
    records = []
    bar_off = True if accelerator and not accelerator.is_main_process else None  # None: off where there is no terminal
    with (
        tqdm(total=len(loader), desc=title, unit="batch", leave=False, delay=1, disable=bar_off) as bar,
        eval_mode(model),
        torch.inference_mode(),
        accelerator.autocast() if accelerator else nullcontext(),
    ):
        for batch in loader:
            batch = {name: part.to(device, non_blocking=True) for name, part in batch.items() if part is not None}
            mask = batch["attention_mask"]
            # One pass of the encoder, and what the decoder derives from it, serve the loss, the search and its score.
            encoded = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            cross = DynamicCache()
            labels = batch.get("labels")  # none for an unlabeled split
            labels = mask.new_full((len(mask), 1), LABEL_PAD) if labels is None else labels
            losses = -token_log_probs(model, encoded, mask, labels, cross).sum(1)
            answers, token_ids = decode_batch(model, tokenizer, encoded, mask, beams, max_target_len, cross)
            scores = losses.new_full(losses.shape, math.nan)
            if with_scores:
                scores = _mean_log_probs(model, encoded, mask, token_ids, cross)
            columns = (batch["index"], scores, losses, (labels != LABEL_PAD).sum(1))
            records += zip(*(column.tolist() for column in columns), answers, strict=True)
            bar.update()
    if accelerator and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        records = gather_object(records)
    names = ["index", "token_logprob", "loss", "target_tokens", "prediction"]
    frame = pd.DataFrame(records, columns=names).drop_duplicates("index").sort_values("index")
    return frame.drop(columns="index").reset_index(drop=True)


def _mean_log_probs(model, encoded, mask, token_ids, cross):
    """(batch,): the mean log-probability of the tokens of each answer that `decode_batch` gave."""
    tokens = (token_ids != LABEL_PAD).sum(1).clamp(min=1)  # an answer of padding alone has none
    return token_log_probs(model, encoded, mask, token_ids, cross).sum(1) / tokens


def evaluate(
    model,
    loader,
    tokenizer,
    device,
    sem_model=None,
    beams=1,
    max_target_len=32,
    accelerator=None,
    title="evaluate",
    with_scores=True,
):
    """Loss, answers and scores of a model on a labeled split.

    model: a T5 model or a PeftModel on `device`; its train/eval mode is left as it was found.
    loader: a DataLoader over a `TweetQADataset` with `build_collate_fn`, in any order.
    sem_model: a SentenceTransformer, or None for no semantic similarity.
    beams: beams of the search, 1 is greedy. max_target_len: the most tokens of an answer.
    accelerator: the run's Accelerator, if there is one: its precision is used, and the examples of all its processes
        are gathered, so that each of them gets the whole result.
    title: of the progress bar. with_scores: whether to compute token_logprob, which takes a tenth of the time.

    Returns (metrics, frame). metrics: `val_loss` (mean cross entropy of a target token, in nats), `f1`, `em` and
    `avg_sem_sim` (means over the examples, in [0, 1]; avg_sem_sim is None without a sem_model). frame: a DataFrame with
    a row an example, in the data set's order: qid, question, tweet, references (a list), prediction, em, f1, sem_sim,
    token_logprob (see `predict`), question_type, has_hashtag, has_handle, has_url, has_number, has_emoji.
    """
    import pandas as pd

    rows = loader.dataset.rows
    predicted = predict(model, loader, tokenizer, device, beams, max_target_len, accelerator, title, with_scores)
    predictions, references = predicted["prediction"].tolist(), [row["Answer"] for row in rows]
    pairs = list(zip(predictions, references, strict=True))
    scores = {
        "em": [exact_match(*pair) for pair in pairs],
        "f1": [token_f1(*pair) for pair in pairs],
        "sem_sim": semantic_similarity(sem_model, predictions, references) if sem_model else None,
    }
    means = {name: None if values is None else float(pd.Series(values).mean()) for name, values in scores.items()}
    means["avg_sem_sim"] = means.pop("sem_sim")
    # Every token counts the same, as in training: a mean of batch means would favour tokens of small batches.
    metrics = {"val_loss": float(predicted["loss"].sum() / predicted["target_tokens"].sum()), **means}
    frame = pd.DataFrame(
        {
            "qid": [row["qid"] for row in rows],
            "question": [row["Question"] for row in rows],
            "tweet": [row["Tweet"] for row in rows],
            "references": references,
            "prediction": predictions,
            **{name: float("nan") if values is None else values for name, values in scores.items()},
            "token_logprob": predicted["token_logprob"],
            "question_type": [question_type(row["Question"]) for row in rows],
        }
    )
    return metrics, frame.join(pd.DataFrame([tweet_features(row["Tweet"]) for row in rows]))


# -------------------------------------------------------------------------------------------------------- answer


def answer(
    model,
    tokenizer,
    device,
    question,
    tweet,
    *,
    beams=5,
    max_input_len=256,
    max_target_len=32,
    batch_size=32,
    return_score=False,
):
    """Answer a question about a tweet, or many at once.

    model: a T5 model or a PeftModel, on `device`; its train/eval mode is left as it was found.
    question, tweet: two strings, or two lists of strings of the same length, answered `batch_size` at a time.
    beams, max_input_len, max_target_len: as in training (--final_beams, --max_input_len, --max_target_len).

    return_score: whether to return (answer, score), for lists (answers, scores). A score is the mean log-probability
        (nats, at most 0) of the answer's tokens: the nearer to 0, the surer the model.

    Returns a string, or a list of strings in the order of the questions. Raises ValueError if the lists differ in
    length, and TypeError if one argument is a list and the other is not, or an entry is no string.
    """
    if isinstance(question, str) and isinstance(tweet, str):
        questions, tweets = [question], [tweet]
    elif isinstance(question, str) or isinstance(tweet, str):
        raise TypeError("question and tweet must both be strings or both be lists of strings")
    else:
        questions, tweets = list(question), list(tweet)
    if len(questions) != len(tweets):
        raise ValueError(f"{len(questions)} questions, but {len(tweets)} tweets: the lists must have the same length")
    if not all(isinstance(text, str) for text in questions + tweets):
        raise TypeError("every question and every tweet must be a string")

    answers, scores = [], []
    with eval_mode(model), torch.inference_mode():
        for start in range(0, len(questions), batch_size):
            chunk = slice(start, start + batch_size)
            prompts = [build_prompt(q, t) for q, t in zip(questions[chunk], tweets[chunk], strict=True)]
            inputs = tokenizer(
                prompts, padding=True, truncation=True, max_length=max_input_len, return_tensors="pt"
            ).to(device)
            mask = inputs.attention_mask
            encoded = model.get_encoder()(input_ids=inputs.input_ids, attention_mask=mask).last_hidden_state
            texts, token_ids = decode_batch(model, tokenizer, encoded, mask, beams, max_target_len)
            answers += texts
            if return_score:
                scores += _mean_log_probs(model, encoded, mask, token_ids, DynamicCache()).tolist()
    if isinstance(question, str):
        answers, scores = answers[0], scores[0] if scores else None
    return (answers, scores) if return_score else answers
