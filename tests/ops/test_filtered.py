"""The backward without inactive tiles, in both implementations, against dense float64 gradients
without them.
"""

import math

import pytest
import torch
from batches import batch_of_tiles, norm_of
from helpers import DEVICE, EPS, GPU, IMPLS, assert_within_budget, device_of, error
from looks import patch_looks

from treg.ops import linear_logprobs
from treg.ops.head import Head
from treg.ops.head.torch_tiles import TorchTiles, block_tops
from treg.ops.head.triton_tiles import TritonTiles
from treg.ops.plans.filtered import check_slab, filtered_gradients

TILE = 128
ALL = (True, True, True)
ROOM = 1 << 28
EPSILON = 2.0**-12
HEADS = {
    "plain": {},
    "softcap": {"softcap": 15.0},
    "scale": {"bias": True, "logit_scale": 0.8, "temperature": 0.7},
    "all": {"bias": True, "softcap": 20.0, "logit_scale": 1.2, "temperature": 1.3},
}
# how far the columns of each tile lie below those of the first, for rows of even and of odd tiles,
# in units of logits
DEPTHS = torch.tensor([[0.0, 14.0, 7.0, 15.0], [0.0, 3.0, 14.0, 12.0]])


class Problem:
    """N rows whose mass lies in some tiles of V columns; the second tile of rows has small
    coefficients.
    """

    def __init__(
        self,
        N=200,
        V=500,
        D=40,
        *,
        bias=False,
        softcap=None,
        logit_scale=1.0,
        temperature=1.0,
        width=TILE,
    ):
        tile_n, tile_v = torch.arange(N) // TILE, torch.arange(V) // TILE
        self.hidden, self.weight = 0.3 * torch.randn(N, D), torch.randn(V, D)
        self.hidden[:, :2] = torch.nn.functional.one_hot(tile_n % 2, 2).float()
        self.weight[:, :2] = -DEPTHS[:, tile_v % 4].T * temperature / logit_scale
        self.bias = 0.3 * torch.randn(V) if bias else None
        self.target = torch.randint(0, min(TILE, V), (N,))
        self.target[5:6], self.target[150:151] = min(200, V - 1), min(300, V - 1)
        self.coef = torch.randn(N) * torch.where(tile_n == 1, 1e-2, 1.0)
        self.softcap, self.logit_scale, self.temperature, self.width = (
            softcap,
            logit_scale,
            temperature,
            width,
        )

    def rounded(self, dtype):
        """Its numbers as a dtype holds them."""
        self.hidden, self.weight = self.hidden.to(dtype), self.weight.to(dtype)
        self.bias = None if self.bias is None else self.bias.to(dtype)
        return self

    def logits(self, dtype):
        """z and dz/da, [N, V]."""
        a = self.hidden.to(dtype) @ self.weight.to(dtype).T
        a = (a if self.bias is None else a + self.bias.to(dtype)) * self.logit_scale
        if self.softcap is None:
            return a / self.temperature, torch.full_like(a, self.logit_scale / self.temperature)
        t = torch.tanh(a / self.softcap)
        return self.softcap * t / self.temperature, (
            1 - t * t
        ) * self.logit_scale / self.temperature

    @property
    def scored(self):
        return self.target != -100

    def forward(self):
        """tops [N, blocks] and lse [N] in nats, float64: what a forward leaves."""
        z, _ = self.logits(torch.float64)
        lse = z.logsumexp(1)
        z = z.scatter(1, self.target.clamp(min=0).unsqueeze(1), -math.inf)
        return torch.stack([block.amax(1) for block in z.split(self.width, 1)], 1), lse

    def active(self, eps):
        """The definition, tile by tile, over the scored rows."""
        tops, lse = self.forward()
        rows, V = self.scored.nonzero().squeeze(1), self.weight.shape[0]
        limit = eps * self.coef[rows].abs().max()
        lines = []
        for i in rows.split(TILE):
            line = []
            for j in range(math.ceil(V / TILE)):
                value = (
                    self.coef[i].abs() * torch.exp(tops[i, j * TILE // self.width] - lse[i])
                ).max()
                held = ((self.target[i] // TILE == j) & (self.coef[i] != 0)).any()
                assert limit == 0 or abs(math.log(max(value, 1e-300) / limit)) > 1e-4, (
                    "too close to tell"
                )
                line.append(bool(held or not value < limit))
            lines.append(line)
        return torch.tensor(lines)

    def gradients(self, eps, dtype=torch.float64):
        """dhidden, dweight, dbias in plain PyTorch, inactive tiles zeroed."""
        z, slope = self.logits(dtype)
        rows = self.scored.nonzero().squeeze(1)
        one = torch.zeros_like(z[rows]).scatter_(1, self.target[rows].unsqueeze(1), 1.0)
        g = self.coef[rows].to(dtype).unsqueeze(1) * slope[rows] * (one - torch.softmax(z[rows], 1))
        mask = (
            self.active(eps)
            .repeat_interleave(TILE, 0)[: len(rows)]
            .repeat_interleave(TILE, 1)[:, : z.shape[1]]
        )
        g = g * mask
        dhidden = torch.zeros_like(self.hidden, dtype=dtype)
        dhidden[rows] = g @ self.weight.to(dtype)
        return dhidden, g.T @ self.hidden[rows].to(dtype), g.sum(0)

    def head(self, device="cpu"):
        bias = None if self.bias is None else self.bias.to(device)
        return Head(
            self.weight.to(device), bias, self.logit_scale, self.softcap, self.temperature, -100
        )


def tiles_of(impl, problem):
    head = problem.head(device_of(impl))
    kind = TritonTiles if impl == "triton" else TorchTiles
    return type(kind.__name__, (kind,), {"top_width": problem.width})(head)


def run(impl, problem, eps=EPSILON, *, needs=ALL, budget=ROOM, tiles=None):
    """(dhidden, dweight, dbias) on the CPU, None where not needed, and the share."""
    tiles = tiles or tiles_of(impl, problem)
    device = device_of(impl)
    tops, lse = (x.float().to(device) * tiles.norm_per_nat for x in problem.forward())
    hidden, target, coef = (x.to(device) for x in (problem.hidden, problem.target, problem.coef))
    needs = (*needs[:2], needs[2] and problem.bias is not None)
    batch = batch_of_tiles(tiles, hidden, target, budget=budget, needs=needs, filter_eps=eps)
    grads, share = filtered_gradients(batch, coef, norm_of(lse), tops)
    return [None if x is None else x.cpu() for x in grads], share.item()


def least_budget(tiles):
    """What a slab of one tile of rows takes."""
    with pytest.raises(ValueError, match="at least") as error:
        check_slab(slab_batch(tiles, 1))
    return int(str(error.value).split("at least ")[1].split()[0])


def slab_batch(tiles, budget):
    """A batch without rows: what a slab takes does not depend on them."""
    weight = tiles.head.weight
    hidden = weight.new_empty(0, weight.shape[1])
    target = torch.empty(0, dtype=torch.int64, device=weight.device)
    return batch_of_tiles(tiles, hidden, target, budget=budget, filter_eps=0.0)


def check(found, problem, dtype, eps=EPSILON):
    exact, plain = problem.gradients(eps), problem.gradients(eps, dtype)
    for name, x, right, rough in zip(
        ("dhidden", "dweight", "dbias"), found, exact, plain, strict=True
    ):
        if x is not None:
            assert_within_budget(name, x, right, error(rough, right), dtype)


@pytest.mark.pairwise
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_inactive_tiles_alone_are_missing(impl, dtype, head):
    problem, eps = Problem(**HEADS[head]).rounded(dtype), 2.0**-6
    active = problem.active(eps)
    assert 0.2 < active.float().mean() < 0.8
    found, share = run(impl, problem, eps)
    assert share == pytest.approx(active.float().mean().item())
    check(found, problem, dtype, eps)
    unseen = (
        found[1][3 * TILE :],
        problem.gradients(0.0)[1][3 * TILE :],
    )  # no row tile has the last one active
    assert not unseen[0].any() and unseen[1].all()


@pytest.mark.parametrize("impl", IMPLS)
def test_float16(impl):
    problem = Problem(bias=True).rounded(torch.float16)
    check(run(impl, problem)[0], problem, torch.float16)


def test_float64():
    problem = Problem(bias=True).rounded(torch.float64)
    found, _ = run("torch", problem)
    assert all(
        error(x, exact) < 1e-6 for x, exact in zip(found, problem.gradients(EPSILON), strict=True)
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("shape", [(150, 400), (128, 128), (129, 257), (3, 50)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_and_widths_of_blocks(impl, shape, width):
    N, V = shape
    problem = Problem(N, V, 33, width=width)
    found, share = run(impl, problem)
    assert share == pytest.approx(problem.active(EPSILON).float().mean().item())
    check(found, problem, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_epsilon_of_zero_keeps_everything(impl):
    problem = Problem(bias=True)
    problem.coef[:TILE] = 0.0
    found, share = run(impl, problem, 0.0)
    assert share == 1.0
    check(found, problem, torch.float32, 0.0)
    device = device_of(impl)
    leaves = [x.to(device).requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
    logprobs = linear_logprobs(
        *leaves[:2], problem.target.to(device), bias=leaves[2], impl=impl
    ).logprobs
    for x, y in zip(
        found, torch.autograd.grad(logprobs, leaves, problem.coef.to(device)), strict=True
    ):
        assert error(x, y) < 1e-6


def test_both_implementations_agree():
    problem = Problem(bias=True, softcap=15.0)
    (left, share), (right, other) = run("torch", problem), run("triton", problem)
    assert share == other
    assert all(error(x, y) < 1e-6 for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("blind", [False, True], ids=["rows listed", "as on a GPU"])
@pytest.mark.parametrize("impl", IMPLS)
def test_ignored_rows_and_rows_without_coefficient(impl, blind, monkeypatch):
    problem = Problem()
    ignored = torch.randperm(200)[:30]
    clean = problem.hidden.clone()
    problem.target[ignored], problem.coef[ignored] = -100, math.nan
    problem.coef[torch.randperm(200)[:50]] = 0.0
    problem.target[ignored] = -100
    if blind:  # ignored rows stay where they are, as rows without a coefficient
        problem.coef[ignored] = 0.0
        same = Problem()
        same.__dict__.update(problem.__dict__, target=problem.target.where(problem.scored, 0))
        exact, active = same.gradients(EPSILON), same.active(EPSILON)
        patch_looks(monkeypatch, lambda x: False)
        problem.coef[ignored] = math.nan
    else:
        exact, active = problem.gradients(EPSILON), problem.active(EPSILON)
    forward = problem.forward()
    problem.hidden = clean.index_fill(0, ignored, math.nan)
    monkeypatch.setattr(
        problem, "forward", lambda: tuple(x.index_fill(0, ignored, math.nan) for x in forward)
    )
    found, share = run(impl, problem)
    assert share == pytest.approx(active.float().mean().item())
    assert not found[0][ignored].any()
    assert error(found[0], exact[0]) < 1e-6 and error(found[1], exact[1]) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_keeps_its_tile_while_it_has_a_coefficient(impl):
    problem = Problem(N=128, V=384)
    problem.target.fill_(3)
    problem.coef.fill_(1.0)
    assert problem.active(EPSILON).tolist() == [[True, False, True]]
    for target, share in ((127, 2 / 3), (128, 1.0), (255, 1.0), (256, 2 / 3)):
        problem.target[7] = target
        assert run(impl, problem, needs=(True, False, False))[1] == pytest.approx(share), target
    problem.target[7] = 200
    check(run(impl, problem)[0], problem, torch.float32)
    problem.coef[7] = 0.0
    assert run(impl, problem)[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_of_another_part_of_the_vocabulary_match_no_tile(impl):
    problem = Problem(N=128, V=512)
    problem.coef.fill_(1.0)
    problem.target.fill_(3)
    tops, lse = problem.forward()
    expected, _ = run(impl, problem)
    problem.target[:64] = -2
    problem.forward = lambda: (tops, lse)
    found, share = run(impl, problem)
    assert share == 0.5
    difference = torch.zeros(128, 40).index_fill(0, torch.arange(64), 1.0) * problem.weight[3]
    assert error(found[0], expected[0] - difference) < 1e-6


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_needed_is_not_made(impl, needs):
    problem = Problem(bias=True)
    found, _ = run(impl, problem, needs=needs)
    assert [x is not None for x in found] == list(needs)
    check(found, problem, torch.float32)


def test_inactive_tiles_of_the_slab_are_not_written_and_active_ones_are_zero_past_the_end():
    from treg_kernels.filtered import filtered_gradients, slab_shape
    from treg_kernels.tiles import Scalars

    problem = Problem(N=140, V=300)
    names = ("hidden", "weight", "target", "coef")
    hidden, weight, target, coef = (getattr(problem, name).to(DEVICE) for name in names)
    norm = norm_of(problem.forward()[1].float().to(DEVICE) * TritonTiles.norm_per_nat)
    slab = torch.full(slab_shape(140, 300), 7.0, device=DEVICE)
    active = torch.tensor([[True, False, True], [False, True, True]], device=DEVICE)
    filtered_gradients(
        hidden,
        weight,
        target,
        None,
        Scalars.of(1.0, None, 1.0),
        norm,
        coef,
        active,
        slab,
        None,
        None,
        None,
        add=False,
    )
    tiles = slab.cpu().unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).transpose(1, 2)
    assert ((tiles == 7.0).all((2, 3)) == ~active.cpu()).all() and not (
        tiles[active.cpu()] == 7.0
    ).any()
    last = tiles[1, 2]
    assert not last[12:].any() and not last[:, 44:].any() and last[:12, :44].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slabs_of_rows_add_up_in_float32(dtype, poisoned):
    problem = Problem(bias=True).rounded(dtype)
    eps, tiles = 2.0**-6, tiles_of("triton", problem)
    budget = least_budget(tiles)
    found, share = run("triton", problem, eps, budget=budget)
    whole, same = run("triton", problem, eps)
    assert whole[1].dtype == dtype and found[1].dtype == torch.float32
    assert share == same and torch.equal(found[0], whole[0])
    check(found, problem, dtype, eps)
    assert error(found[1], whole[1]) < 2 * EPS[dtype]


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_every_time(impl, poisoned):
    problem = Problem(bias=True)
    first, again = run(impl, problem)[0], run(impl, problem)[0]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_operands(impl):
    problem = Problem()
    expected, _ = run(impl, problem)
    problem.hidden = problem.hidden.T.contiguous().T
    problem.weight = torch.cat([problem.weight, problem.weight], 1)[:, :40]
    found, _ = run(impl, problem)
    assert all(error(x, y) < 1e-6 for x, y in zip(found[:2], expected[:2], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_never_dropped(impl):
    for name in ("hidden", "coef"):
        problem = Problem()
        forward = problem.forward()
        getattr(problem, name)[7] = math.nan
        if name == "hidden":
            problem.forward = lambda f=forward: tuple(
                x.index_fill(0, torch.tensor([7]), math.nan) for x in f
            )
        found, _ = run(impl, problem)
        assert found[0][7].isnan().all() and found[1].isnan().all(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_do(impl):
    for problem in (Problem(N=4, bias=True), Problem(N=4, bias=True), Problem(N=0, bias=True)):
        problem.coef.zero_()
        found, _ = run(impl, problem)
        assert not any(x.any() for x in found)
        problem.target.fill_(-100)
    problem = Problem(N=4, bias=True)
    problem.target.fill_(-100)
    found, share = run(impl, problem)
    assert not any(x.any() for x in found) and share in (0.0, 1.0)


@pytest.mark.parametrize("V", [5, 128, 300])
def test_tops_of_blocks(V):
    z, target = torch.randn(7, V), torch.randint(0, V, (7, 1))
    before = z.clone()
    found = block_tops(z, target, 128)
    assert torch.equal(z, before)
    for t in range(7):
        for j in range(math.ceil(V / 128)):
            columns = [v for v in range(j * 128, min(V, j * 128 + 128)) if v != target[t]]
            assert found[t, j] == before[t, columns].max()


def test_tops_of_a_target_alone():
    assert block_tops(torch.zeros(1, 129), torch.tensor([[128]]), 128).tolist() == [
        [0.0, -math.inf]
    ]


@pytest.mark.parametrize("eps", [-0.1, 1.0, math.nan, math.inf])
def test_an_epsilon_that_is_no_share_is_refused(eps):
    problem = Problem()
    with pytest.raises(ValueError, match=r"filter_eps: expected (0 <= value < 1|a finite number)"):
        linear_logprobs(problem.hidden, problem.weight, problem.target, filter_eps=eps)


def test_a_budget_below_one_row_of_tiles_is_refused():
    tiles = tiles_of("triton", Problem())
    least = least_budget(tiles)
    check_slab(slab_batch(tiles, least))
    with pytest.raises(
        ValueError, match=rf"memory_budget: filter_eps needs at least {least} bytes"
    ):
        check_slab(slab_batch(tiles, least - 1))


@pytest.mark.gpu
def test_a_cuda_graph_replays_it():
    problem = Problem(bias=True).rounded(torch.bfloat16)
    expected, share = run("triton", problem)
    tiles = tiles_of("triton", problem)
    tops, lse = (x.float().to(DEVICE) * tiles.norm_per_nat for x in problem.forward())
    hidden, target, coef = (x.to(DEVICE) for x in (problem.hidden, problem.target, problem.coef))
    rows = torch.zeros_like(coef)

    batch = batch_of_tiles(tiles, hidden, target, budget=ROOM, needs=ALL, filter_eps=EPSILON)

    def call():
        return filtered_gradients(batch, rows, norm_of(lse), tops)

    assert GPU
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads, active = call()
    rows.copy_(coef)  # other coefficients, another choice of tiles
    graph.replay()
    assert active.item() == share
    assert all(torch.equal(x.cpu(), y) for x, y in zip(grads, expected, strict=True))
