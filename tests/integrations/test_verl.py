"""verl's fused head and reward managers, served by treg: against dense PyTorch, and against `treg
annotate`.

Runs against verl itself where it can be imported. Elsewhere a stub stands in, with the signatures,
layouts and order of calls of verl 0.9.1: utils/kernel/linear_cross_entropy.py,
models/transformers/dense_common.py, experimental/reward_loop/reward_manager (base.py, naive.py),
experimental/agent_loop/agent_loop.py, protocol.py.
"""

import asyncio
import importlib
import runpy
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torch.distributed as dist
from helpers import EPS, assert_within_budget, error
from tiny import tiny_llama, tiny_tokenizer

import treg.ops.entropy
from treg.data import RowProblem
from treg.data.annotated import read_annotated
from treg.integrations import verl as integration
from treg.rewards.annotate import annotate

try:
    import verl  # noqa: F401

    REAL = True
except ImportError:
    REAL = False

KERNEL = "verl.utils.kernel.linear_cross_entropy"
MANAGERS = "verl.experimental.reward_loop.reward_manager"
AGENT_LOOP = "verl.experimental.agent_loop.agent_loop"
# needs Megatron; what matters here is that it imports by value
FUSED = "verl.models.mcore.model_forward_fused"


def stub_modules() -> dict[str, ModuleType]:
    """verl as far as treg sees it."""
    pydantic = pytest.importorskip("pydantic")

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
        ):
            raise AssertionError("verl's own kernel needs a GPU")

    class NaiveRewardManager:
        def __init__(
            self,
            config,
            tokenizer,
            compute_score,
            reward_router_address=None,
            reward_model_tokenizer=None,
        ):
            self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

        async def run_single(self, data):
            item = data[-1:][0]
            width = item.batch["responses"].shape[-1]
            length = item.batch["attention_mask"][-width:].sum()
            score = self.compute_score(
                data_source=item.non_tensor_batch["data_source"],
                solution_str=self.tokenizer.decode(
                    item.batch["responses"][:length], skip_special_tokens=True
                ),
                ground_truth=item.non_tensor_batch["reward_model"]["ground_truth"],
                extra_info=item.non_tensor_batch.get("extra_info", {}),
            )
            return {"reward_score": score, "reward_extra_info": {"acc": score}}

    class AgentLoopOutput(pydantic.BaseModel):
        prompt_ids: list[int]
        response_ids: list[int]
        response_mask: list[int]
        reward_score: float | None = None
        metrics: dict

        def as_dict(self):
            output = self.model_dump(exclude_unset=True)
            for name, source in (("prompts", "prompt_ids"), ("responses", "response_ids")):
                output[name] = torch.tensor(output.pop(source), dtype=torch.int64)
            output["response_mask"] = torch.tensor(output["response_mask"], dtype=torch.int64)
            score = output.pop("reward_score", None)
            if score is not None:
                output["rm_scores"] = torch.zeros_like(output["response_mask"], dtype=torch.float32)
                output["rm_scores"][-1] = score
            return output

    found = {name: ModuleType(name) for name in (KERNEL, MANAGERS, AGENT_LOOP)}
    found[KERNEL].LinearCrossEntropy = LinearCrossEntropy
    found[KERNEL].linear_cross_entropy = LinearCrossEntropy.apply
    found[MANAGERS].get_reward_manager_cls = {"naive": NaiveRewardManager}.__getitem__
    found[AGENT_LOOP].AgentLoopOutput = AgentLoopOutput
    for name in list(found):
        for parent in ("verl", *(name.rsplit(".", n)[0] for n in range(1, name.count(".")))):
            found.setdefault(parent, ModuleType(parent))
    found["verl"].__version__ = "0.9.1"
    return found


class StubProto:
    """DataProto: rows by a slice, one row without its batch dimension by an index."""

    def __init__(self, batch, non_tensor_batch):
        self.batch, self.non_tensor_batch = batch, non_tensor_batch

    def __getitem__(self, at):
        return StubProto(
            *({k: x[at] for k, x in part.items()} for part in (self.batch, self.non_tensor_batch))
        )


