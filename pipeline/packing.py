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
    length) or (1, 1, length, length), the keys that each query may attend to. batch, length: of the padded batch.
    """

    places: torch.Tensor
    mask: torch.Tensor
    batch: int
    length: int

    def pack(self, padded, fill=0):
        """(batch, length, ...) -> (1, tokens, filled up to MULTIPLE_OF, ...)."""
        tokens = padded.flatten(0, 1)[self.places]
        more = -len(tokens) % MULTIPLE_OF
        return F.pad(tokens, (0, 0) * (tokens.ndim - 1) + (0, more), value=fill).unsqueeze(0)

    def unpack(self, packed):
        """(1, heads, tokens, d) -> (batch, heads, length, d), 0 at the padding."""
        heads, _, d = packed.shape[1:]
        tokens = packed[0].transpose(0, 1).flatten(1)[: len(self.places)]
        padded = tokens.new_zeros(self.batch * self.length, heads * d).index_copy(0, self.places, tokens)
        return padded.view(self.batch, self.length, heads, d).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """The rows of a training batch: of its prompts, and of its targets."""

    sources: Rows
    targets: Rows

    def around(self, attention):
        """(Rows of the queries, Rows of the keys) of a T5Attention."""
        queries = self.targets if attention.is_decoder else self.sources
        return queries, self.targets if attention.is_causal else self.sources


def find_rows(batch, label_pad):
    """The Packed of a training batch of the collate function, on the CPU."""
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    causal = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool).tril()
    sources = Rows(mask.flatten().nonzero().squeeze(1), mask[:, None, None], *mask.shape)
    targets = Rows((labels != label_pad).flatten().nonzero().squeeze(1), causal[None, None], *labels.shape)
    return Packed(sources, targets)
