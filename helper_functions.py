"""What both training scripts and a notebook share, in the order in which the data flows:
prompt -> data set -> batches -> decode -> score -> `evaluate()` -> `answer()`.

In a notebook:

    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from helper_functions import answer

    tokenizer = AutoTokenizer.from_pretrained("flan_t5_tweetqa_ckpt")
    model = AutoModelForSeq2SeqLM.from_pretrained("flan_t5_tweetqa_ckpt")
    answer(model, tokenizer, "cpu", "who won?", "The Rockets won again! @nba")

Only torch and transformers are imported here. Other libraries are imported by the function that needs them, so that
importing this file stays cheap.
"""

import copy
import logging
import math
import random
import re
import warnings
from bisect import bisect_left
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DynamicCache, EncoderDecoderCache

from pipeline import interrupts
from pipeline.data import load_tweet_qa
from pipeline.errors import InputError, RunError
from pipeline.fast_cpu import shares_keys
from pipeline.hub import ask_hub_once, cannot_load, is_local
from pipeline.leaderboard import leaderboard_scores
from pipeline.metrics import METRICS
from pipeline.t5 import (
    LABEL_PAD,
    SearchCache,
    encoder_output,
    eval_mode,
    load_model_and_tokenizer,
    logits_at,
    search,
    start_token,
)
from pipeline.text import check_counts, normalize_answer, paired_texts, question_type, reference_list, tweet_features

# The public names, those of pipeline/ included.
__all__ = ["EpochSampler", "InputError", "LABEL_PAD", "PROMPT", "RunError", "TweetQADataset", "answer"]
__all__ += ["build_collate_fn", "build_prompt", "evaluate", "exact_match", "leaderboard_scores", "load_sem_model"]
__all__ += ["load_model_and_tokenizer", "load_tweet_qa", "normalize_answer", "predict", "question_type"]
__all__ += ["quiet_libraries", "semantic_similarity", "token_f1", "tweet_features"]

# The model's input text, also quoted by the model card and recorded in run.json. T5's tokenizer turns the line breaks
# into spaces.
PROMPT = "Question: {question}\nTweet: {tweet}\nAnswer:"


def quiet_libraries():
    """Keep the libraries' own bars, notices and deprecation warnings off the screen (errors are still shown)."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("accelerate", "datasets", "httpx", "huggingface_hub", "peft", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", message=".*prompts were cut")  # our own, of `answer`


# ------------------------------------------------------------------------------------------------- prompt, data set


def build_prompt(question, tweet):
    """The model's input text for a question about a tweet."""
    return PROMPT.format(question=question, tweet=tweet)


class TweetQADataset(torch.utils.data.Dataset):
    """Tokenized examples of a split; each text is tokenized once, here.

    rows: rows of `load_tweet_qa`; the first reference is the target. If a row has none, as in an unlabeled test
        split, the data set has no `labels` at all: it can be predicted, but not trained on or scored.
    max_input_len, max_target_len: the most tokens of a prompt and of a target, end token included. A longer prompt
        loses words of its tweet, a longer target its end. `cut_inputs` and `cut_targets` count those.

    An item is a dict of `input_ids` and `labels` (lists of int, without padding) and `index`, the position of its row.
    """

    def __init__(self, rows, tokenizer, max_input_len=256, max_target_len=32):
        self.rows = rows
        pairs = [(row["Question"], row["Tweet"]) for row in rows]
        self.input_ids, self.cut_inputs = tokenize_prompts(tokenizer, max_input_len, pairs)
        self.labels, self.cut_targets = None, 0
        if all(row["Answer"] for row in rows):
            targets = [row["Answer"][0] for row in rows]
            self.labels, self.cut_targets = _tokenize_targets(tokenizer, max_target_len, targets)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        item = {"input_ids": self.input_ids[index], "index": index}
        return item if self.labels is None else item | {"labels": self.labels[index]}


