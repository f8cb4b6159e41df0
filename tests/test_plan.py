"""A study's plan: what is wrong in one is said with file and key, and which runs are due follows from the results."""

import re

import pytest
from conftest import PROJECT, run_script
from hypothesis import given
from hypothesis import strategies as st

import study
from pipeline import slots
from pipeline.errors import InputError
from pipeline.plan import Method, check_fits, read_plan, words
from pipeline.tuning import DIVERGED, EXTENSIONS, survey, tune

PARSERS = study.training_parsers()
PLAN = """
dir = "runs/s"
seeds = [0, 1]
[common]
model_name = "demo/tiny-t5"
epochs = 2
[[method]]
name = "full fine-tuning"
script = "tweet_qa_main.py"
lr = [1e-3, 3e-4]
[[method]]
name = "LoRA"
script = "tweet_qa_main_lora.py"
lora_r = [1, 4]
target_modules = ["q", "v"]
lr = 3e-3
"""


@pytest.fixture
def plan_of(tmp_path):
    """plan_of(text): the Plan of a file plan.toml with this text."""

    def read(text=PLAN):
        (tmp_path / "plan.toml").write_text(text)
        return read_plan(tmp_path / "plan.toml", PARSERS)

    return read


# --------------------------------------------------------------------------------------------------------- the file


def test_a_list_is_an_axis_and_the_rates_are_tuned(plan_of):
    plan = plan_of()
    assert [(method.title, method.rates) for method in plan.methods] == [
        ("full fine-tuning", (3e-4, 1e-3)),
        ("LoRA, lora_r 1", (3e-3,)),
        ("LoRA, lora_r 4", (3e-3,)),
    ]
    run = plan.run(plan.methods[2], 3e-3, 1)
    assert run.key == "lora,lora_r=4/lr=0.003/seed_1" and run.title == "LoRA, lora_r 4, lr 0.003, seed 1"
    said = "--model_name demo/tiny-t5 --epochs 2 --lora_r 4 --target_modules q v --lr 0.003 --seed 1"
    assert " ".join(words(run.arguments)) == said
    assert plan.axes == ("lora_r",) and plan.margin_f1 == 2.0
    assert [base.key for base in plan.bases] == ["base"]
    assert words(plan.bases[0].arguments) == ["--model_name", "demo/tiny-t5", "--eval_only"]


def test_several_words_are_one_value_and_a_list_of_lists_is_an_axis(plan_of):
    plan = plan_of(PLAN.replace('["q", "v"]', '[["q", "v"], ["wi_0"]]'))
    assert [method.title for method in plan.methods[1:]] == [
        f"LoRA, lora_r {r}, target_modules {modules}" for r in (1, 4) for modules in ("q v", "wi_0")
    ]
    assert plan.methods[1].key == "lora,lora_r=1,target_modules=q-v"


def test_a_method_has_the_last_word_over_common_and_an_axis_may_be_common(plan_of):
    plan = plan_of(
        PLAN.replace("epochs = 2", "epochs = [2, 3]\ngradient_checkpointing = true\nbatch_size = 4") + "epochs = 7"
    )
    assert [method.arguments["epochs"] for method in plan.methods] == [2, 3, 7, 7]
    assert all("--gradient_checkpointing" in words(method.arguments) for method in plan.methods)
    assert [base.key for base in plan.bases] == ["base"]  # epochs do not matter to an untrained model


def test_true_and_false_can_be_an_axis(plan_of):
    plan = plan_of(PLAN.replace("lora_r = [1, 4]", "gradient_checkpointing = [false, true]"))
    assert [method.key for method in plan.methods[1:]] == [
        f"lora,gradient_checkpointing={each}" for each in ("false", "true")
    ]
    assert ["--gradient_checkpointing" in words(method.arguments) for method in plan.methods[1:]] == [False, True]


def test_each_untrained_model_is_scored_once(plan_of):
    plan = plan_of(PLAN.replace('model_name = "demo/tiny-t5"', 'model_name = ["demo/tiny-t5", "google/flan-t5-small"]'))
    assert len(plan.methods) == 6
    keys = ["base,model_name=demo-tiny-t5", "base,model_name=google-flan-t5-small"]
    assert [base.key for base in plan.bases] == keys


