"""Answers by transformers alone: what this project's search is compared with."""

import json
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
TINY_T5 = DEMO / "tiny-t5"


def demo_rows(count, split="validation"):
    """The first rows of a split of the demo's tweets."""
    return json.loads((DEMO / "tweets" / f"{split}.json").read_text())[:count]


def questions_and_tweets(rows):
    return [row["Question"] for row in rows], [row["Tweet"] for row in rows]


def plain_answers(model, tokenizer, rows, beams):
    """What `generate` of a model or PeftModel answers, with these beams and nothing else but the longest answer."""
    from helper_functions import build_prompt

    prompts = [build_prompt(row["Question"], row["Tweet"]) for row in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, num_beams=beams, max_new_tokens=32
    )
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
