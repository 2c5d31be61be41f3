"""Which tokens are an answer's: found from what the template writes, held against the messages."""

import datetime

import numpy as np
import pytest
import torch

from tests.support.tiny import (
    CHATML,
    bot,
    msg,
    seeded,
    tiny_llama,
    tiny_tokenizer,
    usr,
    with_template,
)
from treg.data import EncodeOptions, PairCollator, RowProblem, load_pairs
from treg.data.encode import encode
from treg.data.examples import examples_of
from treg.data.rendering import Renderer
from treg.data.rows import parse_row
from treg.rewards import Context, load_source
from treg.rewards.base import score_checked
from treg.rewards.response import Response, content_length

# ends a turn with words that are no special tokens of the tokenizer
PLAIN_END = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# the system's text stands in the last user's turn
SYSTEM_LAST = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set last = namespace(i=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.i = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST]{{ s + ' ' if loop.index0 == last.i }}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# thoughts of earlier turns are left out once there is an answer
DROPS_THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% if m.thinking and loop.nextitem and messages[-1].role != 'assistant' %}"
    "<|im_start|>thought\n{{ m.thinking }}<|im_end|>\n{% endif %}"
    "<|im_start|>call\n{{ m.tool_calls[0].function.name }}"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}{{ ' final' if m.role == 'assistant' }}\n"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
CUTS_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ADDS_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' }}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}",
)
MARKED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
)


def call(city):
    return bot("", tool_calls=[{"function": {"name": "weather", "arguments": {"city": city}}}])


def pair_of(template, prompt, chosen, rejected=None, **options):
    tokenizer = with_template(template)
    rejected = [bot("zz")] if rejected is None else rejected
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    ((pair,), report) = load_pairs([row], tokenizer, EncodeOptions(**options), strict=True)
    return tokenizer, pair, report


def parts(tokenizer, pair, side="chosen"):
    """Prompt, completion, what is scored and what is said, as text."""
    ids, answer = getattr(pair, f"{side}_ids"), pair.answers[side]
    pieces = [pair.prompt_ids, ids, ids[answer.scored], ids[answer.content]]
    return [tokenizer.decode(x) for x in pieces]


