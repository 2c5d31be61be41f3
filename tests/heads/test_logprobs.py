"""Log-probs of a model without its logits, against its logits."""

import pytest
import torch

pytest.importorskip("transformers")

from causal_lms import build
from tiny import tiny_llama

from treg.heads import install_head
from treg.heads.logprobs import token_logprobs


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.arange(7) < 2), -100)
    return ids, mask, labels


@pytest.mark.parametrize("nothing", [False, True], ids=["some scored", "none scored"])
def test_values_and_gradients(nothing):
    model, (ids, mask, labels) = tiny_llama(50).double(), batch()
    labels = torch.full_like(labels, -100) if nothing else labels
    install_head(model)
    found = token_logprobs(model, labels, input_ids=ids, attention_mask=mask, outputs=("entropy",))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    scored = labels[:, 1:] != -100
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0] * scored
    entropy = -(logits.exp() * logits).sum(-1) * scored
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-10, atol=1e-10)
    weights = torch.arange(1.0, 7.0).double()
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((found.logprobs * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "phi"])
def test_temperature_and_the_gradient_of_entropies(kind):
    """The model's own logits, after its scale, softcap and bias, are divided by the temperature."""
    model, (ids, mask, labels) = build(kind).double(), batch()
    spec = install_head(model)
    found = token_logprobs(
        model,
        labels,
        input_ids=ids,
        attention_mask=mask,
        outputs=("entropy",),
        entropy_gradient=True,
        temperature=0.6,
    )
    assert {"gemma2": spec.softcap is not None, "cohere": spec.logit_scale != 1.0}.get(kind, True)
    logits = (model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 0.6).log_softmax(-1)
    scored = labels[:, 1:] != -100
    expected = logits.gather(-1, ids[:, 1:, None])[..., 0] * scored
    entropy = -(logits.exp() * logits).sum(-1) * scored
    torch.testing.assert_close(found.logprobs, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-10, atol=1e-10)
    weights = torch.arange(1.0, 7.0).double()
    parameters = [x for x in model.parameters() if x.requires_grad]
    for losses in (
        (weights * found.entropy, weights * entropy),
        (found.logprobs - weights * found.entropy, expected - weights * entropy),
    ):
        pair = [
            torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True)
            for x in losses
        ]
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_states_of_tokens_that_are_not_scored_have_no_part(value):
    """Neither in the entropies of others nor in the gradient of any weight of the head."""
    model, (ids, mask, labels) = tiny_llama(50).double(), batch()
    install_head(model)
    ignored = torch.ones(ids.shape, dtype=torch.bool)
    ignored[:, :-1] = labels[:, 1:] == -100
    found = []
    for filling in (0.0, value):

        def fill(module, args, states, filling=filling):
            return torch.where(ignored.unsqueeze(-1), filling, states)

        hook = model.model.norm.register_forward_hook(fill)
        scores = token_logprobs(
            model,
            labels,
            input_ids=ids,
            attention_mask=mask,
            outputs=("entropy",),
            entropy_gradient=True,
        )
        hook.remove()
        loss = (scores.logprobs - 0.3 * scores.entropy).sum()
        weights = [model.lm_head.weight, model.model.norm.weight]
        found.append((scores.logprobs, scores.entropy, *torch.autograd.grad(loss, weights)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()


def test_entropies_have_no_gradient_unless_asked_for():
    model, (ids, _, labels) = tiny_llama(50), batch()
    install_head(model)
    found = token_logprobs(model, labels, input_ids=ids, outputs=("entropy",))
    assert found.entropy is not None and not found.entropy.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_gradient": True}, r'entropy_gradient: expected "entropy" among outputs, got \('),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"temperature": -1.0}, "temperature: expected a finite number > 0, got -1.0"),
    ],
)
def test_refused_options(options, message):
    model, (ids, _, labels) = tiny_llama(50), batch()
    install_head(model)
    with pytest.raises(ValueError, match=message):
        token_logprobs(model, labels, input_ids=ids, **options)


def test_labels_of_another_shape():
    model, (ids, _, labels) = tiny_llama(50), batch()
    install_head(model)
    with pytest.raises(
        ValueError, match=r"labels: .* input_ids \[3, 7\], not shifted, got \[3, 6\]"
    ):
        token_logprobs(model, labels[:, 1:], input_ids=ids)