@pytest.fixture
def verl_modules(monkeypatch):
    """verl's modules, with one that imported the kernel by value; what is patched in them is
    undone.
    """
    if not REAL:
        for name, module in stub_modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    loop = asyncio.new_event_loop()  # verl's managers keep the one in which they are made
    asyncio.set_event_loop(loop)
    kernel, agent_loop = importlib.import_module(KERNEL), importlib.import_module(AGENT_LOOP)
    importlib.import_module(MANAGERS)
    monkeypatch.setattr(kernel, "linear_cross_entropy", kernel.linear_cross_entropy)
    monkeypatch.setattr(agent_loop.AgentLoopOutput, "as_dict", agent_loop.AgentLoopOutput.as_dict)
    fused = ModuleType(FUSED)
    fused.linear_cross_entropy = kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, FUSED, fused)
    yield SimpleNamespace(kernel=kernel, agent_loop=agent_loop, fused=fused)
    asyncio.set_event_loop(None)
    loop.close()


def dense(hidden, weight, labels, temperature=1.0, widen=False):
    """Log-probs and entropies [N]. widen: from logits of 16 bits in float32, as trainers do."""
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.T
    logp = ((logits.float() if widen else logits) / temperature).log_softmax(-1)
    return logp.gather(-1, labels.reshape(-1, 1))[:, 0], -(logp.exp() * logp).sum(-1)


def make_inputs(*shape, dtype=torch.float64, D=12, V=40):
    hidden = (2 * torch.randn(*shape, D)).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, shape)


def assert_same(actual, expected, leaves, tolerance, seed=1):
    """Log-probs, entropies, and the gradients of a mixture of both in every leaf."""
    generator = torch.Generator().manual_seed(seed)
    mixes = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in expected]
    grads = []
    for found in (actual, expected):
        total = sum((mix * x.double()).sum() for mix, x in zip(mixes, found, strict=True))
        grads.append(torch.autograd.grad(total, leaves))
    for a, b in zip((*actual, *grads[0]), (*expected, *grads[1]), strict=True):
        assert error(a, b) <= tolerance


# -- the op


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [100, 3], ids=["one chunk", "chunks"])
def test_op_is_dense(shape, temperature, rows, monkeypatch):
    hidden, weight, labels = make_inputs(*shape)
    monkeypatch.setattr(treg.ops.entropy, "_tile_rows", lambda *args: rows)
    found = integration.linear_cross_entropy(hidden, weight, labels, temperature, "none")
    assert [list(x.shape) for x in found] == [[labels.numel()]] * 2
    assert_same(found, dense(hidden, weight, labels, temperature), (hidden, weight), 1e-12)


