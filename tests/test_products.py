"""The fast products, gradients and attention of the CPU compute what torch's own do, for every shape that a run makes.

oneDNN is used whether or not it is the faster one on the machine that runs the tests.
"""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional as F

from helper_functions import LABEL_PAD, TweetQADataset, answer, build_collate_fn, load_model_and_tokenizer
from pipeline import fast_cpu
from pipeline.fast_cpu import FastEmbedding, FastLinear, attend, use_fast_training
from pipeline.t5 import packed_rows, target_logits


@pytest.fixture(autouse=True)
def with_onednn(monkeypatch):
    monkeypatch.setattr(fast_cpu, "onednn_is_faster", lambda: True)


@pytest.fixture
def model(standin):
    return load_model_and_tokenizer(str(standin))[0]


@pytest.fixture
def plain(standin, monkeypatch):
    """The same model without any of it but norm and GELU."""
    with monkeypatch.context() as patch:
        patch.setattr(fast_cpu, "onednn_is_faster", lambda: False)
        model = load_model_and_tokenizer(str(standin))[0]
    model.set_attn_implementation("sdpa")
    return model


def batch_of(rows, tokenizer):
    data = TweetQADataset(rows, tokenizer)
    batch = build_collate_fn(tokenizer)([data[index] for index in range(len(data))])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def fast_linear(inputs, outputs):
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    layer.__class__ = FastLinear
    return layer


def gradients_in_double(x, weight, upstream):
    """(result, gradient of x, gradient of the weight) by autograd through torch's linear in float64."""
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    result = F.linear(x, weight)
    result.backward(upstream.double())
    return result, x.grad, weight.grad


SHAPES = {
    "prompt": ((8, 68, 512), 1024),
    "one query": ((40, 1, 512), 384),
    "one row": ((1, 1, 384), 512),
    "targets to the vocabulary": ((45, 128), 2000),
    "adapter down": ((8, 30, 512), 8),
    "adapter up": ((8, 30, 8), 512),
    "nothing": ((0, 512), 64),
    "a batch of nothing": ((0, 7, 512), 64),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_linear_layer_and_its_gradients(name, threads):
    torch.manual_seed(0)
    (shape, outputs), before = SHAPES[name], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = fast_linear(shape[-1], outputs)
        x = torch.randn(shape, requires_grad=True)
        result = layer(x)
        upstream = torch.randn_like(result)
        result.backward(upstream)
        expected = gradients_in_double(x, layer.weight, upstream)
    finally:
        torch.set_num_threads(before)
    assert result.shape == (*shape[:-1], outputs)
    for ours, theirs in zip((result, x.grad, layer.weight.grad), expected, strict=True):
        largest = theirs.abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5 * largest)


