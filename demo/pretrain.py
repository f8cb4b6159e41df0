"""Train the demo's tokenizer, and pretrain its small T5 from scratch on the text of pretraining_text.py.
`make demo` fine-tunes the result, demo/tiny-t5/.

    python demo/pretrain.py tokenizer   # seconds: demo/tiny-t5/tokenizer.json
    python demo/pretrain.py model       # about an hour and a half on one core: the model, in demo/tiny-t5/

Both are seeded. The same command trains on the same text, and gives the same weights up to the machine's rounding.
"""

import argparse
import json
import random
import shutil
import string
import sys
import time
from pathlib import Path

import torch
from pretraining_text import COPY_STEPS, PretrainingText, tokenizer_corpus
from transformers import AutoTokenizer
from transformers.optimization import Adafactor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for the imports below: Python searches only the folder of the script it runs

from helper_functions import (  # noqa: E402
    LABEL_PAD,
    decode_batch,
    eval_mode,
    load_model_and_tokenizer,
    quiet_libraries,
)
from pipeline.checkpoint import let_transformers_4_read  # noqa: E402
from pipeline.run_folder import write_table, writing  # noqa: E402

# (steps, peak learning rate) of each stage of pretraining_text.TASK_WEIGHTS. Adafactor's learning rate is relative to
# the size of the weights. It is low in the last stage, which should change the kind of answer, not the skills.
STAGES = [(5000, 0.015), (7000, 0.015), (3000, 0.015), (200, 0.002)]
PIECES = 2000  # of the tokenizer, T5's 100 sentinels included
BATCH = 32
FINE_TUNING_DROPOUT = 0.05  # written to the config at the end: like T5 1.1, the model is pretrained without dropout
SHAPE = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False,
}  # fmt: skip


