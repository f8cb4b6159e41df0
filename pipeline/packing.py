"""A batch without its padding: in training on a CPU the layers of a T5 see the real tokens of all its rows, one after
another, and attention alone sees rows.

Rows in random order are a fifth padding in TweetQA's prompts, and half in its answers: every matrix product, norm and
dropout would compute it. Used by `t5.py` and by `attend` in `fast_cpu.py`.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# The number of tokens is filled up to a multiple of it: oneDNN compiles and keeps a kernel for each size that it meets.
MULTIPLE_OF = 16


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a padded batch are, on one side of the model.

    places: int64 (tokens,), the positions of the real tokens in the flattened batch. mask: booleans, (batch, 1, 1,
    length) or (1, 1, length, length), the keys that each query may attend to. shape: (batch, heads, length) of the
    padded batch in attention.
    to_rows, to_tokens: int64 (batch * heads * length,) and (filled up tokens * heads,), where attention takes the
    vectors of rows and heads from, and where it puts them back. Padding is taken from a token that fills up.
    """

    places: torch.Tensor
    mask: torch.Tensor
    shape: tuple
    to_rows: torch.Tensor
    to_tokens: torch.Tensor

    def pack(self, padded, fill=0):
        """(batch, length) -> (1, tokens, filled up to MULTIPLE_OF)."""
        tokens = padded.flatten()[self.places]
        return F.pad(tokens, (0, self._filled - len(tokens)), value=fill).unsqueeze(0)

    def pack_heads(self, padded):
        """(batch, heads, length, d) -> (1, tokens, heads, d), 0 where tokens are filled up."""
        return _Pack.apply(padded.reshape(-1, padded.shape[-1]), self).view(1, self._filled, -1, padded.shape[-1])

    def unpack_heads(self, packed):
        """(1, heads, tokens, d) -> (batch, heads, length, d). What is at the padding has no meaning."""
        vectors = packed.transpose(1, 2).reshape(-1, packed.shape[-1])  # a view: the layers put tokens before heads
        return _Unpack.apply(vectors, self).view(*self.shape, -1)

    @property
    def _filled(self):
        return len(self.to_tokens) // self.shape[1]

    def _vectors_of_tokens(self, vectors):
        """(batch * heads * length, d) -> (filled up tokens * heads, d), 0 where tokens are filled up."""
        taken = vectors.index_select(0, self.to_tokens)
        taken[len(self.places) * self.shape[1] :] = 0
        return taken


class _Unpack(torch.autograd.Function):
    """Each token's vectors go to one place, so the gradient of a token is taken from there."""

    @staticmethod
    def forward(ctx, vectors, rows):
        ctx.rows = rows
        return vectors.index_select(0, rows.to_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.rows._vectors_of_tokens(gradient), None


class _Pack(torch.autograd.Function):
    """The other way. The padding's gradient is that of a token that fills up, which is 0: no loss depends on it."""

    @staticmethod
    def forward(ctx, vectors, rows):
        ctx.rows = rows
        return rows._vectors_of_tokens(vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.rows.to_rows), None


@dataclass(frozen=True)
class Packed:
    """The rows of a training batch: of its prompts, and of its targets."""

    sources: Rows
    targets: Rows

    def around(self, attention):
        """(Rows of the queries, Rows of the keys) of a T5Attention."""
        queries = self.targets if attention.is_decoder else self.sources
        return queries, self.targets if attention.is_causal else self.sources


def find_rows(batch, label_pad, heads):
    """The Packed of a training batch of the collate function, on the CPU. heads: of the model's attention."""
    real, length = batch["attention_mask"].bool(), batch["labels"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    counts = batch["labels"] != label_pad
    targets = counts.flip(1).cumsum(1).flip(1) > 0  # those before one that counts are read too
    return Packed(_rows(real, real[:, None, None], heads), _rows(targets, causal[None, None], heads))


def _rows(real, mask, heads):
    """The Rows of a batch. real: booleans, (batch, length), False at the padding. mask: see `Rows`. heads: a count."""
    (batch, length), head = real.shape, torch.arange(heads)
    places = real.flatten().nonzero().squeeze(1)
    filled = (len(places) // MULTIPLE_OF + 1) * MULTIPLE_OF  # at least one token more, which stands for the padding
    token = torch.where(real.flatten(), real.flatten().cumsum(0) - 1, len(places)).view(batch, 1, length)
    to_rows = token * heads + head[:, None]
    to_tokens = torch.zeros(filled, heads, dtype=torch.int64)
    to_tokens[: len(places)] = (places[:, None] // length * heads + head) * length + places[:, None] % length
    return Rows(places, mask, (batch, heads, length), to_rows.flatten(), to_tokens.flatten())
