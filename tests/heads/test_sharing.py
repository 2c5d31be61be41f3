"""Batches of pairs in rows that they share: log-probs and gradients are those of the batch."""

from itertools import chain

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from causal_lms import build
from placed import by_place
from tiny import tiny_llama

from treg.heads import (
    PromptSharing,
    install_head,
    run_head,
    share_prompts,
)
from treg.heads.logprobs import score_tokens, scored_rows, token_logprobs
from treg.heads.sharing import LIMITS, Comparison, compare, precision_of
from treg.ops import fused_treg_loss

# prompt, chosen, rejected: like others, equal ones, one that begins the other, alike at first, and
# of one token
PAIRS = [
    ([5, 6, 7, 8], [10, 11, 12], [20, 21]),
    ([5], [10], [20]),
    ([5, 6], [10, 11], [10, 11]),
    ([5, 6, 7], [10, 11, 12, 13], [10, 11]),
    ([5, 6, 7], [10, 11], [10, 11, 12]),
    ([9, 9, 9, 9, 9], [10, 11, 12, 13], [10, 11, 20]),
]


def sequences():
    return [prompt + pair[side] for side in (0, 1) for prompt, *pair in PAIRS]


def batch(padding="right"):
    """input_ids, attention_mask, labels [2B, T] int64; or packed, input_ids, position_ids, labels
    [1, L].
    """
    rows = sequences()
    prompts = [len(prompt) for prompt, *_ in PAIRS] * 2
    labels = [[-100] * n + row[n:] for n, row in zip(prompts, rows, strict=True)]
    if padding == "packed":
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        ids, labels = (torch.tensor([[*chain(*x)]]) for x in (rows, labels))
        return {"input_ids": ids, "position_ids": positions}, labels
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    scored = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        at = slice(len(row)) if padding == "right" else slice(width - len(row), width)
        ids[i, at], mask[i, at], scored[i, at] = torch.tensor(row), 1, torch.tensor(labels[i])
    return {"input_ids": ids, "attention_mask": mask}, scored


def gradients(model, value):
    parameters = list(model.parameters())
    return torch.autograd.grad(value, parameters)


def assert_close(found, expected, rel):
    assert (found - expected).norm() <= rel * expected.norm()


@pytest.mark.parametrize("padding", ["right", "left", "packed"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_log_probs_and_gradients(kind, padding):
    torch.manual_seed(0)
    model = build(kind)
    install_head(model)
    inputs, labels = batch(padding)
    outputs = ("entropy", "is_top1")
    apart = dict(inputs)
    if padding == "left":
        apart["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = token_logprobs(model, labels, outputs=outputs, **apart)
    if padding == "left":
        with pytest.raises(ValueError, match="position_ids: expected some beside padding on the l"):
            token_logprobs(model, labels, share_prompt=True, **inputs)
    for given in (apart,) if padding == "left" else (inputs, apart):
        found = token_logprobs(model, labels, outputs=outputs, share_prompt=True, **given)
        assert found.logprobs.shape == labels[:, 1:].shape
        for name in ("logprobs", "entropy"):
            assert_close(getattr(found, name), getattr(expected, name), 1e-6)
        assert torch.equal(found.is_top1, expected.is_top1)
    weights = torch.randn(labels[:, 1:].shape, generator=torch.Generator().manual_seed(1))
    pairs = [gradients(model, (weights * x.logprobs).sum()) for x in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, 1e-5)


def test_in_float64_nothing_is_left_but_its_roundings():
    """gpt2 computes in it throughout; a llama's norms stay float32."""
    torch.manual_seed(0)
    model = build("gpt2").double()
    install_head(model)
    inputs, labels = batch()
    found, expected = (
        token_logprobs(model, labels, share_prompt=x, **inputs).logprobs for x in (True, False)
    )
    assert_close(found, expected, 1e-13)
    weights = torch.randn(labels[:, 1:].shape, dtype=torch.float64)
    pairs = [gradients(model, (weights * x).sum()) for x in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b, 1e-12)


def seen_by(model):
    """The tokens that the backbone sees, of each forward."""
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0]))
    return seen


def test_what_a_pair_begins_with_is_run_once():
    model = tiny_llama(50)
    install_head(model)
    inputs, labels = batch("packed")
    token_logprobs(model, labels, share_prompt=True, **inputs)
    seen = seen_by(model)
    token_logprobs(model, labels, share_prompt=True, **inputs)
    tokens = 0
    for prompt, chosen, rejected in PAIRS:
        both = [tuple(prompt + answer) for answer in (chosen, rejected)]
        tokens += len({x[:n] for x in both for n in range(1, len(x) + 1)})
    assert [x.numel() for x in seen] == [tokens]
    assert tokens < sum(map(len, sequences()))


