"""A packed batch gives the loss and gradients of the padded one, and bfloat16 on a CPU casts each tensor once."""

import copy
from argparse import Namespace

import pytest
import torch
from torch.nn import functional as F

from helper_functions import LABEL_PAD, TweetQADataset, build_collate_fn, load_model_and_tokenizer
from pipeline.fast_cpu import convert_frozen, use_fast_training
from pipeline.packing import MULTIPLE_OF, find_rows
from pipeline.t5 import packed_rows, target_logits, use_gradient_checkpointing
from tweet_qa_main_lora import add_lora

LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q", "v", "wo"], "base_dtype": "fp32"}
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture
def model(standin):
    return load_model_and_tokenizer(str(standin))[0]


@pytest.fixture
def batch(tokenizer, rows):
    data = TweetQADataset(rows[:8], tokenizer)
    padded = build_collate_fn(tokenizer, pad_to_multiple_of=8)([data[index] for index in range(len(data))])
    return {name: padded[name] for name in ("input_ids", "attention_mask", "labels")}


def in_training(model, attention_dropout):
    """The model in train mode. attention_dropout: so small that nothing is dropped, to take training's own path."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "T5Attention":
            module.dropout = attention_dropout
    return model


def lora_of(model, **changes):
    return add_lora(model, Namespace(**LORA | {"use_rslora": False, "use_dora": False} | changes))


def test_packing_and_unpacking_move_each_token_and_its_gradient():
    for mask in ([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], [[1] * 16], [[0, 0], [1, 1]]):
        mask = torch.tensor(mask)
        (batch, length), heads, d, count = mask.shape, 2, 3, int(mask.sum())
        sources = find_rows({"labels": mask, "attention_mask": mask}, LABEL_PAD, heads).sources
        numbers = torch.arange(batch * length).view(batch, length) + 1
        packed = sources.pack(numbers, fill=-1)
        real = numbers[mask.bool()].tolist()
        assert packed[0, :count].tolist() == real and (packed[0, count:] == -1).all()
        assert count < packed.shape[1] == sources.pack(mask).shape[1] <= count + MULTIPLE_OF

        padded = torch.randn(batch, heads, length, d, requires_grad=True)
        tokens = sources.pack_heads(padded)
        at = mask[:, None, :, None].bool()
        by_token = padded.transpose(1, 2)[mask.bool()]
        assert torch.equal(tokens[0, :count], by_token) and not tokens[0, count:].any()
        weights = torch.randn(count, heads, d)
        (tokens[0, :count] * weights).sum().backward()
        assert torch.equal(padded.grad.transpose(1, 2)[mask.bool()], weights)
        assert not padded.grad.masked_select(~at).any()

        tokens = tokens.detach().transpose(1, 2).requires_grad_()
        rows = sources.unpack_heads(tokens)
        assert torch.equal(rows.masked_select(at), padded.masked_select(at)) and rows.is_contiguous()
        weights = torch.randn(rows.shape)
        (rows * weights).sum().backward()
        assert torch.equal(tokens.grad.transpose(1, 2)[0, :count], weights.transpose(1, 2)[mask.bool()])
        assert not tokens.grad.transpose(1, 2)[0, count:].any()


def test_a_model_in_float64_has_the_loss_of_one_in_float32(model, batch):
    for rows in (packed_rows(model, batch), None):
        single, double = in_training(copy.deepcopy(model), 1e-9), in_training(copy.deepcopy(model).double(), 1e-9)
        losses = [F.cross_entropy(*target_logits(each, batch, rows)) for each in (single, double)]
        assert losses[1].dtype == torch.float64 and losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


@pytest.mark.parametrize("attention_dropout", [0.0, 1e-9])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_gradients_are_those_of_the_padded_batch(model, batch, attention_dropout, checkpointing):
    batch["labels"][5:] = LABEL_PAD  # rows that fill up the last batch of several processes: no target of theirs counts
    batch["labels"][:2, 0] = LABEL_PAD  # targets that do not count, but are read by those behind them
    packed_model = in_training(model, attention_dropout)
    padded_model = in_training(copy.deepcopy(model), 0.0)
    if checkpointing:
        use_gradient_checkpointing(packed_model)
    losses = []
    for each, rows in ((packed_model, packed_rows(model, batch)), (padded_model, None)):
        losses.append(F.cross_entropy(*target_logits(each, batch, rows)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, ours), theirs in zip(packed_model.named_parameters(), padded_model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_no_layer_computes_the_padding(model, batch):
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, result, name=name: seen.update({name: result.shape[:2]}))
    target_logits(model.train(), batch, packed_rows(model, batch))
    counts = {"prompt": int(batch["attention_mask"].sum()), "target": int((batch["labels"] != LABEL_PAD).sum())}
    counts = {side: (1, (count // MULTIPLE_OF + 1) * MULTIPLE_OF) for side, count in counts.items()}
    assert len(seen) > 20 and counts["prompt"] != counts["target"]
    for name, shape in seen.items():
        of_prompt = name.startswith("encoder") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert shape == counts["prompt" if of_prompt else "target"], name


def test_bf16_changes_no_number_by_converting_frozen_matrices_once(model, batch):
    """Loss and gradients of the adapter are the same, bit for bit; the matrices take half the memory."""
    before = in_training(lora_of(model), 0.0)
    for name, weight in before.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    after = copy.deepcopy(before)
    convert_frozen(after)
    losses = []
    for each in (before, after):
        with torch.autocast(**AUTOCAST):
            losses.append(F.cross_entropy(*target_logits(each, batch, packed_rows(each, batch))))
        losses[-1].backward()
    assert torch.equal(*losses)
    trained = [name for name, weight in after.named_parameters() if weight.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    gradients = [dict(each.named_parameters()) for each in (before, after)]
    for name in trained:
        assert torch.equal(gradients[0][name].grad, gradients[1][name].grad), name
        assert gradients[1][name].dtype == torch.float32
    types = {name.rsplit(".", 2)[-2]: weight.dtype for name, weight in after.named_parameters()}
    assert types["wi_0"] == types["lm_head"] == torch.bfloat16
    assert types["layer_norm"] == types["shared"] == types["relative_attention_bias"] == torch.float32


def test_dora_and_a_tied_embedding_stay_float32_in_bf16(model):
    dora = lora_of(copy.deepcopy(model), use_dora=True)
    convert_frozen(dora)
    assert {weight.dtype for weight in dora.parameters()} == {torch.float32}
    tied = lora_of(copy.deepcopy(model))
    tied.get_output_embeddings().weight = tied.get_input_embeddings().weight
    convert_frozen(tied)
    assert tied.get_input_embeddings().weight.dtype == torch.float32


def test_bf16_casts_a_norms_output_once(model, batch):
    types = []
    model.encoder.block[0].layer[1].layer_norm.register_forward_hook(lambda *given: types.append(given[2].dtype))
    for enabled in (True, False):
        with torch.autocast(**AUTOCAST, enabled=enabled):
            target_logits(model.train(), batch, packed_rows(model, batch))
    assert types == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_in_bf16_is_near_one_in_float32(model, batch, method):
    model = lora_of(model) if method == "lora" else model
    model = in_training(model, 0.0)
    losses = []
    for enabled in (False, True):
        use_fast_training(model, alone=True, autocast=enabled)
        with torch.autocast(**AUTOCAST, enabled=enabled):
            losses.append(F.cross_entropy(*target_logits(model, batch, packed_rows(model, batch))))
    assert losses[0] != losses[1] and losses[0].item() == pytest.approx(losses[1].item(), rel=5e-3)
