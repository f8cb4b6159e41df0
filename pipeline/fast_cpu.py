"""What makes T5 fast on a CPU with the same numbers: norm and GELU in one operation, cheap dropout, kept memory.

`t5.py` applies the kernels to each model it loads, the training loop applies dropout and memory. On a GPU torch's own
operations are used.
"""

import ctypes
import math
import sys

import torch


def use_torch_kernels(model):
    """Let torch compute T5's norm and GELU in one operation each; transformers uses several.

    The same numbers up to the last digits, in a tenth less time. Weights, their names and the config do not change.
    """
    from transformers.activations import NewGELUActivation
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, T5LayerNorm):
                norm = torch.nn.RMSNorm(part.weight.shape, eps=part.variance_epsilon)
                norm.weight = part.weight
                setattr(module, name, norm.train(part.training))
            elif isinstance(part, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh").train(part.training))


def fast_dropout(x, p):
    """Dropout of a tensor on the CPU with cheap random numbers; torch's own take up to a sixth of a step there.

    x: floats of any shape. p: probability above 0 and below 1. Each element uses 16 bits of a 64-bit random number, so
    p is rounded to 1/65536.
    """
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty_like(x)  # floats: multiplying by them is several times as fast as selecting by booleans
    torch.ge(bits[: x.numel()].view(x.shape), dropped - 2**15, out=kept)
    return x * kept.mul_(2**16 / (2**16 - dropped))


class FastDropout(torch.nn.Dropout):
    """torch's Dropout, computed by `fast_dropout` on the CPU."""

    def forward(self, x):
        return fast_dropout(x, self.p) if self.training and x.is_cpu and 0 < self.p < 1 else super().forward(x)


def fast_dropout_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=1.0, position_bias=None, **options
):
    """An attention function for transformers: SDPA, and in training on the CPU its formula with `fast_dropout`.

    query: (batch, heads, queries, d). key, value: (batch, heads, keys, d). attention_mask: None or booleans, (batch, 1,
    queries or 1, keys). position_bias: (1, heads, queries, keys). Returns (batch, queries, heads, d) and None.

    In float32 only: with bf16 weights a run would take 150 MB more at its peak, and bf16 is used to save memory.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    in_float32_on_cpu = query.is_cpu and query.dtype == torch.float32
    if not (0 < dropout < 1 and in_float32_on_cpu and position_bias is not None):
        options |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    scores = torch.add(position_bias, query @ key.transpose(2, 3), alpha=scaling)
    if attention_mask is None and module.is_causal:  # SDPA gets a flag in place of a mask
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores = scores + torch.where(attention_mask, 0.0, torch.finfo(scores.dtype).min)
    return (fast_dropout(scores.softmax(-1), dropout) @ value).transpose(1, 2), None


def use_fast_dropout(model):
    """Compute every dropout of a T5 model or PeftModel by `fast_dropout`, including the adapter's and attention's."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register("fast_dropout", fast_dropout_attention)
    AttentionMaskInterface.register("fast_dropout", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel):  # transformers 5.17 does not set encoder and decoder by itself
            module.set_attn_implementation("fast_dropout")
        for name, part in module.named_children():
            if type(part) is torch.nn.Dropout:
                setattr(module, name, FastDropout(part.p).train(part.training))


def keep_memory():
    """Let glibc keep freed memory for the next step.

    By default it returns gradients to the system after each step and requests them again, which takes up to a tenth of
    a step on the CPU. On other systems than Linux with glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks, which are unmapped when freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap unless more than 2 GB at its end are free