def tokenize_prompts(tokenizer, max_length, pairs):
    """(lists of at most max_length token ids, how many prompts were cut) of pairs (question, tweet)."""
    ids, cut = [], 0
    for some in chunks(pairs, 1000):  # the tokenizer's other results take five times as much memory as the ids
        whole = tokenizer([build_prompt(*pair) for pair in some], verbose=False).input_ids
        too_long = [n for n, one in enumerate(whole) if len(one) > max_length]
        for n in too_long:
            whole[n] = _cut_prompt(tokenizer, max_length, *some[n])
        ids += whole
        cut += len(too_long)
    return ids, cut


def _cut_prompt(tokenizer, max_length, question, tweet):
    """The token ids of the longest prompt that fits: without words at the tweet's end, and if that is not enough,
    without the tweet and words at the question's end. The rest of PROMPT stays, wherever it is."""

    def longest(text, tokens):
        """tokens(the longest beginning of the text with which they fit), or None. A long word is cut too."""
        ends = [0, *(word.end() for word in re.finditer(r"\S{1,20}", text))]
        first = bisect_left(ends, True, key=lambda end: len(tokens(text[:end])) > max_length)  # that is too long
        return tokens(text[: ends[first - 1]]) if first else None

    def tokens(question, tweet):
        return tokenizer(build_prompt(question, tweet), verbose=False).input_ids

    ids = longest(tweet, lambda some: tokens(question, some)) or longest(question, lambda some: tokens(some, ""))
    if ids is None:
        least = len(tokens("", ""))
        raise InputError(f"max_input_len {max_length} is too small: a prompt has {least} tokens besides its texts")
    return ids


def _tokenize_targets(tokenizer, max_length, texts):
    """(lists of token ids of answers, cut to max_length, how many were cut)."""
    ids, cut = [], 0
    for some in chunks(texts, 1000):
        whole = tokenizer(text_target=some, verbose=False).input_ids
        too_long = sum(len(one) > max_length for one in whole)
        ids += tokenizer(text_target=some, truncation=True, max_length=max_length).input_ids if too_long else whole
        cut += too_long
    return ids, cut


# ---------------------------------------------------------------------------------------------------------- batches


class EpochSampler(torch.utils.data.Sampler):
    """A random order of `count` examples that depends only on the seed and on the epoch that `set_epoch` sets.

    Batches of examples with similar lengths would need less padding, but they cost F1: about 1 point on the demo's 960
    rows, with both methods.
    """

    def __init__(self, count, seed=0):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(random.Random(f"{self.seed} {self.epoch}").sample(range(self.count), self.count))