def test_rows_for_several_models():
    """Made once, they serve a policy, a reference, and a loss of one's own."""
    policy, reference = tiny_llama(50), tiny_llama(50, initializer_range=0.2)
    inputs, labels = batch()
    rows = share_prompts(**inputs)
    for model in (policy, reference):
        install_head(model)
        found = token_logprobs(model, labels, share_prompt=rows, use_cache=False, **inputs)
        expected = token_logprobs(model, labels, **inputs)
        assert_close(found.logprobs, expected.logprobs, 1e-6)
    lengths = (labels[:, 1:] != -100).sum(1)
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()

    def loss(shared):
        def head_fn(hidden, operands):
            states, target = scored_rows(hidden, labels, shared)
            return fused_treg_loss(
                states,
                target=target,
                token_rewards=torch.linspace(-0.5, 0.5, len(target)),
                ref_logps=expected.logprobs[labels[:, 1:] != -100],
                cu_seqlens=offsets,
                **operands,
            ).loss

        given = inputs if shared is None else shared.inputs
        return run_head(policy, head_fn, **given)

    found, expected = loss(rows), loss(None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(gradients(policy, found), gradients(policy, expected), strict=True):
        assert_close(a, b, 1e-5)


def test_apart_is_of_the_shape_of_the_batch():
    inputs, _ = batch()
    rows = share_prompts(**inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    found = rows.apart(rows.inputs["input_ids"][..., None])[..., 0]
    assert found.shape == ids.shape and torch.equal(found[mask], ids[mask])
    some = rows.places[:, :3]
    assert torch.equal(rows.apart(rows.inputs["input_ids"][..., None], some)[..., 0], found[:, :3])


# -- what cannot be is named
# -

IDS = torch.tensor([[1, 2, 3], [1, 2, 4]])
BAD = [
    ({"input_ids": IDS[:1]}, r"input_ids: expected an even number of sequences, .* lengths \[3\]"),
    (
        {"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)},
        r"share_prompt: expected input_ids, .* got input_ids, token_type_ids; set share_prompt=Fal",
    ),
    ({"inputs_embeds": torch.zeros(2, 3, 32)}, "share_prompt: expected .* got inputs_embeds; set"),
    (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        r"input_ids: expected sequences with tokens, got the lengths \[3, 0\]",
    ),
    (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
        r"attention_mask: expected the shape of input_ids \[2, 3\], got \[2, 1, 3, 3\]",
    ),
    (
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2], [0, 2, 4]])},
        r"position_ids: expected 0, 1, 2, \.\.\. .* got \[0, 1, 2, 0, 2, 4\]; leave them out",
    ),
    (
        {"input_ids": IDS.reshape(1, 6), "position_ids": torch.tensor([[1, 2, 0, 1, 2, 3]])},
        "position_ids: expected 0, 1, 2, ... from the first token of each sequence",
    ),
]


@pytest.mark.parametrize(("inputs", "message"), BAD)
def test_batches_that_cannot_be_shared(inputs, message):
    model = tiny_llama(50)
    install_head(model)
    labels = inputs.get("input_ids", IDS)
    with pytest.raises(ValueError, match=message):
        token_logprobs(model, labels, share_prompt=True, **inputs)


def test_rows_of_another_batch():
    model = tiny_llama(50)
    install_head(model)
    rows = share_prompts(IDS[:, :2])
    with pytest.raises(ValueError, match=r"labels: .* in shared rows \[2, 2\], got \[2, 3\]"):
        token_logprobs(model, IDS, share_prompt=rows, input_ids=IDS)


def test_padding_behind_packed_sequences():
    ids = torch.tensor([[1, 2, 3, 1, 2, 4, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0]])
    rows = share_prompts(ids, (ids != 0).long(), positions)
    assert rows.inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert rows.places.tolist() == [[0, 1, 2, 0, 1, 3, 0, 0]]


def test_positions_of_one_row_for_all():
    expected = share_prompts(IDS)
    found = share_prompts(IDS, None, torch.arange(3)[None])
    assert torch.equal(found.places, expected.places)


@pytest.mark.parametrize("kind", ["rwkv", "qwen3_next"])
def test_a_model_that_cannot_is_refused_in_its_first_forward(kind):
    """Whoever makes the rows: nothing else has checked the model."""
    torch.manual_seed(0)
    model = build(kind)
    install_head(model)
    with pytest.raises(ValueError, match=type(model).__name__):
        token_logprobs(model, IDS, share_prompt=True, input_ids=IDS)


