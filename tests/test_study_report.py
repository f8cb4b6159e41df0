"""study.md and its pictures: the figures follow from the run folders, and what is missing is said."""

import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure
from run_folders import write_run

from pipeline import study_report
from pipeline.markdown import points, signed
from pipeline.plan import BASE, FULL, LORA, read_plan
from pipeline.statistics import costs_at_most, difference, expected_maximum, holm, mean_interval
from pipeline.tuning import DIVERGED, survey
from study import training_parsers

COMMON = '[common]\nmodel_name = "google/flan-t5-small"\nholdout = 40\n'
FULL_METHOD = '[[method]]\nname = "full fine-tuning"\nscript = "tweet_qa_main.py"\nlr = [1e-4, 1e-3, 1e-2]\n'
LORA_METHOD = '[[method]]\nname = "LoRA"\nscript = "tweet_qa_main_lora.py"\nlora_r = [4, 16]\nlr = [1e-3, 3e-3, 1e-2]\n'
TWEETS = [f"tweet {i % 20}" for i in range(40)]  # of the held-out rows, see run_folders.py


@pytest.fixture(scope="session")
def parsers():
    return training_parsers()


@pytest.fixture
def study(tmp_path, parsers):
    """A function that writes the run folders of a plan, then its report: study(methods, f1_of, …)."""

    def make(methods, f1_of, seeds=(0, 1, 2), margin=2.0, common=COMMON, without=()):
        """f1_of: a function from a Run to its F1 (out of 1), None if it has not ended, or DIVERGED. without: keys of
        runs that are missing. Returns (study.md, plan, {run's key: held-out F1 of each row, out of 100})."""
        head = f'dir = "{tmp_path / "study"}"\nseeds = {list(seeds)}\nmargin_f1 = {margin}\n{common}'
        (tmp_path / "plan.toml").write_text(head + methods)
        plan, made = read_plan(tmp_path / "plan.toml", parsers), {}

        def f1(run):
            value = None if run.key in without else f1_of(run)
            if value in (None, DIVERGED):
                return value
            if run.key not in made:
                made[run.key] = 100 * write_run_of(run, value)
            return 100 * json.loads((run.folder / "run.json").read_text())["final"]["f1"]

        shutil.rmtree(plan.folder, ignore_errors=True)
        plan.folder.mkdir()
        names = study_report.write(plan, survey(plan, f1), f1)
        assert sorted(names) == sorted(path.name for path in plan.folder.iterdir() if path.is_file())
        return (plan.folder / "study.md").read_text(), plan, made

    return make


def write_run_of(run, f1):
    """Write the run folder of a Run of a plan with about this mean F1. Returns F1 of its held-out rows, out of 1."""
    rng = np.random.default_rng(abs(hash_of(run.key)))
    validation = np.clip(np.full(40, f1) + rng.normal(0, 0.01, 40), 0, 1)
    held = np.clip(f1 - 0.05 + rng.normal(0, 0.05, 40), 0, 1)
    kind = BASE if run.method == BASE else {FULL: "full", LORA: "lora"}[run.script]
    rank = run.arguments.get("lora_r")
    sizes = {"trainable_parameters": 100 * rank} if rank else {}
    given = {name: value for name, value in run.arguments.items() if name not in ("seed", "eval_only")}
    write_run(run.folder, kind, run.seed or 0, validation, held_out=held, record=sizes, **given)
    return held


def hash_of(text):
    """A number that depends on a text alone, in every process."""
    return int.from_bytes(text.encode(), "big") % 2**32


def usual(run):
    """Full fine-tuning is best at 1e-3, LoRA at 3e-3; rank 4 is worse than rank 16."""
    if run.method == BASE:
        return 0.2
    best = 1e-3 if run.script == FULL else 3e-3
    return 0.75 - (run.lr != best) * 0.1 - (run.axes.get("lora_r") == 4) * 0.06 - (run.script == LORA) * 0.005