def chunks(items, size):
    """A list, cut into lists of `size`; the last one can be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def by_length(prompts):
    """The positions of prompts (lists of token ids), the longest first: batches in this order have the least padding,
    and if memory runs out, it does in the first one."""
    return sorted(range(len(prompts)), key=lambda position: -len(prompts[position]))


def build_collate_fn(tokenizer, pad_to_multiple_of=None):
    """A collate function for items of `TweetQADataset`.

    It returns a dict of int64 tensors: `input_ids` and `attention_mask`, (batch, longest prompt); `labels`, (batch,
    longest target), padded with -100, which the loss leaves out; `index`, (batch,).
    """
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=LABEL_PAD, pad_to_multiple_of=pad_to_multiple_of)


def build_loader(data, batch_size, collate, sampler):
    """A DataLoader with a separate random generator.

    A loader draws a random number when a pass begins. A run that is resumed in the middle of a pass begins it twice,
    which must not change what dropout draws.
    """
    pin = torch.cuda.is_available()  # a batch is copied while the GPU works on the one before
    return DataLoader(
        data, batch_size, sampler=sampler, collate_fn=collate, generator=torch.Generator(), pin_memory=pin
    )


def make_loaders(rows, tokenizer, args, accelerator):
    """{role: DataLoader} of the roles that have rows: "train" in random order, all others for an evaluation.

    rows: {role: rows}. args: the command line. accelerator: the run's, whose processes share the rows.
    """
    # A GPU multiplies such lengths fastest; oneDNN on a CPU compiles and keeps a kernel for each size that it meets.
    collate = build_collate_fn(tokenizer, pad_to_multiple_of=8)
    process = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    loaders = {}
    for role, role_rows in rows.items():
        if role_rows:
            data = TweetQADataset(role_rows, tokenizer, args.max_input_len, args.max_target_len)
            if role == "train":
                loaders[role] = train_loader(data, args.batch_size, collate, args.seed)
            else:
                loaders[role] = eval_loader(data, args.eval_batch_size, collate, **process)
    return loaders


def train_loader(data, batch_size, collate, seed):
    """A DataLoader of the training rows in random order, which depends on the seed and the epoch alone.

    batch_size: of one process; several processes share the batches, in turn.
    """
    return build_loader(data, batch_size, collate, EpochSampler(len(data), seed))


def eval_loader(data, batch_size, collate, process=0, processes=1):
    """A DataLoader of the rows that one of several processes evaluates, in order of length.

    A row is in the same batch whatever the number of processes, so its scores are the same to the last digit. So that
    all processes have the same number of batches, some get the last one too; `predict` drops the repeated rows.
    """
    batches = chunks(by_length(data.input_ids), batch_size)
    batches += batches[-1:] * (-len(batches) % processes)
    return build_loader(data, batch_size, collate, sum(batches[process::processes], []))


# ----------------------------------------------------------------------------------------------------------- decode


def decode_batch(model, tokenizer, encoded, mask, *, beams, max_target_len, cross=None):
    """Beam search over a batch, the same whatever the checkpoint's own generation config says.

    encoded: the encoder's output, (batch, input length, width). mask: its attention mask, (batch, input length).
    beams: 1 is greedy. max_target_len: the most tokens of an answer, end token included. cross: the input's
    `cross_attention_cache`, if it was needed before.

    Returns (answers, token_ids): stripped strings, and int64 (batch, answer length), padded with -100.
    """
    if cross is None:
        cross = cross_attention_cache(model, encoded, mask)
    if beams > 1 and not shares_keys(model, encoded):
        cross = copy.deepcopy(cross)
        cross.batch_repeat_interleave(beams)
    token_ids = search(
        model,
        tokenizer,
        beams=beams,
        max_target_len=max_target_len,
        # generate repeats the tensors in its encoder_outputs for each beam, in place: so it gets a new object.
        encoder_outputs=encoder_output(encoded),
        attention_mask=mask,
        past_key_values=SearchCache(DynamicCache(), cross),
    )
    padded = token_ids.masked_fill(token_ids == LABEL_PAD, tokenizer.pad_token_id)
    return [text.strip() for text in tokenizer.batch_decode(padded, skip_special_tokens=True)], token_ids


def cross_attention_cache(model, encoded, mask):
    """A DynamicCache of the cross-attention's keys and values of an input, which a search and its score share.

    encoded, mask: as in `decode_batch`. The decoder fills it when it reads its first token, without the output layer.
    """
    cross = DynamicCache()
    model.get_decoder()(
        input_ids=mask.new_full((len(mask), 1), start_token(model)),
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        past_key_values=EncoderDecoderCache(DynamicCache(), cross),
        use_cache=True,
    )
    return cross


def token_log_probs(model, encoded, mask, labels, cross):
    """The log-probability (nats) of each token of `labels` given the input and the tokens before it.

    encoded, mask: as in `decode_batch`. labels: int64 (batch, length), padded with -100. Returns float32 of the same
    shape, 0 at the padding.

    cross: the input's `cross_attention_cache`, or an empty DynamicCache, which this pass of the decoder fills.
    """
    before = labels.roll(1, dims=1)  # what the decoder reads to predict each label
    before[:, 0] = start_token(model)
    tokens = labels != LABEL_PAD
    logits = logits_at(
        model,
        tokens,
        encoder_outputs=encoder_output(encoded),
        attention_mask=mask,
        decoder_input_ids=before.clamp(min=0),  # at the padding any token will do: no label comes after it
        past_key_values=EncoderDecoderCache(DynamicCache(), cross),
        use_cache=True,
    )
    scores = torch.zeros(labels.shape, device=labels.device)
    scores[tokens] = -F.cross_entropy(logits.float(), labels[tokens], reduction="none")
    return scores


def predict(
    model,
    loader,
    tokenizer,
    device,
    *,
    beams=1,
    max_target_len=32,
    accelerator=None,
    title="predict",
    with_scores=True,
):
    """Answers of a model to a split, labeled or not; the arguments are those of `evaluate`.

    Returns a DataFrame with one row per example, in the data set's order, and the columns
    prediction: the answer.
    token_logprob: the mean log-probability (nats) of the answer's tokens, end token included: the score of a beam
        search with a length penalty of 1. NaN without `with_scores`, which saves a pass of the decoder.
    loss, target_tokens: the summed cross entropy (nats) of the target's tokens, and their number; 0 without a target.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    encoder = model.get_encoder()
    records = []
    alone = accelerator is None or accelerator.num_processes == 1
    bar_off = True if accelerator and not accelerator.is_main_process else None  # None: only where stderr is a terminal
    with (
        tqdm(total=len(loader), desc=title, unit="batch", leave=False, delay=1, disable=bar_off) as bar,
        eval_mode(model),
        torch.inference_mode(),
        accelerator.autocast() if accelerator else nullcontext(),
    ):
        for batch in loader:
            batch = {name: part.to(device, non_blocking=True) for name, part in batch.items() if part is not None}
            mask = batch["attention_mask"]
            # One pass of the encoder, and its keys and values, serve the loss, the search and its score.
            encoded = encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            cross = DynamicCache()
            labels = batch.get("labels")  # missing in an unlabeled split
            labels = mask.new_full((len(mask), 1), LABEL_PAD) if labels is None else labels
            losses = -token_log_probs(model, encoded, mask, labels, cross).sum(1)
            options = {"beams": beams, "max_target_len": max_target_len, "cross": cross}
            answers, token_ids = decode_batch(model, tokenizer, encoded, mask, **options)
            scores = losses.new_full(losses.shape, math.nan)
            if with_scores:
                scores = _mean_log_probs(model, encoded, mask, token_ids, cross)
            columns = (batch["index"], scores, losses, (labels != LABEL_PAD).sum(1))
            records += zip(*(column.tolist() for column in columns), answers, strict=True)
            bar.update()
            if alone:  # several processes must make all their batches, since they wait for each other at the end
                interrupts.check()
    if not alone:
        from accelerate.utils import gather_object

        records = gather_object(records)
    names = ["index", "token_logprob", "loss", "target_tokens", "prediction"]
    frame = pd.DataFrame(records, columns=names).drop_duplicates("index").sort_values("index")
    return frame.drop(columns="index").reset_index(drop=True)


