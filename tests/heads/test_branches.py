"""Attention in rows that sequences share, against each sequence alone."""

import re

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from causal_lms import CAUSAL_LMS, NOT_BUILT, REFUSED, V, build, loud  # noqa: E402

from treg.data.tree import grow, model_inputs, one_row, padded_rows  # noqa: E402
from treg.heads import check_branches, check_sequences, install_head  # noqa: E402
from treg.heads.attention import (  # noqa: E402
    MOST_KEYS,
    MOST_PADDING,
    Branches,
    BranchMask,
    branching,
    run_branching,
)

NAMED = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt2", "mixtral"]


def sequences_of(seed, pairs, longest=20):
    """Pairs of sequences that begin alike; some longer than the models' sliding windows (8)."""
    random = np.random.default_rng(seed)

    def ids(least, most):
        return random.integers(1, V, random.integers(least, most))

    found = []
    for _ in range(pairs):
        prompt = ids(1, longest)
        found.append([np.concatenate([prompt, ids(1, longest)]) for _ in range(2)])
    return found


def hidden_of(spec, tree):
    hidden = spec.hidden(**model_inputs(tree)).flatten(0, 1)
    return [hidden[torch.from_numpy(path)] for path in tree.paths]


def alone(spec, sequences):
    return [spec.hidden(input_ids=torch.from_numpy(x)[None])[0] for x in sequences]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check_values_and_gradients(spec, tree, sequences):
    """Hidden states to 1e-6, every gradient to 1e-5, relative."""
    shared, apart = hidden_of(spec, tree), alone(spec, sequences)
    for found, expected in zip(shared, apart, strict=True):
        assert relative(found, expected) < 1e-6
    # a loss in which each row counts by itself
    torch.manual_seed(1)
    weights = [torch.randn_like(x) for x in apart]
    named = [(n, p) for n, p in spec.backbone.named_parameters() if p.requires_grad]
    gradients = []
    for states in (shared, apart):
        loss = sum((w * x).sum() for w, x in zip(weights, states, strict=True))
        gradients.append(
            torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
        )
    largest = max(x.norm() for x in gradients[1] if x is not None)
    for (name, _), found, expected in zip(named, *gradients, strict=True):
        if expected is None or expected.norm() < 1e-6 * largest:
            continue
        assert relative(found, expected) < 1e-5, name


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", NAMED)
def test_values_and_gradients(model_type, implementation, packed):
    torch.manual_seed(0)
    model = build(model_type)
    if implementation == "sdpa" and model_type == "gemma2":
        pytest.skip("its softcap is not in sdpa")
    model.set_attn_implementation(implementation)
    pairs = sequences_of(0, 3)
    trees = [grow(pair) for pair in pairs]
    tree = one_row(trees) if packed else padded_rows(trees, 0)
    check_values_and_gradients(install_head(model), tree, [x for pair in pairs for x in pair])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_gradient_checkpointing(model_type, reentrant):
    torch.manual_seed(0)
    model = build(model_type)
    model.set_attn_implementation("sdpa")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    pairs = sequences_of(1, 2)
    tree = padded_rows([grow(pair) for pair in pairs], 0)
    check_values_and_gradients_by_backward(install_head(model), tree, pairs)


