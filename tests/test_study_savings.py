"""What a study says about forgetting, time to equal quality, storing and answering follows from the run folders."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from run_folders import write_run

import study
from pipeline import study_report
from pipeline.compared import Row, read
from pipeline.errors import InputError
from pipeline.markdown import nats, signed
from pipeline.plan import BASE, FULL, check_fits, read_plan, words
from pipeline.statistics import difference, holm, mean_interval
from pipeline.study_forgetting import by_line
from pipeline.study_savings import contenders, made_at_once, reach, read_answering
from pipeline.tuning import DIVERGED, survey

PARSERS = study.training_parsers()
PLAN = """
[common]
model_name = "google/flan-t5-small"
[[method]]
name = "full"
script = "tweet_qa_main.py"
lr = 1e-3
[[method]]
name = "LoRA"
script = "tweet_qa_main_lora.py"
lora_r = [4, 16]
lr = 3e-3
"""
LINES = 30
KINDS = ["span"] * 20 + ["reading"] * 10
TOKENS = np.random.default_rng(0).integers(1, 40, LINES)
BEFORE = TOKENS * np.random.default_rng(1).uniform(1, 3, LINES)
RISE = {"full": 0.5, "LoRA (lora_r 4)": 0.1, "LoRA (lora_r 16)": 0.49}  # nats a token


def label_of(run):
    return f"LoRA (lora_r {run.axes['lora_r']})" if run.axes else "full"


def probe_of(run, rise=None):
    """The probe of a run: each line's loss changes by about the same per token."""
    rng = np.random.default_rng(int.from_bytes(run.key.encode(), "big") % 2**32)
    change = TOKENS * ((RISE[label_of(run)] if rise is None else rise) + 0.02 * run.seed + rng.normal(0, 0.1, LINES))
    return {"kind": KINDS, "target_tokens": TOKENS, "before": BEFORE, "final": np.maximum(0, BEFORE + change)}


def usual(run):
    """The keywords of `write_run` for a run: LoRA learns more slowly, and forgets less."""
    slow = 1 if run.script == FULL else 2
    start = BEFORE.sum() / TOKENS.sum()
    return {
        "probe": probe_of(run),
        "epochs": {
            "f1": np.array([0.3, 0.5, 0.7]) - 0.01 * run.seed - 0.05 * (slow - 1),
            "seconds_since_start": np.array([60.0, 120, 180]) * slow + run.seed,
            "probe_loss": start + RISE[label_of(run)] * np.array([0.2, 0.6, 1]) + 0.01 * run.seed,
        },
    }


@pytest.fixture
def drawn(monkeypatch):
    """{title: Figure} of what is drawn. Nothing is rendered, which takes most of the time of a report."""
    figures = {}

    def keep(self, path, **more):
        figures[self.axes[0].get_title().splitlines()[0]] = self
        path.write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def report(tmp_path, drawn):
    """report(of, …): (study.md, plan) of run folders that are written for the runs of PLAN. of: a function from a Run
    to the keywords of `write_run`, or to DIVERGED."""

    def make(of=usual, seeds=(0, 1, 2), text=PLAN, base_f1=0.2):
        folder = tmp_path / "study"
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / "plan.toml").write_text(f"dir = {json.dumps(str(folder))}\nseeds = {list(seeds)}\n{text}")
        plan = read_plan(tmp_path / "plan.toml", PARSERS)
        written = {}

        def f1(run):
            if run.key not in written:
                given = {} if run.method == BASE else of(run)
                written[run.key] = given
                if given != DIVERGED:
                    kind = BASE if run.method == BASE else "full" if run.script == FULL else "lora"
                    score = np.linspace(0, 2 * base_f1, 40) if kind == BASE else np.linspace(0.2, 1, 40)
                    fixed = {"lr": run.lr, **run.arguments}
                    fixed = {name: value for name, value in fixed.items() if name not in ("eval_only", "seed")}
                    sizes = {"trainable_parameters": 100 * run.axes["lora_r"]} if "lora_r" in run.axes else {}
                    record = {"started": None} | sizes | given.pop("record", {})
                    write_run(run.folder, kind, run.seed or 0, score, record=record, **fixed, **given)
            return DIVERGED if written[run.key] == DIVERGED else 60.0

        folder.mkdir()
        study_report.write(plan, survey(plan, f1), f1)
        return (folder / "study.md").read_text(), plan

    return make


