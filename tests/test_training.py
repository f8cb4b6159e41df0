"""One pass of the training loop: steps, scaling, clipping, decay and schedule are what the documentation says."""

import functools
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from helper_functions import TweetQADataset, build_collate_fn, load_model_and_tokenizer
from pipeline.resume import LoopState
from tweet_qa_main import Prepared, build_optimizer, train_epoch, train_step
from tweet_qa_main_lora import add_lora


def load(folder, lora=False):
    torch.manual_seed(0)
    model = load_model_and_tokenizer(str(folder))[0]
    if lora:
        options = {"lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q", "v"]}
        model = add_lora(model, Namespace(**options, base_dtype="fp32", use_rslora=False, use_dora=False))
    return model


def train_once(calm, tokenizer, rows, batch_size, accumulate, lora=False):
    """The model after one epoch in the order of the rows, and the epoch's rows and mean loss."""
    model = load(calm, lora)
    loader = DataLoader(TweetQADataset(rows, tokenizer), batch_size, collate_fn=build_collate_fn(tokenizer))
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    optimizer, schedule = build_optimizer(model, lr=1e-3, total_steps=3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps, loss = train_epoch(Prepared(model, loader, optimizer, schedule, hollow=None), accelerator, LoopState())
    return model, steps, loss


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (3, 3)])
def test_accumulated_batches_make_the_step_of_one_large_batch(calm, tokenizer, rows, batch_size, accumulate, lora):
    """Also for the last group, which is shorter, and though the batches hold different numbers of target tokens."""
    n = batch_size * accumulate * 2 + batch_size + 1  # two whole groups, then one of a whole and a part batch
    large, large_steps, large_loss = train_once(calm, tokenizer, rows[:n], batch_size * accumulate, 1, lora)
    small, small_steps, small_loss = train_once(calm, tokenizer, rows[:n], batch_size, accumulate, lora)
    assert len(large_steps) == len(small_steps) == 3
    assert small_loss == pytest.approx(large_loss, rel=1e-5)
    for one, other in zip(large_steps, small_steps, strict=True):
        assert one == pytest.approx(other, rel=2e-4)
    start = dict(load(calm, lora).named_parameters())
    for (name, one), other in zip(large.named_parameters(), small.parameters(), strict=True):
        moved = (one - start[name]).abs().max().item()
        if one.requires_grad:
            assert moved > 0, f"{name} was not trained"
            torch.testing.assert_close(one, other, rtol=0, atol=0.05 * 1e-3, msg=f"{name} differs")
        else:
            assert moved == 0, f"{name} is frozen, but moved"


def test_losses_are_means_over_target_tokens(calm, tokenizer, rows):
    _, steps, mean_loss = train_once(calm, tokenizer, rows[:12], 8, 1)
    model = load(calm)
    batch = build_collate_fn(tokenizer)([TweetQADataset(rows[:8], tokenizer)[i] for i in range(8)])
    first = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert steps[0]["loss"] == pytest.approx(first.item(), rel=1e-5)
    tokens = [sum(map(len, TweetQADataset(part, tokenizer).labels)) for part in (rows[:8], rows[8:12])]
    expected = (steps[0]["loss"] * tokens[0] + steps[1]["loss"] * tokens[1]) / sum(tokens)
    assert mean_loss == pytest.approx(expected, rel=1e-6)


def test_gradients_are_clipped_to_norm_1(calm, tokenizer, rows):
    model = load(calm)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)  # makes gradients far above 1
    loader = DataLoader(TweetQADataset(rows[:8], tokenizer), 8, collate_fn=build_collate_fn(tokenizer))
    accelerator = Accelerator()
    optimizer, schedule = build_optimizer(model, lr=1e-3, total_steps=1)
    used = []
    optimizer.register_step_pre_hook(
        lambda *_: used.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps, _ = train_epoch(Prepared(model, loader, optimizer, schedule, hollow=None), accelerator, LoopState())
    assert steps[0]["grad_norm"] > 5  # what is reported is the norm before clipping
    assert used == [pytest.approx(1.0, rel=1e-3)]


@pytest.mark.parametrize("lora", [False, True])
def test_norms_are_not_decayed_and_every_trained_weight_is_optimized_once(calm, lora):
    model = load(calm, lora)
    optimizer, _ = build_optimizer(model, lr=1e-3, total_steps=10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimized = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in optimized) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert {name for name, decay in optimized if decay == 0} == {n for n, _ in optimized if "norm" in n}
    assert all("lora_" in name for name, _ in optimized) == lora


def test_the_learning_rate_warms_up_over_6_percent_and_falls_to_0():
    optimizer, schedule = build_optimizer(torch.nn.Linear(2, 2), lr=1.0, total_steps=100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:7] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6:] == pytest.approx([1 - i / 94 for i in range(95)])


# ------------------------------------------------------------------------------------------- the optimizer's contract

OPTIMIZERS = {
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=1e-2, fused=True),
    "AdamW, not fused": lambda weights: torch.optim.AdamW(weights, lr=1e-2, fused=False),
    "SGD with momentum": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "torch's Adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-2, weight_decay=0.01),
    "--optim adafactor": lambda weights: build_optimizer(holding(weights), 1e-2, 10, optim="adafactor", warmup_steps=0)[
        0
    ],
}


def holding(weights):
    """A module with these weights."""
    module = torch.nn.Module()
    module.weights = torch.nn.ParameterList(weights)
    return module


def state_of(optimizer):
    """Its tensors, as they are now."""
    states = [sorted(state.items()) for state in optimizer.state.values()]
    return [value.clone() for state in states for _, value in state if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_another_optimizer_skips_a_step_that_is_not_finite(calm, tokenizer, rows, kind):
    """Between two finite steps: weights and the optimizer's own state stay as they were, to the last bit."""
    loader = DataLoader(TweetQADataset(rows[:12], tokenizer), 4, collate_fn=build_collate_fn(tokenizer))
    model, accelerator = load(calm), Accelerator()
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    prepared = Prepared(model, loader, optimizer, schedule, hollow=None)

    def step(batch):
        """(whether the loss was finite, whether weights are the same, whether the optimizer's state is)"""
        weights, state = [weight.detach().clone() for weight in model.parameters()], state_of(optimizer)
        loss = train_step(prepared, [(batch, (batch["labels"] != -100).sum())], accelerator)[0]
        same = all(map(torch.equal, weights, model.parameters()))
        now = state_of(optimizer)
        return loss.isfinite().item(), same, len(state) == len(now) and all(map(torch.equal, state, now))

    one, two, three = loader
    assert step(one) == (True, False, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", spoilt(type(model).forward))
        assert step(two) == (False, True, True)
    assert step(three) == (True, False, False)
    assert all(weight.isfinite().all() for weight in model.parameters())


def spoilt(forward):
    """The forward pass of a model, with logits that are not numbers."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * float("nan")
        return output

    return wrapped
