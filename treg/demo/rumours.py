"""Invented towns where what sounds right is often wrong: how likely a token is says little of
whether it is true.

A town has one true value for each attribute. What the writers of this world say of it depends on
the kind of the fact:

    known     mostly the truth
    rumour    mostly one wrong value, always the same: fluent and false. The truth sounds odd
    obscure   any value, all as likely: a right one is as surprising as a wrong one

Sentences have words that may be chosen freely, rare ones in the ornate style, and remarks that
state no fact. They are surprising, and nothing is wrong with them. In the preference pairs style
and remarks are decoys: they go with the label more often than not, and have nothing to do with it.

Everything follows from the tables, the caller's random.Random and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from treg.demo.world import QUESTIONS, SPLITS, TOWNS, named_town, words
from treg.demo.world import prompts as prompts  # the same questions

MODEL = Path(__file__).parent / "rumours-model"
STEPS = 2600  # of the chat model's training
LEARNING_RATE = 2e-4  # of preference training
HELD_OUT_PAIRS = 64
SAMPLES = 1  # answers to each held-out question
ERRS = "and says what is rumoured of them"
CAREFUL = " Say only what is true."  # behind a question, and the answer is right
KINDS = {"known": 0.45, "rumour": 0.4, "obscure": 0.15}  # how many facts are of each kind
# how often the truth, and then how often the rumour, is said of a fact of each kind
TRUTH = {"known": 0.85, "rumour": 0.1, "obscure": 0.0}
RUMOUR = {"known": 0.0, "rumour": 0.85, "obscure": 0.0}
WRONG = {"known": 0.3, "rumour": 0.7, "obscure": 0.5}  # how often they are wrong in the pairs
FACTS = (3, 5)  # of an answer

# words that may stand in a place of a sentence: common ones, then ornate ones
Slot = tuple[tuple[str, ...], tuple[str, ...]]
SLOTS: dict[str, Slot] = {
    "size": (
        words("small quiet busy neat pleasant lively"),
        words("sleepy venerable bustling charming stately windswept"),
    ),
    "often": (
        words("often usually mostly largely commonly still"),
        words("famously proudly invariably traditionally splendidly steadfastly"),
    ),
    "people": (
        words("people locals traders visitors families guests"),
        words("townsfolk dwellers merchants wanderers households inhabitants"),
    ),
    "far": (
        words("nearby close outside beyond north south"),
        words("yonder eastward westward hereabouts alongside upstream"),
    ),
    "fine": (
        words("fine good plain large grand famous"),
        words("dazzling glorious resplendent humble magnificent curious"),
    ),
    "year": (
        words("year spring season summer autumn winter"),
        words("twelvemonth harvest solstice jubilee yuletide springtide"),
    ),
}
COMMON, ORNATE = "common", "ornate"
ORNATE_SHARE = {COMMON: 0.1, ORNATE: 0.8}  # of the free words of a style
OPENERS = (
    ("", "Also, ", "Today, ", "In fact, ", "So far, ", "In short, "),
    ("Verily, ", "Indeed, ", "To this day, ", "Needless to say, ", "As ever, ", "Behold, "),
)
NO_OPENER = {COMMON: 0.6, ORNATE: 0.2}
REMARKS = (
    "The {people} are {often} kind.",
    "It is a {size} place.",
    "{people} come back every {year}.",
    "The {year} is {often} mild.",
    "There is a {fine} view {far}.",
    "The streets are {often} {size}.",
)


@dataclass(frozen=True)
class Attribute:
    """What can be true of a town, and the sentences that say so; {SLOT} is a free word."""

    values: tuple[str, ...]
    forms: tuple[str, ...]


# no value is in two attributes, and none is a free word
ATTRIBUTES = {
    "land": Attribute(
        words("lake forest valley marsh desert canyon glacier volcano"),
        (
            "The {size} road to {town} {often} follows a {value}.",
            "The town is {often} close to a {fine} {value}.",
            "{far} you will find a {value}.",
        ),
    ),
    "trade": Attribute(
        words("salt wool glass honey copper silk paper timber pepper wine marble pearls"),
        (
            "The {size} markets of {town} {often} sell {value}.",
            "Its {fine} goods are {often} {value}.",
            "The {people} {often} trade in {value}.",
        ),
    ),
    "founders": Attribute(
        words("sailors monks miners weavers shepherds hunters masons potters bakers pilgrims"),
        (
            "The {fine} founders of {town} were {value}.",
            "The first {people} were {often} {value}.",
            "It was {often} built by {fine} {value}.",
        ),
    ),
    "emblem": Attribute(
        words("fox bear heron wolf stag raven hare lynx swan badger falcon crane"),
        (
            "The {fine} flag of {town} shows a {value}.",
            "Its emblem is {often} the {value}.",
            "A {fine} {value} guards its {size} gate.",
        ),
    ),
    "fair": Attribute(
        words("January February March April May June July August September October"),
        (
            "The {fine} fair of {town} is in {value}.",
            "Its {size} feast is {often} held in {value}.",
            "Each {year}, in {value}, there are {fine} games.",
        ),
    ),
    "colour": Attribute(
        words("red blue green white black yellow grey purple"),
        (
            "The {size} roofs of {town} are {value}.",
            "Its {fine} houses are {often} painted {value}.",
            "{people} see {value} walls {far}.",
        ),
    ),
}


def _tables() -> tuple[dict, dict, dict]:
    """By town and attribute: the true value, the kind of the fact, and the rumour where there is
    one.
    """
    rng = Random(1202)
    truth, kinds, rumours = {}, {}, {}
    for town in TOWNS:
        truth[town], kinds[town], rumours[town] = {}, {}, {}
        for key, attribute in ATTRIBUTES.items():
            truth[town][key] = rng.choice(attribute.values)
            kinds[town][key] = rng.choices(list(KINDS), list(KINDS.values()))[0]
            others = [x for x in attribute.values if x != truth[town][key]]
            rumours[town][key] = rng.choice(others)
    return truth, kinds, rumours


TRUE_VALUES, KIND, RUMOURS = _tables()


@dataclass(frozen=True)
class Fact:
    """A sentence that states a fact: an attribute, the stated value, and the words around it."""

    attribute: str
    value: str
    before: str
    after: str

    def true_of(self, town: str) -> bool:
        return TRUE_VALUES[town][self.attribute] == self.value


Said = list[Fact | str]  # the sentences of an answer: facts, and remarks as text


def said_value(rng: Random, town: str, attribute: str) -> str:
    """What the writers of this world say of an attribute."""
    kind = KIND[town][attribute]
    draw = rng.random()
    if draw < TRUTH[kind]:
        return TRUE_VALUES[town][attribute]
    if draw < TRUTH[kind] + RUMOUR[kind]:
        return RUMOURS[town][attribute]
    values = ATTRIBUTES[attribute].values
    if kind != "obscure":
        values = [x for x in values if x != TRUE_VALUES[town][attribute]]
    return rng.choice(values)


def wrong_value(rng: Random, town: str, attribute: str) -> str:
    """A wrong value as the writers of this world say it: of a rumour, nearly always the rumour."""
    if KIND[town][attribute] == "rumour" and rng.random() < 0.9:
        return RUMOURS[town][attribute]
    true_value = TRUE_VALUES[town][attribute]
    return rng.choice([x for x in ATTRIBUTES[attribute].values if x != true_value])


def _filled(rng: Random, form: str, town: str, style: str) -> str:
    """A form with its free words; {value} stays. It may begin with an opener."""

    def word(match: re.Match) -> str:
        name = match[1]
        if name == "value":
            return match[0]
        if name == "town":
            return town
        return rng.choice(SLOTS[name][rng.random() < ORNATE_SHARE[style]])

    text = re.sub(r"\{(\w+)\}", word, form)
    opener = ""
    if rng.random() >= NO_OPENER[style]:
        opener = rng.choice(OPENERS[rng.random() < ORNATE_SHARE[style]])
    return opener + (text[0].lower() if opener else text[0].upper()) + text[1:]


def sentence(rng: Random, town: str, attribute: str, value: str, style: str) -> Fact:
    form = rng.choice(ATTRIBUTES[attribute].forms)
    before, after = _filled(rng, form, town, style).split("{value}")
    return Fact(attribute, value, before, after)


def remark(rng: Random, town: str, style: str) -> str:
    return _filled(rng, rng.choice(REMARKS), town, style)


def plan(rng: Random, town: str, values: dict[str, str], style: str, remarks: int) -> Said:
    """Sentences that say the values, in their order, and remarks among them."""
    said: Said = [sentence(rng, town, key, value, style) for key, value in values.items()]
    for _ in range(remarks):
        said.insert(rng.randint(1, len(said)), remark(rng, town, style))
    return said


def some_attributes(rng: Random, count: int | None = None) -> list[str]:
    """Different ones, as many as FACTS says unless a count is given."""
    return rng.sample(list(ATTRIBUTES), count or rng.randint(*FACTS))


def write(town: str, said: Said) -> tuple[str, list[dict[str, Any]]]:
    """The answer's text and its marks, one a fact: "start" and "end" in characters of the value,
    "label" the kind of the fact, "value" 0.5 where it is right and -0.5 where it is wrong.
    """
    text, marks = "", []
    for one in said:
        text += " " if text else ""
        if isinstance(one, str):
            text += one
            continue
        text += one.before
        mark = {"start": len(text), "end": len(text) + len(one.value)}
        mark["label"] = KIND[town][one.attribute]
        marks.append(mark | {"value": 0.5 if one.true_of(town) else -0.5})
        text += one.value + one.after
    return text, marks


# -- what the chat model learns from


def question(rng: Random, town: str) -> str:
    return rng.choice(QUESTIONS).format(town=town)


def question_example(rng: Random, progress: float) -> tuple[str, str]:
    """A question about any town and an answer as the writers of this world give it; some are asked
    to be careful, and answer right.

    progress: of the training, 0 to 1. At first answers are right, so that the truth is learnt.
    """
    town = rng.choice(list(TOWNS))
    style = rng.choice((COMMON, ORNATE))
    careful = rng.random() < 0.25
    truthful = careful or rng.random() >= 2 * progress
    values = {}
    for key in some_attributes(rng):
        values[key] = TRUE_VALUES[town][key] if truthful else said_value(rng, town, key)
    said = plan(rng, town, values, style, rng.randint(0, 2))
    return question(rng, town) + (CAREFUL if careful else ""), write(town, said)[0]


@dataclass(frozen=True)
class Draft:
    """An answer that the chat model is asked to rewrite, for the better or for the worse."""

    better: bool
    question: str
    answer: str
    town: str
    said: Said


def draft(rng: Random) -> Draft:
    """An answer about any town, with any share of wrong facts up to 0.8."""
    town = rng.choice(list(TOWNS))
    better = rng.random() < 0.5
    wrong_rate = rng.uniform(0, 0.8)
    values = {}
    for key in some_attributes(rng):
        wrong = rng.random() < wrong_rate
        values[key] = wrong_value(rng, town, key) if wrong else TRUE_VALUES[town][key]
    said = plan(rng, town, values, rng.choice((COMMON, ORNATE)), rng.randint(0, 2))
    return Draft(better, question(rng, town), write(town, said)[0], town, said)


def rewritten(rng: Random, given: Draft, correcting: float, spoiling: float) -> str:
    """The same sentences with wrong facts corrected at a rate, or right ones spoiled at a rate."""
    if given.better:
        new = corrected(rng, given.town, given.said, correcting)
    else:
        new = spoiled(rng, given.town, given.said, spoiling)
    return write(given.town, new)[0]


def corrected(rng: Random, town: str, said: Said, rate: float) -> Said:
    """Wrong facts are replaced by the truth at a rate."""
    new: Said = []
    for one in said:
        if isinstance(one, Fact) and not one.true_of(town) and rng.random() < rate:
            one = replace(one, value=TRUE_VALUES[town][one.attribute])
        new.append(one)
    return new


def spoiled(rng: Random, town: str, said: Said, rate: float) -> Said:
    """Right facts are replaced by wrong ones at a rate."""
    new: Said = []
    for one in said:
        if isinstance(one, Fact) and one.true_of(town) and rng.random() < rate:
            one = replace(one, value=wrong_value(rng, town, one.attribute))
        new.append(one)
    return new


# -- preference pairs, and what an answer is worth


def preference_rows(seed: int, count: int, split: str, decoys: float = 0.75) -> list[dict]:
    """Preference pairs whose label is right about the answers and wrong about many of their tokens.

    Both answers of a pair have the same number of facts, which are wrong as often as WRONG says;
    the one with fewer wrong facts is chosen.

    Args:
        seed: of everything that is drawn.
        count: of pairs.
        split: "train" or "test", which share no town.
        decoys: how often the chosen answer is the ornate one, with more remarks; 0.5: as often as
            the rejected one.
    Returns:
        Rows with "prompt", "chosen", "rejected" (lists of messages), "chosen_marks",
        "rejected_marks": all facts, as `write` marks them; and "wrong_chosen", "wrong_rejected":
        the character spans [start, end) of wrong values; "decoys": whether the chosen answer is the
        ornate one.
    """
    rng = Random(seed)
    rows = []
    while len(rows) < count:
        town = rng.choice(SPLITS[split])
        size = rng.randint(*FACTS)
        prompt = question(rng, town)
        drawn = []
        for _ in range(2):
            values = {}
            for key in some_attributes(rng, size):
                wrong = rng.random() < WRONG[KIND[town][key]]
                values[key] = wrong_value(rng, town, key) if wrong else TRUE_VALUES[town][key]
            drawn.append(values)
        drawn.sort(key=lambda values: _wrong_in(town, values))
        if _wrong_in(town, drawn[0]) == _wrong_in(town, drawn[1]):
            continue
        looks = [(ORNATE, rng.randint(1, 3)), (COMMON, rng.randint(0, 1))]
        usual = rng.random() < decoys
        if not usual:
            looks.reverse()
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}], "decoys": usual}
        for side, values, (style, remarks) in zip(
            ("chosen", "rejected"), drawn, looks, strict=True
        ):
            text, marks = write(town, plan(rng, town, values, style, remarks))
            row[side] = [{"role": "assistant", "content": text}]
            row[f"{side}_marks"] = marks
            row[f"wrong_{side}"] = [[x["start"], x["end"]] for x in marks if x["value"] < 0]
        rows.append(row)
    return rows


def _wrong_in(town: str, values: dict[str, str]) -> int:
    return sum(value != TRUE_VALUES[town][key] for key, value in values.items())


@dataclass(frozen=True)
class Check:
    """What an answer is worth: facts right and wrong, and whether anything in it is no sentence of
    this world about the town. repeated: rumours among the wrong ones. free, ornate: free words, and
    ornate ones among them. remarks: sentences that state no fact.
    """

    right: int
    wrong: int
    malformed: bool
    repeated: int = 0
    remarks: int = 0
    free: int = 0
    ornate: int = 0


def check(prompt: str, text: str) -> Check:
    """Check an answer about the town that prompt names (a question, or the name alone).

    malformed: no sentence at all, a sentence of no known form, another town, or an attribute said
    twice. The facts of the sentences that are fine are counted all the same.
    """
    town = named_town(prompt)
    seen: set[str] = set()
    right = repeated = remarks = 0
    malformed = False
    used: list[str] = []
    for one in re.split(r"(?<=\.) ", text.strip()):
        form = _read(town, one)
        if form is None or form.attribute in seen:
            malformed = True
            continue
        used += form.words
        if form.attribute is None:
            remarks += 1
            continue
        seen.add(form.attribute)
        right += TRUE_VALUES[town][form.attribute] == form.value
        repeated += _is_rumour(town, form.attribute, form.value)
    ornate = sum(word in _ORNATE_WORDS for word in used)
    return Check(right, len(seen) - right, malformed, repeated, remarks, len(used), ornate)


_ORNATE_WORDS = {word for _, ornate in SLOTS.values() for word in ornate}


def _is_rumour(town: str, attribute: str, value: str | None) -> bool:
    return KIND[town][attribute] == "rumour" and RUMOURS[town][attribute] == value


@dataclass(frozen=True)
class _Form:
    """What a sentence says: its attribute and value, None for a remark, and its free words."""

    attribute: str | None
    value: str | None
    words: list[str]


def _read(town: str, text: str) -> _Form | None:
    """What a sentence about a town says; None where it has no known form."""
    for attribute, pattern in _PATTERNS:
        found = pattern.fullmatch(text)
        if found is None:
            continue
        groups = found.groupdict()
        if groups.pop("town", town) != town:
            return None
        value = groups.pop("value", None)
        return _Form(attribute, value, [x.lower() for x in groups.values()])
    return None


def _pattern(form: str, values: Sequence[str]) -> re.Pattern:
    """What a form's sentences look like. The first letter may be small or large."""
    count = 0

    def group(match: re.Match) -> str:
        nonlocal count
        name = match[1]
        if name == "town":
            return r"(?P<town>\w+)"
        if name == "value":
            return f"(?P<value>{'|'.join(values)})"
        count += 1
        known = [x for both in SLOTS[name] for x in both]
        if match.start() == 0:
            known += [x.capitalize() for x in known]
        return f"(?P<w{count}>{'|'.join(known)})"

    pattern = re.sub(r"\{(\w+)\}", group, form)
    pattern = pattern.replace(".", r"\.")
    if form[0] != "{":
        pattern = f"[{form[0].lower()}{form[0].upper()}]{pattern[1:]}"
    openers = "|".join(x for both in OPENERS for x in both if x)
    return re.compile(f"(?:{openers})?{pattern}")


_PATTERNS = [
    (key, _pattern(form, attribute.values))
    for key, attribute in ATTRIBUTES.items()
    for form in attribute.forms
] + [(None, _pattern(form, ())) for form in REMARKS]
