"""Each flag says what it changes, and what follows from that: resuming, scoring again, and telling methods apart."""

import argparse

import pytest

import tweet_qa_main_lora
from pipeline import arguments
from pipeline.arguments import (
    FLAGS,
    ROLES,
    Role,
    build_parser,
    flag,
    may_differ_on_resume,
    sets_methods_apart,
    with_role,
)

LORA_FLAGS = {"lora_r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "base_dtype"}
LORA_FLAGS |= {"merge", "merge_dtype"}


@pytest.fixture
def names():
    """The arguments of both scripts."""
    parser = build_parser("", lr=1, save_dir="x", more=tweet_qa_main_lora.LORA_FLAGS, title="LoRA")
    return [action.dest for action in parser._actions if action.dest != "help"]


def test_every_flag_of_both_scripts_has_a_role(names):
    assert len(names) == len(FLAGS) + len(LORA_FLAGS) > 30 and set(names) > LORA_FLAGS
    assert set(names) == ROLES.keys()
    assert all(isinstance(role, Role) and role for role in ROLES.values())


def test_a_flag_without_a_role_fails_where_it_is_declared(monkeypatch):
    monkeypatch.setattr(arguments, "ROLES", {})
    with pytest.raises(TypeError, match="role"):
        flag("--new", type=int)
    assert not arguments.ROLES


def test_a_flag_cannot_come_into_a_parser_but_by_its_declaration(monkeypatch):
    monkeypatch.setattr(arguments, "ROLES", dict(ROLES))
    parser = build_parser("", lr=1, save_dir="x", more=[flag("--new", Role.COST, type=int, default=3)], title="more")
    assert isinstance(parser, argparse.ArgumentParser) and parser.parse_args([]).new == 3
    assert may_differ_on_resume("new") and sets_methods_apart("new")


# The lists that were kept by hand before each flag had a role.
HARMLESS = "save_dir resume overwrite seeds eval_only save_every eval_batch_size auto_batch_size"
HARMLESS = [*HARMLESS.split(), *"gradient_checkpointing report_to push_to_hub model_name dataset".split()]
HARMLESS += ["merge", "merge_dtype"]
HARMLESS += ["sem_model", "probe"]  # whose content is compared, as that of the model and the data set is
SCORING = "dataset max_eval_samples holdout seed drop_leaked max_input_len max_target_len final_beams precision"
SCORING += " holdout_seed sem_model"
NOT_THE_METHOD = {"seed", *HARMLESS} - {"model_name", "dataset", "sem_model", "gradient_checkpointing"}


def test_what_follows_from_the_roles_is_what_was_kept_by_hand(names):
    assert {name for name in names if may_differ_on_resume(name)} == set(HARMLESS)
    assert set(with_role(Role.SCORING)) == {*SCORING.split(), "sem_model", "base_dtype"}
    assert {name for name in names if not sets_methods_apart(name)} == NOT_THE_METHOD
    assert set(with_role(Role.ROWS)) == {"max_train_samples", "holdout", "holdout_seed", "drop_leaked"}
    assert set(with_role(Role.MEASURE)) == {"sem_model", "final_beams", "max_input_len", "max_target_len"}
    assert set(with_role(Role.INPUT)) == {"model_name", "dataset", "sem_model", "probe"}


def test_an_argument_that_no_flag_has_any_more_still_sets_runs_apart():
    assert sets_methods_apart("adam_beta2") and not may_differ_on_resume("adam_beta2")
