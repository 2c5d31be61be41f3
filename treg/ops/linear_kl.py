"""`linear_kl`: per-token KL divergence of two language-model heads, without [N, V] logits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from treg import checks
from treg.operators import Operator, values_of
from treg.ops.call import HEAD_NUMBERS, Batch, Call
from treg.ops.head import Head
from treg.ops.head.gradients import Gradients, GradientSums
from treg.ops.head.head import autocast_dtype, without_autocast
from treg.ops.head.kl_tiles import KlTiles
from treg.ops.head.selection import RowSelection, same_rows, scored_rows
from treg.ops.options import HeadOptions, check_numbers, check_operands, check_target, check_targets
from treg.ops.plans.base import row_factors
from treg.results import LinearKL

DIRECTIONS = ("forward", "reverse")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    target: Tensor | None = None,
    direction: str = "forward",
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ref_logit_scale: float | None = None,
    ref_softcap: float | str | None = "same",
    ignore_index: int = -100,
    impl: str | None = None,
    memory_budget: int | str | None = None,
) -> LinearKL:
    """KL divergence of a policy's and a reference's next-token distributions, in bounded memory.

        p_t, q_t   the softmaxes of policy and reference over the whole vocabulary: of
                   z = softcap * tanh( logit_scale * (h W^T + b) / softcap ) / temperature
        forward    kl_t = KL(q_t, p_t) = sum_v q_tv (log q_tv - log p_tv)
                   d kl_t / d z_tv = p_tv - q_tv
        reverse    kl_t = KL(p_t, q_t) = sum_v p_tv (log p_tv - log q_tv)
                   d kl_t / d z_tv = p_tv (log p_tv - log q_tv - kl_t)

    forward is the sequential KL divergence of TDPO (arXiv 2404.11999), whose tokens are added up
    by the caller. Distributions that are nearly equal keep their digits, equal ones give 0, and no
    others give less (docs/maths.md).

    The matrix products a row are 2 forward only, and with a trainable head 4 for the rows whose
    unscaled gradient of the logits fits into memory_budget, 6 for the others (all in float16). A
    frozen head takes 3 and 5. With targets a row has two such gradients, of the KL divergence and
    of the log-prob: half as many rows fit.

    Args:
        hidden: [..., D] float32, bfloat16 or float16 (float64 too with impl="torch"), any strides.
        weight: [V, D], hidden's dtype, any strides. Under torch.autocast all operands are cast to
            its dtype.
        ref_hidden, ref_weight: [..., D'] and [V, D'], of another model of the same vocabulary, in
            hidden's dtype. The reference is a constant: where these require a gradient, none
            reaches them.
        target: None: all rows count, and no log-probs are returned. Or [...] int64, already
            aligned: target[i] is the token predicted from hidden[i].
        direction: "forward" or "reverse".
        bias, ref_bias: [V] floating, or None. A word whose bias is -inf is forbidden. Where one
            distribution forbids a word that the first of the two allows, kl is inf (in reverse
            without a finite gradient).
        logit_scale: any finite number. softcap, temperature: > 0. The temperature is that of both
            heads.
        ref_logit_scale: None: logit_scale. ref_softcap: "same": softcap. None: no softcap.
        ignore_index: targets that are not scored: kl 0, log-prob 0, gradient 0. They cost nothing,
            as in `linear_logprobs`.
        impl: "triton" (a GPU), "torch" (any device), None: "triton" on a GPU. A name never falls
            back.
        memory_budget: bytes of temporaries, whatever N is; a float32 [V, D] sum of dweight and
            [N]-sized rows come on top. With a gradient they are held until the backward. None: 1
            GiB on a GPU, 384 MiB on a CPU. "least": 192 and 96 MiB, and nothing else.
    Returns:
        LinearKL, each [...] in float32 (float64 of float64), nats. `kl` and `logprobs` are
        differentiable in hidden, weight and bias, also both at once; `ref_logprobs` is detached.
        First derivatives only.
    Raises:
        TypeError: an argument that must be a tensor is none. ValueError: any other bad input, by
            name.
    """
    options = HeadOptions(
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        outputs=(),
        impl=impl,
        memory_budget=memory_budget,
        logits_dtype=None,
        shard=None,
        filter_eps=None,
    )
    checks.check_tensor("target", target, optional=True)
    call = options.call_of_rows(hidden, weight, bias)
    if target is not None:
        check_target(target, hidden)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected 'forward' or 'reverse', got {direction!r}")
    _check_reference(call, hidden, weight, ref_hidden, ref_weight, ref_bias)
    ref_options = _reference_options(options, ref_logit_scale, ref_softcap)
    numbers = (*options.numbers(), *ref_options.numbers())
    kl_call = KlCall(call, direction == "reverse", ref_options.softcap is not None)
    shape = hidden.shape[:-1]
    results = _forward(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        None if target is None else target.reshape(-1),
        numbers,
        kl_call,
    )
    return LinearKL(*(x.view(shape) for x in results[: _outputs(target)]))


def _outputs(target: Tensor | None) -> int:
    """How many results come before what is saved."""
    return 1 if target is None else 3


def _check_reference(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
) -> None:
    """The operands of the reference's head: by themselves, and beside the policy's."""
    operands = {"ref_hidden": ref_hidden, "ref_weight": ref_weight}
    for name, x in operands.items():
        checks.check_tensor(name, x)
    checks.check_tensor("ref_bias", ref_bias, optional=True)
    checks.check_transforms(**operands, ref_bias=ref_bias)
    cast = autocast_dtype(ref_hidden, ref_weight)
    for name, x in operands.items():
        if (cast or x.dtype) != call.dtype:
            raise ValueError(
                f"{name}: expected {call.dtype} (that of hidden), got {x.dtype}; convert one, or "
                "use torch.autocast"
            )
    check_operands(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    checks.check_device("ref_hidden", ref_hidden, hidden)
    rows = hidden.shape[:-1]
    if ref_hidden.shape[:-1] != rows:
        raise ValueError(
            f"ref_hidden: expected shape {[*rows, 'D']} (the rows of hidden), got "
            f"{list(ref_hidden.shape)}"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected [{weight.shape[0]}, D] (V of weight), got "
            f"{list(ref_weight.shape)}; the models need the same vocabulary"
        )


def _reference_options(
    options: HeadOptions, logit_scale: float | None, softcap: float | str | None
) -> HeadOptions:
    """The options of the reference's head, whose numbers are checked."""
    if isinstance(softcap, str):
        if softcap != "same":
            raise ValueError(f"ref_softcap: expected a number > 0, 'same' or None, got {softcap!r}")
        softcap = options.softcap
    scale = options.logit_scale if logit_scale is None else logit_scale
    check_numbers(scale, softcap, options.temperature, prefix="ref_")
    return replace(options, logit_scale=scale, softcap=softcap)


