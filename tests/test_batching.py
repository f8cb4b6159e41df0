"""The order of training is random and repeats by seed, and an evaluation does not depend on its batches."""

import random

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from helper_functions import (
    EpochSampler,
    TweetQADataset,
    build_collate_fn,
    build_loader,
    by_length,
    evaluate,
    load_model_and_tokenizer,
    load_tweet_qa,
    train_loader,
)

LENGTHS = st.lists(st.tuples(st.integers(8, 256), st.integers(2, 32)), min_size=1, max_size=300)


class Lengths(torch.utils.data.Dataset):
    """What the sampler looks at: examples of given lengths."""

    def __init__(self, lengths):
        self.input_ids = [[1] * source for source, _ in lengths]
        self.labels = [[1] * target for _, target in lengths]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return index


def order(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@given(lengths=LENGTHS, batch_size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 50))
@settings(max_examples=200)
def test_an_epoch_is_every_example_exactly_once_and_repeats_by_seed(lengths, batch_size, seed, epoch):
    data = Lengths(lengths)
    first = order(EpochSampler(len(data), seed), epoch)
    assert sorted(first) == list(range(len(data)))
    assert order(EpochSampler(len(data), seed), epoch) == first


def test_the_order_differs_by_epoch_and_by_seed():
    rng = random.Random(0)
    data = Lengths([(rng.randint(8, 256), rng.randint(2, 32)) for _ in range(500)])
    orders = [order(EpochSampler(len(data), seed), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6
    batches = [{tuple(sorted(o[n : n + 8])) for n in range(0, 500, 8)} for o in orders]
    assert all(len(a & b) < 3 for n, a in enumerate(batches) for b in batches[:n])  # not the same batches rearranged


@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
    done=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=50)
def test_an_epoch_that_is_resumed_goes_on_in_the_same_order(lengths, batch_size, epoch, done, seed):
    def loader():
        made = Accelerator().prepare(train_loader(Lengths(lengths), batch_size, torch.tensor, seed))
        made.set_epoch(epoch)
        return made

    whole = [batch.tolist() for batch in loader()]
    done = min(done, len(whole) - 1)
    resumed = loader()
    rest = [batch.tolist() for batch in (skip_first_batches(resumed, done) if done else resumed)]
    assert rest == whole[done:]


def test_predictions_do_not_depend_on_evaluation_batches(standin, tweet_qa, tokenizer):
    """100 real rows, in batches of 1, 8 and 64 in order of length and in batches of 32 as they stand."""
    rows = load_tweet_qa(str(tweet_qa))["validation"][:100]
    model, tokenizer = load_model_and_tokenizer(str(standin))
    data, collate = TweetQADataset(rows, tokenizer), build_collate_fn(tokenizer)
    results = []
    longest_first = by_length(data.input_ids)
    for batch_size, in_order in ((1, longest_first), (8, longest_first), (64, longest_first), (32, range(100))):
        loader = build_loader(data, batch_size, collate, in_order)
        metrics, frame = evaluate(model, loader, tokenizer, "cpu", beams=2, max_target_len=8)
        del metrics["avg_sem_sim"]  # None without a similarity model
        results.append((metrics, frame["prediction"].tolist(), frame["qid"].tolist()))
    assert all(result[1:] == results[0][1:] for result in results)
    assert len(set(results[0][1])) > 20  # or else they would be the same without any reason to be
    for metrics, *_ in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5)
