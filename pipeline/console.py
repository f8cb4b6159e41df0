"""What a run prints about its input before it trains or scores: data, model, device, and what had to be cut."""

import sys
from contextlib import suppress

from pipeline.arguments import precision_as_typed
from pipeline.leaderboard import check_leaderboard
from pipeline.text import tweet_key

ROLES = ("train", "validation", "holdout", "test")


def show_any_character():
    """Let a console that is not UTF-8 show "?" in place of a character that it does not have. By default Python raises
    an error in the middle of a run."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a notebook's streams, a closed one
            stream.reconfigure(errors="replace")


def describe(setup, record, model_name, note):
    """Print what the run works with. Raises InputError if the final evaluation could not be made.

    setup: the run's Setup. record: what run.json says of its start. model_name: the model, or the checkpoint that is
    scored. note: a line about the data, from `select_rows`.
    """
    args, say, loaders = setup.args, setup.say, setup.loaders
    meteor = check_leaderboard() if setup.accelerator.is_main_process else True
    counts = " | ".join(f"{len(loaders[role].dataset) if role in loaders else 0} {role} rows" for role in ROLES)
    trained, total = record["trainable_parameters"], record["total_parameters"]
    say(f"data: {args.dataset} | {counts}")
    unreadable = unreadable_tweets(loaders, setup.tokenizer)
    say(f"{note} | {unreadable} tweets have characters that the tokenizer does not know (<unk>)")
    adapted = f" | adapter on {', '.join(record['adapted_matrices'])}" if "adapted_matrices" in record else ""
    say(
        f"model: {model_name} | {trained:,} of {total:,} parameters trained ({trained / total:.2%}) |"
        f" {record['device']}, {precision_as_typed(setup.accelerator.mixed_precision)}{adapted}"
    )
    for role, loader in loaders.items():
        if loader.dataset.cut_inputs or loader.dataset.cut_targets:
            say(
                f"note: {loader.dataset.cut_inputs} {role} prompts were cut to {args.max_input_len} tokens"
                f" (--max_input_len), {loader.dataset.cut_targets} answers to {args.max_target_len} (--max_target_len)"
            )
    if not meteor:
        say("note: METEOR will be left out: it needs Java, which does not run here")


def unreadable_tweets(loaders, tokenizer):
    """How many distinct tweets have an <unk> in their prompt."""
    tweets = set()
    for loader in loaders.values():
        for row, ids in zip(loader.dataset.rows, loader.dataset.input_ids, strict=True):
            if tokenizer.unk_token_id in ids:
                tweets.add(tweet_key(row["Tweet"]))
    return len(tweets)