def section(text, title):
    """The lines of a section of the report; [] if there is none."""
    parts = text.split(f"## {title}")
    return parts[1].split("\n## ")[0].strip().splitlines() if len(parts) > 1 else []


def tables(lines):
    """The tables of a section, each {first cell: [other cells]}."""
    found, before = [], ""
    for line in lines:
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append({})
            first, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            found[-1][first] = cells
        before = line
    return found


# --------------------------------------------------------------------------------------------------------- forgetting


def changes_of(plan, number):
    """(seeds, lines) of the method of this number, read from the files by hand."""
    method = plan.methods[number]
    frames = [pd.read_csv(plan.run(method, method.rates[0], seed).folder / "probe_losses.csv") for seed in plan.seeds]
    return np.stack([frame["final"] - frame["before"] for frame in frames])


def test_forgetting_is_the_ratio_of_sums_with_an_interval_over_lines_and_seeds(report):
    text, plan = report()
    lines = section(text, "Forgetting")
    table, by_kind = tables(lines)
    changes = [changes_of(plan, number) for number in range(3)]
    for label, change in zip(RISE, changes, strict=True):
        cells = table[label]
        mean = change.sum(1).mean() / TOKENS.sum()
        before = BEFORE.sum() / TOKENS.sum()
        assert cells[:4] == ["3", f"{before:.3f}", f"{before + mean:.3f}", f"{mean:+.3f}"]
        result = mean_interval(by_line(change, TOKENS), range(LINES))
        assert result.mean == pytest.approx(mean) and cells[4] == f"{nats(result.low)} to {nats(result.high)}"
        some = [number for number, kind in enumerate(KINDS) if kind == "reading"]
        of_kind = change[:, some].sum(1).mean() / TOKENS[some].sum()
        assert by_kind[label][1].startswith(f"{of_kind:+.3f} (")
    assert by_kind["change by kind (95 % interval)"] == ["span (20 lines)", "reading (10 lines)"]
    results = [difference(by_line(change, TOKENS), by_line(changes[0], TOKENS), range(LINES)) for change in changes[1:]]
    p4, p16 = holm([result.p for result in results])
    for label, result in zip(list(RISE)[1:], results, strict=True):
        assert table[label][5:7] == [f"{result.mean:+.3f}", f"{nats(result.low)} to {nats(result.high)}"]
    assert table["full"][5:] == ["-", "-", "-"] and float(table["LoRA (lora_r 16)"][7]) == pytest.approx(p16, rel=0.06)
    first = f"**LoRA (lora_r 4, lr 0.003) forgot less than full, by {-results[0].mean:.3f} nats a target token (95 %"
    [line] = [line for line in lines if line.startswith(first)]
    assert p4 < 0.05 and "lines and 3 seeds; adjusted p < 0.001" in _plain(line)
    within = (
        f"**LoRA (lora_r 16, lr 0.003) and full: the difference in forgetting of {signed(results[1].mean, nats)} nats"
    )
    assert p16 >= 0.05 and any(line.startswith(within + " is within noise") for line in lines)
    assert f"30 lines with {TOKENS.sum():,} target tokens" in text and "adjusted for the 2 pairs" in "".join(lines)


def _plain(line):
    return line.replace("\\", "")


def test_the_interval_of_a_ratio_covers_the_true_change_about_as_often_as_it_says():
    """Probes whose lines are drawn anew, with a change that grows with their length, and seeds that shift it."""
    rng, studies, covered, true = np.random.default_rng(0), 400, 0, None
    for _ in range(studies + 1):
        # The first one is large, and gives the true value.
        lines, seeds = (200_000, 1) if true is None else (60, 3)
        tokens = rng.geometric(0.08, lines)
        line = (0.2 + 0.01 * tokens + rng.normal(0, 0.3, lines)) * tokens
        change = (
            line + (rng.normal(0, 0.1 * (true is not None), (seeds, 1)) + rng.normal(0, 0.1, (seeds, lines))) * tokens
        )
        if true is None:
            true = change.sum() / tokens.sum()
            continue
        result = mean_interval(by_line(change, tokens), range(lines))
        assert result.mean == pytest.approx((change.sum(1) / tokens.sum()).mean())
        covered += result.low <= true <= result.high
    assert 0.91 < covered / studies < 0.98