def check_values_and_gradients_by_backward(spec, tree, pairs):
    gradients = []
    for states in (hidden_of, alone):
        spec.model.zero_grad()
        found = states(spec, tree if states is hidden_of else [x for pair in pairs for x in pair])
        torch.manual_seed(1)
        sum((torch.randn_like(x) * x).sum() for x in found).backward()
        gradients.append({n: p.grad.clone() for n, p in spec.backbone.named_parameters()})
    for name, expected in gradients[1].items():
        assert relative(gradients[0][name], expected) < 1e-5, name


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_trees_of_several_depths(model_type):
    """As annotation has them: requests that share a conversation, and pairs of these an answer."""
    torch.manual_seed(0)
    model = build(model_type)
    random = np.random.default_rng(3)
    sequences = sorted(random.integers(1, 3, random.integers(1, 12)).tolist() for _ in range(12))
    sequences = [np.array(x) for x in sequences]
    tree = grow(sequences)
    depth = {int(b): 0 for b in range(len(tree.branches))}
    for b, parent in enumerate(tree.branches[:, 3]):
        depth[b] = 0 if parent < 0 else depth[int(parent)] + 1
    assert max(depth.values()) >= 3
    check_values_and_gradients(install_head(model), tree, sequences)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_branches_of_about_one_size_are_one_call(model_type, packed):
    """With padding among them, which must not reach the gradients either."""
    torch.manual_seed(0)
    model = build(model_type)
    random = np.random.default_rng(5)
    pairs = []
    for _ in range(8):
        prompt = random.integers(1, V, random.integers(18, 21))
        answers = [random.integers(1, V, random.integers(9, 12)) for _ in range(2)]
        pairs.append([np.concatenate([prompt, x]) for x in answers])
    trees = [grow(pair) for pair in pairs]
    tree = one_row(trees) if packed else padded_rows(trees, 0)
    made = Branches(tree.branches, *tree.ids.shape)
    groups, _ = made.groups(torch.device("cpu"))
    assert len(groups) == 2 < len(tree.branches) == 16
    assert any(len(set(x.whole.flatten().tolist())) > 1 for x in groups)  # padded
    check_values_and_gradients(install_head(model), tree, [x for pair in pairs for x in pair])


def test_groups_hold_no_more_than_they_may():
    random = np.random.default_rng(6)
    sequences = sorted(random.integers(1, 3, random.integers(1, 60)).tolist() for _ in range(40))
    tree = grow([np.array(x) for x in sequences])
    groups, places = Branches(tree.branches, *tree.ids.shape).groups(torch.device("cpu"))
    assert 1 < len(groups) < len(tree.branches)
    for group in groups:
        counted = int((group.own * group.whole).sum())
        padded = group.queries.numel() * group.keys.shape[1]
        assert len(group.queries) == 1 or padded <= MOST_PADDING * counted
    assert places is not None and len(set(places.tolist())) == tree.tokens


def test_groups_keep_few_keys():
    """Many short ends of a long beginning each need it all."""
    beginning = np.full(200, 1)
    tree = grow([np.concatenate([beginning, [2, i]]) for i in range(3, 63)])
    groups, _ = Branches(tree.branches, *tree.ids.shape).groups(torch.device("cpu"))
    assert all(x.keys.numel() <= MOST_KEYS * tree.ids.size for x in groups)
    assert 2 < len(groups) < 60


def seen_by_hand(tree, see):
    """[rows, T, T]: along the path of a token's branch, see(position, position)."""
    rows, width = tree.ids.shape
    seen = np.zeros((rows, width, width), dtype=bool)
    for path in tree.paths:
        for i, query in enumerate(path):
            for j, key in enumerate(path):
                seen[query // width, query % width, key % width] |= see(i, j)
    return seen


@pytest.mark.parametrize("kind", ["causal", "sliding", "chunked"])
def test_masks(kind):
    """What a layer's mask says, dense, against the definition told token by token."""
    from transformers import masking_utils

    see = {
        "causal": lambda i, j: j <= i,
        "sliding": lambda i, j: j <= i and i - j < 4,
        "chunked": lambda i, j: j <= i and i // 4 == j // 4,
    }[kind]
    function, size = {
        "causal": (masking_utils.causal_mask_function, None),
        "sliding": (masking_utils.sliding_window_causal_mask_function(4), 4),
        "chunked": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long()), 4),
    }[kind]
    tree = padded_rows([grow(pair) for pair in sequences_of(3, 2, 9)], 0)
    assert tree.ids.size > tree.tokens  # some is padding
    rows, width = tree.ids.shape
    with branching(tree.branches, rows, width):
        mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=rows,
            q_length=width,
            kv_length=width,
            mask_function=function,
            local_size=size,
            attention_mask=torch.ones(rows, width),
            device="cpu",
        )
        eager = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"](
            batch_size=rows,
            q_length=width,
            kv_length=width,
            mask_function=function,
            device="cpu",
        )
    assert isinstance(mask, BranchMask) and mask.shape == (rows, 1, width, width)
    expected = seen_by_hand(tree, see)
    padding = np.ones((rows, width), dtype=bool)
    padding.reshape(-1)[np.concatenate(tree.paths)] = False
    dense = (mask & True)[:, 0].numpy()  # any operation makes it
    for row in range(rows):
        kept = ~padding[row]
        assert (dense[row][np.ix_(kept, kept)] == expected[row][np.ix_(kept, kept)]).all()
        assert not dense[row][np.ix_(kept, padding[row])].any()
        assert dense[row].any(1).all()  # of padding too: a softmax over nothing is NaN
    assert ((eager == 0)[:, 0].numpy() == dense).all()


