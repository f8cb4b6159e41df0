"""What makes a run fast changes none of its numbers, and nothing is computed that need not be."""

import json
import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from conftest import PROJECT
from transformers import AutoModelForSeq2SeqLM

from benchmarks import ct2, report
from benchmarks.jobs import computes_in_bf16
from helper_functions import TweetQADataset, build_collate_fn, build_loader, evaluate, load_model_and_tokenizer
from pipeline.fast_cpu import FastDropout, attend, fast_dropout, use_fast_training


def first_batch(rows, tokenizer):
    return next(iter(build_loader(TweetQADataset(rows, tokenizer), 8, build_collate_fn(tokenizer), range(8))))


@pytest.fixture
def model(standin):
    return load_model_and_tokenizer(str(standin))[0]


@pytest.fixture
def transformers_own(standin):
    """The same model as transformers loads it."""
    return AutoModelForSeq2SeqLM.from_pretrained(standin)


def test_torch_kernels_compute_what_transformers_does(model, transformers_own, tokenizer, rows):
    batch = first_batch(rows, tokenizer)
    del batch["index"]
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"FastNorm", "GELU"} <= kinds and not {"T5LayerNorm", "NewGELUActivation"} & kinds
    assert list(model.state_dict()) == list(transformers_own.state_dict())
    losses = [each(**batch).loss for each in (model, transformers_own)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), transformers_own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("beams", [1, 5])
def test_answers_are_those_of_generate(model, transformers_own, tokenizer, rows, beams):
    data = TweetQADataset(rows, tokenizer)
    loader = build_loader(data, 16, build_collate_fn(tokenizer), range(len(rows)))
    _, frame = evaluate(model, loader, tokenizer, "cpu", beams=beams, max_target_len=12)
    expected = []
    for batch in loader:
        ids = transformers_own.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=beams, max_new_tokens=12
        )
        expected += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert frame["prediction"].tolist() == expected
    assert len(set(expected)) > 10


def test_the_encoder_is_read_once_for_loss_search_and_score(model, tokenizer, rows):
    """The cross-attention projects the encoder's output to keys and values once a batch, not once a beam and pass."""
    seen = []
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    loader = build_loader(TweetQADataset(rows, tokenizer), 20, build_collate_fn(tokenizer), range(len(rows)))
    evaluate(model, loader, tokenizer, "cpu", beams=5, max_target_len=8)
    assert len(rows) == 40 and seen == [20] * 2 * len(model.decoder.block)


def test_dropout_zeroes_its_share_scales_the_rest_and_repeats_by_seed():
    dropout, x = FastDropout(0.1), torch.ones(1001, 999, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y) and set(y.unique().tolist()) == {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    zeroed = (y == 0).float()
    assert zeroed.mean().item() == pytest.approx(0.1, abs=0.002)
    assert all(zeroed.mean(side).std().item() < 0.012 for side in (0, 1))  # 0.0095 if they are independent
    torch.manual_seed(3)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x) and not FastDropout(1.0)(x).any()
    assert torch.equal(FastDropout(1e-9)(x), x) and (FastDropout(1 - 1e-9)(x) == 0).float().mean() > 0.999


