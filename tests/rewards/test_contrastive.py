"""The two requests that judge a response, and the rewards that follow."""

import pytest
import torch

from treg.rewards import ContrastivePrompts, contrastive_rewards

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