def table_after(text, title):
    """The first table behind a text, as {first cell: [other cells]}."""
    lines = text[text.index(title) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| "))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return {cells[0]: cells[1:] for cells in table if cells[0] != "---"}


def test_the_answer_agrees_with_the_statistics_and_the_table(study):
    text, _, held = study(FULL_METHOD + LORA_METHOD, usual)
    scores = {name: [held[f"{name}/seed_{seed}"] for seed in range(3)] for name in (BEST_FULL, BEST_4, BEST_16)}
    table = table_after(text, "## The answer")
    results = [difference(scores[name], scores[BEST_FULL], TWEETS) for name in (BEST_4, BEST_16)]
    adjusted = holm([result.p for result in results])
    for rank, result, p in zip((4, 16), results, adjusted, strict=True):
        most, reached = points(max(0, costs_at_most(result))), f"{np.mean(scores[BEST_FULL]):.1f}"
        said = f"**LoRA (lora_r {rank}, lr 0.003) costs at most {most} F1 of full fine-tuning's {reached} (95 %, tweets"
        assert f"{said} and 3 seeds).**" in text
        cells = table[f"LoRA (lora_r {rank})"]
        assert cells[:2] == ["0.003", "3"] and cells[5] == signed(result.mean)
        assert cells[6] == f"{points(result.low)} to {points(result.high)}"
        assert float(cells[7].lstrip("\\< ")) == pytest.approx(max(p, 0.001), rel=0.06)
    for name, label in ((BEST_FULL, "full fine-tuning"), (BEST_16, "LoRA (lora_r 16)")):
        own = mean_interval(scores[name], TWEETS)
        assert table[label][2:4] == [points(own.mean), f"{points(own.low)} to {points(own.high)}"]
    assert results[0].high < 0 and "It is worse by" in text and "within noise" in text
    base, (full, lora) = held["base"].mean(), (np.mean(scores[name]) for name in (BEST_FULL, BEST_4))
    assert f"LoRA (lora_r 4) keeps {100 * (lora - base) / (full - base):.0f} % of the {full - base:.1f} F1" in text
    assert "Measured on 40 held-out rows (20 tweets), which chose neither the epoch nor the learning rate." in text
    assert table["untrained model"][:3] == ["-", "-", points(base)]
    assert "not finished" not in text and text.startswith(
        "# Study: plan.toml\n\n16 runs (1 of the untrained model, 6 at "
    )


def test_a_default_that_is_written_out_makes_no_other_answer(study):
    said, *_ = study(FULL_METHOD + LORA_METHOD, usual)
    typed, *_ = study(FULL_METHOD + LORA_METHOD + "max_target_len = 32\n", usual)
    answers = [text[text.index("## The answer") : text.index("![")] for text in (said, typed)]
    assert answers[0] == answers[1] and typed.count("## The answer") == 1 and "not finished" not in typed


BEST_FULL, BEST_4, BEST_16 = "full-fine-tuning/lr=0.001", "lora,lora_r=4/lr=0.003", "lora,lora_r=16/lr=0.003"


def test_it_says_how_each_rate_was_chosen_and_what_more_tries_bring(study):
    text, _, _ = study(FULL_METHOD + LORA_METHOD, usual)
    rates = table_after(text, "## How the learning rates were chosen")
    assert rates["method"] == ["0.0001", "0.001", "0.003", "0.01"]
    assert rates["full fine-tuning"][1].endswith(" (best)") and rates["full fine-tuning"][2] == "-"
    assert [cell.endswith(" (best)") for cell in rates["LoRA (lora_r 4)"]] == [False, False, True, False]
    assert "- The best rate of LoRA (lora_r 4) and LoRA (lora_r 16) is 3.0 times that of full fine-tuning." in text
    tries = table_after(text, "## What more tries of the learning rate bring")
    scores = [float(cell.split()[0]) for cell in rates["full fine-tuning"] if cell != "-"]
    expected = [expected_maximum(scores, n) for n in (1, 2, 3)]
    assert [float(cell) for cell in tries["full fine-tuning"]] == pytest.approx(expected, abs=0.11)


@pytest.mark.parametrize(
    "margin, said", [(9.0, "LoRA: rank 4, which costs at most"), (4.0, "LoRA: rank 16, which costs")]
)
def test_the_smallest_rank_within_the_margin_is_named(study, margin, said):
    text, _, _ = study(FULL_METHOD + LORA_METHOD, usual, margin=margin)
    assert f"## The smallest rank within the margin of {margin:g} F1\n\n- {said}" in text
    assert f"The cost is within the margin of {margin:g} F1." in text


def test_no_rank_within_the_margin_is_said(study):
    text, _, _ = study(FULL_METHOD + LORA_METHOD, usual, margin=0.1)
    assert "none of the ranks 4 and 16 is shown to be within it" in text
    assert "Whether the cost is within the margin of 0.1 F1 is not shown." in text


def test_an_unfinished_study_says_what_is_missing(study):
    """The untrained model, a seed, and the rates of a method."""
    without = ["base", "full-fine-tuning/lr=0.001/seed_2", "lora,lora_r=4/lr=0.003/seed_0"]
    text, _, _ = study(FULL_METHOD + LORA_METHOD, usual, without=without)
    [line] = [line for line in text.splitlines() if line.startswith("**This study is not finished**")]
    assert "full fine-tuning lacks 1 of 3 seeds" in line and "the untrained model is not scored yet" in line
    assert "the learning rate of LoRA (lora_r 4) is not chosen yet" in line
    table = table_after(text, "## The answer")
    assert table.keys() == {"method", "full fine-tuning", "LoRA (lora_r 16)"} and table["full fine-tuning"][1] == "2"
    assert "(95 %, tweets, 3 and 2 seeds)" in text and "keeps" not in text
    assert "LoRA (lora_r 4)" in table_after(text, "## How the learning rates were chosen")


def test_a_study_of_which_nothing_is_chosen_yet_has_a_report(study):
    text, plan, _ = study(FULL_METHOD, usual, without=["full-fine-tuning/lr=0.0001/seed_0"])
    assert "1. " not in text and "## The answer" not in text and "not finished" in text
    assert sorted(path.name for path in plan.folder.glob("*.png")) == ["study_rates.png"]


def test_one_method_with_one_seed_and_no_tuning(study):
    method = FULL_METHOD.replace("[1e-4, 1e-3, 1e-2]", "1e-3")
    text, _, held = study(method, usual, seeds=[7])
    own = mean_interval(held["full-fine-tuning/lr=0.001/seed_7"], TWEETS)
    span = f"{points(own.low)} to {points(own.high)}"
    said = f"Full fine-tuning (lr 0.001) has {points(own.mean)} F1 (95 % interval {span}, tweets), the untrained model"
    assert said in text and "full fine-tuning was not tuned" in text
    assert "more tries" not in text and "adjusted" not in text


def test_one_seed_covers_tweets_alone(study):
    text, _, _ = study(FULL_METHOD + LORA_METHOD, usual, seeds=[0])
    assert "(95 %, tweets).**" in text and "With one seed, the interval covers which tweets were asked" in text


def test_rates_that_diverged_are_told(study):
    def f1(run):
        return DIVERGED if run.lr == 1e-2 or run.key == "full-fine-tuning/lr=0.001/seed_1" else usual(run)

    text, _, _ = study(FULL_METHOD + LORA_METHOD, f1)
    assert "Diverged: full fine-tuning, lr 0.001, seed 1; full fine-tuning, lr 0.01, seed 0; LoRA, lora" in text
    assert table_after(text, "## How the learning rates")["full fine-tuning"][-1] == "diverged"
    assert table_after(text, "## The answer")["full fine-tuning"][1] == "2"
    text, _, _ = study(LORA_METHOD, lambda run: DIVERGED if run.axes.get("lora_r") == 4 else usual(run))
    assert "Every learning rate diverged: LoRA (lora_r 4). It has no result." in text


def test_an_edge_is_told(study):
    text, _, _ = study(FULL_METHOD, lambda run: 0.2 if run.method == BASE else 0.5 + 0.01 * np.log10(run.lr))
    assert "The best rate of full fine-tuning is the highest that was tried: a better one may lie beyond." in text


def test_methods_are_compared_with_the_reference_on_as_many_rows(study):
    """A learning curve: an axis of [common]."""
    common = COMMON + "train_subset = [50, 200]\n"

    def f1(run):
        return usual(run) - (run.arguments.get("train_subset") == 50) * 0.2

    methods = FULL_METHOD + LORA_METHOD.replace("[4, 16]", "16")
    text, plan, held = study(methods, f1, common=common)
    for rows in (50, 200):
        ours, theirs = (
            [held[f"{name},train_subset={rows}/lr={lr}/seed_{seed}"] for seed in range(3)]
            for name, lr in (("lora", 0.003), ("full-fine-tuning", 0.001))
        )
        cells = table_after(text, "## The answer")[f"LoRA (train_subset {rows})"]
        assert cells[5] == signed(difference(ours, theirs, TWEETS).mean)
    assert (plan.folder / "study_train_subset.png").exists()


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, in their order."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: (save(self, *given, **more), figures.append(self))
    )
    return figures