def test_a_single_seed_covers_lines_alone(report):
    text, _ = report(seeds=[5])
    lines = "\n".join(section(text, "Forgetting"))
    assert ", lines; adjusted p" in lines and "seeds;" not in lines
    equal = tables(section(text, "Time to equal quality"))[0]["LoRA (lora_r 4)"]
    assert equal[1:3] == ["6.08", "3.08"]  # no range


@pytest.mark.parametrize(
    ("rises", "said"),
    [
        ({"LoRA (lora_r 4)": 0.9}, "forgot more than full, by"),
        ({"full": -0.5, "LoRA (lora_r 4)": -0.9}, "improved more on the probe than full, by"),
        ({"full": -0.9, "LoRA (lora_r 4)": -0.5}, "improved less on the probe than full, by"),
        ({"LoRA (lora_r 4)": 0.0}, "It is not shown that it forgot anything"),
    ],
)
def test_the_words_follow_the_signs(report, rises, said):
    def of(run):
        return usual(run) | {"probe": probe_of(run, rises.get(label_of(run)))}

    [line] = [line for line in section(report(of)[0], "Forgetting") if line.startswith("**LoRA (lora_r 4")]
    assert said in line


def test_without_a_probe_nothing_is_said_of_forgetting(report):
    def without(run):
        given = usual(run)
        del given["probe"], given["epochs"]["probe_loss"]
        return given

    text, plan = report(without)
    assert "orgetting" not in text and "probe" not in text and not (plan.folder / "study_forgetting.png").exists()
    assert section(text, "Time to equal quality") and section(text, "Storing")


@pytest.mark.parametrize("change", ["none", "another", "unfinished"])
def test_methods_that_did_not_measure_the_probe_are_named(report, change):
    def of(run):
        given = usual(run)
        if run.axes.get("lora_r") == 16 and run.seed == 1:
            if change == "none":
                del given["probe"]
            elif change == "another":
                given["probe"]["sha256"] = "f" * 64
            else:
                given["record"] = {"probe": {"sha256": "0" * 64, "lines": LINES}}
        return given

    text, _ = report(of)
    lines = section(text, "Forgetting")
    assert any(line.endswith("Without this probe, and so left out: LoRA (lora_r 16).") for line in lines)
    assert "LoRA (lora_r 16)" not in tables(lines)[0] and "forgot less" in text and "adjusted p" not in "".join(lines)
    cells = tables(section(text, "Time to equal quality"))[0]
    assert cells["LoRA (lora_r 16)"][-2:] == ["-", "-"] and cells["LoRA (lora_r 4)"][-1] != "-"


def test_runs_of_one_method_with_other_lines_are_refused(report):
    def of(run):
        given = usual(run)
        if run.seed == 1:
            given["probe"]["target_tokens"] = TOKENS + 1
        return given

    with pytest.raises(InputError, match=r"seed_1: probe_losses.csv has other lines than that of .*seed_0"):
        report(of)


def test_learning_against_forgetting_is_drawn_from_the_epochs(report, drawn):
    text, _ = report()
    assert "![Learning against forgetting](study_forgetting.png)" in text
    [axes] = drawn["Learning against forgetting"].axes
    lines = {line.get_label(): line for line in axes.lines}
    for label, rise in RISE.items():
        assert list(lines[label].get_xdata()) == pytest.approx([0.2 * rise + 0.01, 0.6 * rise + 0.01, rise + 0.01])
        expected = np.array([29, 49, 69]) - (label != "full") * 5
        assert list(lines[label].get_ydata()) == pytest.approx(expected)
    assert (lines["untrained model"].get_xdata(), lines["untrained model"].get_ydata()) == ([0], [pytest.approx(20)])
    faint = [line for line in axes.lines if line.get_alpha() == 0.35]
    assert len(faint) == 9 and "probe" in axes.get_xlabel() and "validation" in axes.get_ylabel()


