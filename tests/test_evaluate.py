"""evaluate() and answer(): right numbers, nothing computed twice, and the model left as it was found."""

import pytest
import torch
from torch.utils.data import DataLoader

from helper_functions import (
    TweetQADataset,
    answer,
    build_collate_fn,
    build_prompt,
    eval_mode,
    evaluate,
    load_model_and_tokenizer,
    load_sem_model,
    predict,
    token_f1,
)
from pipeline.t5 import logits_at
from tweet_qa_main_lora import add_lora


@pytest.fixture(scope="module")
def model(standin):
    return load_model_and_tokenizer(str(standin))[0]


@pytest.fixture(scope="module")
def lora_model(standin):
    """A PeftModel whose adapter changes the answers (a fresh adapter adds exactly nothing)."""
    from argparse import Namespace

    torch.manual_seed(1)
    args = Namespace(lora_r=4, lora_alpha=32, lora_dropout=0.5, target_modules=["q", "v"], base_dtype="fp32")
    args.use_rslora = args.use_dora = False
    lora = add_lora(load_model_and_tokenizer(str(standin))[0], args)
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return lora.eval()


def loader_over(rows, tokenizer, batch_size, shuffle=False):
    data = TweetQADataset(rows, tokenizer)
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=build_collate_fn(tokenizer))


