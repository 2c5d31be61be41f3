"""The world of rumours, its sentences, and the chat model shipped beside it."""

import hashlib
import json
from collections import Counter
from random import Random

import pytest

from treg.demo import rumours as world
from treg.demo.worlds import WORLDS

ROWS = {split: world.preference_rows(3, 60, split) for split in world.SPLITS}
ALL_ROWS = ROWS["train"] + ROWS["test"]
TOWN = "Velmora"


def facts_of(row: dict, side: str) -> list[tuple[str, dict]]:
    text = row[side][0]["content"]
    return [(text[x["start"] : x["end"]], x) for x in row[f"{side}_marks"]]


def attribute_of(value: str) -> str:
    (found,) = [key for key, x in world.ATTRIBUTES.items() if value in x.values]
    return found


def test_words_mean_one_thing():
    values = [value for x in world.ATTRIBUTES.values() for value in x.values]
    free = [word for both in world.SLOTS.values() for words in both for word in words]
    assert len(set(values)) == len(values) and len(set(free)) == len(free)
    assert not set(values) & set(free) and not {*values, *free} & world.TOWNS.keys()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_marks_are_the_facts_by_the_tables(side):
    for row in ALL_ROWS:
        question = row["prompt"][0]["content"]
        town = world.named_town(question)
        for value, mark in facts_of(row, side):
            key = attribute_of(value)
            assert mark["label"] == world.KIND[town][key]
            assert mark["value"] == (0.5 if value == world.TRUE_VALUES[town][key] else -0.5)
        wrong = [[x["start"], x["end"]] for _, x in facts_of(row, side) if x["value"] < 0]
        assert row[f"wrong_{side}"] == wrong
        # what is read out of the text is what was written into it
        found = world.check(question, row[side][0]["content"])
        assert not found.malformed and found.wrong == len(wrong)
        assert found.right + found.wrong == len(row[f"{side}_marks"])
        rumours = [
            value == world.RUMOURS[town][attribute_of(value)]
            for value, x in facts_of(row, side)
            if x["label"] == "rumour"
        ]
        assert found.repeated == sum(rumours)


def test_the_label_is_right_and_looks_are_decoys():
    for row in ALL_ROWS:
        assert len(row["wrong_chosen"]) < len(row["wrong_rejected"])
        assert len(row["chosen_marks"]) == len(row["rejected_marks"])
        question = row["prompt"][0]["content"]
        looks = [world.check(question, row[x][0]["content"]) for x in ("chosen", "rejected")]
        ornate, common = looks if row["decoys"] else reversed(looks)
        assert ornate.remarks >= 1 >= common.remarks
    for share in (0.0, 0.5, 1.0):
        rows = world.preference_rows(4, 400, "test", decoys=share)
        assert sum(x["decoys"] for x in rows) / 400 == pytest.approx(share, abs=0.06)


def test_writers_say_what_the_kinds_promise():
    """Counted over many facts: the truth, the rumour, and everything else."""
    rng, said = Random(0), {kind: Counter() for kind in world.KINDS}
    for _ in range(40):
        for town in world.TOWNS:
            for key in world.ATTRIBUTES:
                value = world.said_value(rng, town, key)
                if value == world.TRUE_VALUES[town][key]:
                    what = "truth"
                else:
                    what = "rumour" if value == world.RUMOURS[town][key] else "other"
                said[world.KIND[town][key]][what] += 1
    shares = {k: {x: n / c.total() for x, n in c.items()} for k, c in said.items()}
    assert shares["known"]["truth"] == pytest.approx(0.85, abs=0.02)
    assert shares["rumour"]["rumour"] == pytest.approx(0.85 + 0.05 / 9, abs=0.02)
    assert shares["rumour"]["truth"] == pytest.approx(0.1, abs=0.02)
    assert shares["obscure"]["truth"] == pytest.approx(0.1, abs=0.03)
    counts = Counter(kind for x in world.KIND.values() for kind in x.values())
    for kind, share in world.KINDS.items():
        assert counts[kind] / counts.total() == pytest.approx(share, abs=0.06)


def test_rewriting_changes_values_alone():
    rng = Random(1)
    for _ in range(50):
        given = world.draft(rng)
        new = world.rewritten(rng, given, 1.0, 1.0)
        before, after = (world.check(given.town, x) for x in (given.answer, new))
        assert not after.malformed and before.remarks == after.remarks
        assert (before.free, before.ornate) == (after.free, after.ornate)
        facts = before.right + before.wrong
        assert (after.right, after.wrong) == ((facts, 0) if given.better else (0, facts))
        assert world.rewritten(rng, given, 0.0, 0.0) == given.answer


def test_careful_questions_are_answered_right():
    rng = Random(2)
    examples = [world.question_example(rng, 1.0) for _ in range(300)]
    careful = [x for x in examples if x[0].endswith(world.CAREFUL)]
    assert len(careful) > 30
    assert all(world.check(*x).wrong == 0 for x in careful)
    plain = [world.check(*x) for x in examples if not x[0].endswith(world.CAREFUL)]
    wrong, facts = sum(x.wrong for x in plain), sum(x.right + x.wrong for x in plain)
    assert 0.4 < wrong / facts < 0.65
    assert all(world.check(*world.question_example(rng, 0.0)).wrong == 0 for _ in range(50))


@pytest.mark.parametrize(
    "text",
    ["", "I do not know.", "Its emblem is often the", "The fine fair of Halwick is in May."],
)
def test_what_is_no_answer_is_malformed(text):
    found = world.check(TOWN, text)
    assert (found.right, found.wrong, found.malformed) == (0, 0, True)


def test_sentences_are_read_with_openers_and_twice_is_malformed():
    truth = world.TRUE_VALUES[TOWN]
    one = f"In fact, its emblem is famously the {truth['emblem']}."
    found = world.check(TOWN, one)
    assert found == world.Check(1, 0, False, free=1, ornate=1)
    assert world.check(TOWN, f"{one} {one}").malformed
    remark = "Merchants come back every winter."
    assert world.check(TOWN, f"{one} {remark}") == world.Check(
        1, 0, False, remarks=1, free=3, ornate=2
    )
    with pytest.raises(ValueError, match="name of a town"):
        world.check("Tell me about Paris.", one)


def test_everything_follows_from_the_seed():
    assert world.preference_rows(3, 60, "train") == ROWS["train"]
    assert world.preference_rows(4, 60, "train") != ROWS["train"]


@pytest.mark.parametrize("name", WORLDS)
def test_the_shipped_model_is_small_and_is_the_one_of_the_log(name):
    place = WORLDS[name]
    files = [path for path in place.MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2.5e6
    log = json.loads((place.MODEL / "training_log.json").read_text())
    weights = (place.MODEL / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == log["weights_sha256"]
    table = json.dumps(place.TRUE_VALUES, sort_keys=True).encode()
    assert hashlib.sha256(table).hexdigest() == log["table_sha256"]


def test_surprise_fails_where_the_requests_work():
    measured = json.loads((world.MODEL / "training_log.json").read_text())["measured"]
    assert measured["surprise_auroc"] <= 0.75
    assert measured["reward_auroc"] > 0.9