# ------------------------------------------------------------------------------------------------------ equal quality


def test_equal_quality_is_the_first_epoch_at_the_f1_that_all_seeds_of_both_reached(report):
    """LoRA's worst seed reaches 0.63 at last. Full fine-tuning has that after its third epoch too, of 60 seconds, LoRA
    after its third, of 120."""
    text, _ = report()
    lines = section(text, "Time to equal quality")
    [table] = tables(lines)
    assert table["LoRA (lora_r 4)"][:4] == ["63.0", "6.02 (6.00 to 6.03)", "3.02 (3.00 to 3.03)", "2.0"]
    # The change at that epoch: the whole rise, and 0.01 more for each seed.
    assert table["LoRA (lora_r 4)"][4:] == ["+0.110 (+0.100 to +0.120)", "+0.510 (+0.500 to +0.520)"]
    said = "LoRA (lora_r 4, lr 0.003) reached 63.0 validation F1 in 6.02 (6.00 to 6.03) minutes, full in 3.02 (3.00 to"
    said += (
        " 3.03): 2.0 of the time. When they reached it, the loss of a target token of the probe had changed by +0.110"
    )
    assert any(line.startswith(said) for line in lines) and "same time" not in text


def test_the_epoch_is_the_first_one_that_reaches_it(report):
    def of(run):
        f1 = [0.6, 0.2, 0.65] if run.script == FULL else [0.1, 0.55 + 0.01 * run.seed, 0.3]
        return {"epochs": {"f1": f1, "seconds_since_start": [60, 120, 180]}}

    table = tables(section(report(of)[0], "Time to equal quality"))[0]
    assert table["LoRA (lora_r 4)"] == ["55.0", "2.00 (2.00 to 2.00)", "1.00 (1.00 to 1.00)", "2.0"]


def test_a_method_that_reaches_nothing_above_the_untrained_model_is_said(report):
    def of(run):
        given = usual(run)
        if run.axes.get("lora_r") == 4 and run.seed == 2:
            given["epochs"]["f1"] = [0.0, 0.2, 0.1]
        return given

    lines = section(report(of)[0], "Time to equal quality")
    assert tables(lines)[0]["LoRA (lora_r 4)"] == ["-"] * 6 and tables(lines)[0]["LoRA (lora_r 16)"][0] == "63.0"
    said = "No validation F1 above the untrained model's was reached by every seed of LoRA (lora_r 4) and full."
    assert said in lines


def test_runs_of_older_versions_count_the_training_alone_and_so_does_what_they_are_compared_with(report):
    def of(run):
        given = usual(run)
        if run.axes.get("lora_r") == 4 and run.seed == 0:
            del given["epochs"]["seconds_since_start"]
        return given

    lines = section(report(of)[0], "Time to equal quality")
    table = tables(lines)[0]
    assert table["LoRA (lora_r 4)"][1:4] == ["3.00 (3.00 to 3.00)", "3.00 (3.00 to 3.00)", "1.0"]  # 30 + 60 + 90 s
    assert table["LoRA (lora_r 16)"][1] == "6.02 (6.00 to 6.03)"
    assert "those of training alone, without evaluation" in lines[-1]


def test_times_of_several_devices_and_of_runs_at_once_are_not_taken_at_face_value(report):
    def of(run):
        device = "NVIDIA H200" if run.axes.get("lora_r") == 4 else "cpu"
        started = f"2026-01-01T00:0{3 if run.axes.get('lora_r') == 16 and run.seed == 1 else 0}:00+00:00"
        return usual(run) | {"record": {"device": device, "started": started}}

    lines = section(report(of)[0], "Time to equal quality")
    assert tables(lines)[0]["LoRA (lora_r 4)"][1:4] == ["-", "-", "-"] and "Times of different devices" in lines[-1]
    assert "made at the same time (--jobs)" in lines[-1]


def test_runs_one_after_the_other_were_not_made_at_once(tmp_path):
    def run_from(minute, name):
        record = {"started": f"2026-01-01T00:{minute:02}:00+00:00", "wall_time_seconds": 180.4}
        return read(write_run(tmp_path / name, record=record))

    runs = [run_from(3 * number, f"run{number}") for number in range(3)]
    assert not made_at_once(runs) and made_at_once([*runs, run_from(1, "other")])


