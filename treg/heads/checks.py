"""The checks of `treg.heads`: on a few tokens, the model's own log-probs and hidden states against
what was read.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from treg.heads.spec import HeadSpec, Operands, UnreadableHead, name_of, shape_of, without_cache

TOKENS = 8
ROWS_AT_A_TIME = 8192  # of the weight, widened to float32
INSTEAD = "compute this model's loss from dense logits, and please open an issue"


def check_head(spec: HeadSpec) -> None:
    """Check the model's own log-probs of a few tokens against those by spec.

    Raises:
        ValueError: they differ; the head could not be read; or the model's own forward failed.
    """
    model = spec.model
    ids = _tokens_for_head(spec)
    with _inference(model):
        with _own_forward(model, ids, "its head"):
            output = _forward(model, ids)
        try:
            logits = output.logits.float()
            found, eps = _logits_by(spec, ids)
        except UnreadableHead:
            raise
        except Exception as error:
            raise ValueError(
                f"{name_of(model)}: its head could not be checked: {error!r}; {INSTEAD}"
            ) from error
        if found.shape != logits.shape:
            raise ValueError(
                f"{name_of(model)}: its head was misread: expected logits {list(logits.shape)}, "
                f"got {list(found.shape)}; {INSTEAD}"
            )
        difference = (logits.log_softmax(-1) - found.log_softmax(-1)).abs().max().item()
        # the product and the pointwise steps after it are each rounded to the model's dtype;
        # float32 may mean TF32
        allowed = max(4 * eps, 1e-4) * logits.abs().max().item() + 1e-5
    # not ">": a difference that is NaN is refused too
    if not difference <= allowed:
        raise ValueError(
            f"{name_of(model)}: its head was misread: log-probs differ by {difference:.2e}, "
            f"expected at most {allowed:.2e}; {INSTEAD}"
        )


def check_sequences_of(spec: HeadSpec, *, packing: bool) -> None:
    """Check on a few tokens that hidden states depend on what they may depend on.

    Raises:
        ValueError: later tokens change a hidden state; with packing, tokens of another sequence
            do; or the model's own forward failed.
    """
    model = spec.model
    vocab = _input_vocab(model)
    ids = _random_ids(model, 2 * TOKENS, lowest=1, highest=vocab)
    changed = ids.clone()
    changed[:, TOKENS:] = (ids[:, TOKENS:] + 1) % vocab
    positions, remedy = None, ""
    if packing:
        positions = torch.arange(TOKENS, device=model.device).repeat(2)[None]
        remedy = "; a model that takes no position_ids needs packing=False"

    alone = None
    with _inference(model), _own_forward(model, ids, "its sequences", remedy):
        states = spec.hidden(input_ids=ids, position_ids=positions)
        states_of_changed = spec.hidden(input_ids=changed, position_ids=positions)
        if packing:
            alone = spec.hidden(input_ids=ids[:, TOKENS:])

    leaks = "later tokens change the hidden states before them"
    fix = "use a causal model (is_decoder=True)"
    _check_same(model, states[:, :TOKENS], states_of_changed[:, :TOKENS], leaks, fix)
    if alone is not None:
        leaks = "packed sequences see one another"
        _check_same(model, states[:, TOKENS:], alone, leaks, "use packing=False")


def check_branches_of(spec: HeadSpec) -> None:
    """Check on a few tokens that the hidden states of two sequences are the same in a row that they
    share (`treg.data.tree`) and alone.

    Raises:
        ValueError: they differ, or the model cannot run such a row; says why.
    """
    model = spec.model
    vocab = _input_vocab(model)
    ids = _random_ids(model, 4 * TOKENS, lowest=1, highest=vocab)[0]
    beginning, first, second, others = ids.split(TOKENS)
    alone = [torch.cat([beginning, tail])[None] for tail in (first, second)]
    positions = torch.arange(2 * TOKENS, device=model.device)
    branches = np.array([(0, 0, 2 * TOKENS, -1, 0), (0, 2 * TOKENS, TOKENS, 0, TOKENS)])

    def together(first: Tensor, padding: Tensor) -> Tensor:
        places = torch.cat([positions, positions[TOKENS:], torch.zeros_like(padding)])
        row = torch.cat([beginning, first, second, padding])
        return spec.hidden(input_ids=row[None], position_ids=places[None], branches=branches)

    with _inference(model):
        with _own_forward(model, alone[0], "shared beginnings"):
            expected = [spec.hidden(input_ids=x) for x in alone]
        try:
            found = together(first, first[:0])
            of_others = together(others, first[:0])
            padded = together(first, others)
        except Exception as error:
            raise ValueError(
                f"{name_of(model)}: it cannot run two answers after one prompt: {error}"
            ) from error
    second_rows = slice(2 * TOKENS, 3 * TOKENS)
    rest = found[:, second_rows]
    # A row of the same shape has the same bits, but among experts, whose products take the shapes
    # that the tokens give them: there padding shows what rounding changes.
    leak = (of_others[:, second_rows] - rest).abs().max().item()
    noise = (padded[:, second_rows] - rest).abs().max().item()
    rounding = 8 * torch.finfo(rest.dtype).eps * rest.abs().max().item()
    experts = _has_experts(model.config.get_text_config().to_dict())
    if not leak <= (16 * noise + rounding if experts else 0.0):
        raise ValueError(
            f"{name_of(model)}: an answer sees another one that stands before it in the row (by "
            f"{leak:.2e}): some layers are no attention with a mask, but a state, a linear "
            "attention or a convolution"
        )
    differ = "hidden states after a shared beginning are not those of the sequences alone: its "
    differ += "positions are not position_ids from 0 (ALiBi, a bias by distance, an offset)"
    _check_same(model, found[:, : 2 * TOKENS], expected[0], differ)
    _check_same(model, rest, expected[1][:, TOKENS:], differ)


def _has_experts(config: Any) -> bool:
    """Whether tokens are sent to experts, as the names in a config tell."""
    return any(
        _has_experts(value)
        if isinstance(value, dict)
        else "experts" in str(name) and isinstance(value, int) and value > 1
        for name, value in config.items()
    )


def _check_same(
    model: PreTrainedModel, found: Tensor, expected: Tensor, leaks: str, fix: str = ""
) -> None:
    """ValueError unless hidden states are the same, up to rounding. fix: what to do otherwise."""
    # what leaks changes states by a good part of their size; float32 may mean TF32
    allowed = max(8 * torch.finfo(found.dtype).eps, 3e-4) * expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    if not difference <= allowed:
        raise ValueError(
            f"{name_of(model)}: {leaks} (by {difference:.2e}, expected at most {allowed:.2e})"
            + (fix and f"; {fix}")
        )


@contextlib.contextmanager
def _own_forward(model: PreTrainedModel, ids: Tensor, what: str, remedy: str = "") -> Iterator:
    """An error of the model's own code is told as such, and not blamed on what is checked."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{name_of(model)}: the model's own forward failed on {ids.shape[1]} tokens on "
            f"{ids.device}, so {what} could not be checked: {error!r}; make model(input_ids=...) "
            f"run there, or move the model to a device where it runs{remedy}"
        ) from error