END = "<|im_end|>"
HEAD = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
Q = [usr("q")]
# thoughts before the last turn alone, as Qwen3 has it
LAST_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# an end after the last turn alone, which begins like the next turn's beginning
LAST_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '<|im_end|>' }}"
)
# the tool's turn must follow a call
STRICT = (
    "{% for m in messages %}{% if m.role == 'tool' and not loop.previtem.tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}{% endfor %}"
) + CALLS
FOUND = {  # template, prompt, answer: completion, what is scored, what is said
    "chatml": (CHATML, Q, [bot("a b")], "a b<|im_end|>\n", "a b<|im_end|>\n", "a b"),
    "no special end": (
        PLAIN_END,
        Q,
        [bot("four")],
        "four<end_of_turn>\n",
        "four<end_of_turn>\n",
        "four",
    ),
    "trimmed": (PLAIN_END, Q, [bot(" x ")], "x<end_of_turn>\n", "x<end_of_turn>\n", "x"),
    "blanks kept": (CHATML, Q, [bot(" x \n")], " x \n<|im_end|>\n", " x \n<|im_end|>\n", " x \n"),
    "ends like the template": (
        CHATML,
        Q,
        [bot("x<|im_end|>\n")],
        "x<|im_end|>\n<|im_end|>\n",
        "x<|im_end|>\n<|im_end|>\n",
        "x<|im_end|>\n",
    ),
    "template thinks": (
        ADDS_THINK,
        Q,
        [bot("x")],
        "<think>\n\n</think>\n\nx<|im_end|>\n",
        "<think>\n\n</think>\n\nx<|im_end|>\n",
        "x",
    ),
    "several turns": (
        CHATML,
        Q,
        [bot("a"), usr("r"), bot("b")],
        "a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        "a<|im_end|>\nb<|im_end|>\n",
        "ab",
    ),
    "tool results": (
        CALLS,
        Q,
        [call("Oslo"), msg("tool", "12"), bot("cold")],
        '<call>weather{"city": "Oslo"}</call><|im_end|>\n<|im_start|>tool\n12<|im_end|>\n'
        "<|im_start|>assistant\ncold<|im_end|>\n",
        '<call>weather{"city": "Oslo"}</call><|im_end|>\ncold<|im_end|>\n',
        '<call>weather{"city": "Oslo"}</call>cold',
    ),
    "tool call": (
        CALLS,
        Q,
        [call("Oslo")],
        '<call>weather{"city": "Oslo"}</call><|im_end|>\n',
        '<call>weather{"city": "Oslo"}</call><|im_end|>\n',
        '<call>weather{"city": "Oslo"}</call>',
    ),
    "goes on": (
        CHATML,
        [*Q, bot("The sun")],
        [bot(" is big.")],
        " is big.<|im_end|>\n",
        " is big.<|im_end|>\n",
        " is big.",
    ),
    "last turn thinks": (
        LAST_THINKS,
        Q,
        [bot("a"), usr("r"), bot("b")],
        "a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\nb<|im_end|>\n",
        "a<|im_end|>\n<think>\n\n</think>\n\nb<|im_end|>\n",
        "ab",
    ),
    "last turn ends": (
        LAST_ENDS,
        Q,
        [bot("a"), usr("r"), bot("b")],
        "a<|im_start|>user\nr<|im_start|>assistant\nb<|im_end|>",
        "ab<|im_end|>",
        "ab",
    ),
    "strict about tools": (
        STRICT,
        Q,
        [call("Oslo"), msg("tool", "12"), bot("cold")],
        '<call>weather{"city": "Oslo"}</call><|im_end|>\n<|im_start|>tool\n12<|im_end|>\n'
        "<|im_start|>assistant\ncold<|im_end|>\n",
        '<call>weather{"city": "Oslo"}</call><|im_end|>\ncold<|im_end|>\n',
        '<call>weather{"city": "Oslo"}</call>cold',
    ),
    "marked": (MARKED, Q, [bot("a")], "a<|im_end|>\n", "a<|im_end|>", "a"),
    "marked turns": (
        MARKED,
        [*Q, bot("b"), usr("r")],
        [bot("a"), usr("r"), bot("a")],
        "a<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
        "a<|im_end|>a<|im_end|>",
        "aa",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_tokens_of_an_answer(case):
    template, prompt, answer, *want = FOUND[case]
    tokenizer, pair, report = pair_of(template, prompt, answer)
    before, *found = parts(tokenizer, pair)
    assert found == want and not report.noted
    assert before == Renderer(tokenizer).prompt(prompt)


def test_turns_of_others_are_scored_on_request():
    answer = [bot("a"), usr("r"), bot("b")]
    tokenizer, pair, _ = pair_of(CHATML, Q, answer, turns="all")
    _, completion, scored, said = parts(tokenizer, pair)
    assert scored == completion and said == "ab" and not pair.masked


def test_a_prompt_that_is_written_otherwise_before_the_answer():
    """The system's text moves into a later turn: it would be scored."""
    prompt = [msg("system", "Be kind."), usr("2+2?")]
    with pytest.raises(RowProblem, match=r"prompt rendered otherwise: chosen: .*'Be kind"):
        pair_of(SYSTEM_LAST, prompt, [bot("four"), usr("sure?"), bot("yes")])
    tokenizer, pair, _ = pair_of(SYSTEM_LAST, prompt, [bot("four")])
    assert parts(tokenizer, pair)[:2] == ["[INST]Be kind. 2+2?[/INST]", "four<|im_end|>"]


def test_earlier_thoughts_stay_where_the_model_sees_them():
    """Prompt as at generation, though the template drops the thoughts once there is an answer."""
    prompt = [
        usr("Oslo?"),
        {**call("Oslo"), "thinking": "I should call"},
        msg("tool", "12 degrees, rain"),
    ]
    tokenizer, pair, _ = pair_of(DROPS_THOUGHTS, prompt, [bot("cold")])
    before, completion, _, said = parts(tokenizer, pair)
    assert before == Renderer(tokenizer).prompt(prompt) and "I should call" in before
    assert completion == " final\ncold<|im_end|>\n" and said == "cold"


def test_an_answer_that_begins_like_what_opens_the_turn():
    tokenizer, pair, _ = pair_of(CUTS_THINK, Q, [bot("<b>fox")], [bot("<i>owl")])
    assert parts(tokenizer, pair)[1:] == ["<b>fox<|im_end|>\n"] * 2 + ["<b>fox"]


def test_what_a_template_leaves_out_is_counted_and_shown():
    tokenizer, pair, report = pair_of(CUTS_THINK, Q, [bot("<think>add</think>four")])
    assert parts(tokenizer, pair)[1:] == ["four<|im_end|>\n", "four<|im_end|>\n", "four"]
    assert report.noted == {"the template leaves out a part of the answer": 1}
    assert "  kept 1: the template leaves out a part of the answer" in str(report)
    _, _, report = pair_of(CHATML, Q, [bot("x", reasoning_content="because")])
    assert report.noted == {"the template leaves out the answer's reasoning_content": 1}


def test_a_template_that_ends_no_turn():
    _, _, report = pair_of("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", Q, [bot("x")])
    assert not report.noted  # two newlines end it
    plain = "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content }}{% endfor %}"
    _, _, report = pair_of(plain, Q, [bot("x")])
    assert report.noted == {"the template writes no end of a turn after the answer": 1}


REFUSED = {
    "calls are not written": (CHATML, Q, [call("Oslo")], "answer not rendered", "weather"),
    "content is changed": (
        CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"),
        [usr("Q")],
        [bot("a b")],
        "answer not rendered",
        "'A B' where the answer is 'a b'",
    ),
    "a turn vanishes": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
        [bot("before"), usr("q")],
        [bot("x")],
        "turn not rendered",
        "turn 1 of the prompt",
    ),
    "an unknown role vanishes": (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
        [msg("critic", "be strict"), usr("q")],
        [bot("x")],
        "turn not rendered",
        "'critic'",
    ),
    "a tool's result vanishes": (
        CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"),
        [usr("q"), msg("tool", "12 degrees")],
        [bot("x")],
        "turn not rendered",
        "'tool'",
    ),
    "marks elsewhere": (
        MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}"),
        Q,
        [bot("x")],
        "generation marks",
        "other characters",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_in_the_text_is_refused(case):
    template, prompt, answer, reason, detail = REFUSED[case]
    with pytest.raises(RowProblem) as problem:
        pair_of(template, prompt, answer)
    assert problem.value.reason == reason and detail in problem.value.detail


# -- what a row may tell the template


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{{ 'x' * 9999999999 }}"},
        {"tokenize": True},
        {"messages": []},
        {"add_generation_prompt": True},
        {"eos_token": "x"},
        {"strftime_now": 1},
        {"unread": 1},
    ],
)
def test_a_row_sets_only_what_the_template_reads(kwargs):
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "chat_template_kwargs": kwargs}
    with pytest.raises(RowProblem, match=r"chat template: .*reads \(style\), got"):
        load_pairs([row], tiny_tokenizer(), strict=True)


