"""A model folder in which something is damaged is refused in one line, or loads and keeps T5's contract. Whatever its
files say, no library's exception and no library's output reaches the screen."""

import json
import random
import shutil

import pytest
import torch
from plain import TINY_T5, demo_rows, questions_and_tweets

from helper_functions import InputError, answer, load_model_and_tokenizer

VALUES = (None, True, 0, 1, -1, 3, 2**40, 10**30, 1.5, float("nan"), "", "abc", [], [1], {}, {"a": 1}, ["x"])


def places(node, path=()):
    """The paths of all entries of a JSON value, without the later ones of long lists."""
    items = node.items() if isinstance(node, dict) else list(enumerate(node))[:30] if isinstance(node, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def damage(folder, rng):
    """Damage one file of a model folder, as disks, editors and interrupted copies do."""
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    path = folder / rng.choice(names)
    kinds = ("cut", "deleted", "flipped", "swapped", "empty", *("edited",) * 4 * path.name.endswith(".json"))
    kind = rng.choice(kinds)
    content = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "deleted":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":
        end = rng.choice((len(content), min(len(content), 4000)))  # anywhere, or in the header of the weights
        for _ in range(rng.choice((1, 3, 50))):
            content[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "swapped":
        other = folder / rng.choice([name for name in names if name != path.name])
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        value = json.loads(content)
        deepest = rng.choice((1, 2, 3, 5))
        place = rng.choice([place for place in places(value) if len(place) <= deepest])
        node = value
        for key in place[:-1]:
            node = node[key]
        if rng.random() < 0.3:
            del node[place[-1]]
        else:
            node[place[-1]] = rng.choice(VALUES)
        path.write_text(json.dumps(value))
        kind += f" {place}"
    return f"{path.name} {kind}"


def keeps_the_contract(folder):
    """Load a folder; True if it is refused in one line, or answers and takes a step on finite numbers."""
    try:
        model, tokenizer = load_model_and_tokenizer(str(folder))
    except InputError as error:
        return "\n" not in str(error) and len(str(error)) > 20
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    batch = tokenizer(["who won 3:1? \u00e9\U0001f600"], text_target=["The Rockets"], return_tensors="pt")
    assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == end != pad
    answer(model, tokenizer, "cpu", *questions_and_tweets(demo_rows(2)), beams=2)
    loss = model.train()(**batch).loss
    loss.backward()
    return bool(torch.isfinite(loss)) and all(torch.isfinite(w.grad).all() for w in model.parameters())


@pytest.mark.slow
def test_300_damaged_model_folders(tmp_path, capfd):
    wrong = []
    for seed in range(300):
        folder = shutil.copytree(TINY_T5, tmp_path / str(seed))
        what = damage(folder, random.Random(seed))
        capfd.readouterr()
        try:
            kept = keeps_the_contract(folder)
        except BaseException as error:
            kept = error
        printed = "".join(capfd.readouterr())
        if kept is not True or printed:
            wrong.append((seed, what, kept, printed))
        shutil.rmtree(folder)
    assert wrong == []
