"""What sources are told of a response: its text, where its characters lie, whether it was cut."""

import numpy as np
import pytest
from judges import judge, judge_tokenizer
from surroundings import shared_data
from tiny import tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, load_pairs
from treg.rewards import Context, Response, load_source
from treg.rewards.response import ResponsePairs

CHAT, PLAIN = tiny_tokenizer(), tiny_tokenizer(chat=False)
MODEL = tiny_llama(len(CHAT))
ASK = [{"role": "user", "content": "the fox?"}]


def responses(row, tokenizer=CHAT, max_length=256):
    pairs, _ = load_pairs([row], tokenizer, EncodeOptions(max_length))
    return ResponsePairs(pairs, tokenizer)[0]


def turns(*texts):
    """An answer of several turns, a tool's between the assistant's."""
    roles = ("assistant", "tool")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def row_of(*texts):
    return {"prompt": ASK, "chosen": turns(*texts), "rejected": turns("no")}


def source(name, tokenizer=CHAT, **options):
    return load_source(name, options, Context(MODEL, tokenizer))


# -- the end of plain text


@pytest.mark.parametrize("name", ["contrastive", "redistribution"])
def test_plain_text_that_has_its_end_already(name):
    """Other programs write the end-of-sequence token into the text: it is no part of the answer."""
    row = {"prompt": "the fox? ", "chosen": "the owl is old", "rejected": "no"}
    ended = row | {side: row[side] + PLAIN.eos_token for side in ("chosen", "rejected")}
    options = {"model": judge("llama", judge_tokenizer)} if name == "redistribution" else {}
    made = source(name, PLAIN, **options)
    plain, other = (responses(x, PLAIN) for x in (row, ended))
    assert [made.check(x) for x in (*plain, *other)] == [None] * 4
    for a, b, wanted, found in zip(plain, other, made.score(plain), made.score(other), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert b.text == b.completion == a.text and b.spans.tolist() == a.spans.tolist()
        assert found["token_rewards"].tolist() == wanted["token_rewards"].tolist()


# -- where characters lie


@pytest.mark.parametrize("texts", [("a", "i", "s"), ("assistant", "tool", "st"), ("x", "ool", "")])
def test_short_messages_are_not_found_in_the_headers(texts):
    """Each character of each message belongs to a token that says it."""
    chosen, _ = responses(row_of(*texts))
    said = np.cumsum([0, *map(len, chosen.pieces)])
    whole = "".join(chosen.pieces)
    # what CHATML writes around the messages
    place, at = 0, 0
    for i, text in enumerate(texts):
        if i:
            place += len(f"<|im_end|>\n<|im_start|>{('assistant', 'tool')[i % 2]}\n")
        assert whole.startswith(text, place)
        for k in range(len(text)):
            holds = (chosen.spans[:, 0] <= at + k) & (chosen.spans[:, 1] > at + k)
            (token,) = np.flatnonzero(holds)
            assert said[token] <= place + k < said[token + 1]
        place += len(text)
        at += len(text) + 1


def test_a_reward_model_reads_short_messages_at_their_places():
    """Each message adds up to what its tokens add to R, not the header's."""
    made = source("redistribution", model=judge("llama", judge_tokenizer))
    chosen, _ = responses(row_of("ok", "i", "s"))
    assert made.check(chosen) is None
    reading = made.reading(chosen)
    tokenizer = made.reward_model.tokenizer
    texts = [tokenizer.decode(reading.ids[:n]) for n in range(len(reading.ids) + 1)]
    ends = [next(n for n, x in enumerate(texts) if x.endswith(end)) for end in ("] i", "] s")]
    held = reading.held[[n - 1 - reading.first for n in ends]]
    assert held[:, 1].tolist() == [4, 6]  # of "ok\ni\ns"
    # of the last message nothing is in the tokens before its own
    assert reading.held[: ends[1] - 1 - reading.first, 1].max() == 5


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_that_the_template_puts_something_before(chat):
    """A template that begins an answer with thoughts: "think" is not found in their marks."""
    tokenizer = with_thoughts() if chat else CHAT
    chosen, _ = responses(row_of("think"), tokenizer)
    ends = np.cumsum([*map(len, chosen.pieces)])
    first = int(np.flatnonzero(chosen.spans[:, 1] > chosen.spans[:, 0])[0])
    lead = "<think>\n\n</think>\n\n" if chat else ""
    assert ends[first] > len(lead) >= ends[first] - len(chosen.pieces[first])
    assert "".join(chosen.pieces).startswith(f"{lead}think")


THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "<think>\n{{ (parts[0].split('<think>')[-1] if parts | length > 1 else '').strip('\n') }}"
    "\n</think>\n\n{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_thoughts():
    """A tokenizer whose template writes thoughts in a form of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THOUGHTS
    return tokenizer


def qwen3():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = shared_data("tok", "templates", "qwen3.jinja").read_text()
    return tokenizer


@pytest.mark.parametrize("tokenizer", [with_thoughts, qwen3])
def test_thoughts_that_a_template_rewrites(tokenizer):
    """R(x, empty) is R after the assistant's header, and every token of thoughts has its share."""
    own = tokenizer()
    made = source("redistribution", model=judge("llama", tokenizer))
    answer = "<think>\nthe owl is old\n</think>\n\nit is 42"
    for policy in (own, CHAT):
        chosen, _ = responses(row_of(answer), policy)
        assert chosen.text == answer and made.check(chosen) is None
        reading = made.reading(chosen)
        assert own.decode(reading.ids[: reading.first]).endswith("<|im_start|>assistant\n")
        (scores,) = made.reward_model.of_beginnings([reading.ids])
        found = made.score([chosen])[0]["token_rewards"].double().numpy()
        # the same tokens and the same template: a token's reward is what it adds to R
        if policy is own:
            wanted = np.diff(scores[reading.first - 1 :])
            n = chosen.content
            np.testing.assert_allclose(found[:n], wanted[:n], atol=1e-5)
        np.testing.assert_allclose(found.sum(), scores[-1] - scores[reading.first - 1], atol=1e-4)
    other, _ = responses(row_of("<think>old</think>it"))
    assert made.check(other).reason == "answer not found"


# -- answers that were cut


def test_only_the_side_that_was_cut_is_read_from_its_tokens():
    row = row_of("the owl", "42", "is old") | {"rejected": turns("was " * 60)}
    whole, _ = responses(row, max_length=1000)
    length = len(whole.prompt_ids) + len(whole.ids)
    chosen, rejected = responses(row, max_length=length)
    assert (chosen.cut, rejected.cut) == (False, True)
    assert chosen.text == "the owl\n42\nis old" and rejected.text.startswith("was was")
    made = source("redistribution", model=judge("llama", judge_tokenizer))
    assert [made.check(x) for x in (chosen, rejected)] == [None, None]
    a, b = (made.score([x])[0] for x in (chosen, whole))
    assert a["token_rewards"].tolist() == b["token_rewards"].tolist()


@pytest.mark.parametrize("name", ["contrastive", "redistribution"])
def test_an_answer_that_was_cut_after_its_first_message_is_refused(name):
    options = {"model": judge("llama", judge_tokenizer)} if name == "redistribution" else {}
    made = source(name, **options)
    row = row_of("the owl", "42", "is old " * 9)
    whole, _ = responses(row, max_length=1000)
    first = len(whole.prompt_ids) + int((whole.messages == 0).sum())
    problem = made.check(responses(row, max_length=first + 8)[0])
    assert problem.reason == "several messages, cut"
    assert problem.detail == "chosen: cut after the first of its messages; raise max_length"
    left, _ = responses(row, max_length=first - 3)  # a part of the first message alone
    assert left.cut and made.check(left) is None and "the owl".startswith(left.text)


@pytest.mark.parametrize("text", ["the fox asked", "🦊 déjà 東京"])
def test_a_special_token_within_a_sampled_answer_says_nothing(text):
    """A policy may sample one anywhere, between the bytes of a character too."""
    tokenizer = tiny_tokenizer()
    plain = tokenizer(text)["input_ids"]
    prompt, special = tokenizer("what is")["input_ids"], tokenizer.all_special_ids[-1]
    for place in range(1, len(plain)):
        ids = [*plain[:place], special, special, *plain[place:], tokenizer.eos_token_id]
        response = Response.sampled("what is", prompt, ids, tokenizer)
        alone = Response.sampled("what is", prompt, [*plain, tokenizer.eos_token_id], tokenizer)
        assert response.text == text and response.spans is not None
        pieces = [*response.pieces[:place], *response.pieces[place + 2 :]]
        assert pieces == alone.pieces and pieces[-1] == tokenizer.eos_token
        assert response.pieces[place : place + 2] == ["", ""]
        held = [*response.spans[:place].tolist(), *response.spans[place + 2 :].tolist()]
        lengths = [end - start for start, end in held]
        assert lengths == [end - start for start, end in alone.spans.tolist()]
