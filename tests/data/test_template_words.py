"""What of a rendered answer is the template's: thoughts, openings, and contents like the probe."""

import random

import numpy as np
import pytest

from tests.support.tiny import CHATML, bot, msg, tiny_llama, tiny_tokenizer, usr, with_template
from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.data.messages import PROBES, common_prefix, common_suffix
from treg.data.rendering import Renderer
from treg.rewards import Context, load_source
from treg.rewards.response import Response

Q = [usr("q")]
END = "<|im_end|>\n"
# thoughts of a key or of the content, in a block that the last turn always has; `open` is what the
# prompt ends with beyond the header
THINKS = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% if m.role == 'assistant' %%}"
    "{%% set parts = m.content.split('</think>') %%}"
    "{%% set own = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %%}"
    "{{ '<think>\n' + (m.reasoning_content or own) + '\n</think>\n\n' }}"
    "{{ parts[-1].lstrip('\n') }}{%% else %%}{{ m.content }}{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n%s{%% endif %%}"
)


def pair_of(template, row, **options):
    tokenizer = with_template(template)
    ((pair,), report) = load_pairs([row], tokenizer, EncodeOptions(**options), strict=True)
    return tokenizer, pair, report


def parts(tokenizer, pair):
    ids, answer = pair.chosen_ids, pair.answers["chosen"]
    return [tokenizer.decode(x) for x in (ids, ids[answer.scored], ids[answer.content])]


FORMS = {
    "as it is written": bot("<think>\nhm\n</think>\n\nfox"),
    "otherwise": bot("<think>hm</think>fox"),
    "key": bot("fox", reasoning_content="hm"),
}


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("form", FORMS)
def test_thoughts_are_said_in_every_form(form, opening):
    """The same tokens have the same masks, and none of the forms is noted as cut."""
    answer = FORMS[form]
    tokenizer, pair, report = pair_of(
        THINKS % opening, {"prompt": Q, "chosen": [answer], "rejected": [bot("zz")]}
    )
    said = "<think>\nhm\n</think>\n\nfox".removeprefix(opening)
    assert parts(tokenizer, pair) == [said + END, said + END, said]
    assert not report.noted
    # also in a later turn, whose header is nobody's
    turns = [bot("a"), usr("r"), answer]
    tokenizer, pair, _ = pair_of(
        THINKS % opening, {"prompt": Q, "chosen": turns, "rejected": [bot("zz")]}
    )
    assert parts(tokenizer, pair)[2] == "a" + said


def test_a_block_without_thoughts_is_the_templates():
    for answer in (bot("fox"), bot("fox", reasoning_content="")):
        row = {"prompt": Q, "chosen": [answer], "rejected": [bot("zz")]}
        tokenizer, pair, _ = pair_of(THINKS % "", row)
        assert parts(tokenizer, pair)[1:] == ["<think>\n\n</think>\n\nfox" + END, "fox"]


def test_thoughts_that_are_left_out_are_still_noted():
    template = (THINKS % "<think>\n").replace("(m.reasoning_content or own)", "''")
    for answer in (FORMS["as it is written"], FORMS["key"]):
        row = {"prompt": Q, "chosen": [answer], "rejected": [bot("zz")]}
        tokenizer, pair, report = pair_of(template, row)
        assert parts(tokenizer, pair)[2] == "fox" and list(report.noted.values()) == [1]


# -- contents like what stands in their place


@pytest.mark.parametrize("content", ["\x00", "\x00a", "a\x00", "\x00\x01", "a\x00b"])
def test_contents_like_the_probe(content):
    for answer in ([bot(content)], [bot("b"), usr("r"), bot(content)]):
        row = {"prompt": Q, "chosen": answer, "rejected": [bot("zz")]}
        tokenizer, pair, report = pair_of(CHATML, row)
        said = "b" * (len(answer) > 1) + content
        assert parts(tokenizer, pair)[2] == said and not report.noted


def test_a_content_of_all_probes_is_refused():
    row = {"prompt": Q, "chosen": [bot("".join(PROBES))], "rejected": [bot("zz")]}
    with pytest.raises(RowProblem, match=r"control characters: chosen: all from U\+0000"):
        pair_of(CHATML, row)


# -- templates