def _forward(model: PreTrainedModel, ids: Tensor):
    """What the model itself gives for these tokens."""
    # forward, and no call: this may run within a forward of what wraps the model. The original
    # one: accelerate puts autocast around the other, which would switch it on again.
    forward = getattr(model, "_original_forward", model.forward)
    with _forked_rng(model):
        return forward(input_ids=ids, return_dict=True, **without_cache(model))


def _logits_by(spec: HeadSpec, ids: Tensor) -> tuple[Tensor, float]:
    """Logits as spec reads the head, and the rounding of their dtype."""
    with _forked_rng(spec.model):
        return spec.through(_dense, spec.hidden(input_ids=ids))


def _dense(hidden: Tensor, operands: Operands) -> tuple[Tensor, float]:
    """Logits by the operands in float32, and the rounding of the dtypes that the model computes
    them in.
    """
    weight, bias, softcap = operands["weight"], operands["bias"], operands["softcap"]
    parts = [F.linear(hidden.float(), rows.float()) for rows in weight.split(ROWS_AT_A_TIME)]
    z = torch.cat(parts, dim=-1)
    if bias is not None:
        z = z + bias.float()
    z = operands["logit_scale"] * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    eps = max(torch.finfo(hidden.dtype).eps, torch.finfo(weight.dtype).eps)
    return z, eps


def _tokens_for_head(spec: HeadSpec) -> Tensor:
    vocab = _input_vocab(spec.model)
    if spec.vocab:
        vocab = min(vocab, spec.vocab)
    return _random_ids(spec.model, TOKENS, lowest=0, highest=vocab)


def _random_ids(model: PreTrainedModel, count: int, *, lowest: int, highest: int) -> Tensor:
    """[1, count] of lowest .. highest - 1, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(lowest, highest, (1, count), generator=generator).to(model.device)


def _input_vocab(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return shape_of(embeddings.weight)[0]


def _forked_rng(model: PreTrainedModel):
    """Leaves the random state as it was found: two calls within get the same (reformer hashes at
    random).
    """
    if model.device.type == "cpu":
        return torch.random.fork_rng(devices=[], device_type="cuda")
    return torch.random.fork_rng(devices=[model.device], device_type=model.device.type)


@contextlib.contextmanager
def _inference(model: PreTrainedModel) -> Iterator[None]:
    """Plain inference: eval mode, no gradients, no autocast, no flash attention. All is put back
    after it.
    """
    with (
        evaluated(model),
        _without_flash_attention(model),
        torch.no_grad(),
        torch.autocast(model.device.type, enabled=False),
    ):
        yield


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode; after it each module is in the mode in which it was."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def _without_flash_attention(model: PreTrainedModel) -> Iterator[None]:
    """sdpa in the place of flash attention, which takes 16-bit inputs on a GPU only: the model may
    be there later.
    """
    configs = [model.config]
    for name in model.config.sub_configs:
        part = getattr(model.config, name, None)
        if part is not None:
            configs.append(part)
    before = [config._attn_implementation for config in configs]
    if not any("flash" in str(implementation) for implementation in before):
        yield
        return
    try:
        model.config._attn_implementation = "sdpa"  # and that of every part
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