# -- the operators


@dataclass(frozen=True)
class KlCall:
    """Everything of a call that is fixed in a run; an operator takes it as one string."""

    call: Call  # of the policy's head
    reverse: bool
    ref_softcapped: bool

    def text(self) -> str:
        flags = (self.reverse, self.ref_softcapped)
        return "|".join(["1" if flag else "" for flag in flags] + [self.call.text()])

    @classmethod
    def of(cls, given: "str | KlCall") -> "KlCall":
        """From `text`; a call is itself."""
        if isinstance(given, KlCall):
            return given
        reverse, capped, rest = given.split("|", 2)
        return cls(Call.of(rest), bool(reverse), bool(capped))

    def ref_head(self, weight: Tensor, bias: Tensor | None, numbers: Sequence[float]) -> Head:
        """numbers: of both heads, the policy's first."""
        head = replace(self.call, softcapped=self.ref_softcapped)
        return head.head(weight, bias, numbers[HEAD_NUMBERS:])


class Operands(NamedTuple):
    """The tensors of an operator, in the order of its arguments."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    ref_hidden: Tensor  # [N, D']
    ref_weight: Tensor  # [V, D']
    ref_bias: Tensor | None  # [V]
    target: Tensor | None  # [N]
    numbers: Tensor | tuple[float, ...]  # of both heads, the policy's first


class Work:
    """The rows of one call, and the heads that they go through."""

    def __init__(self, call: KlCall, given: Operands, numbers: Sequence[float]):
        """From shapes alone: no value is looked at, and all rows count."""
        policy, dtype = call.call, call.call.dtype
        self.target = given.target
        # without targets the batch has none, and nothing below reads them
        target = (
            given.hidden.new_empty(0, dtype=torch.int64) if self.target is None else self.target
        )
        self.batch = Batch.of_shapes(
            policy, given.hidden, given.weight, given.bias, target, numbers[:HEAD_NUMBERS]
        )
        self.ref_hidden = given.ref_hidden.to(dtype)
        self.tiles = KlTiles(
            policy.impl,
            self.batch.head,
            call.ref_head(given.ref_weight.to(dtype), given.ref_bias, numbers),
            reverse=call.reverse,
            scored=self.target is not None,
        )
        self._plan = self.tiles.plan(policy.budget, gradient=any(policy.needs))

    @property
    def kept(self) -> int:
        """The rows that are kept if all are scored."""
        return min(self.batch.hidden.shape[0], self._plan[0])

    def tile_rows(self, count: int) -> int:
        """Rows that are worked on at a time, of `count` scored ones."""
        if count > self.kept:
            return self._plan[1]
        return self.tiles.tile_beside(self.kept, self.batch.call.budget, count)

    def scored(self, note: int | None = None) -> RowSelection:
        """note: of the forward's selection, in a backward."""
        if self.target is None:
            return self.batch.rows
        ignored = self.batch.call.ignore_index
        if note is None:
            return scored_rows(self.target, ignored)
        return same_rows(self.target, ignored, note)

    def read(self, rows: RowSelection) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, ref_hidden and target of a tile's rows."""
        hidden, ref_hidden = rows.read(self.batch.hidden), rows.read(self.ref_hidden)
        if self.target is None:
            return hidden, ref_hidden, None
        target = rows.read(self.target)
        if not rows.looked:  # what ignored rows hold (NaN even) must not reach a product
            ignored = (target == self.batch.call.ignore_index).unsqueeze(1)
            hidden = hidden.masked_fill(ignored, 0.0)
            ref_hidden = ref_hidden.masked_fill(ignored, 0.0)
        return hidden, ref_hidden, target

    def empty_stashes(self) -> list[Tensor]:
        """Room for the rows that are kept if all are scored."""
        if not any(self.batch.call.needs):
            return []
        tiles = self.tiles
        return [tiles.empty(self.kept, tiles.stash_dtype) for _ in range(tiles.stashes)]