def test_templates_are_bounded(monkeypatch):
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    many = "{% for i in range(999) %}{% for j in range(999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(RowProblem, match=r"chat template: it writes 99.* characters for"):
        load_pairs([row], with_template(many + CHATML), strict=True)
    monkeypatch.setattr("treg.data.rendering.SECONDS", 0.2)
    slow = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(RowProblem, match=r"TimeoutError: no end after 0\.2 seconds"):
        load_pairs([row], with_template(slow + CHATML), strict=True)


def test_today_is_the_same_for_a_whole_run():
    dated = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + CHATML
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    tokenizer = with_template(dated)
    ((pair,), _) = load_pairs([row], tokenizer, EncodeOptions(date="2024-07-26"))
    assert tokenizer.decode(pair.prompt_ids).startswith("26 Jul 2024 00:00:00\n")
    today = datetime.date.today().isoformat()
    assert EncodeOptions().dated(tokenizer).date == today
    assert EncodeOptions().dated(tiny_tokenizer()).date is None
    with pytest.raises(ValueError, match="date: expected YYYY-MM-DD, got 'today'"):
        EncodeOptions(date="today")


def test_text_that_is_rendered_already_is_not_rendered_again():
    row = {"prompt": HEAD, "chosen": "x", "rejected": "y"}
    with pytest.raises(RowProblem, match=r"rendered already.*im_start.*--plain_text"):
        load_pairs([row], tiny_tokenizer(), strict=True)
    ((pair,), _) = load_pairs([row], tiny_tokenizer(), EncodeOptions(chat=False))
    assert tiny_tokenizer().decode(pair.prompt_ids) == HEAD


