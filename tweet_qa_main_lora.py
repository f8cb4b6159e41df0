"""Fine-tune a LoRA adapter of a T5 model on TweetQA: the run of `tweet_qa_main.py` with the model wrapped.

    python tweet_qa_main_lora.py --model_name google/flan-t5-small --epochs 5 --batch_size 8 --lr 3e-4 \\
        --save_dir flan_t5_tweetqa_ckpt_lora

Only the adapter is trained and saved: a few MB in place of the whole model. This file is the whole difference between
the two methods.
"""

import sys

from merge_adapter import MERGE_FLAGS, merge_if_asked
from pipeline.arguments import Role, at_least, build_parser, flag, rate
from pipeline.t5 import hold_in_bf16, matrices_to_adapt
from tweet_qa_main import run_from_command_line

T = Role.TRAINING
LORA_FLAGS = [
    flag("--lora_r", T, type=at_least(1), default=8, help="rank of the adapter's matrices"),
    flag("--lora_alpha", T, type=at_least(1), default=32, help="the adapter is scaled by lora_alpha / lora_r"),
    flag("--lora_dropout", T, type=rate, default=0.05, help="dropout on the adapter's input"),
    flag(
        "--target_modules",
        T,
        nargs="+",
        default=["q", "v"],
        help="names of the matrices to adapt, attention (q k v o), or all-linear (every one but lm_head)",
    ),
    flag("--use_rslora", T, action="store_true", help="scale by lora_alpha / sqrt(lora_r): for large ranks"),
    flag("--use_dora", T, action="store_true", help="train each row's length apart from its direction; slower"),
    flag(
        "--base_dtype",
        T | Role.SCORING,
        choices=["fp32", "bf16"],
        default="fp32",
        help="type of the frozen weights; bf16 halves their memory",
    ),
    *MERGE_FLAGS,
]


def main(argv=None):
    save_dir = "flan_t5_tweetqa_ckpt_lora"
    parser = build_parser(__doc__, lr=3e-4, save_dir=save_dir, more=LORA_FLAGS, title="LoRA")
    return run_from_command_line(parser, argv, wrap=add_lora, instead=merge_if_asked)


def add_lora(model, args):
    """Freeze the model and wrap it with a LoRA adapter (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    Next to each target matrix W it trains B A of rank --lora_r, and computes W x + (lora_alpha / lora_r) B A x.
    --base_dtype is the type of W; A and B are float32.
    Raises InputError if the model has no matrix of a name in --target_modules.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = matrices_to_adapt(model, args.target_modules)
    if args.base_dtype == "bf16":
        hold_in_bf16(model)  # peft makes the adapter float32 on any base
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        use_rslora=args.use_rslora,  # Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732
        use_dora=args.use_dora,  # Liu et al., 2024, https://arxiv.org/abs/2402.09353
    )
    return get_peft_model(model, config)


if __name__ == "__main__":
    sys.exit(main())