def test_a_default_that_is_written_out_changes_nothing(plan_of):
    typed = plan_of(PLAN.replace("lora_r = [1, 4]", "lora_r = [1, 4]\nmax_target_len = 32"))
    assert [base.key for base in typed.bases] == ["base"]
    assert [method.meant for method in typed.methods] == [method.meant for method in plan_of().methods]


def test_each_method_is_compared_with_its_own_untrained_model(plan_of):
    """Also where one writes a default out that another one has without saying so."""
    head, lora = PLAN.split("[[method]]", 1)[0], '[[method]]\nname = "LoRA"\nscript = "tweet_qa_main_lora.py"\n'
    full = '[[method]]\nname = "full"\nscript = "tweet_qa_main.py"\nmax_target_len = 32\n'
    assert plan_of(head + full + lora).base_keys == {"full": "base", "lora": "base"}
    keys = plan_of(head + full + lora + "final_beams = 1\n").base_keys
    assert keys == {"full": "base,max_target_len=32", "lora": "base,final_beams=1"}


WRONG = {
    "folder name": (('dir = "runs/s"', f'dir = "{"x" * 300}"'), "dir: cannot be used: "),
    "unknown top key": (("seeds = [0, 1]", "seed = [0]"), "seed: unknown key (did you mean seeds?)"),
    "unknown argument": (("lora_r = [1, 4]", "lora_rank = 4"), r'method "LoRA": lora_rank: .*no such argument'),
    "only of LoRA": (("epochs = 2", "lora_r = 2"), r"\[common\]: lora_r: tweet_qa_main.py has no such argument"),
    "value": (("lora_r = [1, 4]", "lora_r = [1, 0]"), 'method "LoRA": lora_r: must be a whole number of at least 1'),
    "text for a number": (("epochs = 2", 'epochs = "2"'), r"\[common\]: epochs: must be a number, without quotes"),
    "number for a text": (('"demo/tiny-t5"', "5"), r"\[common\]: model_name: must be a text, in quotes"),
    "true for a number": (("epochs = 2", "epochs = true"), r"\[common\]: epochs: must be a text or a number, not True"),
    "a date": (("epochs = 2", "epochs = 2026-01-02"), r"\[common\]: epochs: must be"),
    "a table": (("epochs = 2", "epochs = {a = 1}"), r"\[common\]: epochs: must be .*not a table"),
    "number for true": (("epochs = 2", "drop_leaked = 1"), r"\[common\]: drop_leaked: must be true or false"),
    "choice": (("epochs = 2", 'precision = "fp8"'), r"\[common\]: precision: invalid choice: 'fp8'"),
    "negative rate": (("lr = 3e-3", "lr = -1"), 'method "LoRA": lr: must be a number above 0'),
    "infinite rate": (("lr = 3e-3", "lr = inf"), 'method "LoRA": lr: must be a number above 0'),
    "list for dir": (('dir = "runs/s"', 'dir = ["runs/s"]'), "dir: must be the name of a folder"),
    "no dir": (('dir = "runs/s"', ""), "dir: must be the name of a folder"),
    "number for seeds": (("[0, 1]", "3"), "seeds: must be a list"),
    "seed twice": (("[0, 1]", "[1, 1]"), "seeds: must be a list of different"),
    "list for a script": (('"tweet_qa_main.py"', '["tweet_qa_main.py"]'), 'method "full fine-tuning": script: must be'),
    "no such script": (
        ('"tweet_qa_main.py"', '"no.py"'),
        'method "full fine-tuning": script: unknown training script .*no.py',
    ),
    "no script": (('script = "tweet_qa_main.py"', ""), 'method "full fine-tuning": script: must be'),
    "list for a name": (('"LoRA"', '["LoRA"]'), "method 2: name: must be a text"),
    "two of one name": (('"LoRA"', '"Full fine tuning"'), "name: another method is called"),
    "a folder of the study": (('"LoRA"', '"base"'), 'method "base": name: the study has a folder'),
    "empty axis": (("[1, 4]", "[]"), 'method "LoRA": lora_r: the list is empty'),
    "value twice": (("[1, 4]", "[1, 1]"), 'method "LoRA": lora_r: 1 is in the list twice'),
    "rate twice": (("lr = 3e-3", "lr = [1e-3, 0.001001]"), 'method "LoRA": lr: .*the same rate'),
    "set by the study": (("epochs = 2", "save_dir = 'x'"), r"\[common\]: save_dir: the study sets it"),
    "seed": (("epochs = 2", "seed = 1"), r"\[common\]: seed: the study sets it"),
    "upload": (("epochs = 2", "push_to_hub = 'a/b'"), r"\[common\]: push_to_hub: a study uploads nothing"),
    "margin": (("[common]", "margin_f1 = '2'\n[common]"), "margin_f1: must be a number"),
    "no methods": (("[[method]]", "[[methods]]"), "methods: unknown key"),
    "no TOML": (("seeds = [0, 1]", "seeds ="), r"cannot be read .*line 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_file_and_key(plan_of, case):
    (before, after), message = WRONG[case]
    assert before in PLAN
    with pytest.raises(InputError) as refused:
        plan_of(PLAN.replace(before, after))
    assert "plan.toml: " in str(refused.value) and "\n" not in str(refused.value)
    assert re.search(message.replace("(did", r"\(did").replace("?)", r"\?\)"), str(refused.value)), refused.value


def test_two_methods_with_the_same_arguments_are_one(plan_of):
    same = PLAN[PLAN.index('[[method]]\nname = "LoRA"') :].replace('"LoRA"', '"other"').replace("3e-3", "1e-2")
    with pytest.raises(InputError, match='method "other": has the same arguments as "LoRA, lora_r 1"'):
        plan_of(PLAN + same.replace("[1, 4]", "1") + "lora_alpha = 32")  # its default


def test_a_wrong_plan_ends_the_script_before_anything_runs(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace("runs/s", str(tmp_path / "runs")).replace("[1, 4]", "[1, 0]"))
    done = run_script("study.py", path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f'error: {path}: method "LoRA": lora_r: must be') and done.stderr.count("\n") == 1
    assert run_script("study.py", tmp_path / "none.toml").returncode == 2
    assert [each.name for each in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize("path", sorted((PROJECT / "studies").glob("*.toml")), ids=lambda path: path.name)
def test_the_plans_that_come_with_the_project_can_be_run(path):
    if "holdout_seed" not in study.build_parser("", None, None).parse_args([]):
        pytest.skip("this version of the scripts cannot run them")
    plan = read_plan(path, PARSERS)
    said = re.search(r"(\d+) runs", path.read_text())[1]
    assert survey(plan, lambda run: None).expected == int(said)
    assert all(len(method.rates) >= 3 for method in plan.methods) and len(plan.seeds) == 3
    assert len(plan.bases) == 1 and plan.methods[0].arguments["holdout"] > 0


# ------------------------------------------------------------------------------------------------ which runs are due


def method_with(plan_of, rates):
    return plan_of(PLAN.replace("lr = 3e-3", f"lr = {rates}").replace("[1, 4]", "1")).methods[1]


def test_a_best_rate_within_the_list_is_taken(plan_of):
    method = method_with(plan_of, [1e-3, 3e-3, 1e-2])
    assert tune(method, {1e-3: 50.0}.get).missing == (3e-3, 1e-2)
    found = tune(method, {1e-3: 50.0, 3e-3: 60.0, 1e-2: 55.0}.get)
    assert (found.best, found.at_edge, found.chosen, found.rates) == (3e-3, "", True, (1e-3, 3e-3, 1e-2))


def test_a_best_rate_at_the_edge_is_followed_outward_twice_at_most(plan_of):
    method = method_with(plan_of, [3e-4, 1e-3, 3e-3])
    f1 = {3e-4: 40.0, 1e-3: 50.0, 3e-3: 60.0}
    assert tune(method, f1.get).missing == (9e-3,)
    f1[9e-3] = 59.0
    assert (tune(method, f1.get).best, tune(method, f1.get).at_edge) == (3e-3, "")
    f1[9e-3] = 61.0
    assert tune(method, f1.get).missing == (2.7e-2,)
    f1[2.7e-2] = 62.0
    found = tune(method, f1.get)
    assert (found.best, found.at_edge, found.chosen) == (2.7e-2, "highest", True)
    low = {3e-4: 60.0, 1e-3: 50.0, 3e-3: 40.0}
    assert tune(method, low.get).missing == (9e-5,)
    low[9e-5] = DIVERGED
    assert (tune(method, low.get).best, tune(method, low.get).at_edge) == (3e-4, "")


def test_a_rate_that_diverged_is_never_the_best(plan_of):
    method = method_with(plan_of, [1e-3, 3e-3])
    assert tune(method, {1e-3: DIVERGED, 3e-3: 0.0, 9e-3: DIVERGED}.get).best == 3e-3
    nothing = tune(method, {1e-3: DIVERGED, 3e-3: DIVERGED}.get)
    assert not nothing.chosen and not nothing.missing


def test_of_equal_rates_the_lower_is_the_best(plan_of):
    method = method_with(plan_of, [1e-3, 3e-3, 1e-2])
    assert tune(method, {1e-3: 1.0, 3e-3: 2.0, 1e-2: 2.0}.get).best == 3e-3


@given(st.lists(st.integers(-1, 5).map(float), min_size=9, max_size=9), st.integers(2, 5))
def test_tuning_ends_with_the_best_of_what_it_tried(values, count):
    method = Method("a", "a", "a", "tweet_qa_main.py", {}, {}, tuple(round(1e-3 * 3**n, 9) for n in range(count)), {})
    f1 = {}
    for _ in range(count + EXTENSIONS + 1):
        found = tune(method, f1.get)
        if not found.missing:
            break
        f1[found.missing[0]] = values[len(f1)]
    assert not found.missing and set(found.rates) == set(f1) and len(f1) <= count + EXTENSIONS
    if found.chosen:
        assert f1[found.best] == max(f1.values()) and f1[found.best] != DIVERGED
        inside = found.best not in (min(f1), max(f1))
        assert inside == (found.at_edge == "") and (inside or len(f1) == count + EXTENSIONS)


def test_seeds_follow_when_a_method_is_tuned_and_no_earlier(plan_of):
    plan = plan_of()

    results = {}

    def due():
        return [run.key for run in survey(plan, lambda run: results.get(run.key)).due]

    first = ["base", "full-fine-tuning/lr=0.0003/seed_0", "full-fine-tuning/lr=0.001/seed_0"]
    single = [f"lora,lora_r={r}/lr=0.003/seed_{seed}" for seed in (0, 1) for r in (1, 4)]
    assert due() == first + single  # a single rate is not tuned: its seeds wait for nothing
    assert survey(plan, lambda run: None).expected == 1 + 2 + 1 + 4
    results |= dict.fromkeys(["base", *single], 30.0) | {first[1]: 50.0, first[2]: 60.0}
    assert due() == ["full-fine-tuning/lr=0.003333/seed_0"]
    results["full-fine-tuning/lr=0.003333/seed_0"] = 55.0
    assert due() == ["full-fine-tuning/lr=0.001/seed_1"]
    results["full-fine-tuning/lr=0.001/seed_1"] = 58.0
    assert due() == []
    now = survey(plan, lambda run: results.get(run.key))
    assert now.expected == len(now.runs) == len(results) == 9
    stages = {key: stage for key, (_, stage) in now.runs.items() if key.startswith(("base", "full"))}
    assert list(stages.values()) == ["base", "tuning", "chosen", "chosen", "tuning"]


def test_one_more_seed_makes_the_difference_due(plan_of):
    results = {}
    plan = plan_of(PLAN.replace("[1e-3, 3e-4]", "1e-3"))
    while due := survey(plan, lambda run: results.get(run.key)).due:
        results[due[0].key] = 50.0
    more = plan_of(PLAN.replace("[1e-3, 3e-4]", "1e-3").replace("[0, 1]", "[0, 1, 7]"))
    due = survey(more, lambda run: results.get(run.key)).due
    assert [run.seed for run in due] == [7, 7, 7]


# ------------------------------------------------------------------------------------------------ an existing folder


def record_of(run, method):
    parsed = vars(PARSERS[run.script].parse_args(words(run.arguments | {"save_dir": str(run.folder)})))
    return {"method": method, "args": parsed | {"eval_batch_size": 32}}


def test_a_folder_of_the_same_run_fits_however_it_ran(plan_of):
    plan = plan_of()
    run = plan.run(plan.methods[1], 3e-3, 0)
    record = record_of(run, "lora")
    check_fits(plan, run, record, PARSERS)
    record["args"] |= {"save_every": 5, "gradient_checkpointing": True, "model_name": str(PROJECT / "demo/tiny-t5")}
    del record["args"]["holdout"]  # as if an older version did not know it
    check_fits(plan, run, record, PARSERS)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 3), ("lora_r", 2), ("model_name", "other"), ("sem_model", "none"), ("final_beams", 1)],
)
def test_a_folder_of_another_run_is_refused_with_folder_and_argument(plan_of, name, value):
    plan = plan_of()
    run = plan.run(plan.methods[1], 3e-3, 0)
    record = record_of(run, "lora")
    record["args"][name] = value
    with pytest.raises(InputError, match=f"plan.toml: {re.escape(str(run.folder))} was started with {name} {value}"):
        check_fits(plan, run, record, PARSERS)
    with pytest.raises(InputError, match="method full, not lora"):
        check_fits(plan, run, record_of(run, "full"), PARSERS)


