"""What makes T5 fast on a CPU with the same float32 numbers, up to rounding: products by oneDNN where that is faster,
norm and GELU in one operation, attention by plain products, cheap dropout, an embedding gradient in a buffer that
stays, and memory that is kept.

`t5.py` applies the kernels to each model it loads, the training loop those for training. On a GPU torch's own
operations are used.
"""

import ctypes
import math
import sys
import time
from functools import lru_cache

import torch

MARGIN = 1.2  # how much faster oneDNN has to be: with less, the choice could differ from one start to the next


# --------------------------------------------------------------------------------------------------------- products


def onednn_product(x, weight):
    """x @ weight.T in float32 by oneDNN. x: (rows, in). weight: (out, in). Both can be transposed views.

    torch sends float32 products to MKL, which does not use AVX-512 on AMD's processors. This operation computes in
    float32 on every CPU, unlike torch.backends.mkldnn.matmul.fp32_precision = "bf16".
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@lru_cache(maxsize=1)
def onednn_is_faster():
    """Whether oneDNN multiplies matrices of a T5's size MARGIN times as fast as torch's own product: both are tried.

    The processor time of one thread is compared, and the shortest of many tries: on a busy machine the answer must be
    the same as on a quiet one, since the last digits of a run depend on it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, threads = torch.ones(128, 512), torch.ones(512, 512), torch.get_num_threads()
    calls = {"torch": lambda: torch.nn.functional.linear(x, weight), "oneDNN": lambda: onednn_product(x, weight)}
    seconds = dict.fromkeys(calls, math.inf)
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(30):
                for name, call in calls.items():
                    start = time.thread_time()
                    call()
                    seconds[name] = min(seconds[name], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return seconds["oneDNN"] * MARGIN < seconds["torch"]


class _Product(torch.autograd.Function):
    """`onednn_product` with both gradients by oneDNN too. A frozen weight's gradient is not computed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return onednn_product(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = onednn_product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        return of_x, onednn_product(gradient.t(), x.t()) if ctx.needs_input_grad[1] else None


class FastLinear(torch.nn.Linear):
    """torch's Linear without bias, on the CPU in float32 by `onednn_product`; in all other cases torch's own."""

    def forward(self, x):
        weight = self.weight
        plain = x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.numel() and self.bias is None
        if not plain or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        product = _Product.apply if torch.is_grad_enabled() else onednn_product
        return product(rows, weight).view(*x.shape[:-1], -1)


def use_fast_products(model):
    """Compute the products of all linear layers by oneDNN, if that is faster here, an adapter's layers included."""
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = FastLinear  # its weight, name and hooks stay as they are


def use_fast_kernels(model):
    """Let torch compute T5's norm and GELU in one operation each, attention by `attend`, and products by oneDNN.

    The same numbers up to the last digits. Weights, their names and the config do not change.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.activations import NewGELUActivation
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel):  # transformers 5.17 does not set encoder and decoder by itself
            module.set_attn_implementation(ATTENTION)
        if type(module).__name__ in ATTENTIONS:
            module.register_forward_pre_hook(bias_of_rows, with_kwargs=True)
        for name, part in module.named_children():
            if isinstance(part, T5LayerNorm):
                norm = FastNorm(part.weight.shape, eps=part.variance_epsilon)
                norm.weight = part.weight
                setattr(module, name, norm.train(part.training))
            elif isinstance(part, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh").train(part.training))
    use_fast_products(model)


class FastNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, which is T5's norm in one operation. Under autocast on the CPU its output is cast once, in place
    of once by each of the matrices that read it."""

    def forward(self, x):
        normed = super().forward(x)
        return normed.to(torch.get_autocast_dtype("cpu")) if x.is_cpu and torch.is_autocast_enabled("cpu") else normed


# -------------------------------------------------------------------------------------------------------- attention

ATTENTION = "fast_cpu"  # its name among transformers' attention functions
PACKED = ("t5", "mt5")  # the model types whose attention works on packed batches
ATTENTIONS = ("T5Attention", "MT5Attention")


def attend(module, query, key, value, attention_mask, packed=None, **options):
    """An attention function for transformers: `attend_to_rows`, also where the batch is packed.

    packed: None, or a `packing.Packed`: query, key and value are then (1, heads, tokens, d).
    """
    if packed is None:
        return attend_to_rows(module, query, key, value, attention_mask, **options)
    rows, keys = packed.around(module)
    query, key, value = rows.unpack_heads(query), keys.unpack_heads(key), keys.unpack_heads(value)
    result, _ = attend_to_rows(module, query, key, value, keys.mask, **options)
    return rows.pack_heads(result.transpose(1, 2)), None


def bias_of_rows(attention, given, options):
    """A hook before each of ATTENTIONS: where the batch is packed, its position bias is that of rows."""
    if options.get("packed") is not None and options.get("position_bias") is None:
        queries, keys = options["packed"].around(attention)
        bias = torch.zeros(1, 1, 1, 1)
        if attention.has_relative_attention_bias:
            bias = attention.compute_bias(queries.shape[2], keys.shape[2])
        options = options | {"position_bias": bias}
    return given, options


def attend_to_rows(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=1.0,
    position_bias=None,
    **options,
):
    """SDPA, and on the CPU its formula by plain products where that is faster: in training, for dropout by
    `fast_dropout`, and with one query, where SDPA's kernel is slow.

    query: (batch, heads, queries, d). key, value: (batch, heads, keys, d). attention_mask: None or booleans, (batch, 1,
    queries or 1, keys). position_bias: (1, heads, queries, keys).
    Returns (batch, queries, heads, d) and None.

    In a beam search the batch of key and value can be that of the examples: their beams share them, with nothing
    repeated.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    beams = len(query) // max(1, len(key))
    plain = query.is_cpu and position_bias is not None
    if not (plain and (0 < dropout < 1 or query.shape[2] == 1)):
        options |= {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        if beams > 1:
            key, value = (states.repeat_interleave(beams, 0) for states in (key, value))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    if beams > 1:  # (examples, heads, beams, d): the beams are the queries of their example
        query = query.view(len(key), beams, *query.shape[1:]).squeeze(3).transpose(1, 2)
        attention_mask = attention_mask[::beams] if attention_mask is not None else None
    scores = torch.add(position_bias, query @ key.transpose(2, 3), alpha=scaling)
    if attention_mask is None and module.is_causal and query.shape[2] > 1 and beams == 1:  # SDPA gets a flag instead
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        scores = scores + torch.where(attention_mask, scores.new_zeros(()), torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(value.dtype)  # in bf16 the scores are float32 where the bias is
    result = ((fast_dropout(weights, dropout) if dropout else weights) @ value).transpose(1, 2)
    return result.reshape(-1, 1, *result.shape[2:]) if beams > 1 else result, None


def shares_keys(model, encoded):
    """Whether the beams of an example can share its encoder's keys and values: see `attend`."""
    return encoded.is_cpu and model.config._attn_implementation == ATTENTION


# ---------------------------------------------------------------------------------------------------------- training


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


class _Lookup(torch.autograd.Function):
    """Rows of an embedding, whose gradient is added to the weight's own, in a buffer that stays from step to step."""

    @staticmethod
    def forward(ctx, ids, weight, buffer):
        ctx.ids, ctx.weight, ctx.buffer = ids, weight, buffer
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        ids, weight = ctx.ids.flatten(), ctx.weight
        if weight.grad is None:
            weight.grad = ctx.buffer.cleared(weight)
        weight.grad.index_add_(0, ids, gradient.flatten(0, -2))
        ctx.buffer.used.append(ids)
        return None, None, None


class _Buffer:
    """The gradient of an embedding. Only the rows that a step has used are set to 0 for the next one: to fill all of
    flan-t5-small's takes a tenth of a step, twice. So an optimizer may scale it, and write nothing else into it."""

    def __init__(self):
        self.gradient, self.used = None, []

    def cleared(self, weight):
        """All zeros, to be the gradient of the next step."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(weight)
        elif self.used:
            rows = torch.cat(self.used)
            if self.gradient[rows[0]].isnan().any():  # clipping has multiplied every row by a norm that is not finite
                self.gradient.zero_()
            self.gradient.index_fill_(0, rows, 0.0)
        self.used = []
        return self.gradient


class FastEmbedding(torch.nn.Embedding):
    """torch's Embedding; in training on the CPU its gradient goes through `buffer`, a `_Buffer`."""

    buffer = None

    def forward(self, ids):
        if self.buffer and self.training and torch.is_grad_enabled() and ids.is_cpu and ids.numel():
            return _Lookup.apply(ids, self.weight, self.buffer)
        return super().forward(ids)


def use_fast_training(model, alone, autocast=False):
    """Compute every dropout of a T5 model or PeftModel by `fast_dropout`, an adapter's products by oneDNN, and the
    gradient of the embedding, if it is trained and not that of the output layer too, in a buffer that stays.

    alone: whether this is the only process: others wait for a gradient that autograd itself has made. autocast: whether
    the CPU computes the products in bfloat16: frozen matrices are then converted once, and not in each step.
    """
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is torch.nn.Dropout:
                setattr(module, name, FastDropout(part.p).train(part.training))
    use_fast_products(model)
    weight = model.get_input_embeddings().weight
    if alone and weight.requires_grad and weight is not model.get_output_embeddings().weight:
        buffer = _Buffer()
        for module in model.modules():
            if type(module) in (torch.nn.Embedding, FastEmbedding) and module.weight is weight:
                module.__class__, module.buffer = FastEmbedding, buffer
    if alone and autocast:
        convert_frozen(model)


def convert_frozen(model):
    """Convert the frozen matrices of a LoRA model to bfloat16, as autocast does in each step: the same numbers in half
    the memory. An adapter's float32 input is not cast to float32 and back.

    Norms, embeddings and a matrix that is the embedding too stay as they are, and so does a model with DoRA, which
    computes each row's length from the matrices.
    """
    if any(getattr(module, "lora_magnitude_vector", None) for module in model.modules()):
        return
    shared = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and module.weight is not shared:
            module.weight.data = module.weight.data.to(torch.bfloat16)
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # peft's


def keep_memory():
    """Let glibc keep freed memory for the next step.

    By default it returns gradients to the system after each step and requests them again, which takes up to a tenth of
    a step on the CPU. On other systems than Linux with glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks, which are unmapped when freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap unless more than 2 GB at its end are free