def test_a_leak_between_answers_is_refused_in_the_first_forward():
    torch.manual_seed(0)
    model = build("llama")
    layer = model.model.layers[0].mlp
    plain = layer.forward
    before = torch.nn.ZeroPad2d((0, 0, 1, -1))  # of each token the one before it
    layer.forward = lambda x: plain(x) + 1e-2 * before(x)
    install_head(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="an answer sees another one"):
            token_logprobs(model, IDS, share_prompt=True, input_ids=IDS)
    token_logprobs(model, IDS, input_ids=IDS)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_named(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny_llama(50), config)
    install_head(model)
    with pytest.raises(ValueError, match="virtual tokens of prompt-learning adapters"):
        token_logprobs(model, IDS, share_prompt=True, input_ids=IDS)


# -- the check of a first batch
# -


@pytest.mark.parametrize("asked", [None, True])
def test_a_difference_that_long_rows_alone_show(asked, caplog):
    """The tiny check sees none. 12 + 6 tokens of a sequence, 12 + 6 + 6 of a row: the second answer
    stands beyond place 16 alone.
    """
    torch.manual_seed(0)
    model = by_place(tiny_llama(50), 24, 1e-2)
    spec = install_head(model)
    random = np.random.default_rng(0)
    prompt = random.integers(1, 50, 12)
    ids = torch.from_numpy(np.stack([np.r_[prompt, random.integers(1, 50, 12)] for _ in "ab"]))
    sharing = PromptSharing(asked)
    sharing.try_on(spec)
    assert sharing.on
    inputs = {"input_ids": ids}
    arguments = (model, inputs, share_prompts(ids), torch.float32)
    if asked:
        with pytest.raises(ValueError, match=r"share_prompt: the first batch's log-probs are not"):
            sharing.settle(*arguments)
    else:
        sharing.settle(*arguments)
        assert "log-probs are not the same: they differ by" in caplog.text
        assert not sharing.on and sharing.settled


def test_a_model_of_bfloat16_settles():
    model = tiny_llama(50, num_hidden_layers=4).bfloat16()
    spec = install_head(model)
    inputs, _ = batch()
    sharing = PromptSharing(True)
    sharing.try_on(spec)
    sharing.settle(model, inputs, share_prompts(**inputs), torch.bfloat16)
    assert sharing.on and sharing.settled


def test_what_another_process_finds_counts():
    model = tiny_llama(50)
    spec = install_head(model)
    inputs, _ = batch()
    sharing = PromptSharing(None)
    sharing.try_on(spec)
    sharing.settle(model, inputs, share_prompts(**inputs), torch.float32, lambda found: False)
    assert not sharing.on
    with pytest.raises(ValueError, match="share_prompt: another process found a difference"):
        PromptSharing(True).settle(
            model, inputs, share_prompts(**inputs), torch.float32, lambda found: False
        )


def test_flash_attention_is_named_before_the_first_batch(caplog):
    model = build("llama")
    spec = install_head(model)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"share_prompt: .*attn_implementation: .* got 'flash_att"):
        PromptSharing(True).try_on(spec)
    sharing = PromptSharing(None)
    sharing.try_on(spec)
    assert not sharing.on and "attn_implementation='sdpa'" in caplog.text


def test_comparing_leaves_the_modes_of_modules_alone():
    model = tiny_llama(50)
    install_head(model)
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    inputs, _ = batch()
    compare(model, inputs, share_prompts(**inputs))
    assert [module.training for module in model.modules()] == before


def test_a_waiting_check_that_fails_stops_no_other_forward(monkeypatch):
    """Sharded weights are read in a forward: sharing is given up then, and training goes on."""
    monkeypatch.setattr("treg.heads.install.is_fsdp_enabled", lambda: True)
    torch.manual_seed(0)
    model = build("qwen3_next")
    spec = install_head(model)
    inputs, labels = batch()
    sharing = PromptSharing(None)
    monkeypatch.setattr("treg.heads.sharing.check_attention", lambda model: None)
    sharing.try_on(spec)
    assert sharing.on
    sharing.settle(model, inputs, share_prompts(**inputs), torch.float32)
    assert not sharing.on
    token_logprobs(model, labels, **inputs)


def test_scores_of_ones_own_are_of_the_batch():
    model = tiny_llama(50)
    install_head(model)
    inputs, labels = batch()
    found, expected = (
        score_tokens(model, labels, lambda h, *_: {"size": h.norm(dim=1)}, share_prompt=x, **inputs)
        for x in (True, False)
    )
    assert_close(found["size"], expected["size"], 1e-6)