@pytest.mark.parametrize(
    ("name", "value"), [("final_beams", 1), ("max_eval_samples", 36), ("holdout", 4), ("sem_model", "none")]
)
def test_a_run_that_was_scored_again_in_another_way_is_refused(plan_of, name, value):
    """Its F1 would be compared with that of other rates, which means something else."""
    plan = plan_of()
    run = plan.run(plan.methods[1], 3e-3, 0)
    record = record_of(run, "lora")
    scored = record["args"] | {"eval_only": True, "eval_batch_size": 1, "save_dir": "moved"}
    check_fits(plan, run, record | {"eval_only": scored}, PARSERS)
    with pytest.raises(InputError, match=rf"was scored again \(--eval_only\) with {name} {value}, and the plan has"):
        check_fits(plan, run, record | {"eval_only": scored | {name: value}}, PARSERS)
    auto = record | {"identity": {"precision": "no"}, "eval_only": scored | {"precision": "fp32"}}
    check_fits(plan, run, auto, PARSERS)  # which is what auto meant
    with pytest.raises(InputError, match="with precision fp32, and the plan has auto"):
        check_fits(plan, run, auto | {"identity": {"precision": "bf16"}}, PARSERS)
    older = record | {"args": {n: v for n, v in record["args"].items() if n != "holdout_seed"}}
    check_fits(plan, run, older | {"eval_only": scored | {"holdout_seed": 0}}, PARSERS)
    moved = {"content": {"dataset": "same"}, "eval_only": scored | {"dataset": "x", "content": {"dataset": "same"}}}
    check_fits(plan, run, record | moved, PARSERS)


def test_runs_at_once_share_the_cores_or_get_a_gpu_each(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(slots.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert slots.environment_of_jobs(1) == [{}]
    assert slots.environment_of_jobs(4) == [{"OMP_NUM_THREADS": "1"}] * 4
    assert slots.environment_of_jobs(2) == [{"OMP_NUM_THREADS": "3"}] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert slots.environment_of_jobs(2) == [{}, {}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    names = [each["CUDA_VISIBLE_DEVICES"] for each in slots.environment_of_jobs(3)]
    assert names == ["2", "GPU-5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert slots.environment_of_jobs(2) == [{}, {}]
