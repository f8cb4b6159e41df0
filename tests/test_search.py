"""The search is this project's: whatever a checkpoint brings along, the same weights give the same answers, and a run
does not pass any of it on."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest
import torch
from conftest import SHARED, run_script
from plain import DEMO, TINY_T5, demo_rows, plain_answers, questions_and_tweets
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from helper_functions import (
    InputError,
    TweetQADataset,
    answer,
    build_collate_fn,
    build_prompt,
    eval_loader,
    evaluate,
    load_model_and_tokenizer,
    load_tweet_qa,
)

ROWS = demo_rows(16)
BEAMS = (1, 3)
# Each of these changes what `generate` answers, or makes it fail, where it comes from generation_config.json.
HOSTILE = {
    "lengths": {"min_length": 20, "max_length": 200},
    "new tokens": {"min_new_tokens": 9, "max_new_tokens": 3},
    "penalties": {"length_penalty": -5.0, "repetition_penalty": 3.0, "encoder_repetition_penalty": 0.2},
    "repetitions": {"no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1},
    "early stopping": {"num_beams": 4, "early_stopping": "never"},
    "forced tokens": {"forced_bos_token_id": 5, "forced_eos_token_id": 9},
    "suppressed tokens": {"suppress_tokens": [1, 3, 4], "begin_suppress_tokens": [500, 501]},
    "biased tokens": {"sequence_bias": [[[300], 50.0]], "bad_words_ids": [[200], [201]]},
    "sampling": {"do_sample": True, "temperature": 50.0, "top_k": 0, "top_p": 1.0},
    "several answers": {"num_return_sequences": 3, "num_beams": 5},
    "groups of beams": {"num_beam_groups": 2, "diversity_penalty": 9.0, "num_beams": 4},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "a dict": {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
    "a static cache": {"cache_implementation": "static", "max_cache_len": 2},
    "a quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "no cache": {"use_cache": False},
    "look-up": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "assistant": {"assistant_early_exit": 1, "is_assistant": True, "num_assistant_tokens": 4},
    "guidance": {"guidance_scale": 3.0},
    "a watermark": {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 40.0, "hashing_key": 7}},
    "layers": {"dola_layers": "low"},
    "strings": {"stop_strings": ["a"], "token_healing": True},
    "time": {"max_time": 1e-9},
    "decay": {"exponential_decay_length_penalty": [1, 9.0]},
    "other tokens": {"eos_token_id": [1, 700], "pad_token_id": 5, "decoder_start_token_id": 9, "bos_token_id": 8},
    "compiling": {"compile_config": {"fullgraph": True, "dynamic": None}, "disable_compile": False},
    "rubbish": {"renormalize_logits": "yes", "trust_remote_code": True, "custom_generate": "someone/else"},
}
each_hostile = pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)


@pytest.fixture(scope="module")
def right():
    """{beams: the demo model's answers}, as transformers gives them for a checkpoint with token ids alone."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    answers = {beams: plain_answers(model, tokenizer, ROWS, beams) for beams in BEAMS}
    assert len({*answers[1]}) > 5 and answers[1] != answers[3]
    return answers


def copy_demo(folder, generation=None, config=None):
    """A copy of the demo's model whose JSON files say more."""
    shutil.copytree(TINY_T5, folder)
    for name, more in (("generation_config.json", generation), ("config.json", config)):
        if more is not None:
            (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    return folder


def answers_of(model, tokenizer, rows=ROWS, **options):
    return {beams: answer(model, tokenizer, "cpu", *questions_and_tweets(rows), beams=beams) for beams in BEAMS}


@each_hostile
def test_a_generation_config_does_not_change_the_answers(tmp_path, right, hostile):
    folder = copy_demo(tmp_path / "model", generation=hostile)
    assert answers_of(*load_model_and_tokenizer(str(folder))) == right


@each_hostile
def test_nor_does_an_old_config_that_has_it(tmp_path, right, hostile):
    folder = copy_demo(tmp_path / "model", config={k: v for k, v in hostile.items() if "token_id" not in k or "f" in k})
    (folder / "generation_config.json").unlink()
    assert answers_of(*load_model_and_tokenizer(str(folder))) == right


@each_hostile
def test_nor_that_of_a_model_which_a_notebook_made(right, hostile):
    """It is left as it is: the notebook may search with it."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    brought = GenerationConfig()
    for name, value in hostile.items():
        setattr(brought, name, value)  # past the checks of its class, as an older version's file comes
    model.generation_config = brought
    before = dict(vars(brought))
    assert answers_of(model, tokenizer) == right
    assert model.generation_config is brought and vars(brought) == before


@pytest.mark.parametrize("name", ["gen_minlen", "gen_forced", "gen_return_dict"])
def test_the_handed_cases(tmp_path, right, name):
    cases = SHARED / "cases" / "01_generation_config"
    if not cases.is_dir():
        pytest.skip("the cases are not here (../shared/cases)")
    folder = copy_demo(tmp_path / "model")
    shutil.copyfile(cases / f"{name}.generation_config.json", folder / "generation_config.json")
    assert answers_of(*load_model_and_tokenizer(str(folder))) == right


def test_evaluate_gives_the_f1_of_the_weights(tmp_path):
    """24.8 with five beams on the demo's 240 validation rows, as its README says. min_length made 13 of it."""
    rows = load_tweet_qa(str(DEMO / "tweets"))["validation"]
    scores = []
    for generation in ({}, {"min_length": 20, "no_repeat_ngram_size": 3}):
        model, tokenizer = load_model_and_tokenizer(str(copy_demo(tmp_path / str(len(scores)), generation)))
        loader = eval_loader(TweetQADataset(rows, tokenizer), 40, build_collate_fn(tokenizer))
        metrics, frame = evaluate(model, loader, tokenizer, "cpu", beams=5)
        scores.append((metrics["f1"], metrics["val_loss"], frame["token_logprob"].tolist()))
    assert scores[0] == scores[1]
    assert abs(scores[0][0] - 0.248) < 0.005


def test_a_peft_model_searches_without_its_bases_config(right):
    from peft import LoraConfig, TaskType, get_peft_model

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    model.generation_config.update(min_length=20, forced_bos_token_id=5, num_return_sequences=2, num_beams=2)
    adapter = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["q"])  # of which B is zero: no change
    assert answers_of(get_peft_model(model, adapter), tokenizer) == right


def test_the_adapter_of_a_prompt_is_refused():
    """The encoder alone, which this search uses, would not see the prompt that was learned."""
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    model = get_peft_model(model, PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3))
    with pytest.raises(InputError, match="^this adapter is of type PROMPT_TUNING, not LORA"):
        answer(model, tokenizer, "cpu", "who?", "me")