def mask_of(tree, **more):
    from transformers import masking_utils

    rows, width = tree.ids.shape
    given = dict(
        batch_size=rows,
        q_length=width,
        kv_length=width,
        mask_function=masking_utils.causal_mask_function,
        device="cpu",
    )
    with branching(tree.branches, rows, width):
        return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**given | more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"use_vmap": True}, "no function of positions"),
        ({"kv_length": 99}, r"asks for a mask of batch, queries and keys \(1, \d+, 99\)"),
    ],
)
def test_masks_that_are_not_of_branches_are_refused(more, said):
    with pytest.raises(ValueError, match=said):
        mask_of(grow(sequences_of(2, 1)[0]), **more)


@pytest.mark.parametrize("what", ["plain", "position_bias", "more keys"])
def test_attention_by_branch_or_by_the_mask(what, monkeypatch):
    """A bias by places and keys of somebody else's take the mask of the row."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tree = grow(sequences_of(2, 1)[0])
    width = tree.ids.shape[1]
    mask = mask_of(tree)
    query, key = torch.randn(2, 1, 2, width, 8)
    more, attended = {}, []
    attend = BranchMask.attend

    def counted(*args, **kwargs):
        attended.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(BranchMask, "attend", counted)
    if what == "position_bias":
        more["position_bias"] = torch.zeros(1, 2, width, width)
    if what == "more keys":  # which no query may see is the caller's to say
        with pytest.raises(RuntimeError):
            longer = torch.cat([key, key[:, :, :1]], 2)
            ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, longer, longer, mask)
        assert not attended
        return
    found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](torch.nn.Module(), query, key, key, mask, **more)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, attn_mask=mask.dense
    ).transpose(1, 2)
    assert len(attended) == (what == "plain")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_that_is_moved_stays_one_of_branches():
    """As between the devices of a model."""
    mask = mask_of(grow(sequences_of(2, 1)[0]))
    moved = mask.to("meta")
    assert isinstance(moved, BranchMask) and moved.device.type == "meta"
    assert not isinstance(mask.float(), BranchMask)


@pytest.mark.slow
def test_graphs_are_whole_after_rows_were_shared():
    model = build("llama")
    check_branches(install_head(model))
    other = build("llama")
    ids = torch.randint(1, V, (1, 9))
    expected = other(input_ids=ids).logits
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids=ids).logits, expected)


def test_without_branches_masks_are_as_they_were():
    torch.manual_seed(0)
    model = build("llama")
    ids = torch.randint(1, V, (2, 9))
    before = model(input_ids=ids).logits
    spec = install_head(model)
    hidden_of(spec, grow([np.array([1, 2, 3]), np.array([1, 2, 4])]))
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.slow
def test_flex_attention():
    """Its block masks; compiled on the CPU without a gradient."""
    torch.manual_seed(0)
    model = build("llama").requires_grad_(False)
    pairs = sequences_of(4, 2)
    tree = one_row([grow(pair) for pair in pairs])
    sequences = [x for pair in pairs for x in pair]
    expected = alone(install_head(model), sequences)
    model.set_attn_implementation("flex_attention")
    try:
        with torch.no_grad():
            alone(install_head(model), sequences)
    except Exception as error:  # no compiler, or a head size that the CPU's kernel does not take
        pytest.skip(f"flex_attention does not run here, on rows of its own: {error!r:.200}")
    with torch.no_grad():
        found = hidden_of(install_head(model), tree)
    for x, y in zip(found, expected, strict=True):
        assert relative(x, y) < 1e-5


# -- every model type
# -

DECODERS = "is_decoder"  # set, where a config has it


def loud_layers(model_type):
    """A causal model whose attention says enough to be seen in its hidden states."""
    torch.manual_seed(0)
    model = build(model_type)
    if getattr(model.config, DECODERS, None) is False:
        model.config.is_decoder = True
        torch.manual_seed(0)
        model = loud(type(model)(model.config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and not re.search("embed|head|wte", name):
                p.mul_(8)
    return model


@pytest.mark.parametrize("model_type", [x for x in CAUSAL_LMS if x not in {*REFUSED, *NOT_BUILT}])
def test_every_type_is_shared_right_or_refused_by_name(model_type):
    model = loud_layers(model_type)
    try:
        spec = install_head(model)
        check_sequences(spec)
    except ValueError:
        pytest.skip("refused as it is: not causal")
    try:
        check_branches(spec)
    except ValueError as error:
        assert type(model).__name__ in str(error)
        return
    # 42 tokens of 64 positions, past windows of 8, in rows of up to 59
    random = np.random.default_rng(0)
    prompt, chosen, rejected = (random.integers(1, V - 1, n) for n in (20, 22, 17))
    pairs = [[np.concatenate([x, y]) for y in (chosen, rejected)] for x in (prompt, prompt[:5])]
    sequences = [x for pair in pairs for x in pair]
    trees = [grow(pair) for pair in pairs]
    with torch.no_grad():
        expected = alone(spec, sequences)
        for tree in (padded_rows(trees, 0), one_row(trees)):
            for x, y in zip(hidden_of(spec, tree), expected, strict=True):
                assert (x - y).abs().max() <= 5e-6 * y.abs().max()


@pytest.mark.slow
def test_how_many_types_are_shared():
    """docs/trainers.md says so many."""
    shared = []
    for model_type in CAUSAL_LMS:
        if model_type in {*REFUSED, *NOT_BUILT}:
            continue
        try:
            spec = install_head(loud_layers(model_type))
            check_sequences(spec)
            check_branches(spec)
        except ValueError:
            continue
        shared.append(model_type)
    assert set(NAMED) <= set(shared)
    assert len(shared) >= 116


# -- what is refused
# -


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("rwkv", "makes its attention masks itself"),
        ("zamba2", "layers of type hybrid, linear_attention"),
        ("qwen3_next", "layers of type linear_attention"),
        ("bloom", "ALiBi"),
        ("deepseek_v32", r"layers of type \w+_attention"),
        ("gpt_neo", "local attention"),
        ("llama4_text", "attn_temperature_tuning"),
        ("lfm2", "layers of type conv"),
    ],
)
def test_refused_by_name(model_type, said):
    model = loud_layers(model_type)
    with pytest.raises(ValueError, match=said) as error:
        check_branches(install_head(model))
    assert type(model).__name__ in str(error.value)


def test_what_runs_along_the_row_is_refused():
    """A layer that hands something on to the next token, whatever the mask."""
    model = build("llama")
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 1e-3 * x.roll(1, dims=1)
    with pytest.raises(ValueError, match="a state, a linear attention or a convolution"):
        check_branches(install_head(model))


def test_a_small_leak_in_16_bits_is_refused():
    model = build("llama").bfloat16()
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 0.02 * x.roll(1, dims=1)
    with pytest.raises(ValueError, match="a state, a linear attention or a convolution"):
        check_branches(install_head(model))


def test_attention_without_a_mask_is_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    tree = grow([np.array([1, 2, 3]), np.array([1, 2, 4])])
    inputs = model_inputs(tree)
    with pytest.raises(ValueError, match=r"attn_implementation: .* sdpa.* got 'flash_attention_2'"):
        run_branching(model, model.model, inputs.pop("branches"), inputs)
