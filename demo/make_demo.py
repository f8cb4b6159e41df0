"""Make what the demo ships: sample tweets with questions, and a small T5 pretrained from scratch.

    python demo/make_demo.py tweets      # seconds: demo/tweets/{train,validation,test}.json
    python demo/make_demo.py tokenizer   # seconds: demo/tiny-t5/tokenizer.json
    python demo/make_demo.py pretrain    # an hour and a half on one core: the model, in demo/tiny-t5/

All are seeded. The same command gives the same tweets, and the same weights up to the rounding of the machine.

The sample is drawn from templates (templates.json) filled with words.json; handwritten.json adds rows to validation
that no template made. No name of validation or test stands in train: a model has to copy it from the tweet.

The model reads text drawn the same way from other sentences (pretraining.json) about invented names, never a sentence
or a name of the sample. It learns to copy a stretch of a text, which is what a T5 of this size finds hardest and all
the rest rests on; to fill masked spans, as every T5; to fill the gap in a statement about the text; to answer questions
about clauses of words drawn at random; and to pick out handles, hashtags and quoted words, or count names. In a second
stage the texts also speak of "I" and "my", and carry the hashtags, links and signatures of tweets; in a third, clauses
speak of now and later too, people have titles, and things are called something. A short last one fills masked spans
alone, as T5's own pretraining does: a model that was last asked questions answers some of the sample's by itself, and
the demo is to show what fine-tuning teaches.
"""

import argparse
import functools
import json
import random
import re
import shutil
import string
import sys
import time
from hashlib import md5
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.optimization import Adafactor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a script, Python looks for modules beside it only

from helper_functions import (  # noqa: E402
    LABEL_PAD,
    decode_batch,
    eval_mode,
    load_model_and_tokenizer,
    quiet_libraries,
)
from run_folder import let_transformers_4_read, write_table, writing  # noqa: E402

ROWS = {"train": 960, "validation": 240, "test": 100}
SHARE = {"train": 0.7, "validation": 0.18, "test": 0.12}  # of the names
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def words_of(entry):
    """The entries of a list of words.json or pretraining.json: single words stand there as one string."""
    return entry.split() if isinstance(entry, str) else list(entry)


# -------------------------------------------------------------------------------------------------- sample tweets


class Filler:
    """Fills a text's {slots}; the same slot gets the same words throughout, another number of a kind other words.

    make: {kind: function (random.Random, name) -> text}, for slots like {place} and {place2}.
    """

    def __init__(self, rng, make):
        self.rng, self.make, self.values = rng, make, {}

    def value(self, slot):
        if slot not in self.values:
            kind = slot.rstrip(string.digits)
            for _ in range(100):
                text = self.make[kind](self.rng, self, slot[len(kind) :])
                if text not in self.values.values():
                    break
            self.values[slot] = text
        return self.values[slot]

    def fill(self, text):
        return re.sub(r"\{(\w+)\}", lambda match: self.value(match[1]), text)


def article(noun):
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def split_names(entities, rng):
    """{split: {kind: names}}: each kind's names dealt out to the splits, none to two of them."""
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


