"""Draw the demo's sample tweets, with questions and answers, and write them to demo/tweets/.
`make demo` trains on them. pretraining_text.py fills its own templates with the functions of this file.

    python demo/make_tweets.py      # seconds: demo/tweets/{train,validation,test}.json

The same seed always gives the same files.

The rows are drawn from templates (templates.json) whose slots are filled with words (words.json). Validation also
contains the rows of handwritten.json, which come from no template. No name in validation or test occurs in train, so a
model has to copy it from the tweet.
"""

import argparse
import json
import random
import re
import string
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

HERE = Path(__file__).resolve().parent

ROWS = {"train": 960, "validation": 240, "test": 100}
SHARE = {"train": 0.7, "validation": 0.18, "test": 0.12}  # of the names
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
EMOJI = "😂 ❤️ 🎉 😭 🙏 🔥 👏 😡 🐶 ⚽ 🎶 🌧️".split()
HASHTAGS = "love news fail mondaymood throwback blessed goals lol weekend life breaking wow food sports music".split()


# ---------------------------------------------------------------------------------------------- filling a template


def read(name):
    """The content of a JSON file of this folder."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def words_of(entry):
    """A word list of words.json or pretraining.json, as a list. A list of single words is stored as one string."""
    return entry.split() if isinstance(entry, str) else list(entry)


class Filler:
    """Fills the {slots} of texts. A slot such as {place} or {place2} is a kind, with or without a number.

    A slot has the same words in every text that one Filler fills. Two slots get different words, unless 100 draws find
    none.

    make: {kind: function (rng, filler, number) -> text}. `number` is the slot's number as a string: "2" for {place2},
        "" for {place}.
    """

    def __init__(self, rng, make):
        self.rng, self.make, self.values = rng, make, {}

    def value(self, slot):
        """The words of a slot, drawn when the slot is first used."""
        if slot not in self.values:
            kind = slot.rstrip(string.digits)
            for _ in range(100):
                text = self.make[kind](self.rng, self, slot[len(kind) :])
                if text not in self.values.values():
                    break
            self.values[slot] = text
        return self.values[slot]

    def fill(self, text):
        """The text with each slot replaced by its words."""
        return re.sub(r"\{(\w+)\}", lambda match: self.value(match[1]), text)


def pick(choices):
    """A function for `Filler` that draws one of the choices."""
    return lambda rng, filler, number: rng.choice(choices)


def listed(names):
    """Two or more names as one text: "Ann, Bo and Cy"."""
    return f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True)
class Decoration:
    """How often `decorate` adds each part: probabilities from 0 to 1. author: the slot of the signature's name.
    years: the first and the last year of its date."""

    hashtag: float
    emoji: float
    link: float
    signature: float
    author: str
    years: tuple[int, int]
    retweet: float = 0


def decorate(text, filler, chances):
    """The text with what tweets have before and after it: "RT", a hashtag, an emoji, a link, and a signature that says
    who wrote the tweet and when. No question asks for these.

    filler: must have the kinds handle, tag, month and that of `chances.author`. The number 8 keeps these hashtags and
        names apart from those of the templates.
    """
    rng = filler.rng
    if chances.retweet and rng.random() < chances.retweet:
        text = f"RT {filler.value('handle')}: {text}"
    if rng.random() < chances.hashtag:
        text += f" {filler.value('tag8')}"
    if rng.random() < chances.emoji:
        text += f" {rng.choice(EMOJI)}"
    if rng.random() < chances.link:
        text += " https://t.co/" + "".join(rng.choices(string.ascii_letters + string.digits, k=8))
    if rng.random() < chances.signature:
        date = f"{filler.value('month')} {rng.randint(1, 28)}, {rng.randint(*chances.years)}"
        text += f" — {filler.value(chances.author)} ({filler.value('handle8')}) {date}"
    return text


# --------------------------------------------------------------------------------------------------- sample tweets

DECORATION = Decoration(hashtag=0.35, emoji=0.25, link=0.15, signature=0.15, author="first8", years=(2012, 2018))


def article(noun):
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def split_names(entities, rng):
    """{split: {kind: names}}: the names of each kind, divided between the splits so that no two splits share one."""
    lists = {kind: words_of(entry) for kind, entry in entities.items()}
    for kind in ("last", "place", "company"):
        starts, ends = lists.pop(f"{kind}_start"), lists.pop(f"{kind}_end")
        lists[kind] = [start + rng.choice(ends) for start in starts for _ in range(1 if kind == "company" else 2)]
    split = {name: {} for name in ROWS}
    for kind, names in lists.items():
        names = sorted(set(names))
        rng.shuffle(names)
        start = 0.0
        for name, share in SHARE.items():
            split[name][kind] = names[round(start * len(names)) : round((start + share) * len(names))]
            start += share
    return split


def tweet_makers(names, common):
    """The functions that `Filler` needs for templates.json.

    names: {kind: names} of one split, from `split_names`. common: the word lists that all splits share.
    """

    def person(rng, filler, number):
        return f"{filler.value('first' + number)} {filler.value('last' + number)}"

    def handle(rng, filler, number):
        first, last, place = (rng.choice(names[kind]) for kind in ("first", "last", "place"))
        return "@" + rng.choice(
            [first + last, f"{first}_{last}", f"the_{last}", f"{place}{rng.choice(['News', 'FM', 'Daily'])}"]
        )

    def people(rng, filler, number):
        chosen = rng.sample(names["first"], rng.randint(2, 4))
        filler.values["count"] = COUNTS[len(chosen)]  # the slot {count} of the same template
        return listed(chosen)

    def price(rng, filler, number):
        amount = rng.randint(2, 95)
        return rng.choice([f"${amount}", f"{amount} dollars", f"{amount} euros", f"{amount} million", f"£{amount}"])

    def clock(rng, filler, number):
        return rng.choice(
            [
                f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}",
                f"{rng.randint(1, 12)}:{rng.choice(['15', '30', '45'])}",
            ]
        )

    def title(rng, filler, number):
        return f"{rng.choice(names['title_first'])} {rng.choice(names['title_second'])}"

    def tag(rng, filler, number):
        return f"#{rng.choice([rng.choice(HASHTAGS), filler.value('place' + number).lower()])}"

    make = {kind: pick(words_of(entry)) for kind, entry in common.items()}
    make |= {kind: pick(names[kind]) for kind in ("first", "last", "place", "company", "pet")}
    return make | {
        "person": person,
        "handle": handle,
        "people": people,
        "price": price,
        "time": clock,
        "title": title,
        "tag": tag,
        "team": lambda rng, filler, number: f"{filler.value('place9' + number)} {rng.choice(names['team'])}",
        "shop": lambda rng, filler, number: f"{rng.choice(names['last'])}'s {filler.value('shop_kind')}",
        "flight": lambda rng, filler, number: f"{rng.choice(names['company'])[:2].upper()}{rng.randint(100, 999)}",
        "num": lambda rng, filler, number: str(rng.randint(2, 99)),
        "a_thing": lambda rng, filler, number: article(filler.value("thing")),
        "a_job": lambda rng, filler, number: article(filler.value("job")),
        "a_event": lambda rng, filler, number: article(filler.value("event")),
    }


def draw_row(template, question, filler, both):
    """One row: a tweet from the template, one of the template's questions, and one reference, or two if `both`."""
    tweet = decorate(filler.fill(template["tweet"]), filler, DECORATION)
    wordings, *references = question
    wording = filler.rng.choice(wordings.split("|"))
    return {
        "Question": filler.fill(wording),
        "Answer": [filler.fill(reference) for reference in references[: 2 if both else 1]],
        "Tweet": tweet[0].upper() + tweet[1:],
    }


