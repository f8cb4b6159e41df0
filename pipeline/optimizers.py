"""How weights are updated: the optimizer, the learning rate's schedule, and a step that skips what is not finite.

Used by the training loop. To change the optimizer, edit `build_optimizer`; nothing else depends on which one it is.
"""

import math

import torch

from pipeline.arguments import WARMUP, WEIGHT_DECAY


def build_optimizer(
    model, lr, total_steps, *, optim="adamw", weight_decay=WEIGHT_DECAY, warmup_steps=WARMUP, lr_scheduler_type="linear"
):
    """(optimizer of the trainable weights, schedule of the learning rate, to be stepped after each optimizer step).

    The keywords are the flags of the same names. Any torch optimizer can be put here: `step_if_finite` below skips its
    bad steps, and the memory estimate measures its state.
    """
    from transformers import Adafactor, get_scheduler  # imports peft, which takes seconds

    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim == "adafactor":  # without its own learning rate: the schedule's applies, as with AdamW
        optimizer = Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False)
    else:  # fused: one kernel for all weights in place of several operations per weight
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    return optimizer, get_scheduler(lr_scheduler_type, optimizer, warmup(warmup_steps, total_steps), total_steps)


def warmup(warmup_steps, total_steps):
    """The number of steps in which the learning rate rises. warmup_steps: that number or, below 1, their share."""
    return int(warmup_steps) if warmup_steps >= 1 else math.ceil(warmup_steps * total_steps)


def step_if_finite(optimizer, finite, scaler=None):
    """Make the optimizer's step, or leave weights and optimizer state unchanged if `finite` is false.

    finite: a boolean tensor, whether loss and gradients are finite. scaler: accelerate's GradScaler, which skips the
    step by itself, or None.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper, or torch's own
    if scaler is None:
        if getattr(inner, "_step_supports_amp_scaling", False):
            # torch's fused optimizers read this in their kernel, as GradScaler uses it; an `if` would wait for the
            # device in each step.
            inner.found_inf = 1.0 - finite.float()
        elif not finite:
            inner.zero_grad(set_to_none=True)  # weights without a gradient are not touched
    optimizer.step()