def results(fn, hidden, weight, labels, temperature) -> list[torch.Tensor]:
    """Log-probs, entropies, and the gradients of a mixture of both."""
    found = fn(hidden, weight, labels, temperature)
    mixes = torch.randn(2, labels.numel(), generator=torch.Generator().manual_seed(1))
    total = sum((mix * x).sum() for mix, x in zip(mixes, found, strict=True))
    return [*found, *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_errs_as_little_as_plain_pytorch(dtype):
    hidden, weight, labels = make_inputs(50, dtype=dtype)
    exact = results(
        dense, *(x.detach().double().requires_grad_() for x in (hidden, weight)), labels, 0.7
    )
    plain = results(lambda h, w, *rest: dense(h, w, *rest, widen=True), hidden, weight, labels, 0.7)
    found = results(integration.linear_cross_entropy, hidden, weight, labels, 0.7)
    assert found[0].dtype == found[1].dtype == torch.float32
    for name, a, b, c in zip(
        ("logprobs", "entropy", "dhidden", "dweight"), found, exact, plain, strict=True
    ):
        assert_within_budget(name, a, b, error(c, b), dtype)


def test_op_under_autocast():
    """The operands are rounded once, as those of a linear layer are."""
    hidden, weight, labels = make_inputs(50, dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = results(integration.linear_cross_entropy, *rounded, labels, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(integration.linear_cross_entropy, hidden, weight, labels, 0.7)
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(found[2:], expected[2:], strict=True):
        # not rounded to 16 bits, as those of bfloat16 operands are
        assert a.dtype == torch.float32 and b.dtype == torch.bfloat16
        assert error(a, b) < EPS[torch.bfloat16]


@pytest.mark.parametrize("reduction", ["sum", "mean", "SUM", None])
def test_reductions(reduction):
    hidden, weight, labels = make_inputs(6)
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels, None, reduction)
    expected = dense(hidden, weight, labels)[0]
    reduced = {"sum": expected.sum(), "mean": expected.mean(), "none": expected}[
        (reduction or "none").lower()
    ]
    torch.testing.assert_close(logps, reduced)
    assert entropy.shape == (6,)


def test_entropy_gradient_of_a_frozen_head():
    hidden, weight, labels = make_inputs(6)
    frozen = weight.detach()
    found = integration.linear_cross_entropy(hidden, frozen, labels)
    assert_same(found, dense(hidden, frozen, labels), (hidden,), 1e-12)


@pytest.mark.parametrize(
    "coefficient", [0.0, None], ids=["entropy_coeff 0", "no entropy in the loss"]
)
def test_entropy_that_is_not_asked_for_costs_nothing(coefficient, monkeypatch):
    def no_products(*args):
        raise AssertionError("logits were made again")

    monkeypatch.setattr(treg.ops.entropy, "logits_into", no_products)
    hidden, weight, labels = make_inputs(6)
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels)
    loss = logps.sum() if coefficient is None else logps.sum() - coefficient * entropy.mean()
    expected = torch.autograd.grad(dense(hidden, weight, labels)[0].sum(), (hidden, weight))
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert error(a, b) <= 1e-12


def test_labels_that_are_ignored():
    hidden, weight, labels = make_inputs(6)
    labels[[1, 4]] = -100
    kept = labels != -100
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels)
    assert not logps[~kept].any() and not entropy[~kept].any()
    expected = dense(hidden[kept], weight, labels[kept])
    actual = torch.autograd.grad((logps + 2 * entropy).sum(), (hidden, weight))
    for a, b in zip(
        actual,
        torch.autograd.grad((expected[0] + 2 * expected[1]).sum(), (hidden, weight)),
        strict=True,
    ):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_ignored_rows_hold_has_no_part(value):
    """1e6: logits whose exponential overflows."""
    hidden, weight, labels = make_inputs(6, dtype=torch.float32)
    labels[[1, 4]] = -100
    kept = labels != -100
    with torch.no_grad():
        hidden[~kept] = value
    logps, entropy = integration.linear_cross_entropy(hidden, weight, labels, 0.7)
    found = torch.autograd.grad((logps + 2 * entropy).sum(), (hidden, weight))
    assert not logps[~kept].any() and not entropy[~kept].any() and not found[0][~kept].any()
    rest = hidden.detach()[kept].requires_grad_()
    logps, entropy = dense(rest, weight, labels[kept], 0.7)
    expected = torch.autograd.grad((logps + 2 * entropy).sum(), (rest, weight))
    assert error(found[0][kept], expected[0]) <= 1e-5
    assert error(found[1], expected[1]) <= 1e-5


def rowwise_temperature(shape):
    """Of few values, as of packed sequences that were sampled at different temperatures."""
    rows = torch.arange(int(np.prod(shape)))
    return torch.tensor([0.7, 1.0, 2.5])[rows % 3].reshape(shape)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 2)], ids=str)
@pytest.mark.parametrize("form", ["as labels", "flat", "equal"])
def test_a_temperature_for_each_row(shape, form):
    hidden, weight, labels = make_inputs(*shape)
    temperature = torch.full(shape, 0.7) if form == "equal" else rowwise_temperature(shape)
    given = temperature.reshape(-1) if form == "flat" else temperature
    labels.reshape(-1)[2] = -100
    scored = labels.reshape(-1) != -100
    found = integration.linear_cross_entropy(hidden, weight, labels, given)
    expected = dense(hidden, weight, labels.clamp(min=0), temperature.reshape(-1, 1).double())
    zero = torch.zeros((), dtype=torch.float64)
    expected = [torch.where(scored, x, zero) for x in expected]
    assert_same(found, expected, (hidden, weight), 1e-7)  # float32 holds 0.7 to 1e-8