def test_one_beginning_of_sequence():
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", bos)]
    )
    for prompt in ("q", "<s>q"):
        row = {"prompt": prompt, "chosen": "x", "rejected": "y"}
        ((pair,), _) = load_pairs([row], tokenizer)
        assert pair.prompt_ids.tolist() == [bos, *tokenizer("q")["input_ids"][1:]]
        assert tokenizer.decode(pair.chosen_ids[pair.answers["chosen"].content]) == "x"


# -- lengths


def test_no_more_is_tokenized_than_can_be_used(monkeypatch):
    tokenizer, seen = tiny_tokenizer(), []
    inner = type(tokenizer).__call__

    def count(self, texts, *args, **more):
        seen.extend(map(len, [texts] if isinstance(texts, str) else texts))
        return inner(self, texts, *args, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    rows = [
        {"prompt": "q" * 10**6, "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": "x" * 10**6, "rejected": "y"},
    ]
    pairs, report = load_pairs(rows, tokenizer, EncodeOptions(64))
    assert max(seen) < 10_000 and report.dropped == {"prompt too long": 1}
    whole = tokenizer(HEAD + "x" * 10**5)["input_ids"][:64]
    assert [*pairs[0].prompt_ids, *pairs[0].chosen_ids] == whole


# -- what is scored and rewarded


MODEL = seeded(lambda: tiny_llama(len(tiny_tokenizer()), max_position_embeddings=1024))
TURNS = {
    "prompt": Q,
    "chosen": [bot("the sun"), usr("sure?"), bot("the fox")],
    "rejected": [bot("the moon")],
}


def test_batches_score_the_assistants_tokens_alone():
    pairs, _ = load_pairs([TURNS], tiny_tokenizer())
    batch = PairCollator()(examples_of(pairs))
    (pair,) = pairs
    scored = pair.answers["chosen"].scored
    want = [*pair.chosen_ids[scored], *pair.rejected_ids]
    assert batch["target"].tolist() == want and not scored.all()
    assert batch["lengths"].tolist() == [scored.sum(), len(pair.rejected_ids)]
    width = batch["input_ids"].shape[1]
    at = len(pair.prompt_ids) - 1 + np.flatnonzero(scored)
    at = [*at, *(width + len(pair.prompt_ids) - 1 + np.arange(len(pair.rejected_ids)))]
    assert batch["scored"].tolist() == at


@pytest.mark.parametrize(
    "template", [CHATML, PLAIN_END, ADDS_THINK], ids=["chatml", "end", "think"]
)
def test_rewards_beyond_what_is_said_are_zero(template):
    tokenizer = with_template(template)
    pairs, _ = load_pairs([TURNS], tokenizer)
    source = load_source("contrastive", {}, Context(MODEL, tokenizer))
    for side in ("chosen", "rejected"):
        response = Response.of_pair(pairs[0], side, tokenizer)
        (found,) = score_checked(source, [response])
        rewarded = found["token_rewards"].numpy() != 0
        said = pairs[0].answers[side].content
        assert not rewarded[~said].any() and rewarded[said].any()


def test_the_judge_sees_the_calls_and_the_tools():
    tokenizer = with_template(CALLS)
    tools = [{"name": "weather", "parameters": {}}]
    row = {"prompt": Q, "chosen": [call("Oslo")], "rejected": [call("Rome")], "tools": tools}
    ((pair,), _) = load_pairs([row], tokenizer)
    source = load_source("contrastive", {}, Context(MODEL, tokenizer))
    for side, city in (("chosen", "Oslo"), ("rejected", "Rome")):
        response = Response.of_pair(pair, side, tokenizer)
        for ids in source.contexts(response):
            text = tokenizer.decode(ids)
            assert f'<call>weather{{"city": "{city}"}}</call>' in text
            assert '[tools]\n[{"name": "weather"' in text


def test_a_call_of_the_prompt_is_shown_too():
    tokenizer = with_template(CALLS)
    row = {"prompt": [*Q, call("Oslo"), msg("tool", "12")], "chosen": "x", "rejected": "y"}
    ((pair,), _) = load_pairs([row], tokenizer)
    source = load_source("contrastive", {}, Context(MODEL, tokenizer))
    text = tokenizer.decode(source.contexts(Response.of_pair(pair, "chosen", tokenizer))[0])
    assert '"arguments": {"city": "Oslo"}' in text


@pytest.mark.parametrize("ids_end", ["<end_of_turn>\n", "<end_of_turn>", ""])
def test_where_an_answer_ends_in_ids_from_elsewhere(ids_end):
    """An engine returns the end of a turn, a part of it, or nothing of it."""
    tokenizer = with_template(PLAIN_END)
    answer, ending = (tokenizer(x)["input_ids"] for x in ("four", ids_end))
    assert content_length([*answer, *ending], tokenizer) == len(answer)


def test_continued_answers_find_their_characters():
    tokenizer = tiny_tokenizer()
    row = {"prompt": [*Q, bot("The sun")], "chosen": [bot(" is big")], "rejected": [bot(" no")]}
    ((pair,), _) = load_pairs([row], tokenizer)
    response = Response.of_pair(pair, "chosen", tokenizer)
    held = "".join(response.text[a:b] for a, b in response.spans)
    assert tokenizer.decode(pair.prompt_ids) == f"{HEAD}The sun"
    assert held == " is big" and response.content == int(pair.answers["chosen"].content.sum())


def test_encode_is_load_pairs_of_one_row():
    tokenizer = tiny_tokenizer()
    pair = encode(parse_row(TURNS, chat=True), tokenizer)
    ((other,), _) = load_pairs([TURNS], tokenizer)
    for side in ("chosen", "rejected"):
        assert np.array_equal(getattr(pair, f"{side}_ids"), getattr(other, f"{side}_ids"))
        assert np.array_equal(pair.answers[side].scored, other.answers[side].scored)
    assert torch.is_tensor(PairCollator()([pair.example])["input_ids"])


def test_a_token_without_an_embedding_is_named(tmp_path):
    from treg.rewards.annotate import annotate

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    rows = [{"prompt": "q", "chosen": "x <|extra|>", "rejected": "y"}, TURNS]
    report = annotate(MODEL, tokenizer, rows, tmp_path / "a.parquet", progress=False)
    (message,) = report.examples["token beyond the embeddings"]
    assert "'<|extra|>' is token" in message and report.kept == 1


@pytest.mark.parametrize("per_token", [False, True])
def test_an_annotated_file_keeps_what_is_scored(tmp_path, per_token):
    from treg.data.annotated import read_annotated
    from treg.rewards.annotate import AnnotateOptions, annotate

    tokenizer, file = tiny_tokenizer(), tmp_path / "a.parquet"
    annotate(MODEL, tokenizer, [TURNS], file, AnnotateOptions(per_token=per_token), progress=False)
    ((pair,), _) = load_pairs([TURNS], tokenizer)
    ((example,), _) = read_annotated(file)
    ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
    logits = MODEL(ids).logits[0, len(pair.prompt_ids) - 1 : -1].double()
    logps = (
        logits.log_softmax(-1)
        .gather(1, torch.tensor(pair.chosen_ids).long()[:, None])[:, 0]
        .detach()
    )
    scored = pair.answers["chosen"].scored
    assert example["chosen_scored"].tolist() == scored.tolist() and not scored.all()
    np.testing.assert_allclose(example["ref_chosen_logps"], logps[scored].sum().item(), atol=1e-4)
    assert not example["chosen_token_rewards"][~scored].any()
    batch = PairCollator()([example])
    assert batch["lengths"][0] == scored.sum()
    if per_token:
        np.testing.assert_allclose(batch["ref_logps"][: scored.sum()], logps[scored], atol=1e-4)