def make_tokenizer(out, seed):
    """Train a lower-casing unigram tokenizer like T5's, in which each digit is a separate piece. Write it to `out`.

    The library's trainer numbers pieces of equal score in a different order each time. Tokenizer and model are
    therefore separate commands, and the model is trained with the tokenizer files in demo/tiny-t5/.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    sentinels = [f"<extra_id_{n}>" for n in range(100)]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES,
        special_tokens=["<pad>", "</s>", "<unk>", *sentinels],
        unk_token="<unk>",
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *string.punctuation, *"▁—’“”£…€"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_max_length=512,
    )
    fast.save_pretrained(out)
    let_transformers_4_read(out / "tokenizer_config.json")


def pretrain(out, seed, steps=None):
    """Train the model with the tokenizer of demo/tiny-t5/, and replace the folder `out`. The new folder contains the
    model, the tokenizer, a log (CSV) and its plot (PNG).

    steps: the number of optimizer steps of each stage. None: those of STAGES.
    """
    quiet_libraries()
    torch.set_num_threads(1)  # more threads sum in a different order, which changes the last digits of the weights
    torch.manual_seed(seed)
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    write_untrained(beside, AutoTokenizer.from_pretrained(HERE / "tiny-t5"))
    model, tokenizer = load_model_and_tokenizer(str(beside))
    log = []
    for stage, (stage_steps, lr) in enumerate(STAGES):
        rows = train_stage(model, tokenizer, stage=stage, steps=steps or stage_steps, lr=lr, seed=seed)
        done = log[-1] if log else {"step": 0, "seconds": 0}
        log += [row | {name: row[name] + done[name] for name in ("step", "seconds")} for row in rows]
    model.config.dropout_rate = FINE_TUNING_DROPOUT
    model.save_pretrained(beside)
    write_table(beside / "pretraining_log.csv", log)
    draw_log(beside / "pretraining_loss.png", log)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def write_untrained(folder, tokenizer):
    """Write a T5 with T5's random initialization to `folder`. Its tensors are saved directly: transformers 5 would tie
    lm_head to the embeddings."""
    from safetensors.torch import save_file
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **SHAPE)
    weights = T5ForConditionalGeneration(config).state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items() if not name.endswith("embed_tokens.weight")}
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"]) * SHAPE["d_model"] ** -0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record = config.to_dict() | {"tie_word_embeddings": False, "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    let_transformers_4_read(folder / "tokenizer_config.json")


def train_stage(model, tokenizer, *, stage, steps, lr, seed):
    """Train on the text of a stage, an index into STAGES. Returns the rows of its log.

    lr: the peak learning rate. It is reached after a short warmup. In every stage but the first it falls linearly to
        almost 0 in the second half.
    """
    text = PretrainingText(random.Random(f"{seed} text" + stage * " 2"), stage)
    probe = PretrainingText(random.Random(f"{seed} probe"), stage)
    pairs = [task() for task in (probe.asked, probe.gap) for _ in range(100)]
    # scale_parameter makes each step relative to the size of the weights that it changes. From T5's random
    # initialization, AdamW needs several times as many steps.
    optimizer = Adafactor(model.parameters(), lr=lr, scale_parameter=True, relative_step=False, warmup_init=False)
    rise, fall = max(1, min(200, steps // 4)), steps // 2 if stage > 0 else steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 1, (steps + 1 - step) / (steps + 1 - fall))
    )
    log, losses, started = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        sources, targets = zip(*(text.draw(step - 1) for _ in range(BATCH)), strict=True)
        batch = tokenizer(list(sources), padding=True, truncation=True, max_length=160, return_tensors="pt")
        labels = tokenizer(list(targets), padding=True, truncation=True, max_length=64, return_tensors="pt").input_ids
        loss = model(**batch, labels=labels.masked_fill(labels == tokenizer.pad_token_id, LABEL_PAD)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, min(100, steps // 4)) == 0:
            row = {"stage": stage + 1, "step": step, "loss": round(sum(losses) / len(losses), 4)}
            row["probe_exact_match"] = None
            if step % 500 == 0 or step == steps:
                row["probe_exact_match"] = exact_share(model, tokenizer, pairs)
            log.append(row | {"seconds": round(time.perf_counter() - started)})
            losses.clear()
            print(*(f"{name}={value}" for name, value in log[-1].items() if value is not None), flush=True)
    return log


def exact_share(model, tokenizer, pairs):
    """The share of pairs (source, target) whose target greedy decoding gives exactly, from 0 to 1."""
    right = 0
    with eval_mode(model), torch.inference_mode():
        for start in range(0, len(pairs), 50):
            sources, targets = zip(*pairs[start : start + 50], strict=True)
            inputs = tokenizer(list(sources), padding=True, return_tensors="pt")
            encoded = model.get_encoder()(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)[0]
            answers, _ = decode_batch(model, tokenizer, encoded, inputs.attention_mask, beams=1, max_target_len=32)
            right += sum(answer == target.lower() for answer, target in zip(answers, targets, strict=True))
    return right / len(pairs)


def draw_log(path, log):
    """Plot the loss by step, and the exact match on the probe: 100 questions and 100 gaps that are not trained on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="Pretraining of demo/tiny-t5", xlabel="optimizer step")
    axes.plot([row["step"] for row in log], [row["loss"] for row in log], color="#0072B2")
    axes.set_ylabel("training loss, mean since the last point (nats a token)", color="#0072B2")
    axes.set_ylim(bottom=0)
    axes.axvline(COPY_STEPS, color="grey", linestyle=":", linewidth=1)
    axes.text(COPY_STEPS, axes.get_ylim()[1] * 0.97, " all tasks from here on", color="grey", va="top")
    probed = [row for row in log if row["probe_exact_match"] is not None]
    right = axes.twinx()
    right.plot(
        [row["step"] for row in probed], [row["probe_exact_match"] for row in probed], color="#D55E00", marker="o"
    )
    right.set_ylabel("exact match on 200 unseen gaps", color="#D55E00")
    right.set_ylim(0, 1)
    with writing(path) as beside:
        figure.savefig(beside, format="png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    tokenizer = commands.add_parser("tokenizer", help="train the tokenizer")
    tokenizer.set_defaults(run=make_tokenizer)
    model = commands.add_parser("model", help="pretrain the model with the tokenizer of demo/tiny-t5/")
    model.set_defaults(run=pretrain)
    for command, replaced in ((tokenizer, "its tokenizer files"), (model, "everything in it")):
        command.add_argument(
            "--out",
            type=Path,
            default=HERE / "tiny-t5",
            help=f"folder to write to; replaces {replaced} (default: demo/tiny-t5)",
        )
        command.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    model.add_argument("--steps", type=int, help="optimizer steps of each stage (default: 5000, 7000, 3000 and 200)")
    args = vars(parser.parse_args(argv))
    args.pop("run")(**args)


if __name__ == "__main__":
    main()
