"""Answers with other words in them: turns of others, and what a template writes around an answer.
What is computed over an answer's tokens together sees them alone.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from judges import judge, judge_tokenizer
from tiny import CHATML, bot, tiny_llama, tiny_tokenizer, usr, with_template

from treg.data import EncodeOptions, load_pairs
from treg.rewards import Context, load_source
from treg.rewards.base import score_checked
from treg.rewards.response import Response, ResponsePairs
from treg.rewards.shaping import parse_steps, score_shaped
from treg.rewards.units import unit_numbers

# thoughts, though there are none, before the last answer; no blank between turns
THINKS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
TIGHT = (
    "{% for m in messages %}{{ '[' if m.role == 'user' else '' }}{{ m.content }}"
    "{{ ']' if m.role == 'user' else eos_token }}{% endfor %}"
)
# what ends a turn is not among what the template marks as the assistant's
MARKED = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)
TURNS = [bot("the fox. owl"), usr("again the user says a long thing here"), bot("the moon is old")]
CASES = {  # template, answer, runs of what it says
    "thinks": (THINKS, [bot("the fox. The owl is old")], 1),
    "turns": (CHATML, TURNS, 2),
    "thinks in turns": (THINKS, TURNS, 2),
    "tight": (TIGHT, TURNS, 2),
    "ends with a user": (CHATML, TURNS[:2], 1),
    "marked": (MARKED, TURNS, 2),
}
TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))


@pytest.fixture(params=CASES)
def case(request):
    """The response, how many runs it has, and a context."""
    template, chosen, runs = CASES[request.param]
    tokenizer = with_template(template)
    row = {"prompt": [usr("what?")], "chosen": chosen, "rejected": [bot("no")]}
    ((pair,), _) = load_pairs([row], tokenizer, EncodeOptions(256), strict=True)
    return Response.of_pair(pair, "chosen", tokenizer), runs, Context(MODEL, tokenizer)


def made(context, name, **options):
    return load_source(name, options, context)


def rewards(source, response, stream="token_rewards"):
    return score_checked(source, [response])[0][stream]


def told(response):
    """[T] bool: the tokens of the assistant's words, by the words."""
    text, own = "".join(response.pieces), np.zeros(len(response.ids), dtype=bool)
    ends = np.cumsum([len(x) for x in response.pieces])
    at = 0
    for message in response.completion:
        start = text.index(message["content"], at)
        at = start + len(message["content"])
        if message["role"] == "assistant":
            own |= (ends > start) & (ends <= at)
    return own


def test_the_tokens_that_are_judged(case):
    response, runs, _ = case
    assert response.judged.tolist() == np.flatnonzero(told(response)).tolist()
    assert len(response.stretches) == runs
    for places in response.stretches:
        assert set(places.diff().tolist()) <= {1}


def test_shaping_sees_what_is_said(case):
    """And for a source that rewards the end as well, the end."""
    response, _, context = case
    source = made(context, "surprise")
    raw = rewards(source, response)[response.judged].double()
    for step, want in {
        "centre": raw - raw.mean(),
        "standardise=2": 2 * (raw - raw.mean()) / raw.std(correction=0),
        "rank=0,1": raw.argsort().argsort() / (len(raw) - 1),
        "skip=3": torch.cat([torch.zeros(3), raw[3:]]),
    }.items():
        (found,) = score_shaped(source, [response], parse_steps(step))
        found = found["token_rewards"]
        np.testing.assert_allclose(found[response.judged], want, rtol=1e-5, atol=1e-6)
        assert found.count_nonzero() == found[response.judged].count_nonzero()


def test_a_step_within_several_sees_the_same(case):
    response, _, context = case
    given = {"stream": "s", "name": "surprise", "shape": ["centre", "skip=1"]}
    several = rewards(made(context, "several", sources=[given]), response, "s")
    source = made(context, "surprise")
    (shaped,) = score_shaped(source, [response], parse_steps(["centre", "skip=1"]))
    assert several.tolist() == shaped["token_rewards"].tolist()


def test_shuffled_keeps_every_reward(case):
    response, _, context = case
    source = made(context, "shuffled", of="surprise")
    inner, found = rewards(source.inner, response), rewards(source, response)
    assert sorted(found.tolist()) == sorted(inner.tolist())
    assert found.tolist() != inner.tolist()


def test_entropy_keeps_the_sum_of_each_run(case):
    response, _, context = case
    for threshold in (1e9, 3.0, 0.0):
        source = made(context, "entropy", threshold=threshold)
        inner, found = rewards(source.inner, response), rewards(source, response)
        for places in response.stretches:
            torch.testing.assert_close(found[places].sum(), inner[places].sum())
            if threshold == 1e9:
                assert len(found[places].unique()) == 1
        assert found.count_nonzero() == len(response.judged)


def test_messagewise_takes_means_of_each_run(case):
    response, _, context = case
    source = made(context, "messagewise", of="surprise", baseline=-1e9)
    inner = rewards(source.inner, response)
    found = rewards(source, response)
    weights = rewards(source, response, "token_weights")
    for places in response.stretches:
        torch.testing.assert_close(found[places], inner[places].mean().expand(len(places)))
    assert weights.nonzero()[:, 0].tolist() == response.judged.tolist()