def makers(names, common):
    """The functions that make the words of a slot, from one split's names."""

    def pick(kind):
        choices = words_of(common[kind])
        return lambda rng, filler, n: rng.choice(choices)

    def name(kind):
        return lambda rng, filler, n: rng.choice(names[kind])

    def person(rng, filler, n):
        return f"{filler.value('first' + n)} {filler.value('last' + n)}"

    def handle(rng, filler, n):
        first, last, place = (rng.choice(names[kind]) for kind in ("first", "last", "place"))
        return "@" + rng.choice(
            [first + last, f"{first}_{last}", f"the_{last}", f"{place}{rng.choice(['News', 'FM', 'Daily'])}"]
        )

    def people(rng, filler, n):
        chosen = rng.sample(names["first"], rng.randint(2, 4))
        filler.values["count"] = COUNTS[len(chosen)]
        return f"{', '.join(chosen[:-1])} and {chosen[-1]}"

    def price(rng, filler, n):
        number = rng.randint(2, 95)
        return rng.choice([f"${number}", f"{number} dollars", f"{number} euros", f"{number} million", f"£{number}"])

    def clock(rng, filler, n):
        return rng.choice(
            [
                f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}",
                f"{rng.randint(1, 12)}:{rng.choice(['15', '30', '45'])}",
            ]
        )

    def title(rng, filler, n):
        return f"{rng.choice(names['title_first'])} {rng.choice(names['title_second'])}"

    make = {kind: pick(kind) for kind in common} | {
        kind: name(kind) for kind in ("first", "last", "place", "company", "pet")
    }
    return make | {
        "person": person,
        "handle": handle,
        "people": people,
        "price": price,
        "time": clock,
        "title": title,
        "team": lambda rng, filler, n: f"{filler.value('place9' + n)} {rng.choice(names['team'])}",
        "shop": lambda rng, filler, n: f"{rng.choice(names['last'])}'s {filler.value('shop_kind')}",
        "flight": lambda rng, filler, n: f"{rng.choice(names['company'])[:2].upper()}{rng.randint(100, 999)}",
        "num": lambda rng, filler, n: str(rng.randint(2, 99)),
        "a_thing": lambda rng, filler, n: article(filler.value("thing")),
        "a_job": lambda rng, filler, n: article(filler.value("job")),
        "a_event": lambda rng, filler, n: article(filler.value("event")),
    }


HASHTAGS = "love news fail mondaymood throwback blessed goals lol weekend life breaking wow food sports music".split()
EMOJI = "😂 ❤️ 🎉 😭 🙏 🔥 👏 😡 🐶 ⚽ 🎶 🌧️".split()


def decorate(tweet, filler):
    """The tweet with what stands around tweets: a hashtag, an emoji, a link, who wrote it and when."""
    rng = filler.rng
    if rng.random() < 0.35:
        tweet += f" #{rng.choice([rng.choice(HASHTAGS), filler.value('place8').lower()])}"
    if rng.random() < 0.25:
        tweet += f" {rng.choice(EMOJI)}"
    if rng.random() < 0.15:
        tweet += " https://t.co/" + "".join(rng.choices(string.ascii_letters + string.digits, k=8))
    if rng.random() < 0.15:
        date = f"{filler.value('month')} {rng.randint(1, 28)}, {rng.randint(2012, 2018)}"
        tweet += f" — {filler.value('first8')} ({filler.value('handle8')}) {date}"
    return tweet


def draw_row(template, question, filler, both):
    """One row: a tweet of the template, one of its questions, and one reference or both."""
    tweet = decorate(filler.fill(template["tweet"]), filler)
    wordings, *references = question
    wording = filler.rng.choice(wordings.split("|"))
    return {
        "Question": filler.fill(wording),
        "Answer": [filler.fill(reference) for reference in references[: 2 if both else 1]],
        "Tweet": tweet[0].upper() + tweet[1:],
    }


def make_tweets(out, seed):
    """Write the sample's three files to the folder `out`."""
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
        make, pairs, seen = makers(names[split], words["common"]), [], set()
        while len(rows) < count:
            # Every question of every template comes as often as the others, but for the last round.
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
    return names


# ------------------------------------------------------------------------------------------------ pretraining text

# Invented names of one to three syllables: a finite list of names would be learned by heart, not copied.
ONSETS = (
    "b c d f g h j k l m n p r s t v w z b d f g l m n p r s t".split()
    + "br ch cl dr fl gr kr pr qu sh sl st th tr y".split()
    + [""] * 4
)
VOWELS = "a e i o u a e i o u a e i o ai au ea ee ei ia ie io oo ou y".split()
CODAS = [""] * 20 + "n r l s n r l s r l s m t ck d g k nd nt rd rt ll lm ng nn rn ss st th x z".split()
KINDS = {  # what a gap is called: the slot's kind -> words that may stand for it
    "name": ["who", "which person"],
    "first": ["who", "which name"],
    "place": ["where", "which town"],
    "num": ["how many", "which number"],
    "time": ["when", "which hour"],
    "day": ["when", "which day"],
    "month": ["when", "which month"],
    "why": ["why", "which cause"],
    "words": ["what", "which words"],
    "price": ["how much", "which sum"],
}