def test_a_mask_with_holes_is_refused():
    inputs, _ = batch()
    inputs["attention_mask"][0, 1] = 0
    with pytest.raises(ValueError, match="attention_mask: expected padding at the ends"):
        share_prompts(**inputs)


# -- the verdict
# -


@pytest.mark.parametrize("dtype", LIMITS)
def test_what_counts_as_the_same(dtype):
    least, most = LIMITS[dtype]
    same = {
        "rounding": Comparison(0.9 * least, 9 * least, 0.0, 0.0),
        "as padding": Comparison(3.9 * least, 79 * least, least, 10 * least),
    }
    other = {
        "more than rounding": Comparison(1.1 * least, least, 0.0, 0.0),
        "one token": Comparison(0.1 * least, 11 * least, 0.0, 0.0),
        "more than padding": Comparison(4.1 * least, 10 * least, least, 10 * least),
        "padding proves nothing": Comparison(1.1 * most, most, most, most),
        "no number": Comparison(*[float("nan")] * 4),
        "no number of padding": Comparison(most, most, *[float("nan")] * 2),
    }
    assert all(x.same(dtype) for x in same.values())
    assert not any(x.same(dtype) for x in other.values())


def test_products_of_less_precision_have_the_bounds_of_float16(monkeypatch):
    assert precision_of(torch.float32) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision_of(torch.float32) == torch.float32
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert precision_of(torch.float32) == torch.float16
    assert precision_of(torch.bfloat16) == torch.bfloat16


def placed(amount):
    model = by_place(tiny_llama(60), 30, amount)
    install_head(model)
    return model


def batch_of(lengths):
    """Pairs of a prompt and two answers of so many tokens, padded on the right."""
    random = np.random.default_rng(0)
    rows = [[], []]
    for prompt, *answers in lengths:
        ids = random.integers(3, 60, prompt)
        for side, n in zip(rows, answers, strict=True):
            side.append(torch.from_numpy(np.concatenate([ids, random.integers(3, 60, n)])))
    rows = rows[0] + rows[1]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


ONE, THREE = [(20, 20, 20)], [(20, 20, 20), (12, 6, 6), (10, 14, 12)]


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [(ONE, torch.float32), (ONE, torch.bfloat16), (THREE, torch.float32)],
    ids=["one", "one in 16 bits", "three"],
)
def test_what_depends_on_places_is_not_the_same(lengths, dtype):
    """Though padding on the left changes places too, where sequences have different lengths: in 16
    bits that cannot be told from rounding.
    """
    model, given = placed(0.3).to(dtype), batch_of(lengths)
    found = compare(model, given, share_prompts(**given))
    assert not found.same(dtype), found
    plain = placed(0.0).to(dtype)
    assert compare(plain, given, share_prompts(**given)).same(dtype)


def test_the_longest_sequence_is_among_those_compared():
    """Of a model in which the longest row of a forward says what positions mean."""
    model = tiny_llama(60)
    backbone = model.model.rotary_emb
    plain = backbone.forward

    def forward(x, position_ids):
        long = 3.0 if int(position_ids.max()) > 100 else 1.0
        return plain(x, position_ids / long)

    backbone.forward = forward
    install_head(model)
    given = batch_of([(5, 110, 5), (40, 50, 50), (40, 50, 49), (3, 9, 9), (3, 8, 8)])
    assert compare(model, given, share_prompts(**given)).same(torch.float32)


def test_nothing_to_compare_is_no_difference():
    given = {"input_ids": torch.tensor([[5], [5]])}
    assert compare(tiny_llama_with_head(), given, share_prompts(**given)).same(torch.float32)


def tiny_llama_with_head():
    model = tiny_llama(60)
    install_head(model)
    return model


def test_memory_that_runs_out_is_no_verdict(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("treg.heads.sharing.compare", fails)
    given = batch_of([(5, 6, 7)])
    with pytest.raises(torch.OutOfMemoryError):
        sharing = PromptSharing(None)
        sharing.settle(tiny_llama_with_head(), given, share_prompts(**given), torch.float32)


def test_processes_agree_before_the_forwards_too(monkeypatch):
    """What one of them cannot put into rows is told before any waits for it in a forward."""
    monkeypatch.setattr("treg.heads.sharing.compare", lambda *_: pytest.fail("a forward"))
    said, odd = [], {"input_ids": torch.tensor([[5, 6], [5, 7], [5, 8]])}
    for given in (odd, batch_of([(5, 6, 7)])):
        sharing = PromptSharing(None)
        sharing.settle(
            *(tiny_llama_with_head(), given, lambda x=given: share_prompts(**x), torch.float32),
            lambda found: (said.append(found), False)[1],
        )
        assert not sharing.on
    assert said == [False, True]
