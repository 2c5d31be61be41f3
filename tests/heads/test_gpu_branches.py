"""Rows that sequences share on a GPU: each attention implementation, forward and backward."""

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from treg.data.tree import grow, model_inputs, one_row, padded_rows  # noqa: E402
from treg.heads import check_branches, install_head  # noqa: E402

pytestmark = pytest.mark.gpu
V = 512


def llama(implementation, **more):
    """Head sizes that every kernel takes; attention that says enough to be seen."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=V,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
        attn_implementation=implementation,
        **more,
    )
    return transformers.MistralForCausalLM(config).cuda()


def sequences():
    """Pairs of different lengths, of about one, and one whose answers begin alike."""
    random = np.random.default_rng(0)
    found = []
    for prompt, chosen, rejected in ((200, 40, 90), (90, 60, 61), (92, 61, 59), (1, 1, 7)):
        ids = random.integers(1, V, prompt + 3)
        answers = [np.concatenate([ids, random.integers(1, V, n)]) for n in (chosen, rejected)]
        found.append(answers)
    return found


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_shared_rows(implementation, packed, window):
    """Against each sequence alone with sdpa, in float32 without TF32."""
    model, plain = (
        llama(implementation, sliding_window=window),
        llama("sdpa", sliding_window=window),
    )
    plain.load_state_dict(model.state_dict())
    spec, alone = install_head(model), install_head(plain)
    check_branches(spec)
    pairs = sequences()
    trees = [grow(pair) for pair in pairs]
    tree = one_row(trees) if packed else padded_rows(trees, 0)
    inputs = model_inputs(tree)
    branches = inputs.pop("branches")
    hidden = spec.hidden(**{k: x.cuda() for k, x in inputs.items()}, branches=branches)
    states = hidden.flatten(0, 1)
    torch.manual_seed(1)
    losses = [0.0, 0.0]
    for path, sequence in zip(tree.paths, [x for pair in pairs for x in pair], strict=True):
        found = states[torch.from_numpy(path).cuda()]
        expected = alone.hidden(input_ids=torch.from_numpy(sequence).cuda()[None])[0]
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        weight = torch.randn_like(expected)
        losses = [a + (weight * b).sum() for a, b in zip(losses, (found, expected), strict=True)]
    for loss in losses:
        loss.backward()
    for (name, p), (_, q) in zip(
        spec.backbone.named_parameters(), alone.backbone.named_parameters(), strict=True
    ):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm(), name
