"""Random rows through real chat templates: every row is right by its words, or refused by name.

Each message has words of its own, so that what a token says tells whose it is, without rendering
anything: the oracle is the row itself. `TREG_FUZZ_ROWS=5000` tries as many in all.
"""

import collections
import importlib.util
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import CHATML, tiny_tokenizer
from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.rewards import Context, load_source
from treg.rewards.base import score_checked
from treg.rewards.response import Response

WORD = re.compile(r"[a-z]{3}\d{6}")
ROWS = int(os.environ.get("TREG_FUZZ_ROWS", "0"))
REASONS = {  # that a row of this test may be refused for
    "chat template",
    "prompt rendered otherwise",
    "turn not rendered",
    "answer not rendered",
    "generation marks",
    "rendered already",
}
PICTURES = ("idefics", "smolvlm", "llava")  # their content is a list of parts: text is refused
BLANKS = ("", "", "", " ", "\n", "  ", "\n\n", "\t")
BETWEEN = (" ", " ", "\n", "  ", ", ", ". ", " é ", " 東京 ", " 🙂", " <b> ", ' "x" ', " {{ x }} ")


def templates():
    """The chat templates of TRL, where it is installed, and one of our own."""
    found = {"chatml": CHATML}
    trl = importlib.util.find_spec("trl")
    if trl is not None and trl.origin:
        for file in sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja")):
            if not file.stem.startswith(PICTURES):
                found[file.stem] = file.read_text()
    return found


TEMPLATES = templates()


class Writer:
    """Messages of words that occur once, and whose they are."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.count = seed % 1000 * 100

    def text(self, kind):
        words = []
        for _ in range(self.rng.randint(1, 5)):
            self.count += 1
            words.append(f"{kind}{self.count:06}")
        text = words[0]
        for word in words[1:]:
            text += self.rng.choice(BETWEEN) + word
        return self.rng.choice(BLANKS) + text + self.rng.choice(BLANKS)

    def call(self, kind):
        function = {"name": "weather", "arguments": {"city": self.text(kind).strip()}}
        content = self.rng.choice(["", "", self.text(kind)])
        calls = [{"type": "function", "function": function}]
        return {"role": "assistant", "content": content, "tool_calls": calls}

    def turn(self, role, kind):
        return {"role": role, "content": self.text(kind)}

    def prompt(self):
        rng, messages = self.rng, []
        if rng.random() < 0.3:
            messages.append(self.turn("system", "sys"))
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            messages += [self.turn("user", "usr"), self.turn("assistant", "old")]
        messages.append(self.turn("user", "usr"))
        if rng.random() < 0.1:
            messages += [self.call("old"), self.turn("tool", "res")]
        elif rng.random() < 0.1:
            messages.append({"role": "assistant", "content": self.text("old").strip()})
        return messages

    def answer(self, kind):
        rng = self.rng
        if rng.random() < 0.1:
            return [self.call(kind)]
        message = self.turn("assistant", kind)
        if rng.random() < 0.1:
            message["reasoning_content"] = self.text(kind).strip()
        elif rng.random() < 0.1:
            message["content"] = (
                f"<think>\n{self.text(kind).strip()}\n</think>\n\n{self.text(kind)}"
            )
        if rng.random() < 0.15:
            return [message, self.turn("user", "oth"), self.turn("assistant", kind)]
        return [message]

    def row(self):
        """A row in some form, with what every form means."""
        rng, prompt = self.rng, self.prompt()
        sides = {"chosen": self.answer("cho"), "rejected": self.answer("rej")}
        simple = all(len(x) == 1 and "tool_calls" not in x[0] for x in sides.values())
        form = rng.randrange(7)
        if form == 0 and len(prompt) == 1 and simple:
            texts = {side: x[0]["content"] for side, x in sides.items()}
            return {rng.choice(["prompt", "question"]): prompt[0]["content"], **texts}
        if form == 1:
            return {side: prompt + x for side, x in sides.items()}
        if form == 2:
            return {"prompt": prompt, **{side: prompt + x for side, x in sides.items()}}
        if form == 3:
            return {"prompt": json.dumps(prompt), **{k: json.dumps(x) for k, x in sides.items()}}
        if form == 4 and simple and all("tool_calls" not in x for x in prompt):
            names = {"user": "human", "assistant": "gpt", "system": "system"}

            def sharegpt(message):
                return {"from": names[message["role"]], "value": message["content"]}

            last = {side: sharegpt(x[0]) for side, x in sides.items()}
            return {"conversations": list(map(sharegpt, prompt)), **last}
        return {"prompt": prompt, **sides}


def words_of(value, *kinds):
    """The words of these kinds in a row's value or a text, in order."""
    text = value if isinstance(value, str) else json.dumps(value).replace("\\n", " ")
    return [x for x in WORD.findall(text) if x[:3] in kinds]


def check(row, pair, tokenizer, noted):
    """What tokens say against the row's words."""
    prompt = tokenizer.decode(pair.prompt_ids)
    assert not words_of(prompt, "cho", "rej", "oth"), "the prompt holds an answer"
    asked = words_of(row, "usr", "sys", "res")
    assert sorted(set(words_of(prompt, "usr", "sys", "res"))) == sorted(set(asked)), "the prompt"
    for side, kind, other in (("chosen", "cho", "rej"), ("rejected", "rej", "cho")):
        ids, answer = getattr(pair, f"{side}_ids"), pair.answers[side]
        said, scored = (tokenizer.decode(ids[x]) for x in (answer.content, answer.scored))
        want = words_of(row, kind)
        for text in (said, scored):
            assert not words_of(text, "usr", "sys", "res", "old", "oth", other), "not the answer's"
            found = words_of(text, kind)
            if noted:
                assert set(found) <= set(want) and found, "left out"
            else:
                assert sorted(found) == sorted(set(want)), "what is said"
        assert not words_of(tokenizer.decode(ids[~answer.scored]), kind, other)
        assert set(words_of(answer.said, kind)) == set(words_of(said, kind))


def checked_rewards(pair, tokenizer, source):
    for side in ("chosen", "rejected"):
        response = Response.of_pair(pair, side, tokenizer)
        (found,) = score_checked(source, [response])
        rewarded = found["token_rewards"].numpy() != 0
        assert np.array_equal(rewarded, pair.answers[side].content), "rewards beyond what is said"


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_rows(name):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.bos_token = "<|im_start|>"
    source = load_source("constant", {"value": 1.0}, Context(None, tokenizer))
    kept = collections.Counter()
    count = ROWS // len(TEMPLATES) + 1 if ROWS else 12
    for seed in range(count):
        row = Writer(seed).row()
        try:
            ((pair,), report) = load_pairs([row], tokenizer, EncodeOptions(None), strict=True)
        except RowProblem as problem:
            assert problem.reason in REASONS, problem
            kept[problem.reason] += 1
            continue
        kept["right"] += 1
        try:
            check(row, pair, tokenizer, report.noted)
            checked_rewards(pair, tokenizer, source)
        except AssertionError as error:
            whole = tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids])
            raise AssertionError(f"seed {seed}: {error}\n{json.dumps(row)}\n{whole!r}") from error
    assert kept["right"] >= count / 4, kept
