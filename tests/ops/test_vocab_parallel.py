"""A vocabulary-parallel head on 2 and 3 processes, both implementations, against the dense
reference in float64.
"""

import itertools
import re
import subprocess
import sys

import processes
import pytest
import torch
import vocab_parallel_worker as worker
from helpers import EPS, assert_within_budget, check_against_reference, error
from surroundings import environment
from vocab_parallel_worker import CALLS, FAR, SIZES, N, case_of, only, upstream

from treg import linear_logprobs
from treg.ops import LinearLogprobs, TRegLoss, reference


@pytest.fixture(scope="module", params=sorted(SIZES), ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    """What each rank got, in order."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    processes.run(worker.__file__, folder, ranks=world, env={"TRITON_INTERPRET": "1"})
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


def joined(parts: list[dict]) -> dict[str, torch.Tensor]:
    """One process's results from those of all: dweight and dbias in parts, everything else the same
    bits.
    """
    found = {}
    for name, first in parts[0].items():
        if name in ("dweight", "dbias"):
            found[name] = torch.cat([part[name] for part in parts])
            continue
        found[name] = first
        for part in parts[1:]:
            assert torch.equal(part[name], first) or (
                first.isnan().any() and part[name].isnan().any()
            ), name
    return found


class Recorded(torch.autograd.Function):
    """A result and the gradients that were taken elsewhere."""

    @staticmethod
    def forward(ctx, result, gradients, *leaves):
        ctx.gradients = gradients
        return result.clone()

    @staticmethod
    def backward(ctx, _):
        return None, None, *ctx.gradients


def recorded(found: dict[str, torch.Tensor]):
    """The function of a case that gives what was found."""

    def fn(hidden, weight, bias=None, **_):
        leaves = {"dhidden": hidden, "dweight": weight, "dbias": bias}
        gradients = tuple(None if x is None else found.get(name) for name, x in leaves.items())
        values = {k: x for k, x in found.items() if k not in leaves}
        carrier = "loss" if "loss" in values else "logprobs"
        values[carrier] = Recorded.apply(values[carrier], gradients, *leaves.values())
        return (TRegLoss if carrier == "loss" else LinearLogprobs)(**values)

    return fn


@pytest.mark.parametrize("name", [name for name in CALLS if FAR not in name])
def test_parts_are_the_whole(ranks, name):
    """Values within the budget of one process's; gradients too, in parts or summed; no more
    collectives than said.
    """
    world, call = len(ranks), CALLS[name]
    parts = [rank[name] for rank in ranks]
    found = joined([part["found"] for part in parts])
    plain = reference.linear_logprobs if call.loss is None else reference.fused_treg_loss
    case = case_of(name, world)
    if call.needs:
        check_against_reference(
            case, recorded(found), only(plain, call.needs), upstream, call.dtype, "cpu"
        )
    else:
        exact = plain(case.hidden.double(), case.weight.double(), **case.rest)
        for key, x in found.items():
            assert_within_budget(key, x, getattr(exact, key), 0.0, torch.float32)
    for part in parts:
        assert len(part["gathers"]) == 1 and part["gathers"][0] <= 9 * N
        wide = torch.float64 if call.dtype == torch.float64 else torch.float32
        assert part["sums"] == [(case.hidden.numel(), wide)] * ("hidden" in call.needs)
        kept, count = part["kept"][0] if part["kept"] else (0, N)
        assert {"all": kept == count, "some": 0 < kept < count, "none": kept == 0}[call.kept], (
            kept,
            count,
        )


@pytest.mark.parametrize("name", ["plain", "every option and output", "some kept", "far apart"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_as_in_one_process(ranks, impl, name):
    name = f"{impl}: {name}"
    found = joined([rank[name]["found"] for rank in ranks])
    case = case_of(name, len(ranks)).at(torch.float32)
    for key, x in case.run(linear_logprobs, upstream, impl=impl).items():
        assert error(found[key], x) < 1e-6, key


def test_matrix_products(ranks):
    """Of each rank's own part: 1 forward only, 3 with a trainable head, 2 with a frozen one; 1 more
    where not kept.
    """
    for rank in ranks:
        scored = {"torch: forward only": 1, "torch: plain": 3, f"torch: {FAR}": 4}
        for name, products in scored.items():
            count = int((case_of(name, len(ranks)).rest["target"] != -100).sum())
            assert rank[name]["products"] == products * count, name
        kept, count = rank["torch: orpo"]["kept"][0]
        assert rank["torch: orpo"]["products"] == 4 * count - kept
        assert rank["torch: ipo, frozen head"]["products"] == 2 * count


def test_nearly_certain_targets_keep_their_relative_accuracy(ranks):
    """In Triton, whose log-probs of one process do."""
    name = "triton: nearly certain"
    found = joined([rank[name]["found"] for rank in ranks])["logprobs"].double()
    case = case_of(name, len(ranks))
    scored = case.rest["target"] != -100
    z = case.hidden.double() @ case.weight.double().T
    y = case.rest["target"].clamp(min=0).unsqueeze(-1)
    others = z.scatter(1, y, -float("inf")).logsumexp(1) - z.gather(1, y).squeeze(1)
    exact = -others.exp().log1p()[scored]
    assert -1e-11 < exact.max() < 0 and not found[~scored].any()
    assert (found[scored] / exact - 1).abs().max() < 1e-5


def test_gaps_beyond_the_range_of_exp(ranks):
    """Targets whose rank has e^-1500 of the probability, of which float64 has none either."""
    for impl, kept in itertools.product(("torch", "triton"), ("far apart", FAR)):
        name = f"{impl}: {kept}"
        found = joined([rank[name]["found"] for rank in ranks])
        exact = case_of(name, len(ranks)).at(torch.float64).run(reference.linear_logprobs, upstream)
        assert found["logprobs"].min() < -745
        for key, x in exact.items():
            assert error(found[key], x) < 4e-6, (name, key)


def test_backward_twice(ranks):
    for rank in ranks:
        first, second, double = rank["twice"]
        for a, b, c in zip(first, second, double, strict=True):
            assert a.any() and torch.equal(a, b) and error(c, 2 * a) < 1e-6


def test_autocast(ranks):
    """Operands in bfloat16, gradients in float32, one rounding to bfloat16 of the sum over
    ranks.
    """
    found = joined([rank["autocast"] for rank in ranks])
    case = case_of("torch: bfloat16", len(ranks)).at(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(case.hidden, case.weight, case.rest["target"], bias=case.bias)
    upstream(out).backward()
    assert error(found["logprobs"], out.logprobs) < 1e-6
    for name, leaf in (("dhidden", case.hidden), ("dweight", case.weight)):
        assert found[name].dtype == torch.float32
        assert error(found[name], leaf.grad) < 2 * EPS[torch.bfloat16]


def test_no_rows(ranks):
    for rank in ranks:
        shape, dweight = rank["no_rows"]
        assert shape == (0,) and not dweight.any()


def test_replicated_weight_is_one_process(ranks):
    case = case_of("torch: plain", len(ranks)).at(torch.float32)
    exact = case.run(linear_logprobs, upstream)
    for rank, (name, x) in itertools.product(ranks, exact.items()):
        assert torch.equal(rank["replicated"][name], x), name


def test_impossible_targets_give_nan_not_a_number(ranks):
    """Where nobody looks at values: row 1 is one that no rank holds, or that differs among the
    ranks.
    """
    for rank in ranks:
        found = rank["not_a_number"]
        for impl, why in itertools.product(("torch", "triton"), ("none", "differ")):
            for name in ("logprobs", "lse", "entropy", "log_sum_sq_probs"):
                x = found[f"{impl} {why} {name}"]
                assert x[1].isnan() and torch.isfinite(x[[0, 2]]).all() and x[3] == 0, (
                    impl,
                    why,
                    name,
                )
            assert found[f"{impl} {why} dhidden"][1].isnan().all()
            assert torch.isfinite(found[f"{impl} {why} dhidden"][[0, 2, 3]]).all()
            assert found[f"{impl} {why} dweight"].isnan().all()


REFUSED = {
    "outputs": r"outputs: .*log_sum_sq_probs.*with a shard, got \['is_top1'\]",
    "negative target": (
        r"target: expected values >= 0 or ignore_index=-100, got -2 at index \[2\]"
    ),
    "target on no rank": (
        r"target: expected ids that one rank holds, got (10|15) at row 2, "
        r"which 0 ranks hold.*shard"
    ),
    "overlap": (
        r"shard: expected the ranks' rows one after the other, from 0 on, "
        r"got \[\(0, 5\), \(0, 5\)"
    ),
    "gap": (
        r"shard: expected the ranks' rows one after the other, from 0 on, "
        r"got \[\(0, 5\), \(6, 11\)"
    ),
    "other targets": (
        r"target: expected the same rows on every rank.*row 1.*weight\.full_tensor\(\)"
    ),
    "shard": r"shard: expected a VocabShard or None, got int",
    "start": r"start: expected an int >= 0, got -1",
    "group": r"group: expected a ProcessGroup .*, got 'world'",
    "foreign group": r"group: expected a ProcessGroup that this process is in",
    "Shard(1)": (
        r"weight: expected .*Replicate\(\), or Shard\(0\) .*"
        r"got .*Shard\(dim=1\).*full_tensor"
    ),
    "Partial": r"weight: expected .*got .*Partial.*weight\.full_tensor\(\)",
    "two dimensions": (
        r"weight: expected .*one dimension, got .*mesh of 2 dimensions; "
        r"pass .*shard=VocabShard"
    ),
    "hidden": (r"hidden: expected .*Replicate\(\), got .*Shard\(dim=0\).*hidden\.full_tensor\(\)$"),
    "shard and DTensor": r"shard: expected None beside a DTensor",
    "bias alone": (
        r"bias: expected a plain tensor, or a DTensor with the mesh and placements of weight"
    ),
    "empty part": (
        r"weight: expected a DTensor of parts of 2 rows, .*not empty, "
        r"got \[4, 3\] over 3 ranks"
    ),
    "other parts": (
        r"weight: expected a DTensor of parts of .* "
        r"pass weight\.to_local\(\) and shard=VocabShard"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_on_every_rank(ranks, name):
    for i, rank in enumerate(ranks):
        found = rank["refused"][name]
        if found == "":  # nothing to refuse in this group, or on its first rank
            assert (name == "empty part" and len(ranks) == 2) or (
                name == "foreign group" and i == 0
            )
            continue
        assert re.search(REFUSED[name], found), found


def test_dtensors_are_imported_by_who_makes_them():
    code = "import sys, treg.ops; assert 'torch.distributed.tensor' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_a_process_group():
    with pytest.raises(
        ValueError, match=r"group: expected an initialized process group; call .*init_process_group"
    ):
        worker.VocabShard(0)