def test_the_pictures_show_the_figures(study, drawn):
    text, plan, held = study(FULL_METHOD + LORA_METHOD, usual)
    names = re.findall(r"^!\[.+\]\((.+)\)$", text, flags=re.MULTILINE)
    assert names == ["study_rates.png", "study_lora_r.png", "study_minutes.png", "study_parameters.png"]
    assert all((plan.folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    rates, ranks, minutes, parameters = (figure.axes[0] for figure in drawn)
    for axes in (rates, ranks, minutes, parameters):
        assert axes.get_title() and axes.get_xlabel() and "F1" in axes.get_ylabel()
    assert rates.get_xscale() == parameters.get_xscale() == "log"
    full = rates.lines[0]
    assert list(full.get_xdata()) == [1e-4, 1e-3, 1e-2] and full.get_ydata()[1] == max(full.get_ydata())
    rings = [line.get_xdata()[0] for line in rates.lines if line.get_markersize() == 15]
    assert rings == [1e-3, 3e-3, 3e-3]  # the best rate of each
    [lora] = [line for line in ranks.lines if line.get_label() == "LoRA"]
    expected = [np.mean([held[f"{name}/seed_{seed}"] for seed in range(3)]) for name in (BEST_4, BEST_16)]
    assert list(lora.get_ydata()) == pytest.approx(expected)
    [base] = [line for line in parameters.lines if line.get_label() == "untrained model"]
    assert base.get_ydata()[0] == pytest.approx(held["base"].mean())
    assert [text.get_text() for text in minutes.figure.legends[0].get_texts()] == [
        *("full fine-tuning", "LoRA (lora_r 4)", "LoRA (lora_r 16)")
    ]
    assert len(minutes.lines) == 9 and list(minutes.lines[0].get_xdata()) == [0.5, 1.5, 3]


def test_nothing_in_the_pictures_is_cut_or_covered(study, drawn):
    """Many methods with long names."""
    method = LORA_METHOD.replace("lora_r = [4, 16]", "lora_r = [1, 2, 4, 8, 16]").replace(
        '"LoRA"', '"LoRA on every linear layer with a long name"'
    )
    study(FULL_METHOD + method, usual)
    for figure in drawn:
        [axes], [legend] = figure.axes, figure.legends
        texts = [*legend.get_texts(), axes.title, axes.xaxis.label, axes.yaxis.label]
        low, high = axes.get_xlim()
        texts += [tick for tick in axes.get_xticklabels() if low <= tick.get_position()[0] <= high]
        for box in (text.get_window_extent() for text in texts):
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
        assert legend.get_window_extent().y1 <= axes.xaxis.label.get_window_extent().y1
        assert axes.bbox.height > 0.5 * figure.bbox.height