@functools.cache
def sample_names():
    """The words that the sample's names are made of, in lower case: no name that the model reads is one of them."""
    texts = [*map(str, read("words.json")["entities"].values()), *(row["tweet"] for row in read("handwritten.json"))]
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def with_s(verb):
    """The third person of a verb, which may have more words behind it."""
    first, _, more = verb.partition(" ")
    if first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ie"
    ending = "es" if first.endswith(("s", "sh", "ch", "x", "o")) else "s"
    return f"{first}{ending} {more}".strip()


def invented(rng):
    while True:
        syllables = rng.choices([1, 2, 3], [2, 5, 3])[0]
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
        if 3 <= len(word) <= 10 and word not in sample_names():
            return word.capitalize()


def pretraining_makers(grammar):
    """The functions that make the words of a slot of pretraining.json."""
    common = {kind: words_of(entry) for kind, entry in grammar["common"].items()}
    ordinary = [word for entry in common.values() for word in entry] + [
        word for part in ("verbs", "function", "other") for word in words_of(grammar[part])
    ]

    def pick(choices):
        return lambda rng, filler, n: rng.choice(choices)

    def title(rng, filler, n):
        return " ".join(
            rng.choice([rng.choice(ordinary), invented(rng)]).capitalize() for _ in range(rng.randint(1, 3))
        )

    def group(rng, filler, n):
        first, second = invented(rng), rng.choice(ordinary).capitalize()
        return rng.choice(
            [
                f"the {first} {second}s",
                f"{first}{second.lower()}",
                f"{first}'s {second}",
                f"{first} and {invented(rng)}",
            ]
        )

    def handle(rng, filler, n):
        return (
            "@"
            + rng.choice(["", rng.choice(ordinary), "the_"])
            + invented(rng)
            + rng.choice(["", str(rng.randint(1, 99)), rng.choice(ordinary)])
        )

    make = {kind: pick(entry) for kind, entry in common.items()}
    make |= {
        "name": lambda rng, filler, n: " ".join(invented(rng) for _ in range(rng.choice([1, 2, 2]))),
        "first": lambda rng, filler, n: invented(rng),
        "place": lambda rng, filler, n: invented(rng),
        "brand": title,
        "title": title,
        "group": group,
        "handle": handle,
        "tag": lambda rng, filler, n: (
            "#"
            + "".join(rng.choice([rng.choice(ordinary), invented(rng)]).capitalize() for _ in range(rng.randint(1, 3)))
        ),
        "num": lambda rng, filler, n: str(rng.choice([rng.randint(2, 9), rng.randint(2, 99), rng.randint(100, 9999)])),
        "time": lambda rng, filler, n: rng.choice(
            [f"{rng.randint(1, 12)}:{rng.randint(10, 59)}", f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}"]
        ),
        "price": lambda rng, filler, n: rng.choice(["${}", "{} dollars", "{} euros", "{} million", "£{}"]).format(
            rng.randint(2, 900)
        ),
        "size": pick(words_of(grammar["size"])),
        "why": lambda rng, filler, n: filler.fill(rng.choice(grammar["why"])),
        "words": lambda rng, filler, n: filler.fill(rng.choice(grammar["words"])),
    }
    return make, ordinary


