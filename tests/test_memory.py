"""Gradient checkpointing and a base in bfloat16 save memory, and what training takes is known before it begins."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import (
    FOLDER_NAMES,
    FULL,
    LORA,
    PROJECT,
    SCRIPTS,
    TINY,
    arguments,
    assert_same_end,
    end_of,
    main_of,
    readme_snippets,
    run_script,
    signal_at_step,
    write_standin,
)
from safetensors.torch import load_file
from torch.nn import functional as F

from helper_functions import (
    EpochSampler,
    TweetQADataset,
    answer,
    build_collate_fn,
    build_loader,
    evaluate,
    load_model_and_tokenizer,
)
from pipeline.arguments import build_parser
from pipeline.checkpoint import load_checkpoint
from pipeline.fast_cpu import use_fast_training
from pipeline.memory import LiveBytes, is_out_of_memory, largest_batch, memory_lines, training_memory
from pipeline.resume import LoopState
from pipeline.t5 import packed_rows, target_logits, use_gradient_checkpointing
from tweet_qa_main import Prepared, build_optimizer, train_epoch
from tweet_qa_main_lora import add_lora

CPU = torch.device("cpu")
MB = 2**20


pytestmark = pytest.mark.usefixtures("without_java")


def optimizer_of(model):
    return build_optimizer(model, 1e-3, 10)[0]


def load(folder, method, checkpointing=False, base_dtype="fp32"):
    """A model that is ready to be trained, with dropout and the same adapter each time."""
    torch.manual_seed(0)
    model = load_model_and_tokenizer(str(folder))[0]
    if method == "lora":
        options = {"lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q", "v", "wo"]}
        model = add_lora(model, Namespace(**options, base_dtype=base_dtype, use_rslora=False, use_dora=False))
    use_fast_training(model, alone=True)
    if checkpointing:
        use_gradient_checkpointing(model)
    return model.train()


def trained(model, tokenizer, rows):
    """(losses and gradient norms, random state at the end) of an epoch of three steps; the model is changed by it."""
    loader = build_loader(TweetQADataset(rows[:20], tokenizer), 4, build_collate_fn(tokenizer), range(20))
    accelerator = Accelerator(gradient_accumulation_steps=2)
    optimizer, schedule = build_optimizer(model, lr=1e-2, total_steps=3)
    torch.manual_seed(1)
    prepared = Prepared(*accelerator.prepare(model, loader, optimizer), schedule, hollow=None)
    steps, _ = train_epoch(prepared, accelerator, LoopState())
    return [(row["loss"], row["grad_norm"]) for row in steps], torch.get_rng_state()


def batch_of(rows, tokenizer):
    data = TweetQADataset(rows, tokenizer)
    batch = build_collate_fn(tokenizer)([data[index] for index in range(len(data))])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


# -------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_gives_the_same_losses_and_weights_with_dropout_on(standin, tokenizer, rows, method):
    models = [load(standin, method, checkpointing) for checkpointing in (False, True)]
    (steps, state), (same_steps, same_state) = (trained(model, tokenizer, rows) for model in models)
    assert same_steps == steps and torch.equal(same_state, state)
    start, one, other = (dict(model.named_parameters()) for model in (load(standin, method), *models))
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], start[name])}
    assert moved == {name for name, weight in one.items() if weight.requires_grad}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_answers_right_after_training_use_the_cache_as_ever(standin, tokenizer, rows, method):
    """Each token after the first is computed alone, not together with those before it once more."""
    lengths, frames = [], []
    for checkpointing in (False, True):
        model = load(standin, method, checkpointing)
        trained(model, tokenizer, rows)
        assert model.training
        attention = model.get_decoder().block[-1].layer[0].SelfAttention.o
        attention.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
        loader = build_loader(TweetQADataset(rows, tokenizer), 20, build_collate_fn(tokenizer), range(len(rows)))
        lengths.clear()
        frames.append(evaluate(model, loader, tokenizer, "cpu", max_target_len=8)[1])
        assert lengths.count(1) == 2 * 8  # two batches; the targets are longer
    assert frames[0].equals(frames[1]) and frames[0]["prediction"].str.len().max() > 0


# ------------------------------------------------------------------------------------------------- base in bfloat16


def test_a_base_in_bf16_takes_half_the_memory_and_is_not_trained(standin, tokenizer, rows):
    model, reference = load(standin, "lora", base_dtype="bf16"), load(standin, "lora")
    for module in [*model.modules(), *reference.modules()]:
        if type(module).__name__ == "T5Attention":
            module.dropout = 0.0  # it draws other numbers in bf16
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    bytes_held = [sum(w.nbytes for w in m.parameters() if not w.requires_grad) for m in (model, reference)]
    assert 2 * bytes_held[0] == bytes_held[1] > 10 * MB
    steps, expected = trained(model, tokenizer, rows)[0], trained(reference, tokenizer, rows)[0]
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=0.01)
    assert all(loss != torch.tensor(loss).bfloat16().item() for loss, _ in steps)  # the loss itself is not rounded
    for name, weight in model.named_parameters():
        if name in frozen:
            assert torch.equal(weight, frozen[name]) and weight.dtype == torch.bfloat16 and weight.grad is None, name
        else:
            assert "lora_" in name and weight.dtype == torch.float32, name


@pytest.mark.parametrize(("weight", "given"), [("bfloat16", "bfloat16"), ("float32", "float32")])
def test_the_norm_of_torch_is_that_of_t5_in_either_type(standin, weight, given):
    from transformers import AutoModelForSeq2SeqLM

    x = 3 * torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(getattr(torch, given))
    results = []
    for model in (load_model_and_tokenizer(str(standin))[0], AutoModelForSeq2SeqLM.from_pretrained(standin)):
        norm = model.encoder.block[0].layer[0].layer_norm
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        results.append(norm.to(getattr(torch, weight))(x))
    assert type(norm).__name__ == "T5LayerNorm" and results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results)


BF16 = ("--base_dtype", "bf16")


@pytest.fixture(scope="module")
def bf16_run(made_once, place):
    """The folder of a finished LoRA run on a base in bfloat16."""

    def make(folder):
        done = run_script(LORA, *arguments(place, LORA, folder / "run", *BF16))
        assert done.returncode == 0, done.stderr

    return made_once("bf16", make)[0] / "run"


def test_a_bf16_run_saves_the_adapter_in_float32_and_says_on_what(bf16_run, place):
    weights = load_file(bf16_run / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all("lora_A" in name or "lora_B" in name for name in weights)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())
    assert json.loads((bf16_run / "run.json").read_text())["args"]["base_dtype"] == "bf16"
    card = (bf16_run / "README.md").read_text()
    assert "| `--base_dtype` | bf16 |" in card and f"from_pretrained('{place / 'model'}', dtype=\"bfloat16\")" in card


def test_the_figures_of_a_bf16_run_are_those_of_the_model_that_was_trained(bf16_run, place, tokenizer):
    """Read back, the base is in bfloat16 again, the adapter is what was saved, and it answers as the final pass did."""
    model, _ = load_checkpoint(bf16_run, str(place / "model"))
    saved = load_file(bf16_run / "adapter_model.safetensors")
    for name, weight in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, saved[name.replace(".default", "")])
        else:
            assert weight.dtype == torch.bfloat16
    frame = pd.read_csv(bf16_run / "validation_predictions.csv", keep_default_na=False)
    answers, scores = answer(
        model, tokenizer, "cpu", frame["question"].tolist(), frame["tweet"].tolist(), return_score=True
    )
    assert answers == frame["prediction"].tolist() and scores == pytest.approx(
        frame["token_logprob"].tolist(), abs=1e-6
    )


@pytest.mark.slow
def test_a_bf16_run_that_is_stopped_ends_like_one_that_was_not(bf16_run, place, tmp_path, capfd):
    folder = tmp_path / "run"
    with signal_at_step(9):
        assert main_of(LORA)(arguments(place, LORA, folder, *BF16)) == 143
    capfd.readouterr()
    assert main_of(LORA)(arguments(place, LORA, folder, "--resume")) == 2
    assert "--base_dtype fp32 (was bf16)" in capfd.readouterr().err
    assert main_of(LORA)(arguments(place, LORA, folder, *BF16, "--resume")) == 0
    assert_same_end(LORA, folder, bf16_run)


def test_eval_only_takes_the_type_of_the_run_and_no_other_base(bf16_run, place, tmp_path, flan_t5_files, capfd):
    copy = shutil.copytree(bf16_run, tmp_path / "copy")
    argv = arguments(place, LORA, copy, "--eval_only")
    assert main_of(LORA)(argv) == 0
    assert end_of(LORA, copy) == end_of(LORA, bf16_run)
    assert main_of(LORA)([*argv, "--base_dtype", "fp32"]) == 0  # the adapter is read on the base that it was trained on
    assert end_of(LORA, copy) == end_of(LORA, bf16_run)
    assert json.loads((copy / "run.json").read_text())["eval_only"]["base_dtype"] == "bf16"
    other = write_standin(tmp_path / "other", flan_t5_files, seed=1, **TINY)
    capfd.readouterr()
    assert main_of(LORA)(arguments(place, LORA, copy, "--eval_only", "--model_name", other)) == 2
    assert "its adapter was trained on another base" in capfd.readouterr().err


def test_someone_elses_adapter_is_scored_on_the_base_that_is_asked_for(bf16_run, place, tmp_path):
    copy = shutil.copytree(bf16_run, tmp_path / "copy")
    (copy / "run.json").unlink()
    assert main_of(LORA)(arguments(place, LORA, copy, "--eval_only", *BF16)) == 0
    frames = [pd.read_csv(folder / "validation_predictions.csv") for folder in (copy, bf16_run)]
    pd.testing.assert_frame_equal(*frames)
    assert json.loads((copy / "run.json").read_text())["args"]["base_dtype"] == "bf16"


def test_the_readme_snippet_loads_a_bf16_run(bf16_run, place):
    """On a base in float32, as it stands there: the answers may differ in what bfloat16 rounds away."""
    snippet = readme_snippets()[LORA].replace("google/flan-t5-small", str(place / "model"))
    space = {}
    exec(snippet.replace(f'"{FOLDER_NAMES[LORA]}"', repr(str(bf16_run))), space)
    assert {weight.dtype for weight in space["model"].parameters()} == {torch.float32}
    assert "rockets" in space["answer"](space["model"], space["tokenizer"], "cpu", "who won?", "a tweet")


# --------------------------------------------------------------------------------------------------- the estimate


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_copy_without_memory_takes_what_the_model_would(
    standin, tokenizer, rows, method, checkpointing, base_dtype
):
    """Counted in a real step, it is the same to the byte; and the model and its random numbers are as before."""
    if method == "full" and base_dtype == "bf16":
        pytest.skip("only a LoRA run has a frozen base")
    model, batch = load(standin, method, checkpointing, base_dtype), batch_of(rows[:6], tokenizer)
    state = torch.get_rng_state()
    estimated = training_memory(model, batch, CPU, optimizer_of, accumulate=True)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    weights, packed = list(model.parameters()), packed_rows(model, batch)
    assert all(weight.grad is None and type(weight.data) is torch.Tensor for weight in weights)
    with LiveBytes(weights + list(model.buffers())) as live:
        for _ in range(2):
            F.cross_entropy(*target_logits(model, batch, packed)).backward()
    assert (live.peak - live.peak_gradients, live.peak_gradients) == (estimated["activations"], estimated["gradients"])
    optimizer = optimizer_of(model)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
    assert sum(moment.nbytes for moment in moments) == estimated["optimizer"]
    assert estimated["weights"] == sum(weight.nbytes for weight in weights)


def test_checkpointing_and_a_frozen_base_need_less(standin, tokenizer, rows):
    batch = batch_of(rows[:8], tokenizer)

    def parts(*given):
        return training_memory(load(standin, *given), batch, CPU, optimizer_of)

    full, lora = parts("full"), parts("lora")
    assert parts("full", True)["activations"] < 0.7 * full["activations"]
    assert parts("lora", True)["activations"] < 0.7 * lora["activations"]
    assert lora["optimizer"] < 0.1 * full["optimizer"]
    assert parts("lora", False, "bf16")["weights"] < 0.55 * lora["weights"]


def test_no_batch_of_an_epoch_takes_more_than_the_one_that_is_chosen(standin, tokenizer, rows):
    data = TweetQADataset(rows, tokenizer)
    sampler = EpochSampler(len(data), seed=3)
    model = load(standin, "full")
    order = list(sampler)

    def activations(batch):
        batch = batch_of([rows[index] for index in batch], tokenizer)
        return training_memory(model, batch, CPU, optimizer_of)["activations"]

    batches = [order[start : start + 8] for start in range(0, len(order), 8)]
    every = [activations(batch) for batch in batches]
    assert activations(largest_batch(model, data, batches, packed=True)) == max(every) > 1.1 * min(every)


def test_it_warns_where_there_is_less_than_it_takes_and_says_what_to_lower():
    parts = {"weights": 300 * MB, "gradients": 100 * MB, "process overhead": 1700 * MB}
    line = "memory: about 2,100 MB at the peak (weights 300, gradients 100, process overhead 1,700) of {} MB"
    assert list(memory_lines(parts, 2100 * MB, False)) == [line.format("2,100")]
    told, warning = memory_lines(parts, 2099 * MB, False)
    assert told == line.format("2,099") and warning.startswith("warning: ")
    flags = re.findall(r"--\w+", warning)
    assert flags == ["--batch_size", "--grad_accum_steps", "--gradient_checkpointing", "--max_input_len"]
    _, warning = memory_lines(parts, 2099 * MB, True)
    assert "--gradient_checkpointing" not in warning and "--batch_size" in warning
    known = {flag for action in build_parser("", 1, "x")._actions for flag in action.option_strings}
    assert set(flags) <= known


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."), True),
        (torch.OutOfMemoryError("any text"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("a batch is empty"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, expected):
    assert is_out_of_memory(error) is expected


# Runs a script up to the end of the first epoch's training, and prints the most memory that its process held (kB): from
# the first step, for what loading took does not count, to the first evaluation.
UNTIL_TRAINED = """
import os, re, sys
import {script} as script, torch
from torch.nn.modules.module import register_module_forward_pre_hook
began = []