def test_inputs_that_are_views_and_gradients_that_are_expanded():
    torch.manual_seed(0)
    layer = fast_linear(64, 96)
    whole = torch.randn(64, 20, 6)
    for x in (whole.permute(2, 1, 0), whole.permute(1, 2, 0)[::2], whole.permute(2, 1, 0)[:, 3:9]):
        x = x.detach().requires_grad_()
        layer.weight.grad = None
        layer(x).sum().backward()  # the gradient of a sum is one number, expanded
        expected = gradients_in_double(x, layer.weight, torch.ones(*x.shape[:-1], 96))
        for ours, theirs in zip((layer(x), x.grad, layer.weight.grad), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def test_a_frozen_layer_computes_no_gradient_of_its_weight(monkeypatch):
    sizes, product = [], fast_cpu.onednn_product
    monkeypatch.setattr(fast_cpu, "onednn_product", lambda x, w: sizes.append((*x.shape, *w.shape)) or product(x, w))
    layer, x = fast_linear(16, 24), torch.randn(5, 16, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert sizes == [(5, 16, 24, 16), (5, 24, 16, 24)] and layer.weight.grad is None


def test_other_types_and_autocast_are_torchs_own(monkeypatch):
    monkeypatch.setattr(fast_cpu, "onednn_product", None)  # would raise
    layer, x = fast_linear(16, 24), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    double = copy.deepcopy(layer).double()
    assert torch.equal(double(x.double()), F.linear(x.double(), double.weight))


def test_float32_stays_float32_whatever_the_processor(monkeypatch):
    """The settings of torch that let a float32 product be computed in bfloat16 are never changed."""
    layer, x = fast_linear(512, 512), torch.randn(64, 512)
    error = (layer(x).double() - F.linear(x.double(), layer.weight.double())).abs().max() / layer(x).abs().max()
    assert error < 1e-5  # bfloat16 has an error of 4e-3
    assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")


def test_the_loss_and_gradients_of_a_whole_model(model, plain, tokenizer, rows):
    """Of a batch of several lengths, and of a single example; in training, with the probability of dropout at 0."""
    use_fast_training(model, alone=True)
    kinds = {type(module) for module in model.modules()}
    assert {FastLinear, FastEmbedding} <= kinds and torch.nn.Linear not in kinds
    for some in (rows[:8], rows[8:9]):
        batch = batch_of(some, tokenizer)
        for each in (model, plain):
            each.zero_grad()
            for module in each.train().modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif type(module).__name__ == "T5Attention":
                    module.dropout = 0.0
        ours = F.cross_entropy(*target_logits(model, batch, packed_rows(model, batch)))
        theirs = plain(**batch).loss
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        ours.backward()
        theirs.backward()
        for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_output_layer_sees_the_targets_tokens_alone(model, tokenizer, rows):
    batch, seen = batch_of(rows[:8], tokenizer), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    logits, labels = target_logits(model, batch, packed_rows(model, batch))
    counted = batch["labels"] != LABEL_PAD
    tokens = int(counted.sum())
    assert logits.shape == (-(-tokens // 16) * 16, model.config.vocab_size) and len(logits) < counted.numel()
    assert seen == [(1, *logits.shape)]
    assert torch.equal(labels[:tokens], batch["labels"][counted]) and (labels[tokens:] == LABEL_PAD).all()
    whole, with_padding = target_logits(model, batch)  # as on a GPU
    assert len(whole) == counted.numel() and torch.equal(with_padding, batch["labels"].flatten())
    torch.testing.assert_close(whole[with_padding != LABEL_PAD], logits[:tokens])
    assert model(**batch).logits.shape[:2] == counted.shape  # afterwards the model is as before


def test_the_embedding_adds_up_its_gradient_over_passes_and_steps():
    """Also after a step whose gradient was not finite, after which clipping has made every row NaN."""
    torch.manual_seed(0)
    ours = torch.nn.Embedding(50, 8)
    theirs = copy.deepcopy(ours)
    ours.__class__, ours.buffer = FastEmbedding, fast_cpu._Buffer()
    places = set()
    for step in range(5):
        for ids in torch.randint(0, 50, (2, 3, 4)):
            for each in (ours, theirs):
                (each(ids) ** 2).sum().backward()
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        if step == 2:
            ours.weight.grad.mul_(float("nan"))
        places.add(ours.weight.grad.data_ptr())
        for each in (ours, theirs):
            each.weight.grad = None
    assert len(places) == 1
    with torch.no_grad():
        assert torch.equal(ours(ids), theirs(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beams_share_their_examples_keys_and_one_query_goes_by_plain_products(model, dtype):
    torch.manual_seed(0)
    module = model.decoder.block[0].layer[1].EncDecAttention
    examples, beams, heads, keys, size = 3, 5, 4, 11, 16
    query = torch.randn(examples * beams, heads, 1, size).to(dtype)
    key, value = torch.randn(2, examples, heads, keys, size).to(dtype)
    mask = torch.ones(examples, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., 6:] = mask[2, ..., 2:] = False
    mask, bias = mask.repeat_interleave(beams, 0), torch.randn(1, heads, 1, keys)
    shared, _ = attend(module, query, key, value, mask, position_bias=bias)
    repeated, _ = attend(
        module, query, key.repeat_interleave(beams, 0), value.repeat_interleave(beams, 0), mask, position_bias=bias
    )
    query, key, value = query.float(), *(states.float().repeat_interleave(beams, 0) for states in (key, value))
    expected = (query @ key.transpose(2, 3) + bias).masked_fill(~mask, float("-inf")).softmax(-1) @ value
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for result in (shared, repeated):
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected.transpose(1, 2).to(dtype), **close)


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_the_answers_of_a_plain_model(model, plain, tokenizer, rows, beams):
    questions, tweets = ([row[column] for row in rows] for column in ("Question", "Tweet"))
    given = {"beams": beams, "max_target_len": 10, "batch_size": 7, "return_score": True}
    answers, scores = answer(model, tokenizer, "cpu", questions, tweets, **given)
    expected, expected_scores = answer(plain, tokenizer, "cpu", questions, tweets, **given)
    assert answers == expected and len(set(answers)) > 5
    assert scores == pytest.approx(expected_scores, abs=1e-4)


def test_four_threads_answer_at_once(model, tokenizer, rows):
    questions, tweets = ([row[column] for row in rows[:12]] for column in ("Question", "Tweet"))

    def ask(_):
        return answer(model, tokenizer, "cpu", questions, tweets, beams=3, max_target_len=6, return_score=True)

    alone = ask(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(result == alone for result in pool.map(ask, range(8)))