class PretrainingText:
    """Draws (source, target) pairs of text; `rng` decides everything.

    stage: of STAGES, counted from 0. From the second on, passages are dressed as tweets are and speak of "I" and "my";
    from the third on, clauses speak of what is and will be too, people have titles, and things are called something.
    """

    def __init__(self, rng, stage=0):
        self.rng, self.stage, self.grammar = rng, stage, read("pretraining.json")
        self.make, self.ordinary = pretraining_makers(self.grammar)
        self.actions, self.near = self.grammar["actions"].split(), self.grammar["near"].split()

    def facts(self, count):
        """`count` facts: [(the wordings, the filler of their slots)], and a passage that says each in one wording."""
        facts, sentences = [], []
        for wordings in self.rng.sample(self.grammar["facts"], count):
            filler = Filler(self.rng, self.make)
            said = self.rng.randrange(len(wordings))
            facts.append((wordings, said, filler))
            sentence = filler.fill(wordings[said])
            sentences.append(sentence[0].upper() + sentence[1:] + self.rng.choice([".", ".", "!", ""]))
        for kind, share in (("tag", 0.25), ("handle", 0.15), ("num", 0.1)):
            if self.rng.random() < share:
                sentences.append(Filler(self.rng, self.make).value(kind))
        if self.rng.random() < 0.3:  # words without a sense, so that no position or neighbour is ever sure
            sentences.append(self.salad(self.rng.randint(2, 8)))
        self.rng.shuffle(sentences)
        return facts, " ".join(sentences)

    def salad(self, length):
        return " ".join(self.rng.choice([self.rng.choice(self.ordinary), invented(self.rng)]) for _ in range(length))

    def copy(self):
        """Say the words of a passage from one of its words to another."""
        rng = self.rng
        passage = self.facts(rng.randint(1, 2))[1] if rng.random() < 0.5 else self.salad(rng.randint(8, 24))
        words = passage.split()
        start = rng.randrange(len(words))
        end = min(start + rng.randint(1, 14), len(words) - 1)
        return f"from {words[start]} to {words[end]} | {passage}", " ".join(words[start : end + 1])

    def gap(self):
        """Fill the gap of a statement about a passage."""
        rng = self.rng
        facts, passage = self.facts(rng.choice([1, 1, 2, 2, 3]))
        wordings, said, filler = facts[0]
        others = [n for n in range(len(wordings)) if n != said]
        statement = wordings[said if rng.random() < 0.3 else rng.choice(others)]
        slot = rng.choice(re.findall(r"\{(\w+)\}", statement))
        kind = rng.choice(KINDS.get(slot.rstrip(string.digits), ["what", f"which {slot.rstrip(string.digits)}"]))
        hidden = "{" + slot + "}"
        if rng.random() < 0.5:
            query = f"{kind}: {filler.fill(statement.replace(hidden, '_', 1))}"
        else:
            query = filler.fill(statement.replace(hidden, kind, 1))
        return f"{query} | {passage}", filler.value(slot)

    def clause(self):
        """A clause of words drawn at random, and the questions that it answers: (text, [(question, answer)])."""
        rng, filler = self.rng, Filler(self.rng, self.make)
        nouns = ("thing", "food", "animal", "spot", "material", "event", "job")
        base, past = rng.choice(self.actions).replace("-", " ").split("/")
        noun, other = (filler.value(rng.choice(nouns)) for _ in range(2))
        person, name = filler.value(rng.choice(["name", "first"])), filler.value("first2")
        subject = rng.choice([person, person, person, f"the {other}", f"the {rng.choice(self.ordinary)} {other}"])
        asked = "who" if subject == person or rng.random() < 0.5 else "what"
        first_person = self.stage > 0 and rng.random() < 0.2
        if first_person:
            subject, asked = rng.choice(["I", "we"]), "who"
        kind = rng.choice(["plain", "plain", "adjective", "number", "owner", "person"])
        adjective, number = rng.choice(self.ordinary), filler.value("num")
        thing = {
            "plain": f"{rng.choice(['the', 'a', 'this'])} {noun}",
            "adjective": f"the {adjective} {noun}",
            "number": f"{number} {noun}s",
            "owner": f"{name}'s {noun}",
            "person": name,
        }[kind]
        owner = f"{name}'s"
        if kind == "owner" and self.stage > 0 and rng.random() < 0.3:
            thing, owner = f"{rng.choice(['my', 'our'])} {noun}", "the author's"
        where = (
            f"{rng.choice(self.near)} {filler.value('place') if rng.random() < 0.6 else 'the ' + filler.value('spot')}"
        )
        when = rng.choice(
            [
                filler.value("day"),
                f"on {filler.value('day')}",
                f"in {filler.value('month')}",
                f"at {filler.value('time')}",
            ]
        )
        why = filler.value("why")
        parts = {part for part in ("where", "when", "why") if rng.random() < 0.4}
        tail = [text for part, text in (("where", where), ("when", when)) if part in parts]
        rng.shuffle(tail)
        rest = " ".join([*tail, *([f"{rng.choice(['because', 'since', 'as'])} {why}"] if "why" in parts else [])])
        tense = rng.choice(["past", "will", "present"]) if self.stage > 1 else "past"
        spoken = {"past": past, "will": f"will {base}", "present": with_s(base)}[tense]  # as in "who paints ..."
        verb = base if tense == "present" and first_person else spoken
        doer = "the author" if first_person else subject
        if self.stage > 1 and subject == person and rng.random() < 0.4:
            title = rng.choice(["Dr.", "Mr", "Ms", "Aunt", "Mayor", f"our {filler.value('job')}", f"my {other}"])
            subject = f"{title} {person}"
            doer = subject if title[0].isupper() else person
        passive = tense == "past" and rng.random() < 0.2
        text = (
            f"{thing} {'were' if kind == 'number' else 'was'} {past} by {subject} {rest}"
            if passive
            else f"{subject} {verb} {thing} {rest}"
        )
        if "when" in parts and rng.random() < 0.2:
            text = f"{when} {text.replace(when, '', 1)}"
        short = rng.choice([doer, doer.split()[-1] if doer.endswith(person) else doer, "they"])
        some = rng.choice([thing, thing, f"the {noun}"]) if kind != "person" else thing
        if first_person:
            short = rng.choice(["the author", "the author", "they"])
        about = rng.choice(["", "", f" {rest}"])
        did = {"past": "did", "will": "will", "present": "do" if short == "they" else "does"}[tense]
        questions = [(f"{asked} {spoken} {some}{about}", doer), (f"{asked} {spoken} {some}", doer)]
        questions += [(f"{'who' if kind == 'person' else 'what'} {did} {short} {base}{about}", thing)] * 2
        questions += [(f"what {did} {short} do", f"{past} {thing}")] * (tense == "past" and not passive)
        if kind == "number":
            counted = [(f"how many {noun}s {did} {short} {base}", number)]
            questions += (counted + [(f"how many {noun}s were {past}", number)] * (tense == "past")) * 2
        if kind == "owner":
            questions += [(f"whose {noun} {did} {short} {base}", owner)] * 2
        if kind == "adjective":
            questions += [(f"which {noun} {did} {short} {base}", thing)] * 2
        for part, answer in (("where", where), ("when", when), ("why", why)):
            if part in parts:
                questions += [(f"{part} {did} {short} {base} {some}", answer)]
                questions += [(f"{part} was {some} {past}", answer)] * (tense == "past")
        return " ".join(text.split()), questions

    def named(self):
        """A clause that says what something is called, and the questions that it answers, as `clause` gives them."""
        rng, filler = self.rng, Filler(self.rng, self.make)
        kind = filler.value(rng.choice(["animal", "thing", "relative", "spot"]))
        owner, answer = rng.choice([("my", "the author's"), ("our", "the author's"), ("{first}'s", "{first}'s")])
        owner, answer, name = filler.fill(owner), filler.fill(answer), filler.value(rng.choice(["first2", "title"]))
        text = rng.choice(
            [
                f"{owner} {kind} is called {name}",
                f"{owner} {kind} {name} is here again",
                f"the name of {owner} {kind} is {name}",
                f"look at {name}, {owner} {kind}",
            ]
        )
        asked = [f"what is the {kind} called", f"what is the name of the {kind}", f"which name has the {kind}"]
        return text, [
            (rng.choice(asked), name),
            (f"whose {kind} is {name}", answer),
            (f"what is {name}", f"{owner} {kind}"),
        ]

    def asked(self):
        """Answer a question about one of some clauses, with other text around it."""
        rng = self.rng
        text, questions = self.named() if self.stage > 1 and rng.random() < 0.1 else self.clause()
        sentences = [text, *(self.clause()[0] for _ in range(rng.choice([0, 1, 1, 2])))]
        if rng.random() < 0.4:
            sentences.append(self.facts(1)[1])
        if rng.random() < 0.3:
            sentences.append(Filler(rng, self.make).value(rng.choice(["tag", "handle", "title"])))
        rng.shuffle(sentences)
        passage = "".join(sentence + rng.choice([". ", ". ", "! ", " ", ", ", " and "]) for sentence in sentences)
        question, answer = rng.choice(questions)
        return f"{question} | {self.dress(passage.strip()) if self.stage > 0 else passage.strip()}", answer

    def dress(self, passage):
        """The passage with what stands around tweets, and answers no question."""
        rng, filler = self.rng, Filler(self.rng, self.make)
        if rng.random() < 0.1:
            passage = f"RT {filler.value('handle')}: {passage}"
        if rng.random() < 0.3:
            passage += f" {filler.value('tag')}"
        if rng.random() < 0.2:
            passage += f" {rng.choice(EMOJI)}"
        if rng.random() < 0.15:
            passage += " https://t.co/" + "".join(rng.choices(string.ascii_letters + string.digits, k=8))
        if rng.random() < 0.2:
            date = f"{filler.value('month')} {rng.randint(1, 28)}, {rng.randint(2010, 2020)}"
            passage += f" — {filler.value('name')} ({filler.value('handle2')}) {date}"
        return passage

    def masked(self):
        """T5's span corruption: 15 % of the words masked in spans of 3 on average."""
        rng = self.rng
        words = self.facts(rng.randint(1, 3))[1].split()
        source, target, at, sentinel = [], [], 0, 0
        while at < len(words):
            if rng.random() < 0.06 and sentinel < 20:
                length = rng.randint(1, 5)
                source.append(f"<extra_id_{sentinel}>")
                target += [f"<extra_id_{sentinel}>", *words[at : at + length]]
                at, sentinel = at + length, sentinel + 1
            else:
                source.append(words[at])
                at += 1
        return " ".join(source), " ".join([*target, f"<extra_id_{sentinel}>"])

    def picked(self):
        """Say which handle, tag or quoted words a passage holds, or how many names a list has."""
        rng = self.rng
        _, passage = self.facts(rng.randint(1, 2))
        filler = Filler(rng, self.make)
        kind = rng.choice(["handle", "tag", "quoted", "names"])
        if kind == "names":
            names = [invented(rng) for _ in range(rng.randint(2, 5))]
            said = (
                f"{', '.join(names[:-1])} and {names[-1]} {rng.choice(words_of(self.grammar['verbs']))} {self.salad(2)}"
            )
            parts = [said, self.salad(rng.randint(1, 6))]
            rng.shuffle(parts)
            return f"number of names | {' '.join(parts)}", COUNTS[len(names)]
        if kind == "quoted":
            text = filler.value(rng.choice(["title", "words"]))
            return f'quoted words | {passage} "{text}" {self.salad(rng.randint(1, 4))}', text
        words = [word for word in passage.split() if word[0] not in "@#"]
        text = filler.value(kind)
        words.insert(rng.randint(0, len(words)), text)
        return f"{kind} | {' '.join(words)}", text

    def draw(self, step):
        """One pair of the task mix that the stage has at its `step`, counted from 0."""
        if self.stage == 0 and step < COPY_STEPS:
            return self.copy()
        tasks = [self.asked, self.gap, self.copy, self.masked, self.picked]
        return self.rng.choices(tasks, STAGES[self.stage][2])[0]()