def _mean_log_probs(model, encoded, mask, token_ids, cross):
    """(batch,): the mean log-probability (nats) of the tokens of each answer of `decode_batch`."""
    tokens = (token_ids != LABEL_PAD).sum(1)
    return token_log_probs(model, encoded, mask, token_ids, cross).sum(1) / tokens


# ------------------------------------------------------------------------------------------------------------ score


def exact_match(prediction, references):
    """1.0 if the normalized prediction equals one of the normalized references, else 0.0. A blank prediction is 0.0."""
    if not prediction.strip():
        return 0.0
    return max(float(normalize_answer(prediction) == normalize_answer(r)) for r in reference_list(references))


def token_f1(prediction, references):
    """Token F1 as SQuAD defines it, in [0, 1], the best over the references.

    F1 = 2 P R / (P + R), with P and R the shares of the prediction's and of the reference's normalized words that
    they have in common, counted with multiplicity. If one of them is empty after normalization, F1 is 1.0 if the
    other is empty too, else 0.0 (SQuAD 2's rule). A blank prediction is 0.0.
    """
    if not prediction.strip():
        return 0.0
    words = normalize_answer(prediction).split()
    return max(_word_f1(words, normalize_answer(reference).split()) for reference in reference_list(references))


def _word_f1(predicted, gold):
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))  # 2PR / (P + R), written out