@pytest.mark.parametrize("beams", [1, 5])
def test_an_answers_score_does_not_depend_on_the_other_answers_of_its_batch(beams):
    """Where the pad token's id is 0, transformers fills up the shorter answers of a beam search with end tokens."""
    model, tokenizer = load_model_and_tokenizer(str(TINY_T5))
    asked = questions_and_tweets(ROWS)
    answers, scores = answer(model, tokenizer, "cpu", *asked, beams=beams, return_score=True)
    assert len({len(text) for text in answers}) > 3
    alone = [answer(model, tokenizer, "cpu", *one, beams=beams, return_score=True) for one in zip(*asked, strict=True)]
    assert answers == [text for text, _ in alone]
    assert scores == pytest.approx([score for _, score in alone], abs=1e-5)


@pytest.mark.parametrize("pad", [0, 150])
def test_a_pad_token_that_the_model_chooses_counts_in_its_answers_score(pad):
    """Training teaches none, but a random model can answer with nothing else: that is not certain, a score of 0."""
    model, tokenizer = load_model_and_tokenizer(str(TINY_T5))
    tokenizer.pad_token_id = model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.lm_head.weight.data[pad] = model.lm_head.weight.data[tokenizer.eos_token_id] * 1.1  # chosen in its place
    chosen = 0
    for row in ROWS[:8]:
        given = (row["Question"], row["Tweet"])
        _, score = answer(model, tokenizer, "cpu", *given, beams=1, max_target_len=6, return_score=True)
        prompt = tokenizer(build_prompt(*given), return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**prompt, num_beams=1, max_new_tokens=6)
            logits = model(**prompt, decoder_input_ids=ids[:, :-1]).logits[0]
        each = logits.log_softmax(-1)[range(len(logits)), ids[0, 1:]]
        assert score == pytest.approx(each.mean().item(), abs=1e-4)
        chosen += int((ids[0, 1:] == pad).sum())
    assert chosen > 8


def test_threads_can_share_a_model(right):
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    model.generation_config.update(min_length=20, num_beams=4)

    def ask(beams):
        return beams, answer(model, tokenizer, "cpu", *questions_and_tweets(ROWS), beams=beams, batch_size=5)

    with ThreadPoolExecutor(4) as pool:
        assert all(answers == right[beams] for beams, answers in pool.map(ask, BEAMS * 4))
    assert model.generation_config.min_length == 20


