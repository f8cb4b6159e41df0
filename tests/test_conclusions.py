"""What a comparison concludes: each sentence agrees with the statistics on the same rows, and claims no more."""

import math
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.compared import Measured, Row, Run
from pipeline.conclusions import compare_rows, in_order, sentences
from pipeline.markdown import points
from pipeline.statistics import costs_at_most, detectable, difference, holm, interval, mcnemar, seeds_needed

# ----------------------------------------------------------------------------------------------------- statistics


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**32 - 1))
def test_the_interval_is_scipys_paired_bootstrap_and_agrees_with_brute_force(count, seed):
    rng = np.random.default_rng(seed)
    ours, theirs = rng.choice([0, 0.4, 0.5, 1], count), rng.random(count).round(1)
    assume(np.ptp(ours - theirs) > 0)
    low, high = interval(ours - theirs)
    paired = stats.bootstrap(
        (ours, theirs),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=10_000,
        batch=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (low, high) == pytest.approx(tuple(paired), abs=1e-8)
    means = []
    for _ in range(4000):
        picked = rng.integers(0, count, count)
        means.append(ours[picked].mean() - theirs[picked].mean())
    error = np.std(means)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.2 * error + 1 / count**2)


def test_equal_scores_have_no_interval():
    """Five wrong answers do not show that all others would be wrong."""
    for values in ([0.0] * 5, [2.5] * 30, [2.5]):
        assert np.isnan(interval(values)).all()


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(1, (150, 200))
    covered = [low <= 1 <= high for low, high in map(interval, samples)]
    assert 0.88 <= np.mean(covered) <= 0.99


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_examples(pairs):
    ours, theirs = (np.array(side, float) for side in zip(*pairs, strict=True))
    alone = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n = sum(alone)
    tail = sum(math.comb(n, k) for k in range(min(alone) + 1)) / 2**n
    assert mcnemar(ours, theirs) == pytest.approx(min(1, 2 * tail))


# ------------------------------------------------------------------------------------------------------ sentences


def make_row(label, scores, parameters, method=""):
    """A row with these F1 scores, out of 100: one line for each seed."""
    method = method or ("lora" if parameters < 100_000 else "full")
    scores, runs = np.atleast_2d(np.asarray(scores, float)), []
    for seed, line in enumerate(scores):
        frame = pd.DataFrame({"f1": line / 100, "em": 0.0, "sem_sim": np.nan})
        record = {"method": method, "args": {"seed": seed, "model_name": "t5"}, "trainable_parameters": parameters}
        record |= {"total_parameters": 100_000, "checkpoint_bytes": 20 * parameters, "final": {"f1": line.mean() / 100}}
        record |= {"best_epoch": 1, "peak_vram_mb": 0.0, "peak_ram_mb": 500.0 + parameters / 1000, "device": "cpu"}
        epochs = pd.DataFrame({"epoch_seconds": [60.0 + parameters / 1000], "steps_per_sec": [1.0]})
        runs.append(Run(None, record, epochs, {"holdout": frame}))
    return Row(label, label, runs)


def pairs_of(*rows):
    """All pairs of the rows, on rows of one tweet each."""
    measured = Measured("holdout", list(range(rows[0].scores("holdout").shape[1])))
    ordered = [in_order(*two) for two in combinations(rows, 2)]
    return compare_rows(ordered, [measured] * len(ordered))


def said(*rows, base=None, margin=None):
    """The sentences on the only pair of the rows."""
    return sentences(*pairs_of(*rows), base, margin)


BASE = np.tile([0.0, 50, 100, 100], 50)
NOISE = np.tile([3.0, -1, 1, -3, 2, -2, 4, -4, 1, -1], 20)
SEEDS = np.array([[0.5], [-0.5], [0.0]])


@pytest.mark.parametrize(
    "change, parameters, first, second",
    [
        (
            NOISE + 1.2,
            400,
            r"LoRA is better than full, 63\.7 against 62\.5 F1: by 1\.2 \(95 % interval 0\.\d to .*",
            "",
        ),
        (
            NOISE - 1.2,
            400,
            r"LoRA costs at most 1\.\d F1 of full's 62\.5 .*",
            r"It is worse by 1\.2 F1 \(95 % interval 0\.",
        ),
        (
            NOISE,
            400,
            r"LoRA costs at most 0\.\d F1 of .*",
            r"The difference of 0\.0 F1 is within noise \(95 % interval -",
        ),
        (NOISE + 0.2, 400, r"LoRA costs at most 0\.\d F1 of .*", r"The difference of \+0\.2 F1 is within noise .*"),
        (NOISE * 0, 40, r"LoRA and full have the same F1 on every row, 62\.5 on average \(tweets\)\.", ""),
        (NOISE * 0 - 0.04, 400, r"LoRA costs at most 0\.04 F1 of full's 62\.5 .*", r"It is worse by 0\.04 F1 .*"),
        (NOISE * 0 + 9, 100_000, r"LoRA is better than full, .* by 9\.0 \(95 % interval 9\.0 to 9\.0, .*", ""),
    ],
)
def test_the_first_sentence_says_what_the_interval_says(change, parameters, first, second):
    rows = make_row("full", BASE, 100_000), make_row("LoRA", BASE + change, parameters)
    lines = said(*rows)
    assert re.fullmatch(first, lines[0]), lines
    assert re.match(second or "With one seed", lines[1]), lines
    if parameters < 100_000:  # whichever is given first, the smaller one is spoken of
        assert lines == said(*rows[::-1])