ALWAYS = CHATML.replace("{% if add_generation_prompt %}", "").rpartition("{% endif %}")[0]
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ALWAYS, INSTRUCTION + "### Response:\n"])
def test_a_template_that_always_opens_a_turn_is_refused(template):
    row = {"prompt": Q, "chosen": [bot("x")], "rejected": [bot("y")]}
    with pytest.raises(RowProblem, match=r"chat template: it writes '.*', which opens"):
        pair_of(template, row)
    # one that asks for the role of the last turn is right
    asks = "{% if messages[-1].role == 'user' %}"
    opening = template.rpartition("{% endfor %}")[2]
    right = template.removesuffix(opening) + asks + opening + "{% endif %}"
    tokenizer, pair, _ = pair_of(right, row)
    assert parts(tokenizer, pair)[2] == "x"
    assert tokenizer.decode(pair.prompt_ids).endswith(opening)


def test_the_hint_for_variables_that_nothing_reads():
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "chat_template_kwargs": {"unread": 1}}
    with pytest.raises(RowProblem, match="leave them all out with --columns chat_template_kwargs="):
        pair_of(CHATML, row)
    _, pair, _ = pair_of(CHATML, row, columns="chat_template_kwargs=")
    assert not pair.row.template_kwargs


CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
)
PLAIN = CHATML.replace("style", "tone")  # which reads no style


def judged(template):
    """A response with tools and a variable, and the source that judges it."""
    tokenizer = with_template(template)
    call = [{"function": {"name": "weather", "arguments": {}}}]
    row = {
        "prompt": Q,
        "chosen": [bot("", tool_calls=call)],
        "rejected": [bot("zz", tool_calls=call)],
        "tools": [{"name": "weather"}],
        "chat_template_kwargs": {"style": "short"},
    }
    ((pair,), _) = load_pairs([row], tokenizer, strict=True)
    source = load_source("contrastive", {}, Context(tiny_llama(len(tokenizer)), tokenizer))
    return source, Response.of_pair(pair, "chosen", tokenizer), tokenizer


def test_a_variable_of_the_template_of_tools_is_left_out_of_requests():
    source, response, tokenizer = judged({"default": PLAIN, "tool_use": CALLS})
    assert source.check(response) is None
    text = tokenizer.decode(source.contexts(response)[0])
    assert "weather" in text and "<|im_start|>style" not in text
    # where the template of requests reads it too, it stays
    source, response, tokenizer = judged({"default": CHATML, "tool_use": CALLS})
    text = tokenizer.decode(source.contexts(response)[0])
    assert "<|im_start|>style\nshort<|im_end|>" in text


def test_a_request_that_the_template_does_not_take_is_a_problem_of_its_row():
    raises = "{% if style is defined %}{{ raise_exception('no style') }}{% endif %}" + CHATML
    source, response, _ = judged({"default": raises, "tool_use": CALLS})
    problem = source.check(response)
    assert problem.reason == "chat template" and problem.where == "row 0"
    assert "request: " in problem.detail and "no style" in problem.detail


# -- what two texts have in common


def test_common_beginnings_and_ends():
    rng = random.Random(0)
    for _ in range(500):
        a, b = ("".join(rng.choices("ab", [9, 1], k=rng.randrange(9))) for _ in range(2))
        shorter = min(len(a), len(b))
        want = next((i for i in range(shorter) if a[i] != b[i]), shorter)
        assert common_prefix(a, b) == common_prefix([*a], [*b]) == want
        assert common_suffix(a[::-1], b[::-1]) == want


def test_bounds_lie_at_special_tokens():
    """Against a look at every place."""
    tokenizer = tiny_tokenizer()
    render = Renderer(tokenizer)
    text = f"a{END}{END}<|im_start|>b<|im_<|im_end|>"
    inside = {}
    for token in render.tokens:
        for at in range(len(text)):
            if text.startswith(token, at):
                inside |= {i: (at, at + len(token)) for i in range(at + 1, at + len(token))}
    for place in range(len(text) + 1):
        start, end = inside.get(place, (place, place))
        assert (render.bound(text, place), render.bound(text, place, after=True)) == (start, end)


def test_renderings_of_a_long_answer_are_few(monkeypatch):
    """Three a turn, four of the assistant's, and a few more."""
    calls = []
    inner = Renderer._render
    monkeypatch.setattr(Renderer, "_render", lambda *x: calls.append(1) or inner(*x))
    counts = []
    for turns in (5, 15):
        answer = [bot("a") if i % 2 == 0 else msg("user", "b") for i in range(turns)]
        calls.clear()
        pair_of(CHATML, {"prompt": Q, "chosen": answer, "rejected": [bot("zz")]}, max_length=None)
        counts.append(len(calls))
    assert np.diff(counts)[0] == 5 * 3 + 5 * 4