def write_tweets(out, seed):
    """Write the three splits to the folder `out`."""
    templates, words, handwritten = read("templates.json"), read("words.json"), read("handwritten.json")
    names = split_names(words["entities"], random.Random(seed))
    out.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rng = random.Random(f"{seed} {split}")
        rows = []
        if split == "validation":
            for entry in handwritten:
                rows += [
                    {"Question": q, "Answer": references, "Tweet": entry["tweet"]}
                    for q, *references in entry["questions"]
                ]
        make, pairs, seen = tweet_makers(names[split], words["common"]), [], set()
        while len(rows) < count:
            # Each round uses every question of every template once. Only the last round can be incomplete.
            if not pairs:
                pairs = [(template, question) for template in templates for question in template["questions"]]
                rng.shuffle(pairs)
            row = draw_row(*pairs.pop(), Filler(rng, make), both=split == "validation")
            if (row["Question"], row["Tweet"]) not in seen:
                seen.add((row["Question"], row["Tweet"]))
                rows.append(row)
        rng.shuffle(rows)
        for number, row in enumerate(rows):
            row["qid"] = md5(f"demo {split} {number}".encode()).hexdigest()
            if split == "test":
                row["Answer"] = row["Answer"][:1]
        (out / f"{split}.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE / "tweets", help="folder to write the three files to (default: demo/tweets)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for names, words and rows (default: 0)")
    args = parser.parse_args(argv)
    write_tweets(args.out, args.seed)


if __name__ == "__main__":
    main()
