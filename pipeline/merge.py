"""Merging a LoRA adapter into its base: the full model that computes the same, and how its answers compare.

`merge_adapter.py` writes the merged model of a run, `benchmarks/answering.py` measures how fast it answers.
"""

from pathlib import Path

import torch

from pipeline.checkpoint import WEIGHTS
from pipeline.errors import InputError, one_line
from pipeline.run_folder import is_finished, read_run_json
from pipeline.t5 import LABEL_PAD

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far a merged model's logits may be from the adapter's in float32, as a share of the largest one. Rounding alone is
# about 1e-6; an adapter that cannot be merged is off by 0.1 and more.
TOLERANCE = 1e-3


def finished_adapter(folder, flag):
    """The run.json of the finished LoRA run in `folder`. flag: the argument that an error message names.

    Raises InputError if there is none.
    """
    where, folder = f"{flag} {folder}", Path(folder)
    if not folder.is_dir():
        raise InputError(f"{where}: this folder does not exist; give the folder of a finished LoRA run")
    run = read_run_json(folder)
    if run is None:
        raise InputError(f"{where} has no run (no run.json): give the folder of a finished LoRA run")
    if run["method"] != "lora" or not (folder / "adapter_config.json").is_file():
        raise InputError(f"{where} has no adapter: give the folder of a finished LoRA run")
    if not is_finished(run) or (folder / "last").exists():
        raise InputError(f"{where} has a run that is not finished: let it finish first (--resume)")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{where}: the adapter in this folder cannot be loaded (it has no {WEIGHTS})")
    return run


@torch.inference_mode()
def target_logits_of(model, batch):
    """The logits of a batch's target tokens given the tokens before them: float32 (tokens, vocabulary), on the CPU."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return model(**given).logits[batch["labels"] != LABEL_PAD].float().cpu()


def merge(model, batch, where):
    """The full model in float32, in eval mode, that computes what a PeftModel does, whose weights it takes over.

    Each adapted matrix W becomes W + scale B A (with DoRA, the rows of that are scaled to the trained lengths). It is
    computed in float32, and a base in bfloat16 is converted first, which changes no value: peft would round the sum to
    the base's type, and in bfloat16 most of a small B A is lost.

    batch: of a collate function, on the model's device. where: names the adapter in an error message. Raises InputError
    if a merged weight is not a finite number, or the merged model's logits for the batch are not the adapter's, as when
    the adapter changes an lm_head that the model shares with its embeddings.
    """
    model = model.float().eval()
    before = target_logits_of(model, batch)
    try:
        merged = model.merge_and_unload(safe_merge=True).eval()
    except (ValueError, RuntimeError, NotImplementedError) as error:  # peft: not finite, or a kind it cannot merge
        raise InputError(f"{where}: its adapter cannot be merged ({one_line(error)})") from None
    share = max_difference(target_logits_of(merged, batch), before) / before.abs().max().item()
    if not share <= TOLERANCE:
        raise InputError(
            f"{where}: its adapter cannot be merged: the merged model's logits would differ by {share:.1%} of the"
            " largest one; it may change weights that the model shares. Use the adapter as it is"
        )
    return merged


def max_difference(logits, others):
    """The largest absolute difference between two tensors of logits."""
    return (logits - others).abs().max().item()


def changed_answers(frame, merged):
    """The rows whose answers differ between the frames of two `evaluate`, the adapter's and the merged model's.

    A DataFrame with the columns qid, question, references, adapter_answer and merged_answer.
    """
    both = frame[["qid", "question", "references"]].assign(
        adapter_answer=frame["prediction"], merged_answer=merged["prediction"]
    )
    return both[both["adapter_answer"] != both["merged_answer"]].reset_index(drop=True)