def test_methods_that_tie_on_each_tweet_are_not_said_to_tie_on_each_row():
    """Of each tweet's two rows, each method gets another one right."""
    rows = make_row("full", np.tile([100.0, 0], 20), 100_000), make_row("LoRA", np.tile([0.0, 100], 20), 400)
    [pair] = compare_rows([in_order(*rows)], [Measured("holdout", [number // 2 for number in range(40)])])
    assert sentences(pair)[0] == "LoRA and full have the same F1 on every tweet, 50.0 on average (tweets)."


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from([-60.0, -1, 0, 0, 1, 50]), min_size=8, max_size=8), min_size=1, max_size=3))
def test_the_sentences_agree_with_the_statistics_on_the_same_rows(change):
    full = np.tile(BASE[:8], (3, 1)) + SEEDS
    lora = BASE[:8] + np.array(change)
    expected = difference(lora, full, range(8))
    [pair] = pairs_of(make_row("full", full, 100_000), make_row("LoRA", lora, 1))
    result, text = pair.differences["f1"], " ".join(sentences(pair))
    bounds = (result.mean, result.low, result.high)
    assert bounds == pytest.approx((expected.mean, expected.low, expected.high), abs=1e-6)
    assert set(pair.differences) == {"f1", "em"}  # similarity was not measured
    assert ("is better" in text) == (result.low > 0) and ("is worse" in text) == (result.high < 0)
    if "costs at most" in text:
        assert f"costs at most {points(max(0, costs_at_most(result)))} F1 of full's" in text
        assert f"(95 %, {result.covers})" in text
    assert ("covers which tweets were asked" in text) == (len(change) == 1) == (result.covers == "tweets")


def test_the_cost_is_set_against_the_margin():
    def about(change, margin, seeds=SEEDS):
        full, lora = BASE[:40] + seeds, BASE[:40] + seeds[::-1] + change + NOISE[:40]
        rows = make_row("full", full, 100_000), make_row("LoRA", lora, 400)
        return difference(lora, full, range(40)), " ".join(said(*rows, margin=margin))

    result, text = about(-0.5, 3)
    assert costs_at_most(result) < 3 and "The cost is within the margin of 3 F1." in text
    _, text = about(-9, 3)
    assert "The cost is more than the margin of 3 F1." in text and "studies" not in text
    result, text = about(-1.2, 1.5)
    assert costs_at_most(result) > 1.5 and "Whether the cost is within the margin of 1.5 F1 is not shown." in text
    assert f"a true difference of {detectable(result):.1f} F1 is shown in 80 % of studies" in text
    needed = seeds_needed(result, 1.5, 0.8)
    assert needed > 3 and f"To bring that down to 1.5, about {needed} seeds of each method are needed." in text
    result, text = about(-1.2, 0.1)
    assert seeds_needed(result, 0.1, 0.8) is None and "More seeds would not bring that down to 0.1" in text
    _, text = about(-1.2, 1, seeds=SEEDS[:1])  # one seed shows nothing of other seeds
    assert "not shown" in text and "are needed" not in text and "With one seed" in text
    assert "is shown in 80 % of studies" not in about(-9, None)[1]  # without a margin, only where nothing is shown


def test_what_training_gained_and_what_it_needs_are_told():
    full, lora, base = BASE + SEEDS, BASE + SEEDS - 10, BASE * 0 + np.arange(200) % 3
    rows = make_row("full", full, 100_000), make_row("LoRA", lora, 400)
    untrained = make_row("untrained model", base, 0, "base")
    text = " ".join(said(*rows, base=untrained))
    share = (lora.mean() - base.mean()) / (full.mean() - base.mean())
    assert f"LoRA keeps {100 * share:.0f} % of the {full.mean() - base.mean():.1f} F1 that training gained over" in text
    needs = "0.4 % of the trained parameters, 0.4 % of the checkpoint, 0.4 of the time and 0.8 of the memory"
    assert text.endswith(f"It needs {needs}.")
    assert "untrained" not in " ".join(said(*rows))
    [gain] = pairs_of(untrained, rows[1])
    assert gain.ours is rows[1]  # an untrained model is what others are compared with
    gained = points(lora.mean() - base.mean())
    assert sentences(gain)[0].startswith(f"LoRA gains {gained} F1 over the untrained model's")
    nothing = make_row("untrained model", BASE + NOISE, 0, "base")
    text = " ".join(said(*rows, base=nothing))
    assert "How much of training's gain is kept cannot be said: full is not shown to be" in text
    worse = make_row("full", full, 100_000), make_row("LoRA", base - 1 + SEEDS, 400)
    assert "LoRA keeps none of the" in " ".join(said(*worse, base=untrained))


def test_p_values_are_adjusted_for_the_pairs_of_the_report():
    """A difference that would count alone is within noise among several pairs."""
    changes = (0 * NOISE, np.roll(NOISE, 3) * 5, NOISE * 5 - 2)
    rows = [make_row(f"LoRA {n}", BASE + change, 100 + n) for n, change in enumerate(changes)]
    pairs = pairs_of(*rows)
    raw = [pair.differences["f1"].p for pair in pairs]
    assert [pair.p["f1"] for pair in pairs] == pytest.approx(holm(raw))
    hidden = [pair for pair, p in zip(pairs, raw, strict=True) if p < 0.05 <= pair.p["f1"]]
    assert hidden and all("is within noise" in sentences(pair)[1] for pair in hidden)
    assert all("adjusted p = " in sentences(pair)[1] for pair in hidden)
    assert all("costs at most 0.0 F1" in sentences(pair)[0] for pair in hidden if pair.differences["f1"].low > 0)