def _score(*args) -> list[Tensor]:
    """What `LinearKL` holds, [N] each; the note; the stashes."""
    *tensors, text = args
    call, given = KlCall.of(text), Operands(*tensors)
    numbers = values_of(given.numbers)
    _check_values(call, given, numbers)
    work = Work(call, given, numbers)
    rows, stashes = work.scored(), work.empty_stashes()
    N = work.batch.hidden.shape[0]
    found = [
        given.hidden.new_zeros(N, dtype=work.tiles.compute) for _ in range(_outputs(given.target))
    ]
    kept = min(work.kept, len(rows))  # none where nothing is to be differentiated
    step, done = work.tile_rows(len(rows)), 0
    for part, keep in ((rows.section(0, kept), True), (rows.section(kept, len(rows)), False)):
        for chosen in part.chunks(step):
            here = slice(done, done + len(chosen))
            values = work.tiles.forward(*work.read(chosen), [x[here] for x in stashes if keep])
            for x, new in zip(found, values.values(), strict=True):
                chosen.write(x, new)
            done = here.stop
    work.tiles.release()
    return [*found, torch.tensor([rows.note], device="cpu"), *stashes]


def _check_values(call: KlCall, given: Operands, numbers: Sequence[float]) -> None:
    heads = (
        (call.call.softcapped, numbers[:HEAD_NUMBERS], ""),
        (call.ref_softcapped, numbers[HEAD_NUMBERS:], "ref_"),
    )
    for softcapped, (scale, softcap, temperature), prefix in heads:
        check_numbers(scale, softcap if softcapped else None, temperature, prefix)
    if given.target is not None:
        check_targets(given.target, given.weight.shape[0], call.call.ignore_index)


def _score_fake(*args) -> list[Tensor]:
    *tensors, text = args
    given = Operands(*tensors)
    work = Work(KlCall.of(text), given, [1.0] * (2 * HEAD_NUMBERS))
    N = given.hidden.shape[0]
    found = [
        given.hidden.new_empty(N, dtype=work.tiles.compute) for _ in range(_outputs(given.target))
    ]
    note = torch.empty(1, dtype=torch.int64, device="cpu")
    return [*found, note, *work.empty_stashes()]


def _differentiate(kl_grad, lp_grad, note, stashes, *args) -> list[Tensor]:
    """The gradients that are needed, in the order hidden, weight, bias.

    kl_grad, lp_grad: [N], d L / d kl and d L / d lp, or None for 0.
    """
    *tensors, text = args
    call, given = KlCall.of(text), Operands(*tensors)
    work = Work(call, given, values_of(given.numbers))
    rows = work.scored(int(note.item()))
    coefs = _coefficients(work, kl_grad, lp_grad)
    with without_autocast(given.hidden):
        sums = _gradient_sums(work, rows, coefs, stashes)
    dhidden = sums.scaled_hidden_gradient(work.batch.hidden_dtype)
    gradients = Gradients(dhidden, sums.dweight, sums.dbias)
    return [x for x in gradients.like(given.hidden, given.weight, given.bias) if x is not None]


