"""The demo's world, and the chat model shipped beside it."""

import json
import re
from random import Random

import pytest

from treg.demo import world

MODEL = world.MODEL
ATTRIBUTE_OF = {
    value: key for key, attribute in world.ATTRIBUTES.items() for value in attribute.values
}
ROWS = {split: world.preference_rows(3, 60, split) for split in world.SPLITS}
ALL_ROWS = ROWS["train"] + ROWS["test"]


def town_of(row: dict) -> str:
    (town,) = set(re.findall(r"\w+", row["prompt"][0]["content"])) & set(world.TOWNS)
    return town


def corrected(town: str, text: str, spans: list[list[int]]) -> str:
    for start, end in reversed(spans):
        text = text[:start] + world.TOWNS[town][ATTRIBUTE_OF[text[start:end]]] + text[end:]
    return text


def test_values_belong_to_one_attribute_and_names_are_no_values():
    assert len(ATTRIBUTE_OF) == sum(len(a.values) for a in world.ATTRIBUTES.values())
    assert not ATTRIBUTE_OF.keys() & world.TOWNS.keys()
    assert all(town.keys() == world.ATTRIBUTES.keys() for town in world.TOWNS.values())


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_spans_are_the_wrong_values_and_nothing_else_is_wrong(side):
    for row in ALL_ROWS:
        question, text, town = row["prompt"][0]["content"], row[side][0]["content"], town_of(row)
        spans = row[f"wrong_{side}"]
        for start, end in spans:
            assert text[start:end] != world.TOWNS[town][ATTRIBUTE_OF[text[start:end]]]
        before = world.check(question, text)
        assert (before.wrong, before.malformed) == (len(spans), False)
        total = before.right + before.wrong
        assert 4 <= total <= 6
        assert world.check(question, corrected(town, text, spans)) == world.Check(total, 0, False)


def test_marks_are_the_facts():
    for row in ALL_ROWS:
        for side in ("chosen", "rejected"):
            text, marks = row[side][0]["content"], row[f"{side}_marks"]
            found = world.check(row["prompt"][0]["content"], text)
            values = [mark["value"] for mark in marks]
            assert (values.count(0.5), values.count(-0.5)) == (found.right, found.wrong)
            assert all(text[x["start"] : x["end"]] in ATTRIBUTE_OF for x in marks)
            wrong = [[x["start"], x["end"]] for x in marks if x["value"] < 0]
            assert wrong == row[f"wrong_{side}"]


def test_chosen_is_better_and_the_label_wrong_about_many_tokens():
    for row in ALL_ROWS:
        assert len(row["wrong_chosen"]) < len(row["wrong_rejected"])
        sizes = {row[side][0]["content"].count(".") for side in ("chosen", "rejected")}
        assert len(sizes) == 1
    assert sum(bool(row["wrong_chosen"]) for row in ALL_ROWS) > len(ALL_ROWS) / 2
    facts = sum(row["rejected"][0]["content"].count(".") for row in ALL_ROWS)
    assert sum(len(row["wrong_rejected"]) for row in ALL_ROWS) < 0.8 * facts


def test_everything_follows_from_the_seed():
    assert world.preference_rows(3, 60, "train") == ROWS["train"]
    assert world.preference_rows(4, 60, "train") != ROWS["train"]
    assert world.answer(Random(5), "Velmora", 0.5) == world.answer(Random(5), "Velmora", 0.5)


def test_splits_share_no_town():
    train, test = ({town_of(row) for row in ROWS[split]} for split in ("train", "test"))
    assert train <= set(world.SPLITS["train"])
    assert test <= set(world.SPLITS["test"])
    assert not set(world.SPLITS["train"]) & set(world.SPLITS["test"])
    assert {*world.SPLITS["train"], *world.SPLITS["test"]} == world.TOWNS.keys()
    asked = world.prompts("test")
    assert len(set(asked)) == len(asked) == 3 * len(world.SPLITS["test"])
    assert all(world.check(q, "").malformed for q in asked)


def test_wrong_rate():
    rng = Random(0)
    assert not any(world.answer(rng, "Velmora", 0.0)[1] for _ in range(50))
    said = [fact for _ in range(400) for fact in world.facts(rng, "Velmora", 0.3)]
    assert sum(not fact.true_of("Velmora") for fact in said) / len(said) == pytest.approx(
        0.3, abs=0.04
    )


def test_check_of_malformed_and_foreign_text():
    truth, other = world.TOWNS["Velmora"], world.TOWNS["Halwick"]
    right = f"The markets of Velmora sell {truth['trade']}. Its emblem is the {truth['emblem']}."
    assert (
        world.check("Tell me about Velmora.", right)
        == world.check("Velmora", right)
        == world.Check(2, 0, False)
    )
    wrong = next(v for v in world.ATTRIBUTES["trade"].values if v != truth["trade"])
    assert world.check("Velmora", f"Its best goods are {wrong}.") == world.Check(0, 1, False)
    for text in (
        "",
        "Its best goods are",
        "Its best goods are Velmora.",
        f"Its best goods are {truth['emblem']}.",  # another attribute's value
        f"Its best goods are {truth['trade']}",
        "I do not know.",
    ):
        assert world.check("Velmora", text) == world.Check(0, 0, True), text
    foreign = right.replace("Velmora", "Halwick").replace(truth["trade"], other["trade"])
    assert world.check("Velmora", foreign) == world.Check(1, 0, True)
    assert world.check("Velmora", right + " " + right).malformed  # said twice
    with pytest.raises(ValueError, match="name of a town"):
        world.check("Tell me about Paris.", right)


def test_the_shipped_model_is_good_enough():
    log = json.loads((MODEL / "training_log.json").read_text())
    assert log["seed"] == 0
    assert log["measured"]["reward_auroc"] > 0.85
    assert log["measured"]["sampled_malformed_rate"] < 0.05


def test_the_shipped_model_loads_and_answers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "Tell me about Velmora."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nTell me about Velmora.<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(ids[0]) == text
    out = model.generate(ids, do_sample=False, max_new_tokens=96)[0, ids.shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    result = world.check("Velmora", tokenizer.decode(out[:-1]))
    assert not result.malformed
    assert result.right + result.wrong >= 4
