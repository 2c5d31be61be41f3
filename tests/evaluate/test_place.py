"""Which tokens of an answer its marks reach, against a walk over the bytes of every token."""

import random
from dataclasses import replace

import numpy as np
import pytest
from tiny import bot, shared_data, tiny_tokenizer, usr
from transformers import AutoTokenizer, GPT2Tokenizer

from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.evaluate.documents import Mark, MarkedAnswer
from treg.evaluate.place import NO_STEP, responses, token_marks
from treg.rewards.response import ResponsePairs

PROMPT = "what did the fox say?\n"
TEXTS = {
    "words": "The old owl said: it is 42, and upon a time there was a fox.",
    "emoji": "a 🦊 and 👩‍👩‍👧 x🦊🦊y, ok 🙂",
    "CJK": "東京は日本の首都です。 北京 是 中国的首都",
    "accents": "naïve cafe\u0301 über Zürich\r\n\r\n  two  blanks ",
    "blanks": "  \n leading and trailing \n ",
}


def tokenizer_at(*parts):
    return AutoTokenizer.from_pretrained(shared_data(*parts))


TOKENIZERS = {
    "tiny": tiny_tokenizer,
    "tiny, plain": lambda: tiny_tokenizer(chat=False),
    "crossing": lambda: tiny_tokenizer(chat=False, crossing=True),
    "qwen": lambda: tokenizer_at("tok", "qwen2.5"),
    "gpt2": lambda: GPT2Tokenizer.from_pretrained(shared_data("tok", "gpt2")),
    "tinystories": lambda: tokenizer_at("lm", "tinystories-656k"),
}


def byte_values():
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [x for x in range(256) if x not in plain]
    return {chr(x): x for x in plain} | {chr(256 + i): x for i, x in enumerate(others)}


BYTES = byte_values()


def bytes_of(tokenizer):
    """The bytes that each token says."""
    added, blank = tokenizer.added_tokens_decoder, "▁" in tokenizer.get_vocab()

    def of(token_id):
        token = tokenizer.convert_ids_to_tokens(int(token_id))
        if blank or token_id in added:
            return token.replace("▁", " ").encode()
        return bytes(BYTES[x] for x in token)

    return of


def characters_held(response, text):
    """Of each token the numbers of the characters of the text that it holds a byte of."""
    of, held = bytes_of(response.tokenizer), []
    before, own = [[of(x) for x in ids] for ids in (response.prompt_ids, response.ids)]
    # the answer is the last thing that is said but for what ends the turn
    place = len(b"".join(before)) - b"".join([*before, *own]).rindex(text.encode())
    of_byte = [i for i, char in enumerate(text) for _ in char.encode()]
    for piece in own:
        inside = range(max(0, place), min(len(of_byte), place + len(piece)))
        held.append({of_byte[k] for k in inside})
        place += len(piece)
    return held


def made(text, tokenizer, prompt=PROMPT, max_length=512, **fields):
    answer = MarkedAnswer("f:1", "d", prompt, text, **fields)
    (response,) = responses([answer], tokenizer, EncodeOptions(max_length))
    return answer, response


def marked(text, tokenizer, **fields):
    answer, response = made(text, tokenizer, **fields)
    return response, token_marks(response, answer)


def holds(name, kind):
    """Whether the tokens of a tokenizer say a text as it is."""
    if name == "tinystories":
        return kind == "words"  # its decoder drops what it has no token for, and outer blanks
    return not (name == "qwen" and kind == "accents")


CASES = [(name, kind) for name in TOKENIZERS for kind in TEXTS if holds(name, kind)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_marks_reach_the_tokens_that_hold_their_bytes(name, kind):
    text = TEXTS[kind]
    answer, response = made(text, TOKENIZERS[name]())
    held = characters_held(response, text)
    draw = random.Random(0)
    spans = [sorted(draw.sample(range(len(text) + 1), 2)) for _ in range(40)]
    for start, end in [*spans, *((i, i + 1) for i in range(len(text)))]:
        found = token_marks(response, replace(answer, marks=(Mark(start, end, "x"),)))
        wanted = [bool(x & set(range(start, end))) for x in held]
        assert found.wrong.tolist() == wanted, (start, end)
        assert found.content.tolist() == [bool(x) for x in held]
        assert found.labels["x"].tolist() == wanted
    assert found.judged.tolist() == found.content.tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "prompt", [PROMPT, "ends with a blank ", "ends in a wor", "\n\nHuman: q?\n\nAssistant:"]
)
def test_ids_are_those_of_annotate(name, prompt):
    """Alone and as a pair; the prompt ends where the pair's does."""
    tokenizer = TOKENIZERS[name]()
    for kind, other in (("words", "emoji"), ("CJK", "blanks"), ("accents", "words")):
        row = {"prompt": prompt, "chosen": TEXTS[kind], "rejected": TEXTS[other]}
        pairs, _ = load_pairs([row], tokenizer, EncodeOptions())
        wanted = ResponsePairs(pairs, tokenizer)[0]
        answers = [
            MarkedAnswer("f:1", "d", prompt, row[side], pair="p", preferred=good, side=side)
            for side, good in (("chosen", True), ("rejected", False))
        ]
        for one, given in zip(responses(answers, tokenizer), wanted, strict=True):
            for field in ("prompt_ids", "ids", "other_ids", "says", "scored"):
                assert np.array_equal(getattr(one, field), getattr(given, field)), field
            for field in ("prompt", "completion", "text", "content", "side", "row_text", "cut"):
                assert getattr(one, field) == getattr(given, field), field
        for answer, given in zip(answers, wanted, strict=True):
            (alone,) = responses([answer], tokenizer)
            whole = [*alone.prompt_ids, *alone.ids]
            assert whole == [*given.prompt_ids, *given.ids]