Coefficients = tuple[Tensor, Tensor | None]  # of the two stashes, [N] or of a tile's rows


def _coefficients(work: Work, kl_grad: Tensor | None, lp_grad: Tensor | None) -> Coefficients:
    """What multiplies the stashes; 0 where nothing is scored, whatever a loss leaves there."""
    scale, batch = work.batch.head.scale, work.batch

    def of(grad: Tensor, factor: float) -> Tensor:
        grad = grad.to(work.tiles.compute) * factor
        if work.target is None:
            return grad
        return torch.where(work.target == batch.call.ignore_index, 0.0, grad)

    if kl_grad is None:
        kl_grad = batch.hidden.new_zeros(batch.hidden.shape[0], dtype=work.tiles.compute)
    return of(kl_grad, scale), None if lp_grad is None else of(lp_grad, -scale)


def _gradient_sums(
    work: Work, rows: RowSelection, coefs: Coefficients, stashes: list[Tensor]
) -> GradientSums:
    """Rows that are kept first. Where one stash is asked for, it goes into the products as it is;
    else tile by tile: of two stashes one tile is made, so that the products stay two.
    """
    batch, tiles, count = work.batch, work.tiles, len(rows)
    kept = min(stashes[0].shape[0], count)
    whole = kept if coefs[1] is None else 0
    tiled, step = count - whole, work.tile_rows(count)
    sums = GradientSums(
        batch.hidden,
        batch.tiles,
        batch.call.needs,
        complete=rows.complete,
        dweight_dtype=batch.dweight_dtype if _in_one_tile(step, whole, kept, count) else None,
    )
    if whole:
        of_whole = rows.section(0, whole)
        sums.add(stashes[0][:whole], of_whole, of_whole.read(coefs[0]))
    tile = tiles.empty(min(step, tiled), tiles.stash_dtype)
    done = whole
    for part in (rows.section(whole, kept), rows.section(kept, count)):
        for chosen in part.chunks(step):
            out, here = tile[: len(chosen)], slice(done, done + len(chosen))
            mine = chosen.read(coefs[0]), None if coefs[1] is None else chosen.read(coefs[1])
            if here.stop <= kept:
                tiles.passes.combine([x[here] for x in stashes], mine, out)
            else:
                tiles.gradient(*work.read(chosen), mine, out)
            scored = None
            if work.target is not None:
                scored = row_factors(batch, chosen, chosen.read(work.target))
            sums.add(out, chosen, scored)
            done = here.stop
    sums.finish()
    tiles.release()
    return sums


def _in_one_tile(step: int, whole: int, kept: int, count: int) -> bool:
    """Whether a single product makes dweight."""
    if whole:
        return whole == count
    return count <= step and kept in (0, count)


_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
    "Tensor? ref_bias, Tensor? target, Tensor numbers, str call"
)
_forward = Operator(f"linear_kl({_OPERANDS}) -> Tensor[]", _score, _score_fake)
_gradient = Operator(
    f"linear_kl_grad(Tensor? kl_grad, Tensor? lp_grad, Tensor note, Tensor[] stashes, {_OPERANDS})"
    " -> Tensor[]",
    _differentiate,
    lambda kl_grad, lp_grad, note, stashes, hidden, weight, bias, *rest: KlCall.of(
        rest[-1]
    ).call.needs.empty(hidden, weight, bias),
)


def _save(ctx, inputs, output) -> None:
    *operands, text = inputs
    ctx.call = KlCall.of(text)
    ctx.scores = _outputs(operands[6])
    ctx.save_for_backward(*operands, *output[ctx.scores :])
    ctx.mark_non_differentiable(*output[min(2, ctx.scores) :])
    ctx.set_materialize_grads(False)


def _backward(ctx, grads):
    kl_grad, lp_grad = grads[0], grads[1] if ctx.scores > 1 else None
    if kl_grad is None and lp_grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors
    count = len(Operands._fields)
    note, *stashes = saved[count:]
    found = _gradient(kl_grad, lp_grad, note, stashes, *saved[:count], ctx.call)
    return *ctx.call.call.needs.spread(found), *(None,) * 6


_forward.differentiable(_save, _backward)
_gradient.first_derivatives_only()
