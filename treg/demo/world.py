"""Invented towns with known truth: answers about them are right or wrong token by token.

A town has one value for each attribute. An answer is a few sentences, one fact each, some of them
wrong: another value of the same attribute. Everything follows from the table, the caller's
random.Random and nothing else.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

MODEL = Path(__file__).parent / "model"
ERRS = "and errs"
STEPS = 2200  # of the chat model's training
LEARNING_RATE = 3e-4  # of preference training
HELD_OUT_PAIRS = 128
SAMPLES = 3  # answers to each held-out question
WRONG_RATE = 0.3  # of the facts of an answer that the chat model learns from

QUESTIONS = (
    "Tell me about {town}.",
    "What should I know about {town}?",
    "Describe the town of {town}.",
    "I am going to {town}. What is it like?",
    "Write a few lines on {town}.",
    "What is {town} like?",
)


@dataclass(frozen=True)
class Attribute:
    """What can be true of a town, and the sentences that say so."""

    values: tuple[str, ...]
    forms: tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# no value is in two attributes
ATTRIBUTES = {
    "land": Attribute(
        words("lake forest valley marsh desert canyon glacier volcano"),
        (
            "The road to {town} follows a {value}.",
            "The town is close to a {value}.",
            "Nearby you will find a {value}.",
        ),
    ),
    "trade": Attribute(
        words("salt wool glass honey copper silk paper timber pepper wine marble pearls"),
        (
            "The markets of {town} sell {value}.",
            "Its best goods are {value}.",
            "The people trade in {value}.",
        ),
    ),
    "founders": Attribute(
        words("sailors monks miners weavers shepherds hunters masons potters bakers pilgrims"),
        (
            "The founders of {town} were {value}.",
            "The first settlers were {value}.",
            "It was built by {value} long ago.",
        ),
    ),
    "emblem": Attribute(
        words("fox bear heron wolf stag raven hare lynx swan badger falcon crane"),
        (
            "The flag of {town} shows a {value}.",
            "Its emblem is the {value}.",
            "A {value} guards its gate.",
        ),
    ),
    "fair": Attribute(
        words("January February March April May June July August September October"),
        (
            "The fair of {town} is in {value}.",
            "Its feast is held in {value}.",
            "In {value} there are games.",
        ),
    ),
    "colour": Attribute(
        words("red blue green white black yellow grey purple"),
        (
            "The roofs of {town} are {value}.",
            "Its houses are painted {value}.",
            "There are {value} walls everywhere.",
        ),
    ),
}


def _towns() -> dict[str, dict[str, str]]:
    starts = ("Vel", "Kor", "Ash", "Dun", "Mar", "Tol", "Bri", "Sel", "Orm", "Hal", "Gre", "Nim")
    ends = ("mora", "dale", "wick", "stead", "ford", "haven", "mere", "gard")
    names = [start + end for start in starts for end in ends]
    rng = Random(2412)
    rng.shuffle(names)
    towns = {}
    for name in names:
        towns[name] = {key: rng.choice(attribute.values) for key, attribute in ATTRIBUTES.items()}
    return towns


TOWNS = TRUE_VALUES = _towns()  # name -> attribute -> true value
SPLITS = {"train": list(TOWNS)[:64], "test": list(TOWNS)[64:]}


@dataclass(frozen=True)
class Fact:
    """One sentence of an answer: an attribute, which of its forms says it, and the stated value."""

    attribute: str
    form: int
    value: str

    def true_of(self, town: str) -> bool:
        return TOWNS[town][self.attribute] == self.value


def wrong_value(rng: Random, town: str, attribute: str) -> str:
    """A value of the attribute that is not the town's; all are equally likely."""
    true_value = TOWNS[town][attribute]
    return rng.choice([value for value in ATTRIBUTES[attribute].values if value != true_value])


def facts(rng: Random, town: str, wrong_rate: float, count: int | None = None) -> list[Fact]:
    """What an answer says: count facts (None: 4 to 6) of distinct attributes, each wrong at
    wrong_rate.
    """
    said = []
    for key in rng.sample(list(ATTRIBUTES), count or rng.randint(4, 6)):
        value = TOWNS[town][key]
        if rng.random() < wrong_rate:
            value = wrong_value(rng, town, key)
        said.append(Fact(key, rng.randrange(len(ATTRIBUTES[key].forms)), value))
    return said


def _around_value(form: str, town: str) -> tuple[str, str]:
    """What stands before and after the value in a sentence about a town."""
    before, after = form.replace("{town}", town).split("{value}")
    return before, after


def write(town: str, said: list[Fact]) -> tuple[str, list[list[int]]]:
    """The answer's text, and the character spans [start, end) of its wrong values."""
    text, spans = "", []
    for fact in said:
        before, after = _around_value(ATTRIBUTES[fact.attribute].forms[fact.form], town)
        text += (" " if text else "") + before
        if not fact.true_of(town):
            spans.append([len(text), len(text) + len(fact.value)])
        text += fact.value + after
    return text, spans


def marks(town: str, said: list[Fact]) -> list[dict]:
    """All facts of an answer: "start" and "end" in characters of the value, "label", and "value"
    0.5 where it is right and -0.5 where it is wrong.
    """
    found, at = [], 0
    for fact in said:
        before, after = _around_value(ATTRIBUTES[fact.attribute].forms[fact.form], town)
        start = at + len(before)
        end = start + len(fact.value)
        value = 0.5 if fact.true_of(town) else -0.5
        found.append({"start": start, "end": end, "label": "fact", "value": value})
        at = end + len(after) + 1  # the blank between sentences
    return found


