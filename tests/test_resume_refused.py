"""What would lose a run, or resume it to another result, is refused with one line, and the folder stays as it was."""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import FULL, LORA, SCRIPTS, WEIGHTS, arguments, assert_refused_at, assert_same_end, contents, main_of
from run_folders import write_run
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from pipeline.resume import SIMILARITY, check_can_resume, same_start
from pipeline.run_folder import read_run_json

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_run_over_a_former_one_is_refused(place, whole, stopped, capfd, script):
    for folder in (whole[script], stopped[script]):
        assert_refused_at(capfd, folder, script, arguments(place, script, folder), "--resume", "--overwrite")


OTHER_ARGUMENTS = {
    "--lr": "--lr 0.5 (was ",
    "--seed": "--seed 7 (was 42)",
    "--epochs": "--epochs 4 (was 3)",
    "--batch_size": "--batch_size 8 (was 4)",
    "--grad_accum_steps": "--grad_accum_steps 1 (was 2)",
    "--max_input_len": "--max_input_len 99 (was 256)",
    "--max_target_len": "--max_target_len 9 (was 32)",
    "--max_train_samples": "--max_train_samples 40 (was None)",
    "--max_eval_samples": "--max_eval_samples 4 (was None)",
    "--holdout": "--holdout 4 (was 0)",
    "--eval_beams": "--eval_beams 2 (was 1)",
    "--final_beams": "--final_beams 2 (was 5)",
    "--patience": "--patience 1 (was 0)",
    "--precision": "--precision bf16 (was auto)",
}


@pytest.mark.parametrize("flag", OTHER_ARGUMENTS)
def test_resuming_with_an_argument_that_changes_the_result_is_refused(place, stopped, capfd, flag):
    script, message = FULL, OTHER_ARGUMENTS[flag]
    argv = arguments(place, script, stopped[script], flag, message.split()[1], "--resume")
    assert_refused_at(capfd, stopped[script], script, argv, message)