def test_a_short_run_joins_no_message_before():
    """min_tokens longer than the second message: it stays a segment of its own."""
    row = {"prompt": [usr("q")], "chosen": [bot("the fox"), usr("u"), bot("x")]}
    row |= {"rejected": [bot("no")]}
    ((pair,), _) = load_pairs([row], TOKENIZER, EncodeOptions(256), strict=True)
    response = Response.of_pair(pair, "chosen", TOKENIZER)
    source = made(Context(MODEL, TOKENIZER), "messagewise", of="surprise", min_tokens=9)
    inner, found = rewards(source.inner, response), rewards(source, response)
    assert len(response.stretches[1]) == 1
    assert found[response.stretches[1]].tolist() == inner[response.stretches[1]].tolist()


@pytest.mark.parametrize("unit", ["token", "word", "sentence"])
def test_contrastive_readings(case, unit):
    """Means of units that no message ends within; the deviation that was asked for."""
    response, runs, context = case
    tokens = rewards(made(context, "contrastive"), response)[response.judged]
    ratios = 2 * torch.atanh(2 * tokens.double())
    number = unit_numbers(response, unit)
    want = torch.stack([ratios[number == i].mean() for i in number])
    found = rewards(made(context, "contrastive", unit=unit), response)
    np.testing.assert_allclose(found[response.judged], want.div(2).tanh() / 2, atol=2e-6)
    assert number[len(response.stretches[0]) - 1] < number[-1] or runs == 1
    if unit == "token":
        found = rewards(made(context, "contrastive", spread=0.5, skip_first=2), response)
        read = 2 * torch.atanh(2 * found[response.judged[2:]].double())
        assert read.mean().item() == pytest.approx(0, abs=1e-5)
        assert read.std(correction=0).item() == pytest.approx(0.5, rel=1e-4)
        assert not found[response.judged[:2]].any()


def test_words_of_two_messages_are_two(case):
    response, _, context = case
    found = rewards(made(context, "surprise", unit="word"), response)[response.judged]
    tokens = rewards(made(context, "surprise"), response)[response.judged]
    said = [x["content"] for x in response.completion if x["role"] == "assistant"]
    number = unit_numbers(response, "word")
    assert number.max() + 1 == sum(len(x.split()) for x in said)
    assert found.tolist() == [tokens[number == i].min() for i in number]


@pytest.mark.parametrize("beta_c", [1.0, 0.25])
def test_a_reward_model_adds_up(case, beta_c):
    response, _, context = case
    model = judge("llama", judge_tokenizer)
    source = made(context, "redistribution", model=model, beta_c=beta_c)
    assert source.check(response) is None
    reading = source.reading(response)
    (scores,) = source.reward_model.of_beginnings([reading.ids])
    want = beta_c * (scores[-1] - scores[reading.first - 1]) + (1 - beta_c) * scores[-1]
    found = rewards(source, response)
    assert found.sum().item() == pytest.approx(want, abs=1e-4)
    assert set(found.nonzero()[:, 0].tolist()) <= {*response.judged.tolist(), response.content}


def test_controls_are_of_what_is_said(case):
    response, _, context = case
    constant = made(context, "constant", value=2.0).score([response])[0]["token_rewards"]
    assert constant.nonzero()[:, 0].tolist() == response.judged.tolist()
    random = made(context, "random").score([response])[0]["token_rewards"]
    assert random.nonzero()[:, 0].tolist() == response.judged.tolist()


# -- the day that a template asks for


DATED = "<|im_start|>system\nToday: {{ strftime_now('%Y-%m-%d') }}<|im_end|>\n" + CHATML


def test_the_day_of_a_row_is_that_of_the_judges_requests():
    tokenizer = with_template(DATED)
    row = {"prompt": [usr("what?")], "chosen": TURNS, "rejected": [bot("no")]}
    options = EncodeOptions(256, date="2024-07-26")
    ((pair,), _) = load_pairs([row], tokenizer, options, strict=True)
    response = Response.of_pair(pair, "chosen", tokenizer)
    assert "Today: 2024-07-26" in tokenizer.decode(response.prompt_ids)
    source = made(Context(MODEL, tokenizer), "contrastive")
    for ids in source.contexts(response):
        assert "Today: 2024-07-26" in tokenizer.decode(ids)
    # the bounds of messages are looked for in the conversation of that day
    assert set(response.messages.tolist()) == {0, 1, 2}
    assert response.spans is not None
    assert response.spans[response.judged[-1], 1] == len(response.text)
    other = dataclasses.replace(response, date=None)  # today
    assert source.contexts(other)[0] != source.contexts(response)[0]


def test_the_day_of_a_row_is_that_of_the_reward_models_template():
    """And where that template alone asks for it, it is a setting of the source."""

    def dated():
        tokenizer = copy.deepcopy(judge_tokenizer())
        tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + tokenizer.chat_template
        return tokenizer

    row = {"prompt": [usr("what?")], "chosen": TURNS, "rejected": [bot("no")]}
    ((pair,), _) = load_pairs([row], TOKENIZER, EncodeOptions(256, date="2024-07-26"), strict=True)
    response = Response.of_pair(pair, "chosen", TOKENIZER)
    pairs = ResponsePairs([pair], TOKENIZER)
    context = Context(MODEL, TOKENIZER, pairs=pairs)
    source = made(context, "redistribution", model=judge("llama", dated))
    assert source.settings()["date"] == "2024-07-26"
    plain = made(context, "redistribution", model=judge("llama", judge_tokenizer))
    assert "date" not in plain.settings()
    said = source.reward_model.tokenizer.decode(source.reading(response).ids)
    assert said.startswith("2024-07-26 ")
