"""The plain loop that most scripts for this task have: random order, each batch tokenized when it is needed and padded
to its longest text, AdamW with its defaults. Evaluated in batches of 8: a forward pass for the loss, and `generate` for
the answers."""

import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed

from benchmarks.common import load, score
from helper_functions import build_prompt, load_tweet_qa


def epoch_order(rows, tokenizer, batch_size, seed):
    """The positions of the rows in the order of an epoch."""
    return torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()


def _collate(tokenizer):
    def collate(rows):
        prompts = [build_prompt(row["Question"], row["Tweet"]) for row in rows]
        batch = tokenizer(prompts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        targets = [row["Answer"][0] for row in rows]
        labels = tokenizer(text_target=targets, padding=True, truncation=True, max_length=32, return_tensors="pt")
        batch["labels"] = labels.input_ids.masked_fill(labels.input_ids == tokenizer.pad_token_id, -100)
        return batch

    return collate


def _autocast(device, precision):
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def train(model, tokenizer, rows, order, batch_size, lr, seed, device, precision):
    """Train on the rows in the given order. precision: "fp32" or "bf16"."""
    set_seed(seed)
    loader = DataLoader([rows[index] for index in order], batch_size, collate_fn=_collate(tokenizer))
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * len(loader)), len(loader))
    total_loss = 0.0
    for batch in loader:
        with _autocast(device, precision):
            loss = model(**batch.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total_loss += loss.item()
    return total_loss / len(loader)


def validate(model, tokenizer, rows, beams, device, precision, sem_model=None):
    """(metrics, predictions) of the rows."""
    model.to(device).eval()
    total_loss, predictions = 0.0, []
    loader = DataLoader(rows, batch_size=8, collate_fn=_collate(tokenizer))
    with torch.no_grad(), _autocast(device, precision):
        for batch in loader:
            batch = batch.to(device)
            total_loss += model(**batch).loss.item()
            token_ids = model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, num_beams=beams, max_new_tokens=32
            )
            predictions += tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    predictions = [text.strip() for text in predictions]
    return score(predictions, rows, sem_model) | {"val_loss": total_loss / len(loader)}, predictions


def start(model_folder, data_folder):
    """Start a run; the caller ends the process at the first step."""
    model, tokenizer = load(model_folder, None)
    rows = load_tweet_qa(data_folder)["train"]
    device, precision = ("cuda", "bf16") if torch.cuda.is_available() else ("cpu", "fp32")
    train(model, tokenizer, rows, epoch_order(rows, tokenizer, 8, 0), 8, 1e-4, 0, device, precision)