def test_resuming_with_another_shape_method_model_or_data_is_refused(place, stopped, tmp_path, capfd):
    def refused(script, more, *messages, folder=None):
        folder = folder or stopped[script]
        assert_refused_at(capfd, folder, script, arguments(place, script, folder, "--resume", *more), *messages)

    full, lora = SCRIPTS
    refused(lora, ["--lora_r", 4, "--lora_alpha", 8], "--lora_r 4 (was 8)", "--lora_alpha 8 (was 32)")
    refused(lora, ["--target_modules", "q"], "--target_modules q (was q k v o wi_0 wi_1 wo lm_head)")
    refused(lora, [], "a run of tweet_qa_main.py", folder=stopped[full])

    model = shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["shared.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for script in SCRIPTS:
        refused(script, ["--model_name", model], "weights (--model_name)")

    data = shutil.copytree(place / "data", tmp_path / "data")
    rows = json.loads((data / "train.json").read_text())
    rows[3]["Tweet"] += "!"
    (data / "train.json").write_text(json.dumps(rows))
    refused(full, ["--dataset", data], "train rows (--dataset)")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", place / "data"):
        refused(full, [], "no run to resume (no run.json)", folder=folder)
    refused(full, ["--overwrite"], "--eval_only, --resume and --overwrite exclude each other")


def test_a_similarity_model_may_move_but_not_be_left_out(tmp_path):
    """Half of the epochs would be without their similarity."""
    identity = {SIMILARITY: "0" * 64}
    folder = write_run(tmp_path / "run", sem_model="minilm", record={"finished": False, "identity": identity})
    given = read_run_json(folder)["args"]
    check_can_resume(folder, "full", given | {"sem_model": "moved/minilm"})
    with pytest.raises(InputError, match=r"different settings \(--sem_model none \(was minilm\)\)"):
        check_can_resume(folder, "full", given | {"sem_model": "none"})


def test_a_run_is_not_resumed_on_another_kind_of_device(tmp_path):
    """Its random numbers there are others. Older versions recorded the device's name alone."""
    now = {"prompt": "", "device": "cpu", "identity": {"device": "cpu"}}
    for name in ("cpu", "cpu:0"):
        assert same_start(tmp_path, {"prompt": "", "device": name, "identity": {}}, now) == {}
    for identity in ({}, {"device": "cuda"}):
        former = {"prompt": "", "device": "NVIDIA H200", "identity": identity}
        with pytest.raises(InputError, match=r"started with different device \(was cuda, is cpu\): restore"):
            same_start(tmp_path, former, now)


@pytest.mark.slow
def test_what_changes_no_result_may_be_given_anew(place, whole, stopped, tmp_path):
    """Also a copy of the data in another place. The batches of the evaluation sum in another order, a little."""
    script = LORA
    folder = shutil.copytree(stopped[script], tmp_path / "run")
    data = shutil.copytree(place / "data", tmp_path / "data")
    more = ("--dataset", data, "--eval_batch_size", 3, "--save_every", 2, "--auto_batch_size")
    assert main_of(script)(arguments(place, script, folder, "--resume", *more)) == 0
    one, two = (load_file(where / WEIGHTS[script]) for where in (folder, whole[script]))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (folder / "train_loss.csv").read_text() == (whole[script] / "train_loss.csv").read_text()


def test_a_finished_run_is_left_as_it_is(place, whole, capfd):
    folder = whole[FULL]
    before = contents(folder)
    assert main_of(FULL)(arguments(place, FULL, folder, "--resume")) == 0
    [line] = capfd.readouterr().out.splitlines()
    assert line.startswith(f"{folder} has ") and line.endswith("finished: there is nothing to resume")
    assert contents(folder) == before


class Forged:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("forged",)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_damaged_folder_is_not_resumed(place, stopped, tmp_path, monkeypatch, capfd, script):
    """What accelerate saved may have come from a stranger: nothing of it is unpickled but tensors and numbers."""
    monkeypatch.chdir(tmp_path)

    def refused(message, damage, *more):
        folder = shutil.copytree(stopped[script], tmp_path / "run")
        damage(folder)
        assert_refused_at(capfd, folder, script, arguments(place, script, folder, "--resume", *more), message)
        assert not (tmp_path / "forged").exists()
        shutil.rmtree(folder)

    def pickled(name):
        return lambda folder: (folder / "last" / name).write_bytes(pickle.dumps(Forged()))

    def saved(name):
        return lambda folder: torch.save({"state": Forged()}, folder / "last" / name)

    def loop(**changes):
        def change(folder):
            path = folder / "last" / "loop.json"
            held = json.loads(path.read_text())
            path.write_text(json.dumps(held | {"state": held["state"] | changes}))

        return change

    again = "--overwrite starts the run again"
    for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl", "loop.json"):
        refused(again, lambda folder, name=name: cut_off(folder / "last" / name))
        refused(again, lambda folder, name=name: (folder / "last" / name).unlink())
    for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        refused(again, pickled(name))
        refused(again, saved(name))
    refused(again, lambda folder: (folder / "last" / "model.safetensors").rename(folder / "last" / "pytorch_model.bin"))
    refused(again, loop(step="1"))
    refused(again, loop(other=1))
    weights = load_file(stopped[script] / "last" / "model.safetensors")
    name = next(iter(weights))
    other = weights | {name: weights[name][:1]}
    for wrong in (other, {"x": weights[name]}):
        message = "its weights are not those that this model trains"
        refused(message, lambda folder, wrong=wrong: save_file(wrong, folder / "last" / "model.safetensors"))

    refused("is damaged or incomplete", lambda folder: cut_off(folder / WEIGHTS[script]))
    refused("cannot be loaded", lambda folder: (folder / WEIGHTS[script]).unlink())
    refused("its tokenizer files are missing", lambda folder: (folder / "tokenizer.json").unlink())
    refused("run.json cannot be read", lambda folder: (folder / "run.json").write_text("{"))
    refused("run.json cannot be read", lambda folder: (folder / "run.json").write_text('{"args": 1, "method": "full"}'))


@pytest.mark.parametrize("flag", ["--eval_only", "--resume"])
def test_adapters_that_do_not_fit_are_named(place, stopped, tmp_path, flan_t5_files, capfd, flag):
    """A foreign adapter, one of another kind, one for a base of another shape, and pickled or half-missing weights."""
    script = LORA

    def refused(message, damage):
        folder = shutil.copytree(stopped[script], tmp_path / "run")
        damage(folder)
        assert_refused_at(capfd, folder, script, arguments(place, script, folder, flag), message)
        shutil.rmtree(folder)

    def config(**changes):
        def change(folder):
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    def weights(change):
        def write(folder):
            save_file(change(load_file(folder / WEIGHTS[script])), folder / WEIGHTS[script])

        return write

    def pickled(folder):
        torch.save(load_file(folder / WEIGHTS[script]), folder / "adapter_model.bin")
        (folder / WEIGHTS[script]).unlink()

    refused(f"{WEIGHTS[script]} is damaged or incomplete", lambda folder: cut_off(folder / WEIGHTS[script]))
    refused("its weights are pickled (adapter_model.bin)", pickled)
    refused("its tokenizer files are missing", lambda folder: (folder / "tokenizer.json").unlink())
    refused("of type IA3, not LORA", config(peft_type="IA3"))
    refused("the adapter in this folder cannot be loaded", config(peft_type="NO_SUCH"))
    refused("the adapter in this folder cannot be loaded", config(target_modules=["query", "value"]))
    refused("the adapter in this folder cannot be loaded", config(r=3))
    refused("the weights of its adapter do not fit", config(target_modules=["q", "v"]))
    refused("the weights of its adapter do not fit", weights(lambda held: dict(list(held.items())[2:])))
    refused("the weights of its adapter do not fit", weights(lambda held: {f"x.{name}": t for name, t in held.items()}))
    refused(
        "the adapter in this folder cannot be loaded",
        weights(lambda held: {n: t[:, :3].clone() for n, t in held.items()}),
    )


def test_an_adapter_is_not_evaluated_on_another_base(place, whole, tmp_path, capfd):
    script = LORA
    model = shutil.copytree(place / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: t + 1 for name, t in weights.items()}, model / "model.safetensors", metadata={"format": "pt"})
    argv = arguments(place, script, whole[script], "--eval_only", "--model_name", model)
    assert_refused_at(capfd, whole[script], script, argv, f"its adapter was trained on another base than {model}")


