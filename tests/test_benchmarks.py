"""Promises about what the benchmarks say of their measurements; that they run is tested in test_speed.py."""

import json
import math

import pytest
from scipy import stats

from benchmarks import quality, report, run


def runs_of(f1, variant, method="full", epochs=3, **more):
    """Recorded runs with these F1 (of 100) after the last epoch, of the seeds 0, 1, ..."""
    same = {"variant": variant, "method": method, "epochs": epochs, "val_loss": 1.0, "seconds": 2.0}
    same |= {"commit": "a", "date": "2026-01-01"} | more
    return [same | {"seed": seed, "f1": [0.1, value / 100] if value else []} for seed, value in enumerate(f1)]


def test_a_variant_is_compared_seed_by_seed():
    usual, other = [60.0, 62.0, 65.0, 61.0], [60.5, 61.5, 65.5, 61.9]
    runs = runs_of(usual, "fp32") + runs_of(other, "bf16") + runs_of([50.0], "bf16", "LoRA")
    first, second = quality.compare(runs, ["fp32", "bf16"])  # LoRA has no pair
    assert first["f1"] == "62.0 ± 2.2" and "difference" not in first
    expected = stats.ttest_rel(other, usual).confidence_interval(0.95)
    assert second["difference"] == pytest.approx(0.35)
    assert (second["low"], second["high"]) == pytest.approx((expected.low, expected.high))
    assert second["within"] and second["excludes"] and second["seeds"] == 4


def test_a_loss_is_not_hidden():
    usual = [60.0, 62.0, 65.0, 61.0]
    row = quality.compare(runs_of(usual, "fp32") + runs_of([value - 1 for value in usual], "bf16"), ["fp32", "bf16"])[1]
    assert not row["within"] and row["difference"] == pytest.approx(-1)
    wide = runs_of([63.0, 59.0, 68.1, 58.0], "bf16")  # the mean is the same, but four seeds do not show it
    row = quality.compare(runs_of(usual, "fp32") + wide, ["fp32", "bf16"])[1]
    assert row["within"] and not row["excludes"]


def test_runs_that_diverge_are_counted_and_score_what_they_answer():
    runs = runs_of([60.0, 62.0, 61.0], "fp32") + runs_of([61.0, 20.0, None], "bf16")
    rows = quality.compare(runs, ["fp32", "bf16"])
    assert [row["diverged"] for row in rows] == [0, 2]
    assert rows[1]["difference"] == pytest.approx((1 - 42 - 61) / 3)


def test_a_finished_study_trains_nothing_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "train", None)  # cannot be called
    path = tmp_path / f"quality-{report.slug(run.device_name('cpu'))}.json"
    runs = [
        each
        for method in quality.METHODS
        for variant in ("fp32", "bf16")
        for each in runs_of([60.0, 61.0], variant, method)
    ]
    path.write_text(json.dumps({"runs": runs + runs_of([1.0, 2.0], "fp32", epochs=1)}))
    quality.main(["--seeds", "2", "--out", str(tmp_path)])
    text = path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert "| full, fp32, 2 seeds | 60.5 ± 0.7 |" in text and "| LoRA, bf16, 2 seeds | 60.5 ± 0.7 | +0.00 |" in text


def test_a_row_has_this_projects_ratio_to_each_contender():
    speeds = {"this_project": 20.0, "plain_loop": 8.0, "hf_trainer": 10.0}
    assert report.row("speed", speeds, 1, 1, absent="–") == "| speed | 20.0 | 8.0 | 10.0 | – | 2.50 | 2.00 |  |"
    seconds = {"this_project": 2.0, "plain_loop": 8.0, "hf_trainer": 4.0, "ct2": 1.0}
    assert report.row("time", seconds, 0, -1) == "| time | 2 | 8 | 4 | 1 | 4.00 | 2.00 | 0.50 |"


def test_f1_is_compared_over_the_seeds_that_all_contenders_have():
    scores = {"this_project": [0.60, 0.62, 0.9], "plain_loop": [0.61, 0.61], "hf_trainer": [0.50, 0.52]}
    means, differences = report.f1_rows("F1", scores)
    assert means.startswith("| F1, 2 seeds | 61.0 ± 1.4 | 61.0 ± 0.0 | 51.0 ± 1.4 |")
    half = stats.t.ppf(0.975, 1)
    assert f"| +0.00 ({-half:+.2f} to {half:+.2f}) | +10.00 (+10.00 to +10.00) |" in differences
    assert report.f1_rows("F1", {name: [] for name in scores}) == []
    mean, *interval = report.paired_difference([1.0], [0.5])
    assert mean == 0.5 and all(map(math.isnan, interval))


def test_an_interrupted_benchmark_is_continued_by_the_same_one_alone():
    now = {"device": "x", "date": "2026-01-01", "rounds": 5, "commit": "abc-dirty"}
    assert run.is_continued(now | {"commit": "abc", "cases": {}}, now)
    assert not run.is_continued(now | {"commit": "abd", "cases": {}}, now)
    assert not run.is_continued(now | {"rounds": 3}, now)
    assert run.is_continued(now, now | {"date": "2026-01-02"})
