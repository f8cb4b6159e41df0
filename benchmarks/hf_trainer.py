"""Hugging Face's Seq2SeqTrainer with its best ordinary settings: tokenized once, `group_by_length`, fused AdamW (its
default), `predict_with_generate`, evaluation in batches of 32."""

from tempfile import TemporaryDirectory

import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments

from benchmarks.common import load, score
from helper_functions import TweetQADataset, load_tweet_qa


class Trainer(Seq2SeqTrainer):
    """Trains in a given order, and records the order in which it evaluates: with grouping by length, a prediction does
    not say which row it belongs to."""

    order = None

    def _get_train_sampler(self, *given):
        return self.order or super()._get_train_sampler(*given)

    def _get_eval_sampler(self, *given):
        self.evaluated = list(super()._get_eval_sampler(*given))
        return self.evaluated


def _trainer(model, tokenizer, rows, folder, device, precision, batch_size=8, lr=1e-4, seed=0):
    data = TweetQADataset(rows, tokenizer)
    items = [{"input_ids": ids, "labels": labels} for ids, labels in zip(data.input_ids, data.labels, strict=True)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=32,
        train_sampling_strategy="group_by_length",
        num_train_epochs=1,
        learning_rate=lr,
        warmup_steps=0.06,
        weight_decay=0.01,
        predict_with_generate=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        bf16=precision == "bf16",
        seed=seed,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if device == "cuda" else None),
        train_dataset=items,
        eval_dataset=items,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def epoch_order(rows, tokenizer, batch_size, seed):
    """The positions of the rows in the order of an epoch."""
    torch.manual_seed(seed)
    with TemporaryDirectory() as folder:
        trainer = _trainer(torch.nn.Linear(1, 1), tokenizer, rows, folder, "cpu", "fp32", batch_size)
        return list(trainer._get_train_sampler())


def train(model, tokenizer, rows, order, batch_size, lr, seed, device, precision):
    """Train on the rows in the given order. precision: "fp32" or "bf16"."""
    with TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, rows, folder, device, precision, batch_size, lr, seed)
        trainer.order = list(order)
        trainer.train()


def validate(model, tokenizer, rows, beams, device, precision, sem_model=None):
    """(metrics, predictions) of the rows."""
    with TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, rows, folder, device, precision)
        given = trainer.predict(trainer.eval_dataset, num_beams=beams, max_new_tokens=32)
    token_ids = given.predictions
    token_ids[token_ids < 0] = tokenizer.pad_token_id
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    predictions = [""] * len(rows)
    for position, text in zip(trainer.evaluated, texts, strict=True):
        predictions[position] = text.strip()
    return score(predictions, rows, sem_model) | {"val_loss": given.metrics["test_loss"]}, predictions


def start(model_folder, data_folder):
    """Start a run; the caller ends the process at the first step."""
    model, tokenizer = load(model_folder, None)
    rows = load_tweet_qa(data_folder)["train"]
    device, precision = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    with TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, rows, folder, device, precision)
        trainer.train()