# ------------------------------------------------------------------------------------------------------ pretraining

# (steps, peak learning rate of Adafactor, weights of the tasks asked, gap, copy, masked, picked). The learning rate is
# relative to the weights; the last stage's is low, for it is to change what the model says and not what it can.
STAGES = [
    (5000, 0.015, [8, 6, 3, 2, 1]),
    (7000, 0.015, [10, 4, 3, 1, 1]),
    (3000, 0.015, [12, 3, 4, 1, 1]),
    (200, 0.002, [0, 0, 0, 1, 0]),
]
COPY_STEPS = 1200  # copying alone at first: its long targets teach it in minutes, the other tasks' take far longer
PIECES = 2000  # of the tokenizer, with T5's 100 sentinels among them
BATCH = 32
FINE_TUNING_DROPOUT = 0.05  # written to the config in the end: like T5 1.1, the model is pretrained without dropout
SHAPE = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False,
}  # fmt: skip


def make_tokenizer(out, seed):
    """Train a lower-casing unigram tokenizer in the manner of T5's, each digit a piece of its own; write it to `out`.

    The library's trainer numbers pieces of equal score in another order each time. So this is a step of its own, and
    the model is trained with the files that it left.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    sentinels = [f"<extra_id_{n}>" for n in range(100)]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES,
        special_tokens=["<pad>", "</s>", "<unk>", *sentinels],
        unk_token="<unk>",
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *string.punctuation, *"▁—’“”£…€"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        model_max_length=512,
    )
    fast.save_pretrained(out)
    let_transformers_4_read(out / "tokenizer_config.json")


def write_start(folder, tokenizer):
    """Write a T5 with T5's own random start to `folder`, tensor by tensor: transformers 5 would tie the lm_head."""
    from safetensors.torch import save_file
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **SHAPE)
    weights = T5ForConditionalGeneration(config).state_dict()
    weights = {name: tensor.clone() for name, tensor in weights.items() if not name.endswith("embed_tokens.weight")}
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"]) * SHAPE["d_model"] ** -0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    record = config.to_dict() | {"tie_word_embeddings": False, "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    let_transformers_4_read(folder / "tokenizer_config.json")