# ------------------------------------------------------------------------------------------------ overwriting


def test_overwriting_waits_for_good_input_and_removes_only_what_a_run_wrote(place, whole, tmp_path, capfd):
    full, lora = SCRIPTS
    folder = shutil.copytree(whole[lora], tmp_path / "run")
    (folder / "notes.txt").write_text("do not lose me")
    (folder / "last").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "model.safetensors").write_text("do not lose me either")

    def refused(message, *more):
        assert_refused_at(capfd, folder, full, arguments(place, full, folder, "--overwrite", *more), message)

    refused("does not exist", "--dataset", "./nowhere")
    refused("this folder does not exist", "--model_name", "./nowhere")
    refused("--sem_model ./nowhere is not a sentence-transformers folder", "--sem_model", "./nowhere")
    refused("which --overwrite would remove", "--model_name", folder / "mine")
    assert main_of(full)(arguments(place, full, folder, "--overwrite")) == 0
    assert (folder / "notes.txt").read_text() == "do not lose me"
    assert (folder / "mine" / "model.safetensors").read_text() == "do not lose me either"
    (folder / "notes.txt").unlink()
    shutil.rmtree(folder / "mine")
    assert_same_end(full, folder, whole[full])  # also the list of files: nothing of the adapter is left

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("")
    argv = arguments(place, full, other, "--overwrite")
    assert_refused_at(capfd, other, full, argv, "which no run has written")
