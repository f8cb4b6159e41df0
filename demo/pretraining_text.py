"""Draw the text that the demo's T5 is pretrained on, as pairs (source, target). pretrain.py uses it, for the tokenizer
and for the model.

The text comes from the templates and word lists of pretraining.json and from invented names. It contains no sentence
and no name of the sample tweets. A pair belongs to one of five tasks, the methods of `PretrainingText`:

asked   answer a question about a clause, which is made of words drawn at random
gap     fill the gap in a statement about the text
copy    copy a stretch of the text: the hardest task for a T5 of this size, and the others depend on it
masked  fill masked spans, as in T5's own pretraining
picked  find the handle, the hashtag or the quoted words in the text, or count the names

The text changes from stage to stage:

1  clauses and statements in the past tense
2  also the words "I" and "my", and the hashtags, links and signatures of tweets
3  also clauses in the present and the future tense, people with titles, and things with names
4  masked spans only. If the model is asked questions until the end of its pretraining, it answers some questions of the
   sample before it is fine-tuned. The demo is there to show what fine-tuning teaches.
"""

import functools
import random
import re
import string
from dataclasses import dataclass

from make_tweets import COUNTS, Decoration, Filler, decorate, listed, pick, read, words_of

# How often each stage draws each task.
TASK_WEIGHTS = [
    {"asked": 8, "gap": 6, "copy": 3, "masked": 2, "picked": 1},
    {"asked": 10, "gap": 4, "copy": 3, "masked": 1, "picked": 1},
    {"asked": 12, "gap": 3, "copy": 4, "masked": 1, "picked": 1},
    {"masked": 1},
]
# The first steps of stage 1 train copying alone. Its long targets teach it within minutes; with the other tasks, which
# have short targets, it takes far longer.
COPY_STEPS = 1200
DECORATION = Decoration(
    retweet=0.1, hashtag=0.3, emoji=0.2, link=0.15, signature=0.2, author="name8", years=(2010, 2020)
)