def load_sem_model(name, device):
    """The sentence-transformers model `name` (hub id or folder) on `device`, or None for "none".

    Raises InputError if it cannot be loaded.
    """
    if name == "none":
        return None
    if is_local(name) and not Path(name, "modules.json").is_file():
        raise InputError(
            f"--sem_model {name} is not a sentence-transformers folder (no modules.json); give another one, or none"
        )
    if not is_local(name):
        ask_hub_once(name, "model")
    _embed_once.cache_clear()  # else the model of the seed before, and its memory on a GPU, would be kept
    from sentence_transformers import SentenceTransformer

    try:
        # No code and no pickled weights from there are run, as for the T5 model.
        return SentenceTransformer(
            name, device=str(device), trust_remote_code=False, model_kwargs={"use_safetensors": True}
        )
    except Exception as error:
        raise cannot_load("--sem_model", name, "similarity model", error) from None


def semantic_similarity(sem_model, predictions, references):
    """Cosine of the sentence embeddings of prediction and reference, the best over an example's references.

    sem_model: a SentenceTransformer. predictions: a list of n strings. references: a list of n lists of strings.
    Returns n floats in [-1, 1]; a blank prediction gets 0.0. Each distinct string is encoded once, and the references
    of a split only once in a run.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)} examples")
    answered = [i for i, prediction in enumerate(predictions) if prediction.strip()]
    scores = [0.0] * len(predictions)
    if not answered:
        return scores
    predicted = _embed(sem_model, {predictions[i] for i in answered})
    gold = _embed_once(sem_model, frozenset(text for texts in references for text in reference_list(texts)))
    for i in answered:
        best = max(float(predicted[predictions[i]] @ gold[reference]) for reference in references[i])
        scores[i] = min(max(best, -1.0), 1.0)  # rounding can leave a unit vector's square just above 1
    return scores


def _embed(sem_model, texts):
    """{text: unit embedding} of distinct texts, in sorted order so that the same texts always share a batch."""
    texts = sorted(texts)
    vectors = sem_model.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return dict(zip(texts, vectors, strict=True))


# Up to three splits: validation, held-out rows and test. All references of a split at once, so that the same ones share
# a batch whatever was asked before.
_embed_once = lru_cache(maxsize=3)(_embed)


# -------------------------------------------------------------------------------------------------------- evaluate


def evaluate(
    model,
    loader,
    tokenizer,
    device,
    sem_model=None,
    *,
    beams=1,
    max_target_len=32,
    accelerator=None,
    title="evaluate",
    with_scores=True,
):
    """Loss, answers and scores of a model on a labeled split.

    model: a T5 model or a PeftModel on `device`; its train/eval mode does not change.
    loader: a DataLoader over a `TweetQADataset` with `build_collate_fn`, in any order.
    sem_model: a SentenceTransformer, or None for no semantic similarity.
    beams: beams of the search, 1 is greedy. max_target_len: the most tokens of an answer.
    accelerator: the run's Accelerator, if there is one: its precision is used, and the examples of all its processes
        are gathered, so that each process gets the whole result.
    title: of the progress bar. with_scores: whether to compute token_logprob, which takes a tenth of the time.

    Returns (metrics, frame). metrics: `val_loss` (mean cross entropy of a target token, in nats), `f1`, `em` and
    `avg_sem_sim` (means over the examples; avg_sem_sim is None without a sem_model). frame: a DataFrame with one row
    per example, in the data set's order: qid, question, tweet, references (a list), prediction, em, f1, sem_sim,
    token_logprob (see `predict`), question_type, has_hashtag, has_handle, has_url, has_number, has_emoji.
    """
    import pandas as pd

    rows = loader.dataset.rows
    options = {"beams": beams, "max_target_len": max_target_len, "accelerator": accelerator, "title": title}
    predicted = predict(model, loader, tokenizer, device, **options, with_scores=with_scores)
    predictions, references = predicted["prediction"].tolist(), [row["Answer"] for row in rows]
    pairs = list(zip(predictions, references, strict=True))
    # The metrics, under the columns of the table in pipeline/metrics.py: a new one needs a line here and there.
    scores = {
        "em": [exact_match(*pair) for pair in pairs],
        "f1": [token_f1(*pair) for pair in pairs],
        "sem_sim": semantic_similarity(sem_model, predictions, references) if sem_model else None,
    }
    names = {metric.column: metric.name for metric in METRICS if metric.each_epoch}
    if names.keys() != scores.keys():
        missing = ", ".join(sorted(names.keys() ^ scores.keys()))
        raise ValueError(f"{missing}: a metric needs a line in evaluate() and one in METRICS of pipeline/metrics.py")
    means = {names[c]: None if values is None else float(pd.Series(values).mean()) for c, values in scores.items()}
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

    model: a T5 model or a PeftModel, on `device`; its train/eval mode does not change. Threads can share it if it is in
        eval mode.
    question, tweet: strings, or lists, tuples, Series or arrays of strings; both of the same length, or one of them a
        string, which then goes with each of the others. They are answered `batch_size` at a time.
    beams, max_input_len, max_target_len: as in training (--final_beams, --max_input_len, --max_target_len). If a
        prompt is too long, words at its tweet's end are left out, and a warning says so.

    return_score: whether to return (answer, score), for lists (answers, scores). A score is the mean log-probability
        (nats, at most 0) of the answer's tokens: the nearer to 0, the more certain the model.

    Returns a string, or a list of strings in the order of the questions. Raises ValueError if the lists differ in
    length, a text has an unpaired surrogate or an option is below 1, and TypeError for other types and missing entries.
    """
    check_counts(beams=beams, batch_size=batch_size, max_input_len=max_input_len, max_target_len=max_target_len)
    pairs = list(zip(*paired_texts(question, tweet), strict=True))
    prompts, cut = tokenize_prompts(tokenizer, max_input_len, pairs)
    if cut:
        what = f"{cut} of {len(pairs)} prompts were cut to {max_input_len} tokens (max_input_len)"
        warnings.warn(f"{what}: words at the end of the tweet were left out", stacklevel=2)

    answers, scores = {}, {}  # by position
    with eval_mode(model), torch.inference_mode():
        for positions in chunks(by_length(prompts), batch_size):
            # With a mask, whatever the tokenizer's files say that the model takes.
            some = {"input_ids": [prompts[position] for position in positions]}
            inputs = tokenizer.pad(some, return_attention_mask=True, return_tensors="pt")
            input_ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
            encoded = model.get_encoder()(input_ids=input_ids, attention_mask=mask).last_hidden_state
            options = {"max_target_len": max_target_len, "cross": cross_attention_cache(model, encoded, mask)}
            texts, token_ids = decode_batch(model, tokenizer, encoded, mask, beams=beams, **options)
            answers |= zip(positions, texts, strict=True)
            if return_score:
                means = _mean_log_probs(model, encoded, mask, token_ids, options["cross"])
                scores |= zip(positions, means.tolist(), strict=True)
    answers, scores = ([found[position] for position in sorted(found)] for found in (answers, scores))
    if isinstance(question, str) and isinstance(tweet, str):
        answers, scores = answers[0], scores[0] if scores else None
    return (answers, scores) if return_score else answers