@pytest.mark.parametrize("kind", ["model", "lora_model"])
def test_val_loss_is_the_mean_over_target_tokens(kind, request, tokenizer, rows):
    model = request.getfixturevalue(kind)
    metrics, _ = evaluate(model, loader_over(rows, tokenizer, 7), tokenizer, "cpu", max_target_len=4)
    losses, tokens, batch_means = [], [], []
    for item in TweetQADataset(rows, tokenizer):
        labels = torch.tensor([item["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([item["input_ids"]]), labels=labels).loss.item()
        losses.append(loss * labels.numel())
        tokens.append(labels.numel())
        batch_means.append(loss)
    assert metrics["val_loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    assert metrics["val_loss"] != pytest.approx(sum(batch_means) / len(batch_means), rel=1e-5)


@pytest.mark.parametrize("kind", ["model", "lora_model", "in bf16 by accelerate"])
def test_the_output_layer_computes_no_padding(kind, request, tokenizer, rows):
    """Where accelerate has replaced a model's forward, all positions are computed, to the same numbers."""
    model = request.getfixturevalue("model" if "accelerate" in kind else kind)
    whole, seen = next(module for module in model.modules() if "lm_head" in module._modules), []
    batch = next(iter(loader_over(rows, tokenizer, 6)))
    labels = batch["labels"].clamp(min=0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": labels}
    layers, hook = dict(whole._modules), whole.lm_head.register_forward_hook(lambda *given: seen.append(given[2].shape))
    with torch.no_grad():
        expected = model(**inputs).logits
        if "accelerate" in kind:
            whole.forward = torch.autocast("cpu", torch.bfloat16)(whole.forward)
        for chosen in (batch["labels"] >= 0, torch.zeros(labels.shape, dtype=torch.bool)):
            logits = logits_at(model, chosen, **inputs)
            torch.testing.assert_close(logits.float(), expected[chosen], rtol=0, atol=0.3 if "acc" in kind else 1e-5)
    hook.remove()
    vars(whole).pop("forward", None)
    counts = [int((batch["labels"] >= 0).sum()), 0]
    assert 0 < counts[0] < labels.numel() and layers == whole._modules
    assert seen[1:] == ([expected.shape] * 2 if "acc" in kind else [(count, expected.shape[-1]) for count in counts])


@pytest.mark.parametrize("kind", ["model", "lora_model"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_order_and_size_of_batches_change_nothing(kind, beams, request, tokenizer, rows):
    model = request.getfixturevalue(kind)
    once, frame = evaluate(model, loader_over(rows, tokenizer, 16), tokenizer, "cpu", beams=beams, max_target_len=8)
    again, shuffled = evaluate(
        model, loader_over(rows, tokenizer, 5, shuffle=True), tokenizer, "cpu", beams=beams, max_target_len=8
    )
    assert frame["qid"].tolist() == shuffled["qid"].tolist() == [row["qid"] for row in rows]
    assert frame["prediction"].tolist() == shuffled["prediction"].tolist()
    assert len(set(frame["prediction"])) > 10  # a model that always says the same would prove nothing
    assert again["val_loss"] == pytest.approx(once["val_loss"], rel=1e-6)
    answers = answer(
        model,
        tokenizer,
        "cpu",
        [row["Question"] for row in rows],
        [row["Tweet"] for row in rows],
        beams=beams,
        max_target_len=8,
    )
    assert answers == frame["prediction"].tolist()


def test_the_encoder_runs_once_a_batch(model, tokenizer, rows):
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        evaluate(model, loader_over(rows, tokenizer, 8), tokenizer, "cpu", beams=2, max_target_len=4)
    finally:
        hook.remove()
    assert len(calls) == 5  # 40 rows in batches of 8


def test_the_frame_and_the_metrics_agree(model, tokenizer, rows, minilm):
    sem_model = load_sem_model(str(minilm), "cpu")
    metrics, frame = evaluate(model, loader_over(rows, tokenizer, 8), tokenizer, "cpu", sem_model, max_target_len=4)
    assert list(frame) == (
        "qid question tweet references prediction em f1 sem_sim token_logprob question_type"
        " has_hashtag has_handle has_url has_number has_emoji"
    ).split(" ")
    assert metrics["f1"] == frame["f1"].mean() and metrics["em"] == frame["em"].mean()
    assert metrics["avg_sem_sim"] == frame["sem_sim"].mean() != 0
    references = [row["Answer"] for row in rows]
    assert frame["references"].tolist() == references
    assert frame["f1"].tolist() == [
        token_f1(p, r) for p, r in zip(frame["prediction"], frame["references"], strict=True)
    ]
    without, bare = evaluate(model, loader_over(rows[:8], tokenizer, 8), tokenizer, "cpu", max_target_len=4)
    assert without["avg_sem_sim"] is None and bare["sem_sim"].isna().all()


def test_an_answer_may_be_as_long_as_the_longest_target(model, tokenizer, rows):
    """An untrained model never ends an answer, so how long it gets is what it is allowed."""
    for limit in (4, 32):
        with torch.no_grad():
            _, frame = evaluate(model, loader_over(rows[:4], tokenizer, 4), tokenizer, "cpu", max_target_len=limit)
        lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in frame["prediction"]]
        assert max(lengths) > limit // 2


@pytest.mark.parametrize("kind", ["model", "lora_model"])
def test_answer_takes_one_or_many(kind, request, tokenizer, rows):
    model = request.getfixturevalue(kind)
    questions, tweets = [row["Question"] for row in rows[:5]], [row["Tweet"] for row in rows[:5]]
    many = answer(model, tokenizer, "cpu", questions, tweets, max_target_len=8)
    assert many == [
        answer(model, tokenizer, "cpu", q, t, max_target_len=8) for q, t in zip(questions, tweets, strict=True)
    ]
    assert many == answer(model, tokenizer, "cpu", tuple(questions), tuple(tweets), max_target_len=8, batch_size=2)
    assert isinstance(answer(model, tokenizer, torch.device("cpu"), questions[0], tweets[0]), str)
    assert answer(model, tokenizer, "cpu", [], []) == []


def test_the_adapter_is_used(lora_model, tokenizer, rows):
    with_adapter = answer(lora_model, tokenizer, "cpu", rows[0]["Question"], rows[0]["Tweet"], max_target_len=8)
    with lora_model.disable_adapter():
        without = answer(lora_model, tokenizer, "cpu", rows[0]["Question"], rows[0]["Tweet"], max_target_len=8)
    assert with_adapter != without


def test_wrong_arguments_of_answer_are_named(model, tokenizer):
    with pytest.raises(ValueError, match="2 questions, but 1 tweets"):
        answer(model, tokenizer, "cpu", ["a", "b"], ["t"])
    with pytest.raises(TypeError, match="must be a string"):
        answer(model, tokenizer, "cpu", ["a", None], ["t", "t"])


@pytest.mark.parametrize("kind", ["model", "lora_model"])
def test_the_mode_of_each_module_is_left_as_it_was(kind, request, tokenizer, rows):
    model = request.getfixturevalue(kind)
    model.train()
    model.encoder.eval()  # someone who freezes the encoder keeps its dropout off
    before = [module.training for module in model.modules()]
    trained = answer(model, tokenizer, "cpu", rows[0]["Question"], rows[0]["Tweet"], max_target_len=8)
    evaluate(model, loader_over(rows[:4], tokenizer, 4), tokenizer, "cpu", max_target_len=4)
    with pytest.raises(RuntimeError), eval_mode(model):
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    model.eval()
    assert trained == answer(model, tokenizer, "cpu", rows[0]["Question"], rows[0]["Tweet"], max_target_len=8)


@pytest.mark.parametrize("kind", ["model", "lora_model"])
def test_a_score_is_the_beam_search_s_own(kind, request, tokenizer, rows):
    model = request.getfixturevalue(kind)
    questions, tweets = [row["Question"] for row in rows[:6]], [row["Tweet"] for row in rows[:6]]
    answers, scores = answer(model, tokenizer, "cpu", questions, tweets, beams=3, max_target_len=8, return_score=True)
    prompts = [build_prompt(q, t) for q, t in zip(questions, tweets, strict=True)]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    searched = model.generate(
        **inputs, num_beams=3, max_new_tokens=8, output_scores=True, return_dict_in_generate=True, do_sample=False
    )
    assert scores == pytest.approx(searched.sequences_scores.tolist(), abs=1e-4)
    assert all(score < 0 for score in scores)
    _, frame = evaluate(model, loader_over(rows[:6], tokenizer, 4), tokenizer, "cpu", beams=3, max_target_len=8)
    assert frame["token_logprob"].tolist() == pytest.approx(scores, abs=1e-5)
    one = answer(model, tokenizer, "cpu", questions[0], tweets[0], beams=3, max_target_len=8, return_score=True)
    assert one == (answers[0], pytest.approx(scores[0], abs=1e-5))


def test_an_unlabeled_split_is_predicted(model, tokenizer, rows):
    unlabeled = [row | {"Answer": []} for row in rows[:6]]
    options = {"beams": 2, "max_target_len": 8}
    expected = predict(model, loader_over(rows[:6], tokenizer, 4), tokenizer, "cpu", **options)
    frame = predict(model, loader_over(unlabeled, tokenizer, 4), tokenizer, "cpu", **options)
    assert frame["prediction"].tolist() == expected["prediction"].tolist()
    assert (frame["loss"] == 0).all() and (frame["target_tokens"] == 0).all() and (expected["loss"] > 0).all()
