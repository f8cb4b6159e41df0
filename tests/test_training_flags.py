"""The flags that change how a run trains: each does what it says, is recorded, and is resumed exactly."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import (
    FULL,
    LORA,
    LORA_FIRST,
    PROJECT,
    SCRIPTS,
    arguments,
    assert_refused_at,
    assert_same_end,
    main_of,
    run_script,
    signal_at_step,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helper_functions import InputError, TweetQADataset, build_collate_fn, build_loader, load_model_and_tokenizer
from pipeline.arguments import build_parser
from pipeline.data import select_rows, subset
from pipeline.devices import make_accelerator
from pipeline.memory import training_memory
from pipeline.optimizers import build_optimizer
from pipeline.resume import LoopState
from pipeline.run_folder import read_run
from pipeline.step_plan import StepPlan, plan_steps
from pipeline.t5 import matrices_to_adapt
from pipeline.text import tweet_key
from tweet_qa_main import Prepared, train_epoch
from tweet_qa_main_lora import LORA_FLAGS

pytestmark = pytest.mark.usefixtures("without_java")
# Everything at once, each with another value than its default. 11 steps are one epoch of 6 and a part of another.
OTHER = ["--optim", "adafactor", "--lr_scheduler_type", "cosine", "--weight_decay", 0.1, "--warmup_steps", 3]
OTHER += ["--label_smoothing_factor", 0.1, "--max_steps", 11]
ADAPTER = ["--target_modules", "all-linear", "--use_dora", "--use_rslora", "--lora_r", 4]
GIVEN = {FULL: OTHER, LORA: [*OTHER, *ADAPTER]}


def parsed(*argv, script=FULL):
    parser = build_parser("", lr=1e-3, save_dir="run", more=LORA_FLAGS if script == LORA else ())
    return parser.parse_args([str(word) for word in argv])


def args_of(place, script, folder, *more):
    """Of a run with GIVEN in `folder`."""
    targets = "--target_modules" in GIVEN[script]
    argv = arguments(place, script, folder, *GIVEN[script], *more)
    if targets:  # in place of those that the other tests' runs have
        start = argv.index("--target_modules")
        end = next(i for i in range(start + 1, len(argv)) if argv[i].startswith("--"))
        del argv[start:end]
    return argv


@pytest.fixture(scope="module")
def changed(made_once, place):
    """{script: folder} of runs with GIVEN that nothing interrupted."""

    def run(script):
        def make(folder):
            done = run_script(script, *args_of(place, script, folder / "run"))
            assert done.returncode == 0, done.stderr
            return done.stdout

        folder, said = made_once(f"flags-{script}", make)
        return folder / "run", said

    return {script: run(script) for script in SCRIPTS}


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


# ----------------------------------------------------------------------------------------------- recorded and resumed


@pytest.mark.parametrize("script", LORA_FIRST)
def test_a_run_that_is_stopped_within_its_last_part_of_an_epoch_ends_as_the_whole_one(place, changed, tmp_path, script):
    folder = tmp_path / "run"
    with signal_at_step(9):
        assert main_of(script)(args_of(place, script, folder)) == 143
    assert main_of(script)(args_of(place, script, folder, "--resume")) == 0
    assert_same_end(script, folder, changed[script][0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_is_recorded_and_cannot_change_in_a_run(place, changed, tmp_path, capfd, script):
    folder, _ = changed[script]
    args = record_of(folder)["args"]
    names = ["optim", "lr_scheduler_type", "weight_decay", "warmup_steps", "label_smoothing_factor", "max_steps"]
    assert [args[name] for name in names] == ["adafactor", "cosine", 0.1, 3.0, 0.1, 11]
    others = {"--optim": "adamw", "--lr_scheduler_type": "linear", "--weight_decay": 0.01, "--warmup_steps": 2.0}
    others |= {"--label_smoothing_factor": 0.0, "--max_steps": 12}
    if script == LORA:
        assert args["target_modules"] == ["all-linear"] and args["use_dora"] and args["use_rslora"]
        assert record_of(folder)["adapted_matrices"] == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]
        others["--lora_r"] = 5
    for flag, value in others.items():
        argv = args_of(place, script, folder, "--resume", flag, value)
        assert_refused_at(capfd, folder, script, argv, f"{flag} {value} (was ")


def test_a_run_of_an_older_version_is_resumed_as_it_was_started(place, stopped, whole, tmp_path, capfd):
    """Its run.json has none of these flags: it did what their defaults do, and another value is refused."""
    folder = shutil.copytree(stopped[FULL], tmp_path / "old")
    record = record_of(folder)
    new = ["optim", "weight_decay", "warmup_steps", "lr_scheduler_type", "max_steps", "label_smoothing_factor"]
    for name in [*new, "train_subset", "holdout_seed"]:
        del record["args"][name]
    (folder / "run.json").write_text(json.dumps(record))
    for flag, value in {"--lr_scheduler_type": "cosine", "--max_steps": 9, "--train_subset": 20}.items():
        argv = arguments(place, FULL, folder, "--resume", flag, value)
        assert_refused_at(capfd, folder, FULL, argv, f"{flag} {value} (was ")
    assert main_of(FULL)(arguments(place, FULL, folder, "--resume")) == 0
    assert_same_end(FULL, folder, whole[FULL])


def test_hugging_faces_names_and_the_short_ones_are_the_same_flags():
    short = parsed("--optimizer", "adafactor", "--warmup", 0.1, "--label_smoothing", 0.2)
    long = parsed("--optim", "adafactor", "--warmup_steps", 0.1, "--label_smoothing_factor", 0.2)
    assert vars(short) == vars(long) and short.optim == "adafactor"


# ---------------------------------------------------------------------------------------------------- steps and rates


@pytest.mark.parametrize("script", SCRIPTS)
def test_max_steps_ends_within_an_epoch_which_is_scored(changed, script):
    folder, said = changed[script]
    steps, epochs = pd.read_csv(folder / "train_loss.csv"), pd.read_csv(folder / "metrics.csv")
    assert steps["step"].tolist() == list(range(1, 12)) and steps["epoch"].tolist() == [1] * 6 + [2] * 5
    assert epochs["epoch"].tolist() == [1, 2] and record_of(folder)["epochs"] == 2
    assert "steps: 6 per epoch, 11 in all" in said
    peak = record_of(folder)["args"]["lr"]  # three steps of warm-up, then half a cosine over the other eight
    expected = [0, 1 / 3, 2 / 3, *(0.5 + 0.5 * torch.cos(torch.pi * torch.arange(8) / 8)).tolist()]
    assert (steps["lr"] / peak).tolist() == pytest.approx(expected, abs=1e-6)
    record, read, _ = read_run(folder)
    assert record["args"]["epochs"] == 3 and len(read) == 2 and read["seconds_since_start"].is_monotonic_increasing
    # 40 of the 44 rows in the second epoch's five steps of eight
    rates = epochs["samples_per_sec"] * epochs["epoch_seconds"]
    assert rates.tolist() == pytest.approx([44, 40], rel=1e-2)


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 16), st.integers(1, 200))
def test_max_steps_takes_as_many_epochs_as_it_needs(rows, epochs, batch_size, max_steps):
    plan = StepPlan(rows, epochs, 1, batch_size, 2, max_steps)
    assert (plan.epochs - 1) * plan.steps_per_epoch < max_steps <= plan.epochs * plan.steps_per_epoch
    assert plan.total_steps == max_steps
    without = StepPlan(rows, epochs, 1, batch_size, 2)
    assert without.epochs == epochs and without.total_steps == epochs * plan.steps_per_epoch


def rates_of(kind, warmup_steps, steps=10):
    weights = torch.nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(weights, 1.0, steps, lr_scheduler_type=kind, warmup_steps=warmup_steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_the_schedules_and_the_warm_up():
    assert rates_of("constant", 0.5) == [1] * 10
    assert rates_of("constant_with_warmup", 2) == [0, 0.5] + [1] * 8
    assert rates_of("constant_with_warmup", 0.2) == [0, 0.5] + [1] * 8  # below 1: a share
    assert rates_of("linear", 0) == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates_of("inverse_sqrt", 1)[:3] == pytest.approx([0, 1, 2**-0.5])


def test_a_warm_up_that_is_longer_than_the_run_is_refused():
    def plan(*argv):
        return plan_steps(parsed("--epochs", 2, "--batch_size", 5, *argv), rows=20, processes=1)

    assert plan("--warmup_steps", 8).total_steps == 8
    with pytest.raises(InputError, match="--warmup_steps 9: the whole run has only 8 steps"):
        plan("--warmup_steps", 9)
    with pytest.raises(InputError, match="has only 3 steps"):
        plan("--warmup", 4, "--max_steps", 3)


WRONG = {
    "--weight_decay": ("-1", "must be a number of at least 0"),
    "--warmup_steps": ("2.5", "must be a number of steps, or a share of all steps below 1"),
    "--label_smoothing_factor": ("1", "must be a number of at least 0 and below 1"),
    "--max_steps": ("0", "must be a whole number of at least 1"),
    "--train_subset": ("0", "must be a whole number of at least 1"),
    "--optim": ("sgd", "invalid choice: 'sgd'"),
    "--lr_scheduler_type": ("reduce_lr_on_plateau", "invalid choice"),
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_values_are_refused_in_one_line(flag, capfd):
    value, message = WRONG[flag]
    with pytest.raises(SystemExit) as exit:
        parsed(flag, value)
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == "" and err.count("\n") == 1 and f"argument {flag}" in err and message in err


# ------------------------------------------------------------------------------------------ optimizer and loss


def test_adafactor_uses_the_schedules_rate_and_its_state_is_estimated(calm, tokenizer, rows):
    model, _ = load_model_and_tokenizer(str(calm))
    data = TweetQADataset(rows[:4], tokenizer)
    batch = build_collate_fn(tokenizer)([data[i] for i in range(4)])

    def make(model):
        return build_optimizer(model, 1e-2, 10, optim="adafactor", warmup_steps=0)[0]

    parts = training_memory(model, batch, torch.device("cpu"), make)
    before, optimizer = [weight.detach().clone() for weight in model.parameters()], make(model)
    model.train()(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values()]
    real = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.ndim)
    assert parts["optimizer"] == real < sum(weight.nbytes for weight in model.parameters()) / 20
    for old, new in zip(before, model.parameters(), strict=True):  # a step has a root mean square of at most lr
        decay = 0.01 * 1e-2 * old.square().mean().sqrt()
        assert 0 < (new - old).square().mean().sqrt() <= 1e-2 + decay + 1e-6


def test_label_smoothing_is_that_of_szegedy(calm, tokenizer, rows):
    """The loss of the first step: a target has the probability 0.9 + 0.1 / V, each other token 0.1 / V."""
    model, _ = load_model_and_tokenizer(str(calm))
    data = TweetQADataset(rows[:4], tokenizer)
    loader = build_loader(data, 4, build_collate_fn(tokenizer), range(4))
    batch = next(iter(loader))
    tokens = batch["labels"] != -100
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
    logs = logits.log_softmax(-1)[tokens]
    own = logs.gather(1, batch["labels"][tokens][:, None])[:, 0]
    accelerator, (optimizer, schedule) = Accelerator(), build_optimizer(model, 1e-3, 1)
    given = (*accelerator.prepare(model, loader, optimizer), schedule)
    steps, _ = train_epoch(Prepared(*given, hollow=None, label_smoothing=0.1), accelerator, LoopState())
    assert steps[0]["loss"] == pytest.approx(-(0.9 * own + 0.1 * logs.mean(1)).mean().item(), rel=1e-5)
    assert steps[0]["loss"] != pytest.approx(-own.mean().item(), rel=1e-4)


def test_the_logged_loss_is_the_smoothed_one(changed, whole):
    """In the first step, whose weights are the same."""
    smoothed, plain = (pd.read_csv(folder / "train_loss.csv")["loss"][0] for folder in (changed[FULL][0], whole[FULL]))
    assert smoothed > plain + 0.01


# --------------------------------------------------------------------------------------------------- train on a subset


def rows_about(tweets):
    return [{"Question": f"q{i}?", "Tweet": tweet, "Answer": ["a"], "qid": str(i)} for i, tweet in enumerate(tweets)]


@given(st.lists(st.sampled_from(["a", "A", " a ", "b", "c c", "C  c", "d", "e", "f"]), min_size=1, max_size=40))
def test_subsets_are_whole_tweets_and_lie_within_each_other(tweets):
    rows, smaller = rows_about(tweets), set()
    for count in range(1, len(rows) + 1):
        try:
            chosen = subset(rows, count)
        except InputError:
            assert not smaller  # the first tweet alone is larger
            continue
        assert chosen == sorted(set(chosen)) and 0 < len(chosen) <= count and smaller <= set(chosen)
        inside = {tweet_key(rows[i]["Tweet"]) for i in chosen}
        assert not inside & {tweet_key(row["Tweet"]) for i, row in enumerate(rows) if i not in chosen}
        smaller = set(chosen)
    assert len(smaller) == len(rows)
    with pytest.raises(InputError, match=f"--train_subset 41: there are only {len(rows)} training rows"):
        subset(rows, 41)


def test_a_subset_is_the_same_for_all_seeds_and_its_size_is_said(place, tmp_path, capfd):
    given = ["--train_subset", 20, "--epochs", 1, "--final_beams", 1]
    chosen = [select_rows(parsed("--dataset", place / "data", *given, "--seed", seed)) for seed in (1, 2)]
    assert chosen[0].rows == chosen[1].rows and 15 < len(chosen[0].rows["train"]) <= 20
    assert main_of(LORA)(arguments(place, LORA, tmp_path / "run", *given)) == 0
    count = record_of(tmp_path / "run")["train_rows"]
    assert count == len(chosen[0].rows["train"]) and f"--train_subset 20: {count} rows about" in capfd.readouterr().out
    assert main_of(FULL)(arguments(place, FULL, tmp_path / "both", *given, "--max_train_samples", 9)) == 2
    assert "--train_subset and --max_train_samples both choose" in capfd.readouterr().err
    assert not (tmp_path / "both").exists()


# ---------------------------------------------------------------------------------------------------------- adapters


def test_the_short_names_of_matrices(standin):
    model, _ = load_model_and_tokenizer(str(standin))
    assert matrices_to_adapt(model, ["all-linear"]) == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]
    assert matrices_to_adapt(model, ["attention"]) == ["k", "o", "q", "v"]
    assert matrices_to_adapt(model, ["q", "attention", "lm_head"]) == ["q", "k", "o", "v", "lm_head"]
    with pytest.raises(InputError, match="--target_modules wi: this model has k, o, q, v, wi_0, wi_1, wo; all-linear"):
        matrices_to_adapt(model, ["q", "wi"])


def test_all_linear_is_what_peft_means_by_it(standin):
    from peft import LoraConfig, get_peft_model

    model, _ = load_model_and_tokenizer(str(standin))
    ours = matrices_to_adapt(model, ["all-linear"])
    config = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear")).peft_config
    assert {name.rsplit(".", 1)[-1] for name in config["default"].target_modules} == set(ours)


def test_a_dora_adapter_is_saved_whole_and_answers_as_it_did(changed):
    folder, _ = changed[LORA]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"] and len(config["target_modules"]) == 7
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert sum("magnitude" in name for name in names) == sum("lora_A" in name for name in names) > 7
    before = pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False)
    done = run_script(LORA, "--eval_only", "--save_dir", folder)
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(pd.read_csv(folder / "validation_predictions.csv", keep_default_na=False), before)


UNDER_4 = """
import sys, pandas as pd, peft, transformers
from helper_functions import answer
folder, base = sys.argv[1:]
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base)
model, tokenizer = peft.PeftModel.from_pretrained(model, folder), transformers.AutoTokenizer.from_pretrained(folder)
frame = pd.read_csv(f"{folder}/validation_predictions.csv", keep_default_na=False)
answers = answer(model, tokenizer, "cpu", frame["question"].tolist(), frame["tweet"].tolist(), beams=5)
assert answers == frame["prediction"].tolist(), answers
print(transformers.__version__)
"""


@pytest.mark.slow
def test_transformers_4_loads_a_dora_adapter_of_all_linear_matrices(place, changed):
    libraries = PROJECT / ".venv" / "transformers4"
    assert libraries.is_dir(), f"transformers 4 is not in {libraries}: `make test` installs it there"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (libraries, PROJECT)))}
    command = [sys.executable, "-c", UNDER_4, changed[LORA][0], place / "model"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and done.stdout.startswith("4.57"), done.stderr


@pytest.mark.parametrize("given", [["--optim", "adafactor"], ["--use_dora"]])
def test_what_cannot_be_sharded_is_refused(given, monkeypatch):
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_FSDP", "true")
    monkeypatch.setitem(os.environ, "FSDP_VERSION", "2")
    with pytest.raises(InputError, match=f"{given[0]}.* cannot be used for sharded training"):
        make_accelerator(parsed(*given, script=LORA))


def test_attention_is_not_computed_by_cudnn():
    """It is compiled for each length: a search has a new one at each token."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_accelerator(parsed())
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_an_optimizer_that_was_prepared_is_stepped_with_the_schedule():
    """accelerate's wrapper takes transformers' Adafactor as it takes torch's optimizers."""
    model = torch.nn.Linear(4, 4)
    optimizer, schedule = build_optimizer(model, 1e-2, 10, optim="adafactor")
    optimizer = Accelerator().prepare(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step(), schedule.step()
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] > 0
    assert Namespace(**optimizer.param_groups[0]).relative_step is False