# Invented names have one to three syllables. The model would memorize a finite list of names, and not learn to copy.
ONSETS = (
    "b c d f g h j k l m n p r s t v w z b d f g l m n p r s t".split()
    + "br ch cl dr fl gr kr pr qu sh sl st th tr y".split()
    + [""] * 4
)
VOWELS = "a e i o u a e i o u a e i o ai au ea ee ei ia ie io oo ou y".split()
CODAS = [""] * 20 + "n r l s n r l s r l s m t ck d g k nd nt rd rt ll lm ng nn rn ss st th x z".split()
KINDS = {  # the kind of a slot -> the words that can ask for it
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


# ----------------------------------------------------------------------------------------------------------- words


@functools.cache
def sample_names():
    """The lower-case words that the names of the sample tweets are made of. No invented name is one of them."""
    texts = [*map(str, read("words.json")["entities"].values()), *(row["tweet"] for row in read("handwritten.json"))]
    return set(re.findall(r"\w+", " ".join(texts).lower()))


def invented(rng):
    """An invented name of one word."""
    while True:
        syllables = rng.choices([1, 2, 3], [2, 5, 3])[0]
        word = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
        if 3 <= len(word) <= 10 and word not in sample_names():
            return word.capitalize()


def with_s(verb):
    """The third person of a verb: "tries on" for "try on"."""
    first, _, more = verb.partition(" ")
    if first.endswith("y") and first[-2] not in "aeiou":
        first = first[:-1] + "ie"
    ending = "es" if first.endswith(("s", "sh", "ch", "x", "o")) else "s"
    return f"{first}{ending} {more}".strip()


def pretraining_makers(grammar):
    """The functions that `Filler` needs for pretraining.json, and the list of ordinary words that they draw from."""
    common = {kind: words_of(entry) for kind, entry in grammar["common"].items()}
    ordinary = [word for entry in common.values() for word in entry] + [
        word for part in ("verbs", "function", "other") for word in words_of(grammar[part])
    ]

    def capitalized_words(rng):
        count = rng.randint(1, 3)
        return [rng.choice([rng.choice(ordinary), invented(rng)]).capitalize() for _ in range(count)]

    def title(rng, filler, number):
        return " ".join(capitalized_words(rng))

    def group(rng, filler, number):
        first, second = invented(rng), rng.choice(ordinary).capitalize()
        return rng.choice(
            [
                f"the {first} {second}s",
                f"{first}{second.lower()}",
                f"{first}'s {second}",
                f"{first} and {invented(rng)}",
            ]
        )

    def handle(rng, filler, number):
        before = rng.choice(["", rng.choice(ordinary), "the_"])
        return f"@{before}{invented(rng)}{rng.choice(['', str(rng.randint(1, 99)), rng.choice(ordinary)])}"

    def price(rng, filler, number):
        wording = rng.choice(["${}", "{} dollars", "{} euros", "{} million", "£{}"])
        return wording.format(rng.randint(2, 900))

    def clock(rng, filler, number):
        return rng.choice(
            [f"{rng.randint(1, 12)}:{rng.randint(10, 59)}", f"{rng.randint(1, 12)} {rng.choice(['am', 'pm'])}"]
        )

    def count(rng, filler, number):
        return str(rng.choice([rng.randint(2, 9), rng.randint(2, 99), rng.randint(100, 9999)]))

    make = {kind: pick(entry) for kind, entry in common.items()}
    make |= {
        "name": lambda rng, filler, number: " ".join(invented(rng) for _ in range(rng.choice([1, 2, 2]))),
        "first": lambda rng, filler, number: invented(rng),
        "place": lambda rng, filler, number: invented(rng),
        "brand": title,
        "title": title,
        "group": group,
        "handle": handle,
        "tag": lambda rng, filler, number: "#" + "".join(capitalized_words(rng)),
        "num": count,
        "time": clock,
        "price": price,
        "size": pick(words_of(grammar["size"])),
        "why": lambda rng, filler, number: filler.fill(rng.choice(grammar["why"])),
        "words": lambda rng, filler, number: filler.fill(rng.choice(grammar["words"])),
    }
    return make, ordinary


# --------------------------------------------------------------------------------------------------------- clauses


@dataclass(frozen=True)
class Verb:
    """The verb of a clause. tense: past, present or will."""

    base: str
    past: str
    tense: str

    def after_who(self):
        """The verb's form in the third person, as in "who paints"."""
        return {"past": self.past, "will": f"will {self.base}", "present": with_s(self.base)}[self.tense]

    def auxiliary(self, subject):
        """The auxiliary of a question, as in "what does Ann paint"."""
        return {"past": "did", "will": "will", "present": "do" if subject == "they" else "does"}[self.tense]


@dataclass(frozen=True)
class Thing:
    """The object of a clause: `text` as the clause has it, and the words in it that a question can ask for."""

    kind: str
    text: str
    noun: str
    number: str
    owner: str


def clause_questions(verb, thing, circumstances, *, who, doer, short, some, rest, passive):
    """[(question, answer)] of a clause. A question that should be drawn more often is in the list several times.

    circumstances: {"where", "when" or "why": text} of the clause. who: the word that asks for the subject.
    doer: the answer to it. short, some: the subject and the object as questions name them. rest: the circumstances as
        some questions repeat them, or "".
    """
    base, past, noun, object_ = verb.base, verb.past, thing.noun, thing.text
    in_past, did = verb.tense == "past", verb.auxiliary(short)
    questions = [(f"{who} {verb.after_who()} {some}{rest}", doer), (f"{who} {verb.after_who()} {some}", doer)]
    questions += [(f"{'who' if thing.kind == 'person' else 'what'} {did} {short} {base}{rest}", object_)] * 2
    questions += [(f"what {did} {short} do", f"{past} {object_}")] * (in_past and not passive)
    if thing.kind == "number":
        counted = [(f"how many {noun}s {did} {short} {base}", thing.number)]
        questions += (counted + [(f"how many {noun}s were {past}", thing.number)] * in_past) * 2
    if thing.kind == "owner":
        questions += [(f"whose {noun} {did} {short} {base}", thing.owner)] * 2
    if thing.kind == "adjective":
        questions += [(f"which {noun} {did} {short} {base}", object_)] * 2
    for part, answer in circumstances.items():
        questions += [(f"{part} {did} {short} {base} {some}", answer)]
        questions += [(f"{part} was {some} {past}", answer)] * in_past
    return questions


# ----------------------------------------------------------------------------------------------------------- tasks


class PretrainingText:
    """Draws pairs (source, target).

    rng: a random.Random. It alone decides what is drawn.
    stage: an index into TASK_WEIGHTS. The module's docstring says what each stage adds.
    """

    def __init__(self, rng, stage=0):
        self.rng, self.stage, self.grammar = rng, stage, read("pretraining.json")
        self.make, self.ordinary = pretraining_makers(self.grammar)
        self.actions, self.near = self.grammar["actions"].split(), self.grammar["near"].split()

    def draw(self, step):
        """One pair. Its task is drawn with the weights of the stage. step: the stage's step, counted from 0."""
        if self.stage == 0 and step < COPY_STEPS:
            return self.copy()
        weights = TASK_WEIGHTS[self.stage]
        task = self.rng.choices(list(weights), list(weights.values()))[0]
        return getattr(self, task)()

    def facts(self, count):
        """`count` facts, and a passage that states them all among other words.

        Each fact is a tuple (wordings, index of the wording in the passage, the Filler of their slots).
        """
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
        if self.rng.random() < 0.3:  # meaningless words, so that the model cannot rely on positions or neighbors
            sentences.append(self.salad(self.rng.randint(2, 8)))
        self.rng.shuffle(sentences)
        return facts, " ".join(sentences)

    def salad(self, length):
        """`length` words drawn at random."""
        return " ".join(self.rng.choice([self.rng.choice(self.ordinary), invented(self.rng)]) for _ in range(length))

    def asked(self):
        """Answer a question about one of several clauses. The other clauses and words are distractors."""
        rng = self.rng
        text, questions = self.named() if self.stage > 1 and rng.random() < 0.1 else self.clause()
        sentences = [text, *(self.clause()[0] for _ in range(rng.choice([0, 1, 1, 2])))]
        if rng.random() < 0.4:
            sentences.append(self.facts(1)[1])
        if rng.random() < 0.3:
            sentences.append(Filler(rng, self.make).value(rng.choice(["tag", "handle", "title"])))
        rng.shuffle(sentences)
        passage = "".join(sentence + rng.choice([". ", ". ", "! ", " ", ", ", " and "]) for sentence in sentences)
        passage = passage.strip()
        question, answer = rng.choice(questions)
        if self.stage > 0:
            passage = decorate(passage, Filler(rng, self.make), DECORATION)
        return f"{question} | {passage}", answer

    def clause(self):
        """A clause of words drawn at random, and the questions that it answers: (text, [(question, answer)])."""
        rng, filler = self.rng, Filler(self.rng, self.make)
        nouns = ("thing", "food", "animal", "spot", "material", "event", "job")
        base, past = rng.choice(self.actions).replace("-", " ").split("/")
        noun, other = (filler.value(rng.choice(nouns)) for _ in range(2))
        person, name = filler.value(rng.choice(["name", "first"])), filler.value("first2")
        subject = rng.choice([person, person, person, f"the {other}", f"the {rng.choice(self.ordinary)} {other}"])
        who = "who" if subject == person or rng.random() < 0.5 else "what"
        first_person = self.stage > 0 and rng.random() < 0.2
        if first_person:
            subject, who = rng.choice(["I", "we"]), "who"
        thing = self.thing(filler, noun, name)
        circumstances, rest = self.circumstances(filler)
        verb = Verb(base, past, tense=rng.choice(["past", "will", "present"]) if self.stage > 1 else "past")
        doer = "the author" if first_person else subject
        if self.stage > 1 and subject == person and rng.random() < 0.4:
            title = rng.choice(["Dr.", "Mr", "Ms", "Aunt", "Mayor", f"our {filler.value('job')}", f"my {other}"])
            subject = f"{title} {person}"
            doer = subject if title[0].isupper() else person
        passive = verb.tense == "past" and rng.random() < 0.2
        if passive:
            text = f"{thing.text} {'were' if thing.kind == 'number' else 'was'} {past} by {subject} {rest}"
        else:
            form = base if verb.tense == "present" and first_person else verb.after_who()
            text = f"{subject} {form} {thing.text} {rest}"
        when = circumstances.get("when")
        if when and rng.random() < 0.2:
            text = f"{when} {text.replace(when, '', 1)}"
        short = rng.choice([doer, doer.split()[-1] if doer.endswith(person) else doer, "they"])
        some = rng.choice([thing.text, thing.text, f"the {noun}"]) if thing.kind != "person" else thing.text
        if first_person:
            short = rng.choice(["the author", "the author", "they"])
        repeated = rng.choice(["", "", f" {rest}"])
        questions = clause_questions(
            verb, thing, circumstances, who=who, doer=doer, short=short, some=some, rest=repeated, passive=passive
        )
        return " ".join(text.split()), questions

    def thing(self, filler, noun, name):
        """The `Thing` of a clause, with this noun, or the person of this name."""
        rng = self.rng
        kind = rng.choice(["plain", "plain", "adjective", "number", "owner", "person"])
        adjective, number = rng.choice(self.ordinary), filler.value("num")
        text = {
            "plain": f"{rng.choice(['the', 'a', 'this'])} {noun}",
            "adjective": f"the {adjective} {noun}",
            "number": f"{number} {noun}s",
            "owner": f"{name}'s {noun}",
            "person": name,
        }[kind]
        owner = f"{name}'s"
        if kind == "owner" and self.stage > 0 and rng.random() < 0.3:
            text, owner = f"{rng.choice(['my', 'our'])} {noun}", "the author's"
        return Thing(kind, text, noun, number, owner)

    def circumstances(self, filler):
        """Where, when and why: ({"where", "when" or "why": text} of those that the clause states, the words for it)."""
        rng = self.rng
        near = rng.choice(self.near)
        where = f"{near} {filler.value('place') if rng.random() < 0.6 else 'the ' + filler.value('spot')}"
        times = ["{day}", "on {day}", "in {month}", "at {time}"]
        when = rng.choice([filler.fill(time) for time in times])
        drawn = {"where": where, "when": when, "why": filler.value("why")}
        stated = {part: text for part, text in drawn.items() if rng.random() < 0.4}
        words = [text for part, text in stated.items() if part != "why"]
        rng.shuffle(words)
        if "why" in stated:
            words.append(f"{rng.choice(['because', 'since', 'as'])} {stated['why']}")
        return stated, " ".join(words)

    def named(self):
        """A clause that says what something is called, and the questions that it answers, in the form of `clause`."""
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

    def gap(self):
        """Fill the gap in a statement about a passage."""
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

    def copy(self):
        """Copy a passage from one of its words to another."""
        rng = self.rng
        passage = self.facts(rng.randint(1, 2))[1] if rng.random() < 0.5 else self.salad(rng.randint(8, 24))
        words = passage.split()
        start = rng.randrange(len(words))
        end = min(start + rng.randint(1, 14), len(words) - 1)
        return f"from {words[start]} to {words[end]} | {passage}", " ".join(words[start : end + 1])

    def masked(self):
        """T5's span corruption: 15 % of the words are masked, in spans of 3 words on average."""
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
        """Find the handle, the hashtag or the quoted words in a passage, or count the names in a list."""
        rng = self.rng
        _, passage = self.facts(rng.randint(1, 2))
        filler = Filler(rng, self.make)
        kind = rng.choice(["handle", "tag", "quoted", "names"])
        if kind == "names":
            names = [invented(rng) for _ in range(rng.randint(2, 5))]
            said = f"{listed(names)} {rng.choice(words_of(self.grammar['verbs']))} {self.salad(2)}"
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


def tokenizer_corpus(seed):
    """The lines that the tokenizer is trained on: drawn text, and the lists of ordinary words."""
    corpus = PretrainingText(random.Random(f"{seed} tokenizer"))
    drawn = [" ".join(corpus.draw(number % (2 * COPY_STEPS))) for number in range(20000)]
    lists = [" ".join(words_of(corpus.grammar[part])) for part in ("verbs", "function", "other")]
    return [*lists * 200, *(re.sub(r"<extra_id_\d+>", "", line) for line in drawn)]