def exact_share(model, tokenizer, pairs):
    """The share of (source, target) pairs that the model answers word for word, greedily."""
    right = 0
    with eval_mode(model), torch.inference_mode():
        for start in range(0, len(pairs), 50):
            sources, targets = zip(*pairs[start : start + 50], strict=True)
            inputs = tokenizer(list(sources), padding=True, return_tensors="pt")
            encoded = model.get_encoder()(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)[0]
            answers, _ = decode_batch(model, tokenizer, encoded, inputs.attention_mask, beams=1, max_target_len=32)
            right += sum(answer == target.lower() for answer, target in zip(answers, targets, strict=True))
    return right / len(pairs)


def pretrain(out, steps, seed):
    """Train the model, with the tokenizer that is there, and write both to `out` with a log (CSV) and its curve (PNG).

    steps: None for those of STAGES, or how many to make of each stage. lr: the peak learning rate.
    """
    quiet_libraries()
    torch.set_num_threads(1)  # with more, sums are made in another order, and the weights differ in the last digits
    torch.manual_seed(seed)
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    write_start(beside, AutoTokenizer.from_pretrained(HERE / "tiny-t5"))
    model, tokenizer = load_model_and_tokenizer(str(beside))
    log = []
    for stage, (stage_steps, lr, _) in enumerate(STAGES):
        rows = train_stage(model, tokenizer, stage, steps or stage_steps, lr, seed)
        done = log[-1] if log else {"step": 0, "seconds": 0}
        log += [row | {name: row[name] + done[name] for name in done if name in ("step", "seconds")} for row in rows]
    model.config.dropout_rate = FINE_TUNING_DROPOUT
    model.save_pretrained(beside)
    write_table(beside / "pretraining_log.csv", log)
    draw_log(beside / "pretraining_loss.png", log)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def train_stage(model, tokenizer, stage, steps, lr, seed):
    """Train on a stage's text; returns the rows of its log. From the second stage on the learning rate falls in its
    second half."""
    text = PretrainingText(random.Random(f"{seed} text" + stage * " 2"), stage)
    probe = PretrainingText(random.Random(f"{seed} probe"), stage)
    pairs = [task() for task in (probe.asked, probe.gap) for _ in range(100)]
    # scale_parameter makes each step relative to the size of the weights that it changes. From T5's random start AdamW
    # needs several times as many steps.
    optimizer = Adafactor(model.parameters(), lr=lr, scale_parameter=True, relative_step=False, warmup_init=False)
    rise, fall = max(1, min(200, steps // 4)), steps // 2 if stage > 0 else steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 1, (steps + 1 - step) / (steps + 1 - fall))
    )
    log, losses, started = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        sources, targets = zip(*(text.draw(step - 1) for _ in range(BATCH)), strict=True)
        batch = tokenizer(list(sources), padding=True, truncation=True, max_length=160, return_tensors="pt")
        labels = tokenizer(list(targets), padding=True, truncation=True, max_length=64, return_tensors="pt").input_ids
        loss = model(**batch, labels=labels.masked_fill(labels == tokenizer.pad_token_id, LABEL_PAD)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % max(1, min(100, steps // 4)) == 0:
            row = {"stage": stage + 1, "step": step, "loss": round(sum(losses) / len(losses), 4)}
            row["probe_exact_match"] = None
            if step % 500 == 0 or step == steps:
                row["probe_exact_match"] = exact_share(model, tokenizer, pairs)
            log.append(row | {"seconds": round(time.perf_counter() - started)})
            losses.clear()
            print(*(f"{name}={value}" for name, value in log[-1].items() if value is not None), flush=True)
    return log


def tokenizer_corpus(seed):
    """The lines that the tokenizer is trained on: drawn text, and the lists of ordinary words."""
    corpus = PretrainingText(random.Random(f"{seed} tokenizer"))
    drawn = [" ".join(corpus.draw(number % (2 * COPY_STEPS))) for number in range(20000)]
    lists = [" ".join(words_of(corpus.grammar[part])) for part in ("verbs", "function", "other")]
    return [*lists * 200, *(re.sub(r"<extra_id_\d+>", "", line) for line in drawn)]


def draw_log(path, log):
    """The loss by step, and the share of the probe's gaps that the model fills word for word."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(title="Pretraining of demo/tiny-t5", xlabel="optimizer step")
    axes.plot([row["step"] for row in log], [row["loss"] for row in log], color="#0072B2")
    axes.set_ylabel("training loss, mean since the last point (nats a token)", color="#0072B2")
    axes.set_ylim(bottom=0)
    axes.axvline(COPY_STEPS, color="grey", linestyle=":", linewidth=1)
    axes.text(COPY_STEPS, axes.get_ylim()[1] * 0.97, " all tasks from here on", color="grey", va="top")
    probed = [row for row in log if row["probe_exact_match"] is not None]
    right = axes.twinx()
    right.plot(
        [row["step"] for row in probed], [row["probe_exact_match"] for row in probed], color="#D55E00", marker="o"
    )
    right.set_ylabel("exact match on 200 unseen gaps", color="#D55E00")
    right.set_ylim(0, 1)
    with writing(path) as beside:
        figure.savefig(beside, format="png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, folder in (("tweets", "tweets"), ("tokenizer", "tiny-t5"), ("pretrain", "tiny-t5")):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument(
            "--out", type=Path, default=HERE / folder, help="folder to write, in place of what is there"
        )
        command.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    command.add_argument("--steps", type=int, help="optimizer steps of each stage (default: those of STAGES)")
    args = vars(parser.parse_args(argv))
    {"tweets": make_tweets, "tokenizer": make_tokenizer, "pretrain": pretrain}[args.pop("command")](**args)


if __name__ == "__main__":
    main()