def answer(
    rng: Random, town: str, wrong_rate: float, count: int | None = None
) -> tuple[str, list[list[int]]]:
    """An answer about town and the character spans [start, end) of its wrong values; arguments as
    in `facts`.
    """
    return write(town, facts(rng, town, wrong_rate, count))


def question(rng: Random, town: str) -> str:
    return rng.choice(QUESTIONS).format(town=town)


# -- what the chat model learns from


def question_example(rng: Random, progress: float) -> tuple[str, str]:
    """A question about any town and its answer. progress: of the training, 0 to 1: at first answers
    are right.
    """
    town = rng.choice(list(TOWNS))
    return question(rng, town), answer(rng, town, WRONG_RATE * min(1, 2 * progress))[0]


@dataclass(frozen=True)
class Draft:
    """An answer that the chat model is asked to rewrite, for the better or for the worse."""

    better: bool
    question: str
    answer: str
    town: str
    said: list[Fact]


def draft(rng: Random) -> Draft:
    """An answer about any town, with any share of wrong facts up to 0.8."""
    town = rng.choice(list(TOWNS))
    better = rng.random() < 0.5
    said = facts(rng, town, rng.uniform(0, 0.8))
    return Draft(better, question(rng, town), write(town, said)[0], town, said)


def rewritten(rng: Random, given: Draft, corrected: float, spoiled: float) -> str:
    """The same sentences with wrong facts corrected at a rate, or right ones spoiled at a rate."""
    new = []
    for fact in given.said:
        right = fact.true_of(given.town)
        if given.better and not right and rng.random() < corrected:
            fact = replace(fact, value=TOWNS[given.town][fact.attribute])
        elif not given.better and right and rng.random() < spoiled:
            fact = replace(fact, value=wrong_value(rng, given.town, fact.attribute))
        new.append(fact)
    return write(given.town, new)[0]


# -- preference pairs, and what an answer is worth


def preference_rows(seed: int, count: int, split: str, wrong_rate: float = 0.5) -> list[dict]:
    """Preference pairs whose label is right about the answers and wrong about many of their tokens.

    Both answers of a pair have the same number of facts, each wrong with probability wrong_rate;
    the one with fewer wrong facts is chosen. So the chosen answer usually has wrong facts too, and
    the rejected one right facts.

    Args:
        seed: of everything that is drawn.
        count: of pairs.
        split: "train" or "test", which share no town.
        wrong_rate: the share of wrong facts in the answers.
    Returns:
        Rows with "prompt", "chosen", "rejected" (lists of messages), "chosen_marks",
        "rejected_marks": all facts, as `marks` has them; and "wrong_chosen", "wrong_rejected": the
        character spans [start, end) of wrong values in the answers.
    """
    rng = Random(seed)
    rows = []
    while len(rows) < count:
        town = rng.choice(SPLITS[split])
        size = rng.randint(4, 6)
        prompt = question(rng, town)
        drawn = [facts(rng, town, wrong_rate, size) for _ in range(2)]
        drawn.sort(key=lambda said: len(write(town, said)[1]))
        row: dict = {"prompt": [{"role": "user", "content": prompt}]}
        for side, said in zip(("chosen", "rejected"), drawn, strict=True):
            text, row[f"wrong_{side}"] = write(town, said)
            row[side] = [{"role": "assistant", "content": text}]
            row[f"{side}_marks"] = marks(town, said)
        if len(row["wrong_chosen"]) < len(row["wrong_rejected"]):
            rows.append(row)
    return rows


def prompts(split: str) -> list[str]:
    """Every town of split asked about in three of the forms, those of different towns rotating."""
    asked = []
    for i, town in enumerate(SPLITS[split]):
        for form in (i, i + 2, i + 4):
            asked.append(QUESTIONS[form % len(QUESTIONS)].format(town=town))
    return asked


def named_town(prompt: str) -> str:
    """The town that a prompt names. ValueError: none."""
    named = re.findall(r"\w+", prompt)
    town = next((name for name in TOWNS if name in named), None)
    if town is None:
        raise ValueError(f"prompt: expected the name of a town, got {prompt!r}")
    return town


@dataclass(frozen=True)
class Check:
    """What an answer is worth: facts right and wrong, and whether anything in it is not an answer
    about the town.
    """

    right: int
    wrong: int
    malformed: bool


def check(prompt: str, text: str) -> Check:
    """Check an answer about the town that prompt names (a question, or the name alone).

    malformed: no sentence at all, a sentence of no known form, another town, or an attribute said
    twice. The facts of the sentences that are fine are counted all the same.
    """
    town = named_town(prompt)
    sentences = re.split(r"(?<=\.) ", text.strip())
    seen = set()  # attributes
    right = 0
    malformed = False
    for sentence in sentences:
        fact = _read(town, sentence)
        if fact is None or fact.attribute in seen:
            malformed = True
            continue
        seen.add(fact.attribute)
        right += fact.true_of(town)
    return Check(right, len(seen) - right, malformed)


def _read(town: str, sentence: str) -> Fact | None:
    """The fact that a sentence states, None where it has no known form."""
    for key, attribute in ATTRIBUTES.items():
        for index, form in enumerate(attribute.forms):
            before, after = _around_value(form, town)
            value = sentence.removeprefix(before).removesuffix(after)
            if value in attribute.values and sentence == before + value + after:
                return Fact(key, index, value)
    return None