@pytest.mark.parametrize("padded", [True, False])
def test_attention_with_dropout_computes_what_sdpa_does(model, transformers_own, tokenizer, rows, padded):
    """The same loss and gradients where the probability is so small that nothing is dropped, with and without masks."""
    batch = first_batch(rows, tokenizer)
    del batch["index"]
    assert not batch["attention_mask"].all()
    if not padded:
        batch = {name: tensor[:1] for name, tensor in batch.items()}
        length = batch["attention_mask"].sum()
        batch |= {name: batch[name][:, :length] for name in ("input_ids", "attention_mask")}
    use_fast_training(model, alone=True)
    for each in (model, transformers_own):
        for module in each.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif type(module).__name__ == "T5Attention":
                module.dropout = 1e-9 if each is model else 0.0
    with patch("pipeline.fast_cpu.fast_dropout", wraps=fast_dropout) as used:
        losses = [each(**batch).loss for each in (model, transformers_own)]
    assert used.call_count == len(model.encoder.block) + 2 * len(model.decoder.block)
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, ours), theirs in zip(model.named_parameters(), transformers_own.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_dropout_in_attention_zeroes_its_share_of_the_weights_and_nothing_in_eval_mode(model, tokenizer, rows):
    module, size = model.encoder.block[0].layer[0].SelfAttention, 400
    even, one_hot = torch.zeros(1, 1, size, size), torch.eye(size)[None, None]
    weights, _ = attend(module, even, even, one_hot, None, dropout=0.1, position_bias=even)
    assert weights.max().item() * size == pytest.approx(1 / 0.9, rel=1e-4)
    assert (weights == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    batch = first_batch(rows, tokenizer)
    del batch["index"]
    with torch.no_grad():
        before = model.eval()(**batch).logits
        use_fast_training(model, alone=True)
        assert torch.equal(model(**batch).logits, before)
        assert not torch.equal(model.train()(**batch).logits, before)


@pytest.fixture
def lora_model(model):
    from argparse import Namespace

    from tweet_qa_main_lora import add_lora

    return add_lora(
        model,
        Namespace(
            lora_r=4,
            lora_alpha=8,
            lora_dropout=0.1,
            target_modules=["q", "v"],
            base_dtype="fp32",
            use_rslora=False,
            use_dora=False,
        ),
    )


def test_lora_computes_no_gradient_that_no_weight_needs(lora_model, tokenizer, rows):
    """None of a frozen weight, and none of an activation before the first adapter."""
    use_fast_training(lora_model, alone=True)
    assert sum(type(module) is FastDropout for module in lora_model.modules()) > 20
    needs_gradient = {}
    lora_model.train()
    for name in (
        "encoder.embed_tokens",
        "encoder.block.0.layer.0.layer_norm",
        "encoder.block.0.layer.0.SelfAttention.q",
    ):
        lora_model.get_base_model().get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: needs_gradient.update({name: output.requires_grad})
        )
    batch = first_batch(rows, tokenizer)
    del batch["index"]
    lora_model(**batch).loss.backward()
    assert list(needs_gradient.values()) == [False, False, True]
    with_gradient = {name for name, weight in lora_model.named_parameters() if weight.grad is not None}
    assert with_gradient == {name for name, _ in lora_model.named_parameters() if "lora_" in name}


@pytest.mark.slow
def test_the_benchmark_runs_and_its_contenders_agree(tmp_path):
    """--quick: each contender trains and answers; were their answers not the same, it would end with an error."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--quick", "--out", tmp_path],
        cwd=PROJECT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (figures,) = tmp_path.glob("*.json")
    found = json.loads(figures.read_text())
    assert found["quick"] and list(found["cases"]) == ["demo model"]
    measured = found["cases"]["demo model"]
    trained = [f"{method}{kind}" for kind in ("", ", bf16")[: 1 + computes_in_bf16()] for method in ("full", "LoRA")]
    for method in trained:
        for name in ("this_project", "plain_loop", "hf_trainer"):
            assert measured[method][name]["examples_a_second"] > 0
            assert 100 < measured[method][name]["peak_memory_mb"] < 10_000
        assert 0 < measured[method]["profile"]["share_of_matmul_peak"] < 1
    assert all(0 < values[0] < 1 for method in ("full", "LoRA") for values in found["f1"][method].values())
    assert figures.with_suffix(".png").stat().st_size > 10_000
    text = figures.with_suffix(".md").read_text()
    assert "| this project | plain loop | HF trainer | CTranslate2 |" in text
    if ct2.is_installed():  # its answers were those of generate, its loss of the references this project's
        assert measured["validation"]["5_beams"]["ct2"]["seconds"] > 0
        assert measured["answers"]["5_beams"]["same"] > 40
    else:
        assert text.count("not installed") == 2


def test_the_docs_show_the_recorded_results():
    tables = list((PROJECT / "benchmarks" / "results").glob("*.md"))
    shown = (PROJECT / "docs" / "benchmarks.md").read_text()
    assert tables
    for table in tables:
        assert table.read_text() in shown
        picture = table.with_suffix(".png")
        assert f"(../{picture.relative_to(PROJECT)})" in shown or not picture.exists()


def test_the_readme_shows_the_recorded_speed():
    """Of records that have the table of five rows; those of earlier versions of the benchmark had none."""
    for path in (PROJECT / "benchmarks" / "results").glob("*.json"):
        found = json.loads(path.read_text())
        if "matmul_flops_a_second" in found:
            assert report.short_table(found) in (PROJECT / "README.md").read_text()