def test_a_temperature_for_each_row_and_a_reduction():
    hidden, weight, labels = make_inputs(6)
    temperature = rowwise_temperature((6,)).double()
    found = integration.linear_cross_entropy(hidden, weight, labels, temperature, "mean")
    logps, entropy = dense(hidden, weight, labels, temperature[:, None])
    assert_same(found, (logps.mean(), entropy), (hidden, weight), 1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_temperature_of_one_element(shape):
    hidden, weight, labels = make_inputs(5)
    temperature = torch.full(shape, 0.7, dtype=torch.float64)
    found = integration.linear_cross_entropy(hidden, weight, labels, temperature)
    assert_same(found, dense(hidden, weight, labels, 0.7), (hidden, weight), 1e-12)


@pytest.mark.parametrize(
    "temperature, message",
    [
        (torch.ones(3), r"shape \[2, 3\] \(that of labels\), \[6\] or one element, got \[3\]"),
        (torch.ones(3, 2), r"or one element, got \[3, 2\]"),
        (torch.ones(0), r"or one element, got \[0\]"),
        (torch.tensor([1.0, 1, 1, 1, float("nan"), 1]), "expected finite values > 0, got nan"),
        (torch.tensor([1.0, 1, 1, 1, float("inf"), 1]), "expected finite values > 0, got inf"),
        (torch.tensor([1.0, 1, 1, 0.0, 1, 1]), r"expected finite values > 0, got 0\.0"),
        (torch.tensor([1.0, 1, 1, -0.5, 1, 1]), r"expected finite values > 0, got -0\.5"),
        (torch.tensor(0.0), "expected a finite number > 0, got 0.0"),
        (0.0, "expected a finite number > 0, got 0.0"),
        (torch.ones(6, dtype=torch.bool), "expected a number or a tensor of numbers"),
        (torch.ones(6, dtype=torch.complex64), "expected a number or a tensor of numbers"),
    ],
)
def test_temperatures_that_are_refused(temperature, message):
    hidden, weight, labels = make_inputs(2, 3)
    with pytest.raises(ValueError, match=f"temperature: .*{message}"):
        integration.linear_cross_entropy(hidden, weight, labels, temperature)


def test_a_temperature_that_wants_a_gradient_is_refused():
    """It would be lost."""
    hidden, weight, labels = make_inputs(2, 3)
    temperature = torch.ones(6, requires_grad=True)
    with pytest.raises(ValueError, match="temperature: expected no gradient"):
        integration.linear_cross_entropy(hidden, weight, labels, temperature)


def train(hidden, weight, labels, group=None) -> dict[str, torch.Tensor]:
    """Log-probs, entropies, and gradients of a loss of both."""
    temperature = rowwise_temperature(labels.shape)
    logps, entropy = integration.linear_cross_entropy(
        hidden, weight, labels, temperature, "none", group
    )
    loss = (torch.arange(labels.numel()) * logps).sum() - 3.0 * entropy.square().sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return dict(
        zip(("logps", "entropy", "dhidden", "dweight"), (logps, entropy, *grads), strict=True)
    )


def seeded_inputs():
    torch.manual_seed(5)
    return make_inputs(9)


def vocabulary_worker(rank: int, size: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    hidden, weight, labels = seeded_inputs()
    part = weight.detach().chunk(size)[rank].clone().requires_grad_()
    torch.save(train(hidden, part, labels, dist.group.WORLD), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_op_over_a_split_vocabulary(tmp_path):
    workers = [processes.start(__file__, "2", tmp_path, rank) for rank in range(2)]
    processes.wait_for_all(workers, 120)
    assert [worker.wait() for worker in workers] == [0, 0], workers[0].said() + workers[1].said()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = train(*seeded_inputs())
    for one in found:
        assert error(one["logps"], expected["logps"]) <= 1e-12
        assert error(one["entropy"], expected["entropy"]) <= 1e-12
    assert error(found[0]["dhidden"] + found[1]["dhidden"], expected["dhidden"]) <= 1e-12
    assert error(torch.cat([one["dweight"] for one in found]), expected["dweight"]) <= 1e-12


def test_op_refuses():
    hidden, weight, labels = make_inputs(3)
    with pytest.raises(
        ValueError, match="reduction: expected 'none', 'sum' or 'mean', got 'batchmean'"
    ):
        integration.linear_cross_entropy(hidden, weight, labels, 1.0, "batchmean")
    with pytest.raises(ValueError, match="target: expected values in"):
        integration.linear_cross_entropy(hidden, weight, labels + weight.shape[0])


# -- where verl looks it up
# -


def stub_forward(
    self, input_ids, attention_mask=None, position_ids=None, temperature=1.0, return_dict=None, **_
):
    """verl.models.transformers.dense_common.forward_with_triton_backend."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    hidden = self.model(
        input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    )[0]
    rolled = torch.roll(input_ids, shifts=-1, dims=-1)
    log_probs, entropy = linear_cross_entropy(
        hidden, self.lm_head.weight, rolled, temperature, "none"
    )
    return SimpleNamespace(log_probs=log_probs, entropy=entropy)


@pytest.mark.parametrize("entropy_coeff", [0.0, 0.3])
def test_policy_step_through_verls_forward(entropy_coeff, verl_modules):
    """Remove-padding mode: one row of packed sequences; loss and every gradient of a
    policy-gradient step.
    """
    forward = stub_forward
    if REAL:
        from verl.models.transformers.dense_common import forward_with_triton_backend as forward
    integration.install_op()
    model = tiny_llama(48, hidden_size=16, intermediate_size=32).double()
    ids, temperature, advantage = torch.randint(48, (1, 12)), 0.8, torch.randn(12).double()
    position = torch.cat([torch.arange(7), torch.arange(5)])[None]
    # as verl's fsdp engine takes them out of the model's output
    output = forward(
        model,
        input_ids=ids,
        attention_mask=None,
        position_ids=position,
        temperature=temperature,
        use_cache=False,
        return_dict=True,
    )
    log_probs, entropy = output.log_probs.squeeze(0), output.entropy.squeeze(0)
    loss = -(advantage * log_probs).mean() - entropy_coeff * entropy.mean()

    hidden = model.model(ids, position_ids=position, use_cache=False)[0]
    expected = dense(hidden, model.lm_head.weight, torch.roll(ids, -1, -1), temperature)
    oracle = -(advantage * expected[0]).mean() - entropy_coeff * expected[1].mean()
    torch.testing.assert_close(loss, oracle)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(oracle, parameters), strict=True
    ):
        assert error(a, b) <= 1e-10


def test_install_op_reaches_modules_that_imported_by_value(verl_modules):
    integration.install_op()
    assert verl_modules.kernel.linear_cross_entropy is integration.linear_cross_entropy
    assert verl_modules.fused.linear_cross_entropy is integration.linear_cross_entropy
    integration.install_op()
    assert verl_modules.kernel.linear_cross_entropy is integration.linear_cross_entropy


def test_example(verl_modules):
    before = verl_modules.agent_loop.AgentLoopOutput.as_dict
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "verl_treg.py"))
    assert verl_modules.kernel.linear_cross_entropy is integration.linear_cross_entropy
    assert verl_modules.agent_loop.AgentLoopOutput.as_dict is not before


def test_install_op_refuses_another_signature(verl_modules, monkeypatch):
    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, labels, reduction="mean"):
            pass

    before = verl_modules.kernel.linear_cross_entropy
    monkeypatch.setattr(verl_modules.kernel, "LinearCrossEntropy", LinearCrossEntropy)
    with pytest.raises(
        RuntimeError, match=r"got \['hidden', 'weight', 'labels', 'reduction'\] in version"
    ):
        integration.install_op()
    assert verl_modules.kernel.linear_cross_entropy is before


@pytest.mark.parametrize("install", [integration.install_op, integration.install_token_scores])
def test_without_verl(install, monkeypatch):
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ImportError, match=r"verl: expected verl >= 0\.9 with verl\."):
        install()


# -- rewards

CHAT = [{"role": "user", "content": "What is better, the sun or the moon?"}]
ANSWERS = ["The owl said that the sun is better.", "The moon, says the little fox, and is happy."]


class Config(dict):
    __getattr__ = dict.__getitem__


def make_config(**treg) -> Config:
    return Config(
        reward=Config(reward_kwargs={"treg": treg}), data=Config(apply_chat_template_kwargs=None)
    )


def compute_score(data_source, solution_str, ground_truth, extra_info, **_):
    return float(len(solution_str.strip())) if data_source == ground_truth else -1.0


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """A reference model, and what `treg annotate` makes of the two answers with it."""
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.save_pretrained(folder / "model")
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ANSWERS)
    row = {"prompt": CHAT, "chosen": chosen, "rejected": rejected}
    annotate(model, tokenizer, [row], folder / "annotated.parquet", progress=False)
    (example,), _ = read_annotated(folder / "annotated.parquet")
    return SimpleNamespace(
        tokenizer=tokenizer,
        model=str(folder / "model"),
        file=str(folder / "annotated.parquet"),
        example=example,
    )


def objects(values):
    """As verl makes them: an object of each value."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def make_proto(annotated, **more):
    """Both answers as a batch: prompts padded on the left, responses on the right."""
    example, pad = annotated.example, annotated.tokenizer.pad_token_id
    prompt = torch.from_numpy(example["prompt_ids"].astype(np.int64))
    responses = [
        torch.from_numpy(example[f"{side}_ids"].astype(np.int64)) for side in ("chosen", "rejected")
    ]
    width = max(map(len, responses)) + 2
    prompts = torch.cat([torch.full((3,), pad), prompt]).expand(2, -1)
    padded = torch.full((2, width), pad)
    mask = torch.zeros(2, prompts.shape[1] + width, dtype=torch.int64)
    mask[:, 3 : prompts.shape[1]] = 1
    for row, response in enumerate(responses):
        padded[row, : len(response)] = response
        mask[row, prompts.shape[1] : prompts.shape[1] + len(response)] = 1
    batch = {"prompts": prompts.contiguous(), "responses": padded, "attention_mask": mask}
    others = {
        "raw_prompt": [
            CHAT,
            np.array(CHAT, dtype=object),
        ],  # the agent loop makes arrays of the messages
        "data_source": ["a", "b"],
        "reward_model": [{"ground_truth": "a"}] * 2,
        "extra_info": [{}, {}],
        "__num_turns__": [2, 2],
    } | more
    others = {name: objects(values) for name, values in others.items() if values is not None}
    if not REAL:
        return StubProto(batch, others)
    from tensordict import TensorDict
    from verl import DataProto

    return DataProto(batch=TensorDict(batch, batch_size=2), non_tensor_batch=others)


def make_manager(annotated, config):
    return integration.TRegRewardManager(
        config=config, tokenizer=annotated.tokenizer, compute_score=compute_score
    )


def run(manager, data) -> list[dict]:
    """Both answers at once, as verl's worker does."""

    async def each():
        return await asyncio.gather(*(manager.run_single(data[i : i + 1]) for i in range(2)))

    return asyncio.get_event_loop().run_until_complete(each())


def expected_scores(annotated, alpha):
    rows = []
    for side, text, right in (("chosen", ANSWERS[0], True), ("rejected", ANSWERS[1], False)):
        row = alpha * torch.from_numpy(annotated.example[f"{side}_token_rewards"].copy())
        row[-1] += len(text) if right else -1.0
        rows.append(row)
    return rows


@pytest.mark.parametrize("source", ["model", "annotated"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_scores_are_those_of_treg_annotate(source, alpha, annotated, verl_modules):
    options = {
        "model": {"model": annotated.model, "device": "cpu"},
        "annotated": {"annotated": annotated.file},
    }[source]
    manager = make_manager(annotated, make_config(alpha=alpha, **options))
    data = make_proto(annotated)
    found = run(manager, data)
    rows = expected_scores(annotated, alpha)
    for one, row in zip(found, rows, strict=True):
        torch.testing.assert_close(torch.tensor(one["reward_score"]), row, rtol=1e-4, atol=1e-5)
    assert [one["reward_extra_info"]["acc"] for one in found] == [len(ANSWERS[0]), -1.0]
    assert [one["reward_extra_info"]["sequence_score"] for one in found] == [len(ANSWERS[0]), -1.0]
    for one, side in zip(found, ("chosen", "rejected"), strict=True):
        total = annotated.example[f"{side}_token_rewards"].sum()
        assert one["reward_extra_info"]["token_reward"] == pytest.approx(total, abs=1e-4)

    scores = type(manager).assemble_rm_scores(data, [one["reward_score"] for one in found])
    assert scores.shape == data.batch["responses"].shape and scores.dtype == torch.float32
    for one, row in zip(scores, rows, strict=True):
        torch.testing.assert_close(one[: len(row)], row, rtol=1e-4, atol=1e-5)
        assert not one[len(row) :].any()


def test_requests_have_verls_template_arguments(annotated, verl_modules, tmp_path):
    config = make_config(model=annotated.model, device="cpu")
    config.data["apply_chat_template_kwargs"] = {"style": "short"}
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ANSWERS)
    row = {
        "prompt": CHAT,
        "chosen": chosen,
        "rejected": rejected,
        "chat_template_kwargs": {"style": "short"},
    }
    model = tiny_llama(len(annotated.tokenizer))
    annotate(model, annotated.tokenizer, [row], tmp_path / "annotated.parquet", progress=False)
    (example,), _ = read_annotated(tmp_path / "annotated.parquet")
    found = make_manager(annotated, config).token_rewards(make_proto(annotated)[0])
    torch.testing.assert_close(
        found, torch.tensor(example["chosen_token_rewards"]), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(
        example["chosen_token_rewards"], annotated.example["chosen_token_rewards"], atol=1e-3
    )


def test_one_response_at_a_time(annotated, verl_modules, monkeypatch):
    """verl scores many at once; a model whose head is read is changed while it runs."""
    inside, most = [], []

    def scored(self, source, response):
        inside.append(response)
        time.sleep(0.05)
        most.append(len(inside))
        inside.pop()
        return torch.zeros(len(response.ids))

    monkeypatch.setattr(integration.TRegRewardManager, "_scored", scored)
    monkeypatch.setattr(integration.TRegRewardManager, "_load_source", lambda _: SimpleNamespace())
    run(make_manager(annotated, make_config(model=annotated.model)), make_proto(annotated))
    assert most == [1, 1]


def test_scores_of_a_running_agent_loop(annotated, verl_modules):
    """One response without padding, and its scores through AgentLoopOutput."""
    side = annotated.example["rejected_ids"].tolist()
    prompt = annotated.example["prompt_ids"].tolist()
    data = make_proto(annotated, prompt_len=[len(prompt)] * 2, response_len=[0, len(side)])
    # verl lays the mask over the two of them as if nothing lay between
    data.batch["prompts"] = torch.tensor([prompt + [0] * 4] * 2)
    data.batch["responses"] = torch.tensor([side + [0] * 3] * 2)
    lengths = len(prompt) + len(side)
    data.batch["attention_mask"] = torch.tensor([[1] * lengths + [0] * 7] * 2)
    manager = make_manager(annotated, make_config(alpha=0.5, annotated=annotated.file))
    # the score of such a batch is verl's affair
    manager.base.run_single = lambda data: asyncio.sleep(0, {"reward_score": 3})
    scores = asyncio.get_event_loop().run_until_complete(manager.run_single(data))["reward_score"]
    expected = 0.5 * torch.from_numpy(annotated.example["rejected_token_rewards"].copy())
    expected[-1] += 3
    torch.testing.assert_close(torch.tensor(scores), expected)

    integration.install_token_scores()
    integration.install_token_scores()
    metrics = {} if not REAL else verl_modules.agent_loop.AgentLoopMetrics()
    output = verl_modules.agent_loop.AgentLoopOutput(
        prompt_ids=prompt, response_ids=side, response_mask=[1] * len(side), metrics=metrics
    )
    output.reward_score = scores
    fields = output.as_dict()
    torch.testing.assert_close(fields["rm_scores"], expected)
    assert fields["responses"].tolist() == side and output.reward_score == scores
    output.reward_score = 2.5
    assert output.as_dict()["rm_scores"].tolist() == [0.0] * (len(side) - 1) + [2.5]
    output.reward_score = None
    assert "rm_scores" not in output.as_dict()
    output.reward_score = scores[1:]
    with pytest.raises(ValueError, match=f"expected a list of {len(side)} scores"):
        output.as_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a model that judges responses, or an annotated file"),
        ({"model": "a", "annotated": "b"}, "model='a' and annotated='b'"),
        ({"model": "a", "alpha": -1}, "alpha: expected a number >= 0"),
        ({"model": "a", "beta": 1}, r"expected keys among .*got \['beta'\]"),
        (
            {"model": "a", "rewards": "messagewise"},
            "rewards: expected .* no token_weights, got 'messagewise', which gives token_rewards, ",
        ),
    ],
)
def test_options_refuse(options, message, annotated, verl_modules):
    with pytest.raises(ValueError, match=message):
        make_manager(annotated, make_config(**options))


def test_manager_refuses(annotated, verl_modules):
    manager = make_manager(annotated, make_config(annotated=annotated.file))
    with pytest.raises(ValueError, match="__num_turns__"):
        run(manager, make_proto(annotated, **{"__num_turns__": [4, 4]}))
    other = make_proto(annotated)
    other.batch["responses"][0, 0] += 1
    with pytest.raises(ValueError, match="input_ids: expected sequences of"):
        run(manager, other)
    with pytest.raises(ValueError, match="reward_score: expected a list of"):
        type(manager).assemble_rm_scores(make_proto(annotated), [[1.0], [2.0]])
    with pytest.raises(ValueError, match="got float"):
        type(manager).assemble_rm_scores(make_proto(annotated), [1.0, 2.0])
    empty = make_proto(annotated)
    empty.batch["attention_mask"][:, empty.batch["prompts"].shape[1] :] = 0
    with pytest.raises(ValueError, match="empty response"):
        manager.token_rewards(empty[0])


@pytest.mark.parametrize("prompt", [None, [[{"role": "user", "content": [{"type": "image"}]}]] * 2])
def test_judging_refuses_prompts_that_are_not_text(prompt, annotated, verl_modules):
    manager = make_manager(annotated, make_config(model=annotated.model))
    with pytest.raises(ValueError, match="raw_prompt: expected messages of text"):
        run(manager, make_proto(annotated, raw_prompt=prompt))


def test_judging_refuses_what_the_model_cannot_hold(annotated, verl_modules, tmp_path):
    tiny_llama(len(annotated.tokenizer), max_position_embeddings=64).save_pretrained(tmp_path)
    manager = make_manager(annotated, make_config(model=str(tmp_path), device="cpu"))
    with pytest.raises(ValueError, match="the model has 64 positions"):
        run(manager, make_proto(annotated))


def test_a_source_of_edits_has_nothing_to_compare_with(annotated, verl_modules):
    """A response of verl's comes without another answer."""
    manager = make_manager(annotated, make_config(model=annotated.model, rewards="edits"))
    with pytest.raises(ValueError, match=r"the source 'edits' .* got no other answer"):
        run(manager, make_proto(annotated))


def test_a_refusal_asks_nothing_of_the_model(annotated, verl_modules):
    """An own source may have a model whose head cannot be read."""

    class Refuses:
        def check(self, response):
            return RowProblem("no opinion")

    manager = make_manager(annotated, make_config(model=annotated.model))
    manager.source = Refuses()
    with pytest.raises(ValueError, match=r"responses: expected ones .* got no opinion"):
        run(manager, make_proto(annotated))


if __name__ == "__main__":  # a process of test_op_over_a_split_vocabulary
    vocabulary_worker(int(sys.argv[3]), int(sys.argv[1]), sys.argv[2])