def forward(module, given):
    if type(module).__name__ != "T5ForConditionalGeneration" and type(module).__name__ != "T5Stack":
        return
    if module.training and not began and type(next(module.parameters()).data) is torch.Tensor:
        began.append(open("/proc/self/clear_refs", "w").write("5"))
    elif began and not module.training:
        print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], flush=True)
        os._exit(0)

register_module_forward_pre_hook(forward)
script.main(sys.argv[1:])
"""


def estimate_and_peak(script, save_dir, *argv):
    """(MB that a run said it would take, MB that its process held at most in the first epoch's training)."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("only Linux tells the peak of a part of a process's life")
    code = UNTIL_TRAINED.format(script=script.removesuffix(".py"))
    command = [sys.executable, "-c", code, *map(str, argv), "--save_dir", str(save_dir)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    estimated = json.loads((save_dir / "run.json").read_text())["estimated_peak_mb"]
    assert f"memory: about {estimated:,.0f} MB at the peak (weights " in done.stdout
    return estimated, int(re.search(r"^peak (\d+)", done.stdout, flags=re.MULTILINE)[1]) / 1024


DEMO = ("--model_name", PROJECT / "demo" / "tiny-t5", "--dataset", PROJECT / "demo" / "tweets")
DEMO_METHOD = {
    FULL: ["--lr", 1e-3],
    LORA: ["--lr", 3e-3, "--target_modules", *"q k v o wi_0 wi_1 wo".split()],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_demo_takes_what_it_said_it_would(script, tmp_path, minilm):
    """As `make demo` starts it, for one epoch."""
    estimated, peak = estimate_and_peak(
        script, tmp_path / "run", *DEMO, "--sem_model", minilm, "--epochs", 1, *DEMO_METHOD[script]
    )
    assert estimated == pytest.approx(peak, rel=0.2)


@pytest.fixture(scope="module")
def flan(tmp_path_factory, flan_t5_files):
    return write_standin(tmp_path_factory.mktemp("flan") / "model", flan_t5_files)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_shape_of_flan_t5_small_takes_what_it_said_it_would(script, flan, tmp_path, tweet_qa):
    """On 128 rows of TweetQA, as they come and with what saves memory."""
    cases = [[], ["--gradient_checkpointing"], ["--batch_size", "2", "--grad_accum_steps", "4"]]
    cases += [["--base_dtype", "bf16"]] * (script == LORA)
    for number, more in enumerate(cases):
        estimated, peak = estimate_and_peak(
            script,
            tmp_path / str(number),
            *("--model_name", flan, "--dataset", tweet_qa, "--sem_model", "none"),
            *("--max_train_samples", 128, "--max_eval_samples", 8, *more),
        )
        print(script, more, estimated, peak)
        assert estimated == pytest.approx(peak, rel=0.2), more