def test_equal_quality_without_an_untrained_model_needs_an_f1_above_0(tmp_path):
    rows = [
        Row(name, name, [read(write_run(tmp_path / name, epochs={"f1": f1}))])
        for name, f1 in (("a", [0.0, 0.0, 0.0]), ("b", [0.1, 0.2, 0.3]), ("c", [0.1, 0.1, 0.2]))
    ]
    assert reach(rows[0], rows[1], 0.0) is None
    assert reach(rows[1], rows[2], 0.0).f1 == pytest.approx(20)


# ------------------------------------------------------------------------------------------------------------ storing


def test_storing_counts_the_base_once_and_says_from_when_on_adapters_take_less(report):
    """Full: 4 MB; rank 4: 0.5 MB; rank 16: 3 MB, which takes less for more than 4 tasks, then as much as the model."""

    def of(large):
        return lambda run: usual(run) | {"record": {"checkpoint_bytes": large} if run.axes.get("lora_r") == 16 else {}}

    lines = section(report(of(3 * 2**20))[0], "Storing several tasks")
    [table] = tables(lines)
    assert table["weights in MB"] == ["1 task", "10 tasks", "100 tasks"]
    assert table["full: a checkpoint each"] == ["4.0", "40.0", "400.0"]
    assert table["LoRA (lora_r 4): the base and an adapter each"] == ["4.5", "9.0", "54.0"]
    assert table["LoRA (lora_r 16): the base and an adapter each"] == ["7.0", "34.0", "304.0"]
    assert "LoRA (lora_r 4) takes less than full checkpoints from 2 tasks on." in lines[-1]
    assert "LoRA (lora_r 16) takes less than full checkpoints from 5 tasks on." in lines[-1]  # 4 + 4 x 3 = 4 x 4
    text, _ = report(of(4 * 2**20))
    assert "LoRA (lora_r 16) takes more than full checkpoints for any number of tasks." in text


# ---------------------------------------------------------------------------------------------------------- answering


def answering_of(folders):
    """answering.json of {label: folder}; the adapters are measured merged too."""
    found = []
    for number, (label, folder) in enumerate(folders.items()):
        for kind in ["full"] if number == 0 else ["adapter", "merged"]:
            speed = {"full": 20.0, "adapter": 16.0, "merged": 19.9}[kind]
            one = {
                "label": label,
                "folder": str(folder),
                "kind": kind,
                "rows_per_second": speed,
                "delay_ms": 800 / speed,
            }
            one |= {"rows_per_second_of_rounds": [speed] * 3, "delay_ms_quartiles": [39.0, 55.5]}
            found.append(one | ({"answers_changed": 3} if kind == "merged" else {}))
    head = {"machine": "a CPU & 2 cores", "date": "2026-11-28", "commit": "abc", "threads": 2}
    return head | {"rows": 240, "beams": 5, "questions": 50, "contenders": found}


def test_the_measurement_of_answering_is_shown_if_it_is_of_these_runs(report, tmp_path):
    _, plan = report()
    wanted = contenders(plan, survey(plan, lambda run: 60.0 + (run.axes.get("lora_r") == 16)), lambda run: 60.0)
    assert wanted == {
        "full": plan.folder / "full/lr=0.001/seed_0",
        "LoRA (lora_r 4)": plan.folder / "lora,lora_r=4/lr=0.003/seed_0",  # of equal ones the first
    }
    found = answering_of(wanted)

    def written(content):
        (plan.folder / "answering.json").write_text(json.dumps(content))
        study_report.write(plan, survey(plan, lambda run: 60.0), lambda run: 60.0)
        return section((plan.folder / "study.md").read_text(), "Answering")

    lines = written(found)
    table = tables(lines)[0]
    assert table["full: full checkpoint"] == ["20.0", "1.0", "40.0", "39.0 to 55.5", "1.0", "-"]
    assert table["LoRA (lora_r 4): base and adapter"] == ["16.0", "0.8", "50.0", "39.0 to 55.5", "1.2", "-"]
    assert table["LoRA (lora_r 4): adapter merged"][-1] == "3 of 240"
    assert "Measured on 2026-11-28 on a CPU & 2 cores, 2 threads" in _plain("\n".join(lines))
    other = answering_of(wanted | {"full": tmp_path})
    assert written(other) == [] and read_answering(plan.folder, wanted) is None
    damaged = [found | {"contenders": [{}]}, found | {"contenders": None}, {}, [], "x"]
    for text in [*map(json.dumps, damaged), "{"]:
        (plan.folder / "answering.json").write_text(text)
        assert read_answering(plan.folder, wanted) is None


