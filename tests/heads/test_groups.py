"""Completions of prompts, in rows that they share: log-probs, entropies and gradients are those of
the batch as online training has it, padded on both sides.
"""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from causal_lms import build
from placed import by_place
from tiny import tiny_llama

from treg.heads import PromptSharing, install_head, share_prompts
from treg.heads.logprobs import token_logprobs
from treg.heads.sharing import CHECKED, compare

KINDS = ["llama", "qwen2", "gemma2", "gpt2"]
VOCAB = 96  # of build's models


def completions(seed=0):
    """Prompts and completions in any order. Groups of four and three; one alone; two completions
    that are the same, one of a token, one that begins another; one that is masked wholly.
    """
    random = np.random.default_rng(seed)

    def ids(n):
        return random.integers(1, VOCAB, n).tolist()

    long, short, alone = ids(14), ids(3), ids(6)
    same = ids(5)
    rows = [
        *((long, x) for x in (ids(6), ids(11), [*same[:2], *ids(4)], ids(1))),
        *((short, x) for x in (same, same, same[:3])),
        (alone, ids(7)),
        (long, []),
    ]
    return [rows[i] for i in random.permutation(len(rows))]


def batch(rows):
    """As TRL pads: prompts on the left, completions on the right. ids, mask, positions, labels
    [S, T] int64.
    """
    before, after = (max(len(row[side]) for row in rows) for side in (0, 1))
    ids, mask, labels = torch.zeros(3, len(rows), before + after, dtype=torch.int64)
    labels -= 100
    for i, (prompt, completion) in enumerate(rows):
        span = slice(before - len(prompt), before + len(completion))
        ids[i, span], mask[i, span] = torch.tensor(prompt + completion), 1
        labels[i, before : span.stop] = ids[i, before : span.stop]
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, labels


def made(kind, checkpointing=False):
    torch.manual_seed(0)
    model = build(kind)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model


def step(model, rows, inputs, labels):
    """Log-probs, entropies, and gradients of a function of both."""
    model.zero_grad()
    found = token_logprobs(
        *(model, labels),
        outputs=("entropy",),
        entropy_gradient=True,
        temperature=0.7,
        share_prompt=rows,
        **inputs,
    )
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *found.logprobs.shape, generator=generator)
    (weights[0] * found.logprobs + weights[1] * found.entropy).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found.logprobs.detach(), found.entropy.detach(), gradients


def assert_same(found, expected):
    """Log-probs and entropies to 1e-5, and gradients, relative."""
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert found[2].keys() == expected[2].keys()
    total = torch.cat([x.flatten() for x in expected[2].values()]).norm()
    assert total > 0.1
    for name, x in expected[2].items():
        assert (found[2][name] - x).norm() <= 1e-5 * max(x.norm(), 1e-2 * total), name


@pytest.mark.parametrize("packed", [True, False], ids=["one row", "rows"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_entropies_and_gradients(kind, implementation, packed):
    model = made(kind)
    if (kind, implementation) == ("gemma2", "sdpa"):
        pytest.skip("its softcap is not in sdpa")
    model.set_attn_implementation(implementation)
    install_head(model)
    inputs, labels = batch(completions())
    rows = share_prompts(**inputs, pairs=False, packed=packed)
    assert_same(step(model, rows, inputs, labels), step(model, False, inputs, labels))


@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
def test_gradient_checkpointing(checkpointing):
    inputs, labels = batch(completions(1))
    rows = share_prompts(**inputs, pairs=False, packed=True)
    model = made("llama", checkpointing)
    install_head(model)
    expected = step(model, False, inputs, labels)
    assert_same(step(model, rows, inputs, labels), expected)
    plain = made("llama")
    install_head(plain)
    assert_same(step(plain, False, inputs, labels), expected)


def test_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        made("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    install_head(model)
    inputs, labels = batch(completions(2))
    rows = share_prompts(**inputs, pairs=False, packed=True)
    assert_same(step(model, rows, inputs, labels), step(model, False, inputs, labels))
    with model.disable_adapter(), torch.no_grad():
        found, expected = (
            token_logprobs(model, labels, share_prompt=x, **inputs) for x in (rows, False)
        )
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)


def test_what_completions_begin_with_is_run_once():
    rows = completions()
    inputs, _ = batch(rows)
    sequences = [tuple(prompt + completion) for prompt, completion in rows]
    beginnings = {x[:n] for x in sequences for n in range(1, len(x) + 1)}
    one = share_prompts(**inputs, pairs=False, packed=True).inputs["input_ids"]
    assert one.shape == (1, len(beginnings)) and len(beginnings) < 0.6 * sum(map(len, sequences))
    several = share_prompts(**inputs, pairs=False)
    assert len(several.inputs["input_ids"]) == len({tuple(prompt) for prompt, _ in rows}) == 3
    mask = inputs["attention_mask"].bool()
    for found in (several, share_prompts(**inputs, pairs=False, packed=True)):
        flat = found.inputs["input_ids"].flatten()
        positions = found.inputs["position_ids"].flatten()
        assert torch.equal(flat[found.places][mask], inputs["input_ids"][mask])
        assert torch.equal(positions[found.places][mask], inputs["position_ids"][mask])


def test_a_row_of_one_sequence_may_be_padded():
    inputs, labels = batch(completions()[:1])
    inputs = {k: torch.nn.functional.pad(x, (2, 3)) for k, x in inputs.items()}
    labels = torch.nn.functional.pad(labels, (2, 3), value=-100)
    model = made("gpt2")
    install_head(model)
    rows = share_prompts(**inputs, pairs=False)
    assert_same(step(model, rows, inputs, labels), step(model, False, inputs, labels))


def test_an_odd_number_is_no_batch_of_pairs():
    inputs, _ = batch(completions())
    assert len(inputs["input_ids"]) % 2
    with pytest.raises(ValueError, match=r"even number of sequences.*other ones take pairs=False"):
        share_prompts(**inputs)


def test_a_first_batch_settles_it():
    """Of many sequences some are compared; a difference that they show is found."""
    rows = [*completions(), *completions(3)]
    inputs, _ = batch(rows)
    assert len(rows) > CHECKED
    for amount, same in ((0.0, True), (1e-2, False)):
        model = by_place(copy.deepcopy(tiny_llama(VOCAB)), 30, amount)
        install_head(model)
        shared = share_prompts(**inputs, pairs=False, packed=True)
        assert compare(model, inputs, shared).same(torch.float32) == same
        sharing = PromptSharing(None)
        sharing.settle(model, inputs, lambda x=shared: x, torch.float32)
        assert sharing.on == same and sharing.settled
