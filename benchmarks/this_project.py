"""This project: trains and validates with the functions that its scripts call."""

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

import helper_functions
from helper_functions import (
    TweetQADataset,
    build_collate_fn,
    build_loader,
    eval_loader,
    evaluate,
    load_model_and_tokenizer,
    quiet_libraries,
    train_loader,
)
from pipeline.arguments import EVAL_BATCH_SIZE
from pipeline.devices import choose_precision
from pipeline.fast_cpu import keep_memory, use_fast_training
from pipeline.resume import LoopState
from tweet_qa_main import Prepared, build_optimizer, main, train_epoch
from tweet_qa_main_lora import add_lora


def load(model_folder, lora):
    """(model on the CPU, tokenizer). lora: None, or peft's arguments of the adapter to add."""
    quiet_libraries()
    model, tokenizer = load_model_and_tokenizer(model_folder)
    if lora:
        names = {"r": "lora_r"}
        given = {names.get(name, name): value for name, value in lora.items()}
        model = add_lora(model, argparse.Namespace(base_dtype="fp32", use_rslora=False, use_dora=False, **given))
    return model, tokenizer


def epoch_order(rows, tokenizer, batch_size, seed):
    """The positions of the rows in the order of an epoch."""
    return list(train_loader(TweetQADataset(rows, tokenizer), batch_size, None, seed).sampler)


def _accelerator(precision):
    return Accelerator(
        mixed_precision=choose_precision(precision), dataloader_config=DataLoaderConfiguration(non_blocking=True)
    )


def _collate(tokenizer):
    return build_collate_fn(tokenizer, pad_to_multiple_of=8)


def train(model, tokenizer, rows, order, batch_size, lr, seed, device, precision):
    """Train on the rows in the given order, as `tweet_qa_main.train` does. precision: "fp32" or "bf16"."""
    set_seed(seed)
    accelerator = _accelerator(precision)
    data = TweetQADataset([rows[position] for position in order], tokenizer)
    loader = build_loader(data, batch_size, _collate(tokenizer), range(len(data)))
    use_fast_training(model, alone=True, autocast=precision == "bf16" and device == "cpu")
    if device == "cpu":
        keep_memory()
    optimizer, schedule = build_optimizer(model, lr, -(-len(order) // batch_size))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared = Prepared(model, loader, optimizer, schedule, hollow=None)
    train_epoch(prepared, accelerator, LoopState(batch_size=batch_size))


def validate(model, tokenizer, rows, beams, device, precision, sem_model=None):
    """(metrics, predictions) of the rows, as an epoch's validation (1 beam) or the final pass (more) makes them."""
    accelerator = _accelerator(precision)
    data = TweetQADataset(rows, tokenizer)
    loader = eval_loader(data, EVAL_BATCH_SIZE[device], _collate(tokenizer))
    metrics, frame = evaluate(
        model.to(device),
        loader,
        tokenizer,
        accelerator.device,
        sem_model,
        beams=beams,
        accelerator=accelerator,
        with_scores=beams > 1,
    )
    return metrics, frame["prediction"].tolist()


def answer(model, tokenizer, questions, tweets, beams):
    """The answers to questions about tweets, from text to text."""
    return helper_functions.answer(model, tokenizer, "cpu", questions, tweets, beams=beams)


def start(model_folder, data_folder):
    """Start a run; the caller ends the process at the first step."""
    arguments = {"model_name": model_folder, "dataset": data_folder, "sem_model": "none"}
    arguments["save_dir"] = Path(model_folder).parent / "started"
    main([part for name, value in arguments.items() for part in (f"--{name}", str(value))] + ["--overwrite"])
