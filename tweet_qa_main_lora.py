"""Fine-tune a LoRA adapter of a T5 model on TweetQA: the run of `tweet_qa_main.py` with the model wrapped.

    python tweet_qa_main_lora.py --model_name google/flan-t5-small --epochs 5 --batch_size 8 --lr 3e-4 \\
        --save_dir flan_t5_tweetqa_ckpt_lora

Only the adapter is trained and saved: a few MB in place of the whole model. What this file holds is the whole
difference between the two methods.
"""

import argparse
import sys

import torch

from helper_functions import InputError, hold_in_bf16
from tweet_qa_main import at_least, build_parser, run_from_command_line


def dropout_rate(text):
    """An argparse type: a number from 0 up to, but not including, 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number of at least 0 and below 1, not {text!r}")


def add_lora(model, args):
    """Freeze the model and wrap it with a LoRA adapter (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    Next to each target matrix W it trains B A of rank --lora_r, and computes W x + (lora_alpha / lora_r) B A x.
    --base_dtype is the type in which W is held; A and B are float32.
    Raises InputError if the model has no matrix of a name in --target_modules.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    matrices = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    unknown = [name for name in args.target_modules if name not in matrices]
    if unknown:
        raise InputError(f"--target_modules {' '.join(unknown)}: this model has {', '.join(sorted(matrices))}")
    if getattr(args, "base_dtype", "fp32") == "bf16":
        hold_in_bf16(model)  # peft makes the adapter float32 on any base
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.target_modules,
    )
    return get_peft_model(model, config)


def main(argv=None):
    parser = build_parser(__doc__, lr=3e-4, save_dir="flan_t5_tweetqa_ckpt_lora")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora_r", type=at_least(1), default=8, help="rank of the adapter's matrices")
    lora.add_argument("--lora_alpha", type=at_least(1), default=32, help="the adapter is scaled by lora_alpha / lora_r")
    lora.add_argument("--lora_dropout", type=dropout_rate, default=0.05, help="dropout on the adapter's input")
    lora.add_argument("--target_modules", nargs="+", default=["q", "v"], help="names of the matrices to adapt")
    lora.add_argument("--base_dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 halves the frozen weights")
    return run_from_command_line(parser, argv, wrap=add_lora)


if __name__ == "__main__":
    sys.exit(main())
