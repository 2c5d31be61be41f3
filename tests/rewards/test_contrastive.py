"""The two requests that judge a response, and the rewards that follow."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny import END, tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, load_pairs
from treg.rewards import (
    Context,
    ContrastiveOptions,
    ContrastivePrompts,
    contrastive_rewards,
    load_source,
    make_options,
)
from treg.rewards.contrastive import ContrastiveSource, HiddenPrompts
from treg.rewards.response import ResponsePairs

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is {{ 7*7 }}?"},
    {"role": "assistant", "content": "{% if better %}49{% endif %} <b>&amp;</b> {# no #} \\n"},
]
SHOWS = "{{ messages[-1].content }} "
ASKS = "{{ 'better' if better else 'worse' }}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_are_sigmoids(dtype):
    sizes = torch.tensor(
        [0.0, 1e-30, 1e-12, 1e-7, 1e-4, 0.1, 1.0, 5.0, 20.0, 90.0, 1e4, 1e30], dtype=torch.float64
    )
    better = torch.cat([sizes, -sizes]).to(dtype)
    x = better.double()
    exact = (
        -x.sign() * torch.expm1(-x.abs()) / (1 + torch.exp(-x.abs())) / 2
    )  # sigmoid(x) - 1/2 without cancellation
    torch.testing.assert_close(exact, x.sigmoid() - 0.5, rtol=0, atol=2e-16)
    found = contrastive_rewards(better, torch.zeros_like(better))
    assert found.dtype == dtype and found.abs().max() <= 0.5
    torch.testing.assert_close(found.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_rewards_of_log_probs():
    better, worse = -torch.rand(2, 50) * 30
    better.requires_grad_()
    found = contrastive_rewards(better, worse)
    exact = (better.double() - worse.double()).sigmoid() - 0.5
    torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    assert torch.equal(contrastive_rewards(worse, better), -found)
    with pytest.raises(
        ValueError, match=r"worse_logps: expected the shape of better_logps \[50\], got \[49\]"
    ):
        contrastive_rewards(better, worse[1:])


def test_requests_differ_in_their_last_sentence():
    better, worse = (ContrastivePrompts().render(MESSAGES, better=x) for x in (True, False))
    common = [a for a, b in zip(better.split(". "), worse.split(". "), strict=True) if a == b]
    assert common == better.split(". ")[:-1]
    assert better.endswith("must be better: helpful, correct, coherent and concise.")
    assert worse.endswith("must be worse: unhelpful, incorrect, incoherent and verbose.")
    for text in (better, worse):
        at = [text.index(f"[{m['role']}]\n{m['content']}") for m in MESSAGES]
        assert at == sorted(at)


def test_messages_are_no_templates():
    messages = [
        *MESSAGES[:2],
        {"role": "assistant", "content": "{{ 7*7 }} {{ messages }} {% raw %} ''"},
    ]
    for better in (True, False):
        text = ContrastivePrompts().render(messages, better=better)
        assert all(m["content"] in text for m in messages)


def test_own_template(tmp_path):
    path = tmp_path / "prompts.yaml"
    lines = [
        "instruction: |",
        "  Antwort: {{ messages[-1].content }}",
        "  Mach sie {{ 'gut' if better else 'öde' }}.",
        'prefill: "Neu:"',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    prompts = ContrastivePrompts.load(path)
    assert (
        prompts.render([{"role": "assistant", "content": "ja"}], better=False)
        == "Antwort: ja\nMach sie öde."
    )
    assert prompts.prefill == "Neu:"
    assert prompts == ContrastivePrompts(prompts.instruction, "Neu:")
    path.write_text(f'instruction: "{SHOWS}{ASKS}"')
    assert ContrastivePrompts.load(path).prefill == ContrastivePrompts().prefill


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "instruction: 'a'\nother: 1",
            r"prompts\.yaml: expected the keys.*got \['instruction', 'other'\]",
        ),
        ("prefill: 'a'", r"prompts\.yaml: expected the keys.*got \['prefill'\]"),
        ("", r"prompts\.yaml: expected the keys.*got NoneType"),
        ("- a", r"prompts\.yaml: expected the keys.*got list"),
        ("1: a", r"prompts\.yaml: expected the keys.*got \['1'\]"),
        ("instruction: [", r"prompts\.yaml: expected YAML"),
        ("instruction: !!python/object:os.system x", r"prompts\.yaml: expected YAML"),
        ("instruction: 5", "instruction: expected a string, got int"),
        (
            f'instruction: "{SHOWS}{ASKS}"\nprefill: null',
            "prefill: expected a string, got NoneType",
        ),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "prompts.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ContrastivePrompts.load(tmp_path / "prompts.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ContrastivePrompts.load(tmp_path / "prompts.yaml")


@pytest.mark.parametrize(
    "instruction, message",
    [
        (SHOWS, "expected a template that depends on `better`"),
        (ASKS, "expected a template that shows the response"),
        ("{% if better %}" + SHOWS + "{% endif %}", "expected a template that shows the response"),
        ("{{ messages[0].content }}" + ASKS, "expected a template that shows the response"),
        ("{% if better %}", "TemplateSyntaxError"),
        ("{{ message.content }}", "UndefinedError"),
        ("{{ messages[-1].text }}", "UndefinedError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10**9) | list }}", "OverflowError"),
        ("{% include 'other' %}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''['__class__'] }}", "SecurityError|UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages.__init__.__globals__ }}", "SecurityError"),
        ("{{ '{0.__class__}'.format(better) }}", "SecurityError"),
        ("{{ (messages | attr('__class__')).__mro__ }}", "SecurityError|UndefinedError"),
    ],
)
def test_bad_templates(instruction, message):
    with pytest.raises(ValueError, match=f"^instruction: .*({message})"):
        ContrastivePrompts(instruction)


# -- prefill


def test_a_prefill_is_a_template():
    prompts = ContrastivePrompts(
        SHOWS, "<{{ 'good' if better else 'bad' }} {{ messages[-1].role }}>\n"
    )
    begins = [prompts.beginning(MESSAGES, better=x) for x in (True, False)]
    assert begins == ["<good assistant>\n", "<bad assistant>\n"]
    # the default's newline stays, and no template is read into messages
    assert ContrastivePrompts().beginning(MESSAGES, better=True) == "<answer>\n"
    echo = ContrastivePrompts(SHOWS + ASKS, "{{ messages[-1].content }}")
    assert echo.beginning(MESSAGES, better=False) == MESSAGES[-1]["content"]


@pytest.mark.parametrize(
    ("prefill", "message"),
    [
        ("{{ answer }}", "UndefinedError"),
        ("{% if better %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_bad_prefills(prefill, message):
    with pytest.raises(ValueError, match=f"^prefill: {message}"):
        ContrastivePrompts(SHOWS + ASKS, prefill)


# -- requests that do not show the response


def test_hidden_requests_differ_in_their_last_sentence():
    better, worse = (HiddenPrompts().render(MESSAGES[:2], better=x) for x in (True, False))
    common = [a for a, b in zip(better.split(". "), worse.split(". "), strict=True) if a == b]
    assert common == better.split(". ")[:-1]
    assert better.endswith("must be good: helpful, correct, coherent and concise.")
    assert worse.endswith("must be bad: unhelpful, incorrect, incoherent and verbose.")


def test_own_requests_need_not_show_the_response(tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(f'instruction: "{{{{ messages[-1].content }}}} {ASKS}"')
    prompts = ContrastiveOptions(str(path), show_response=False).requests
    question = MESSAGES[:2]
    assert prompts.render(question, better=True) == "What is {{ 7*7 }}? better"
    assert prompts == HiddenPrompts.load(path) != ContrastivePrompts.load(path)
    with pytest.raises(ValueError, match="instruction: UndefinedError"):
        HiddenPrompts("{{ messages[1].content }}" + ASKS)  # no answer is there
    with pytest.raises(ValueError, match="depends on `better`"):
        HiddenPrompts("{{ messages[0].content }}")
    with pytest.raises(ValueError, match="prompts: expected HiddenPrompts with show_response=Fal"):
        ContrastiveOptions(ContrastivePrompts(), show_response=False)
    with pytest.raises(ValueError, match="prompts: expected ContrastivePrompts with show_respons"):
        ContrastiveOptions(prompts)


# -- readings

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [{"prompt": "the fox?", "chosen": "old owl said. The sun", "rejected": "it is 42"}]


def responses():
    pairs, _ = load_pairs(ROWS, TOKENIZER, EncodeOptions(256))
    return [response for pair in ResponsePairs(pairs, TOKENIZER) for response in pair]


def make(context=None, **options):
    return load_source("contrastive", options, context or Context(MODEL, TOKENIZER))


def test_the_response_is_hidden_in_both_contexts():
    chosen = responses()[0]
    texts = [TOKENIZER.decode(ids) for ids in make(show_response=False).contexts(chosen)]
    for text, how in zip(texts, ("good", "bad"), strict=True):
        assert "the fox?" in text and "owl" not in text and f"must be {how}:" in text
        assert text.endswith(f"{END}\n<|im_start|>assistant\n<answer>\n")
    shown = [TOKENIZER.decode(ids) for ids in make().contexts(chosen)]
    assert all("old owl said. The sun" in text for text in shown)


def test_hidden_rewards_are_those_of_dense_logits():
    source = make(show_response=False)
    for response, found in zip(responses(), source.score(responses()), strict=True):
        logps = []
        for context in source.contexts(response):
            ids = torch.tensor([[*context, *response.ids]]).long()
            with torch.no_grad():
                of_all = MODEL(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
            target = torch.from_numpy(response.ids).long()
            logps.append(of_all.gather(1, target[:, None])[:, 0])
        want = (logps[0] - logps[1]).sigmoid() - 0.5
        want[response.content :] = 0.0
        np.testing.assert_allclose(found["token_rewards"], want, atol=1e-5)


def ratios_of(response):
    """Log-ratios that a test can follow, one a token: 0.1, -0.2, 0.3, -0.4, ..."""
    n = len(response.ids)
    return torch.arange(1.0, n + 1) / 10 * torch.tensor([1.0, -1.0]).repeat(n)[:n]


def read(monkeypatch, **options):
    """The response with two sentences of five words, its log-ratios as the options read them."""
    monkeypatch.setattr(
        ContrastiveSource,
        "_score_both",
        lambda self, given: [(ratios_of(x), torch.zeros(len(x.ids))) for x in given],
    )
    chosen = responses()[0]
    (found,) = make(**options).score([chosen])
    rewards = found["token_rewards"].double()
    assert not rewards[chosen.content :].any()
    return chosen, torch.logit(rewards[: chosen.content] + 0.5)


def words_of(response, sentences=False):
    number, found = 0, []
    for token in response.ids[: response.content].tolist():
        piece = TOKENIZER.decode([token])
        number += piece.startswith(" ") and (not sentences or piece.startswith(" The"))
        found.append(number)
    return found


@pytest.mark.parametrize("unit", ["token", "word", "sentence"])
def test_log_ratios_are_averaged_over_units(unit, monkeypatch):
    response, found = read(monkeypatch, unit=unit)
    given, n = ratios_of(response).tolist(), response.content
    words = {
        "token": list(range(n)),
        "word": words_of(response),
        "sentence": words_of(response, sentences=True),
    }[unit]
    assert {"token": n, "word": 5, "sentence": 2}[unit] == words[-1] + 1
    want = []
    for i in range(n):
        mine = [given[j] for j in range(n) if words[j] == words[i]]
        want.append(sum(mine) / len(mine))
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_log_ratios_are_scaled_to_a_spread(monkeypatch):
    response, found = read(monkeypatch, spread=0.5)
    given = ratios_of(response)[: response.content].numpy()
    want = 0.5 * (given - given.mean()) / given.std()
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_first_tokens_are_skipped(monkeypatch):
    """They get 0 and take no part in what the others are read by."""
    response, found = read(monkeypatch, skip_first=2, spread=1.0)
    given = ratios_of(response)[2 : response.content].numpy()
    want = (given - given.mean()) / given.std()
    np.testing.assert_allclose(found, [0, 0, *want], rtol=1e-4, atol=1e-6)
    _, found = read(monkeypatch, skip_first=99, spread=1.0, unit="word")
    assert not found.any()


def test_readings_share_the_forwards_of_their_prompts():
    seen, given = [], responses()
    context = Context(MODEL, TOKENIZER, on_tokens=seen.append)
    first = make(context).score(given)
    count = sum(seen)
    second = make(context, unit="word").score(given)
    assert count == sum(seen) > 0
    assert not torch.equal(first[0]["token_rewards"], second[0]["token_rewards"])
    make(context, show_response=False).score(given)
    assert sum(seen) > count


def test_settings_name_a_reading_only_where_it_is_not_the_default():
    assert make().settings() == {"prompts": asdict(ContrastivePrompts())}
    found = make(unit="word", spread=1.0, show_response=False).settings()
    assert found == {
        "prompts": asdict(HiddenPrompts()),
        "show_response": False,
        "unit": "word",
        "spread": 1.0,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "line"}, "unit: expected one of token, word, sentence, got 'line'"),
        ({"spread": 0.0}, "spread: expected a finite number > 0"),
        ({"spread": float("inf")}, "spread: expected a finite number"),
        ({"skip_first": -1}, "skip_first: expected a whole number >= 0"),
        ({"skip_first": 1.5}, "skip_first: expected an integer, got 1.5"),
    ],
)
def test_readings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_options("contrastive", options)