def test_without_a_start_token_the_pad_token_starts(right):
    """T5's rule, for a notebook's model too, and for scores as for answers."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(TINY_T5)
    asked = (model, tokenizer, "cpu", "who won?", "The Rockets won!")
    with_it = answer(*asked, return_score=True)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    assert answers_of(model, tokenizer) == right
    assert answer(*asked, return_score=True) == with_it
    model.config.pad_token_id = None
    with pytest.raises(InputError, match="names neither decoder_start_token_id nor pad_token_id"):
        answer(*asked)


# ------------------------------------------------------------------------------------------------- what a run saves


@pytest.mark.parametrize("script", ["tweet_qa_main.py", "tweet_qa_main_lora.py"])
def test_a_run_passes_nothing_on(tmp_path, script):
    """Its config files have token ids and the network alone, and a plain `generate` answers as the run wrote."""
    old = {"task_specific_params": {"qa": {"min_length": 9}}, "prefix": "answer: ", "min_length": 12, "num_beams": 2}
    hostile = HOSTILE["lengths"] | HOSTILE["forced tokens"] | HOSTILE["a dict"] | HOSTILE["penalties"]
    base = copy_demo(tmp_path / "base", generation=hostile, config=old | {"output_attentions": True})
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.json").write_text(json.dumps(demo_rows(24, split)))
    run = tmp_path / "run"
    done = run_script(
        script,
        *("--model_name", base, "--dataset", tmp_path / "data", "--sem_model", "none", "--save_dir", run),
        *("--epochs", 2, "--lr", 1e-3, "--final_beams", 3),
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    frame = pd.read_csv(run / "validation_predictions.csv", keep_default_na=False, dtype=str)
    rows = [{"Question": row.question, "Tweet": row.tweet} for row in frame.itertuples()]
    tokenizer = AutoTokenizer.from_pretrained(run)
    if script == "tweet_qa_main.py":
        search = json.loads((run / "generation_config.json").read_text())
        del search["transformers_version"]
        assert search == {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        config = json.loads((run / "config.json").read_text())
        assert not {*old, *hostile} & {*config} and config.get("output_attentions", False) is False
        model = AutoModelForSeq2SeqLM.from_pretrained(run)
        assert plain_answers(model, tokenizer, rows, 3) == frame["prediction"].tolist()
    else:
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), run)
    assert answer(model, tokenizer, "cpu", *questions_and_tweets(rows), beams=3) == frame["prediction"].tolist()


# ------------------------------------------------------------------------------------------------------------ sweep

# What a random generation config is drawn from: numbers and types that are right and wrong, and the names of old ones.
RANDOM = {
    **dict.fromkeys(("min_length", "min_new_tokens", "max_length", "max_new_tokens"), (0, 1, 5, 20, 200, None, "9")),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), (1, 2, 4, None)),
    **dict.fromkeys(("length_penalty", "repetition_penalty", "diversity_penalty"), (-4.0, 0.2, 1.0, 5.0, None)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "top_k"), (0, 1, 2, 50, None)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "bos_token_id", "eos_token_id"), (1, 7, 9, None)),
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), (0, 3, 8, [4], None)),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ([1], [5, 300, 301], [], None)),
    **dict.fromkeys(("do_sample", "early_stopping", "use_cache", "renormalize_logits"), (True, False, None)),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_attentions"), (True, False)),
    **dict.fromkeys(("remove_invalid_values", "token_healing", "low_memory", "is_assistant"), (True, False)),
    **dict.fromkeys(("temperature", "top_p", "typical_p", "penalty_alpha", "guidance_scale"), (0.1, 1.0, 2.0)),
    "cache_implementation": ("static", "offloaded", "quantized", "hybrid", "none such"),
    "bad_words_ids": ([[5]], [[1]], [[300, 301]]),
    "sequence_bias": ([[[300], 50.0]], [[[1], -90.0]]),
    "stop_strings": (["a"], ["the"]),
    "max_time": (1e-9, 60.0),
    "prompt_lookup_num_tokens": (2, 10),
    "exponential_decay_length_penalty": ([1, 9.0], [0, 0.1]),
    "watermarking_config": ({"bias": 40.0}, {"greenlist_ratio": 0.1, "bias": 9.0}),
    "dola_layers": ("low", "high"),
    "task_specific_params": ({"qa": {"min_length": 20}},),
    "constraints": ([3],),
    "force_words_ids": ([[300]],),
    "_from_model_config": (True, False),
}
IDS = {"eos_token_id", "pad_token_id", "decoder_start_token_id"}  # in config.json they are the contract's


@pytest.mark.slow
def test_100_random_generation_configs(tmp_path, right):
    changed = []
    for seed in range(100):
        rng = random.Random(seed)

        def draw(rng=rng):
            return {name: rng.choice(RANDOM[name]) for name in rng.sample(sorted(RANDOM), rng.randint(1, 12))}

        where = rng.choice(("generation", "config", "both"))
        generation = draw() if where != "config" else None
        config = {k: v for k, v in draw().items() if k not in IDS} if where != "generation" else None
        folder = copy_demo(tmp_path / str(seed), generation, config)
        if where == "config" and rng.random() < 0.5:
            (folder / "generation_config.json").unlink()
        if answers_of(*load_model_and_tokenizer(str(folder))) != right:
            changed.append((seed, generation, config))
        shutil.rmtree(folder)
    assert changed == []