def test_the_contenders_are_the_best_of_each_lora_with_the_model_of_the_best_full_run(report):
    more = '[[method]]\nname = "rank 1"\nscript = "tweet_qa_main_lora.py"\nlora_r = 1\nlr = 3e-3\n'
    other = more.replace("rank 1", "other") + 'model_name = "google/t5-small"\n'
    _, plan = report(lambda run: {}, text=PLAN + more + other, seeds=[0])
    f1 = {"full": 50.0, "lora,lora_r=4": 60.0, "lora,lora_r=16": 61.0, "rank-1": 40.0, "other": 70.0}

    def of(run):
        return f1.get(run.key.split("/")[0], 20.0)

    found = contenders(plan, survey(plan, of), of)
    assert list(found) == ["full", "LoRA (lora_r 16)", "rank 1"]
    f1["full"] = DIVERGED
    assert contenders(plan, survey(plan, of), of) == {}


# -------------------------------------------------------------------------------------------------- the plan's probe


@pytest.fixture
def probed_plan(tmp_path):
    """(plan, run of its LoRA, the record of that run when it has finished, the probe's path)."""
    probe = tmp_path / "probe.jsonl"
    probe.write_text('{"prompt": "a", "target": "b"}\n')
    text = PLAN.replace("[common]\n", f"[common]\nprobe = {json.dumps(str(probe))}\n")
    (tmp_path / "plan.toml").write_text(f'dir = "{tmp_path}/s"\nseeds = [0]\n{text}')
    plan = read_plan(tmp_path / "plan.toml", PARSERS)
    run = plan.run(plan.methods[1], 3e-3, 0)
    args = vars(PARSERS[run.script].parse_args(words(run.arguments))) | {"eval_batch_size": 32}
    measured = {"sha256": hashlib.sha256(probe.read_bytes()).hexdigest()}
    return plan, run, {"method": "lora", "args": args, "finished": True, "probe": measured}, probe


def test_a_run_that_measured_the_same_probe_fits_wherever_the_file_is(probed_plan):
    plan, run, record, probe = probed_plan
    record["args"]["probe"] = "elsewhere/probe.jsonl"
    check_fits(plan, run, record, PARSERS)
    probe.unlink()  # a finished run needs it no more
    check_fits(plan, run, record, PARSERS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("none", "was started without a probe, and the plan has .*probe.jsonl: leave it out, choose another dir, or"),
        ("content", "measured another content of the probe than .*probe.jsonl has now: restore it, choose another dir"),
    ],
)
def test_a_run_without_the_probe_of_the_plan_is_refused(probed_plan, change, said):
    plan, run, record, probe = probed_plan
    if change == "none":
        del record["probe"], record["args"]["probe"]  # as an older version wrote it
    else:
        probe.write_text('{"prompt": "a", "target": "c"}\n')
    with pytest.raises(InputError, match=f"^{plan.path}: {run.folder} {said}"):
        check_fits(plan, run, record, PARSERS)


def test_a_plan_without_a_probe_takes_finished_runs_with_one_and_no_interrupted_ones(probed_plan):
    plan, run, record, _ = probed_plan
    del run.arguments["probe"]
    check_fits(plan, run, record, PARSERS)
    with pytest.raises(InputError, match="was started with probe .*probe.jsonl, and the plan has none: restore it"):
        check_fits(plan, run, record | {"finished": False}, PARSERS)


def test_the_untrained_model_is_not_probed_by_itself(probed_plan):
    """Each run measures it before training. So a plan that gets a probe keeps its untrained model."""
    [base] = probed_plan[0].bases
    assert "probe" not in base.arguments and base.arguments["model_name"] == "google/flan-t5-small"