CHAT = tiny_tokenizer()


def said(response, mask):
    return response.tokenizer.decode(response.ids[mask]).strip()


def test_wrong_right_and_labels():
    text = "the old owl said: it is 42."
    marks = (
        Mark(0, 7, "a"),
        Mark(4, 11, "b"),
        Mark(9, 16, "", wrong=False),  # it begins within " owl", which is wrong
        Mark(18, 20, "b"),
    )
    response, found = marked(text, CHAT, marks=marks)
    assert said(response, found.wrong) == "the old owl it"
    assert said(response, found.right) == "said"
    assert {label: said(response, x) for label, x in found.labels.items()} == {
        "a": "the old",
        "b": "old owl it",
    }
    assert not (found.judged & ~found.content).any() and not found.content[response.content :].any()


def test_steps_and_what_nobody_judged():
    steps = ["the old owl.", "it is 42.", "the fox."]
    text = "\n\n".join(steps)
    spans = ((0, 12), (14, 23), (25, 33))
    fields = {"steps": spans, "marks": (Mark(14, 23),), "unjudged": ((23, 33),)}
    response, found = marked(text, CHAT, **fields)
    for number, step in enumerate(steps):
        assert said(response, found.steps == number) == step
    assert said(response, found.wrong) == "it is 42."
    assert said(response, found.judged) == "the old owl.\n\nit is 42."
    assert said(response, found.content) == text
    assert (found.steps[response.content :] == NO_STEP).all()


def test_an_answer_that_nobody_judged_has_content():
    _, found = marked("the fox", CHAT, judged=False)
    assert not found.judged.any() and found.content.any()


def test_a_cut_answer_keeps_the_marks_of_what_is_left():
    text = "the old owl said: it is 42, " * 8
    marks = (Mark(4, 7, "a"), Mark(len(text) - 8, len(text) - 2, "b"))
    answer, whole = made(text, CHAT, marks=marks)
    _, response = made(text, CHAT, marks=marks, max_length=len(whole.prompt_ids) + 20)
    found = token_marks(response, answer)
    assert response.cut and len(response.ids) == 20
    assert said(response, found.wrong) == "old" and not found.labels["b"].any()
    assert found.wrong.tolist() == token_marks(whole, answer).labels["a"][:20].tolist()


def test_blanks_around_an_answer_of_a_dialogue():
    """The template gets them without; marks count characters of what the file has."""
    text = "  the old owl "
    prompt = "\n\nHuman: q?\n\nAssistant:"
    response, found = marked(text, CHAT, prompt=prompt, marks=(Mark(6, 9, ""),))
    assert response.text == "the old owl" and said(response, found.wrong) == "old"


@pytest.mark.parametrize("tokenizer", [CHAT, tiny_tokenizer(chat=False)], ids=["chat", "plain"])
def test_a_sentence_without_a_prompt(tokenizer):
    """Plain text after the token that begins sequences, in both sentences of a pair."""
    pair = [
        MarkedAnswer("f:1", "d", "", text, pair="p", preferred=good)
        for text, good in (("the fox was here", True), ("the fox were here", False))
    ]
    good, bad = responses(pair, tokenizer)
    for response, answer in ((good, pair[0]), (bad, pair[1])):
        assert response.prompt_ids.tolist() == [tokenizer.eos_token_id]  # it has no other
        plain = tokenizer(answer.answer)["input_ids"]
        assert response.ids.tolist() == [*plain, tokenizer.eos_token_id]
        assert said(response, token_marks(response, answer).content) == answer.answer
    assert good.side == "chosen" and bad.side == "rejected"
    assert good.other_ids.tolist() == bad.ids.tolist()


def test_a_tokenizer_that_begins_by_itself():
    tokenizer = tokenizer_at("lm", "tinystories-656k")
    _, response = made("Once upon a time", tokenizer, prompt="")
    assert response.prompt_ids.tolist() == [tokenizer.bos_token_id]


def test_messages_as_a_prompt():
    _, response = made("the fox", CHAT, prompt=[usr("q"), bot("a"), usr("r")])
    text = CHAT.decode(response.prompt_ids)
    assert text.endswith("user\nr<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="holds messages, and the tokenizer has no chat template"):
        made("the fox", tiny_tokenizer(chat=False), prompt=[usr("q")])


def test_what_cannot_be_encoded_is_a_problem_of_its_own_row():
    long = "the old owl said: " * 30
    answers = [
        MarkedAnswer("f:1", "1", long, "the fox"),
        MarkedAnswer("f:2", "2", "q", "the \ud83e fox", pair="p", preferred=True),
        MarkedAnswer("f:3", "2", "q", "the owl", pair="p", preferred=False),
        MarkedAnswer("f:4", "4", "<|im_start|>user\nq", "the owl"),
        MarkedAnswer("f:5", "5", "q", "the owl"),
    ]
    counted = []
    found = responses(answers, CHAT, EncodeOptions(64), on_answers=counted.append)
    kinds = [x.reason if isinstance(x, RowProblem) else "" for x in found]
    assert kinds == ["prompt too long", "broken text", "", "rendered already", ""]
    assert [x.where for x in found] == [x.where for x in answers]
    assert sum(counted) == 5
    assert responses([answers[3]], CHAT, EncodeOptions(64, chat=False))[0].content > 0


def test_text_that_the_tokens_do_not_say_is_refused():
    tokenizer = tokenizer_at("tok", "qwen2.5")
    answer, response = made("cafe\u0301", tokenizer)
    with pytest.raises(RowProblem, match=r"marks cannot be placed.*normalize the data to NFC"):
        token_marks(response, answer)
