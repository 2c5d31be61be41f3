"""T-REG as a loss function of NeMo-RL: against dense PyTorch in float64.

Runs against NeMo-RL itself where it can be imported. Elsewhere a stub stands in, with the
signatures, layouts and normalisation of NVIDIA-NeMo/RL at 006907a:
nemo_rl/algorithms/loss/loss_functions.py (DPOLossFn, NLLLossFn), loss/interfaces.py, utils.py
(masked_mean), dpo.py; and with pair_index and is_chosen, which later versions may put into a batch.
"""

import enum
import importlib
import pickle
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error
from tiny import tiny_llama

from treg.data.annotated import write_annotated
from treg.integrations import nemo_rl as integration

LOSSES, DPO = "nemo_rl.algorithms.loss.loss_functions", "nemo_rl.algorithms.dpo"
try:
    import nemo_rl.algorithms.loss.loss_functions  # noqa: F401

    REAL = True
except ImportError:
    REAL = False

V, PAD = 48, 0


class LossType(enum.Enum):
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


def masked_mean(values, mask, factor):
    return (values * mask).sum() / (factor + 1e-8)


class DPOLossFn:
    loss_type, input_type = LossType.SEQUENCE_LEVEL, LossInputType.LOGPROB

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        for name in CONFIG:
            setattr(self, name, getattr(cfg, name))
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.metric_normalizations = {"loss": "sequences", "num_valid_samples": "none"}

    def split_output_tensor(self, tensor, data):
        if "pair_index" not in data:
            return tensor[::2], tensor[1::2]
        order, chosen = data["pair_index"].argsort(stable=True), data["is_chosen"].bool()
        return tensor[order][chosen[order]], tensor[order][~chosen[order]]

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        tokens, factor = data["token_mask"][:, 1:], global_valid_seqs / 2
        kept, _ = self.split_output_tensor(data["sample_mask"], data)
        sft_loss = torch.tensor(0.0)
        if self.sft_loss_weight > 0:
            assert global_valid_toks is not None
            mask = tokens * data["sample_mask"].unsqueeze(-1)
            each = -(next_token_logprobs * mask).sum(-1)
            if self.sft_average_log_probs:
                each = each / mask.sum(-1).clamp(min=1)
            sft_loss = masked_mean(self.split_output_tensor(each, data)[0], kept, factor)
        rewards = ((next_token_logprobs - data["reference_policy_logprobs"][:, :-1]) * tokens).sum(
            -1
        )
        if self.preference_average_log_probs:
            rewards = rewards / tokens.sum(-1).clamp(min=1)
        chosen, rejected = self.split_output_tensor(rewards, data)
        each = -F.logsigmoid(self.reference_policy_kl_penalty * (chosen - rejected)) * kept
        preference_loss = masked_mean(each, kept, factor)
        loss = self.sft_loss_weight * sft_loss + self.preference_loss_weight * preference_loss
        return loss, {
            "loss": loss.item(),
            "sft_loss": sft_loss.item(),
            "preference_loss": preference_loss.item(),
            "accuracy": masked_mean(chosen > rejected, kept, factor).item(),
            "rewards_chosen_mean": masked_mean(chosen, kept, factor).item(),
            "rewards_rejected_mean": masked_mean(rejected, kept, factor).item(),
            "num_valid_samples": (data["sample_mask"].sum() / 2).item(),
        }


CONFIG = {
    "reference_policy_kl_penalty": 0.3,
    "preference_loss_weight": 1.0,
    "sft_loss_weight": 0.0,
    "preference_average_log_probs": False,
    "sft_average_log_probs": False,
}


@pytest.fixture
def nemo(monkeypatch):
    """nemo_rl's modules of losses and of DPO; dpo.DPOLossFn is put back."""
    if not REAL:
        names = ["nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss", LOSSES, DPO]
        modules = {name: ModuleType(name) for name in names}
        modules[LOSSES].DPOLossFn = modules[DPO].DPOLossFn = DPOLossFn
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
            if "." in name:
                setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    losses, dpo = importlib.import_module(LOSSES), importlib.import_module(DPO)
    monkeypatch.setattr(dpo, "DPOLossFn", dpo.DPOLossFn)
    return SimpleNamespace(DPOLossFn=losses.DPOLossFn, dpo=dpo)


def make_config(**options):
    return SimpleNamespace(**CONFIG | options)


# -- a batch


def make_examples(pairs: int = 3) -> list[dict]:
    """Annotated pairs."""
    numbers, examples = np.random.default_rng(0), []
    for i in range(pairs):
        example = {"index": i, "where": f"row {i}", "prompt_ids": numbers.integers(1, V, 3 + i)}
        for side, length in (("chosen", 5 + i), ("rejected", 6 - i)):
            example[f"{side}_ids"] = numbers.integers(1, V, length)
            example[f"{side}_token_rewards"] = (numbers.random(length) - 0.5).astype(np.float32)
            example[f"ref_{side}_logps"] = -1.0
        examples.append(example)
    return examples


def make_data(examples, masked=()) -> dict[str, torch.Tensor]:
    """What preference_collate_fn and add_ref_logprobs_to_data give: chosen and rejected in turn,
    padded to 16.

    masked: pairs that were too long, cut to a few tokens; their length is still that of the whole.
    """
    rows = [(x, side) for x in examples for side in ("chosen", "rejected")]
    data = {name: torch.zeros(len(rows), 16) for name in ("token_mask", "token_rewards")}
    data["input_ids"] = torch.full((len(rows), 16), PAD)
    data["input_lengths"] = torch.zeros(len(rows), dtype=torch.int64)
    data["sample_mask"] = torch.tensor(
        [float(i not in masked) for i in range(len(examples)) for _ in range(2)]
    )
    data["reference_policy_logprobs"] = -3 * torch.rand(
        len(rows), 16, generator=torch.Generator().manual_seed(3)
    )
    for row, (x, side) in enumerate(rows):
        start, ids = len(x["prompt_ids"]), np.concatenate([x["prompt_ids"], x[f"{side}_ids"]])
        data["input_lengths"][row] = len(ids) + 100 * (row // 2 in masked)
        ids = ids[:4] if row // 2 in masked else ids
        data["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
        data["token_mask"][row, start : len(ids)] = 1
        if row // 2 not in masked:
            data["token_rewards"][row, start : len(ids)] = torch.from_numpy(
                x[f"{side}_token_rewards"]
            )
    return data


def without(data, *names):
    return {name: x for name, x in data.items() if name not in names}


def step(loss_fn, data, seqs=4.0, dtype=torch.float64):
    """Loss, metrics and the gradients of a tiny model, as NeMo-RL's worker calls a loss on
    log-probs.
    """
    model = tiny_llama(V, hidden_size=16, intermediate_size=32).to(dtype)
    data = {name: x.to(dtype) if x.is_floating_point() else x for name, x in data.items()}
    logits = model(data["input_ids"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, data["input_ids"][:, 1:, None])[..., 0]
    loss, metrics = loss_fn(
        data=data,
        global_valid_seqs=torch.tensor(seqs),
        global_valid_toks=torch.tensor(50.0),
        next_token_logprobs=logps,
    )
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), metrics, [p.grad for p in model.parameters()]


def oracle(options, alpha, seqs=4.0):
    """NeMo-RL's DPO with T-REG by its formulas, pair by pair; the signature of a loss function."""
    o = SimpleNamespace(**CONFIG | options)

    def loss_fn(data, global_valid_seqs, global_valid_toks, next_token_logprobs):
        preference = regularizer = sft = 0.0
        for chosen in range(0, len(next_token_logprobs), 2):
            if not data["sample_mask"][chosen]:
                continue
            sums, rewarded = [], 0.0
            for row in (chosen, chosen + 1):
                on = data["token_mask"][row, 1:] > 0
                lp, ref = (
                    next_token_logprobs[row][on],
                    data["reference_policy_logprobs"][row, :-1][on],
                )
                count = len(lp) if o.preference_average_log_probs else 1
                sums.append((lp - ref).sum() / count)
                rewarded = rewarded + (data["token_rewards"][row, 1:][on] * lp).sum() / count
                if row == chosen:
                    sft = sft - lp.sum() / (len(lp) if o.sft_average_log_probs else 1)
            z = o.reference_policy_kl_penalty * (sums[0] - sums[1])
            preference = preference - F.logsigmoid(z)
            regularizer = (
                regularizer
                - alpha * o.reference_policy_kl_penalty * (-z).sigmoid().detach() * rewarded
            )
        pairs = seqs / 2 + 1e-8
        regularizer = o.preference_loss_weight * regularizer / pairs
        loss = (
            o.preference_loss_weight * preference + o.sft_loss_weight * sft
        ) / pairs + regularizer
        return loss, {"loss": loss.item(), "treg_loss": regularizer.item() if alpha else None}

    return loss_fn


def assert_same(found, expected, tolerance=1e-6):
    """Llama's norms are float32 in any model, and NeMo-RL's 1e-8 is lost in its float32 counts."""
    assert error(found[0], expected[0]) <= tolerance
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=tolerance)
    for a, b in zip(found[2], expected[2], strict=True):
        assert error(a, b) <= tolerance


VARIANTS = {
    "DPO": {},
    "weighted": {"preference_loss_weight": 0.4},
    "averages": {"preference_average_log_probs": True},
    "with sft": {"sft_loss_weight": 0.7},
    "with averaged sft": {
        "sft_loss_weight": 0.7,
        "sft_average_log_probs": True,
        "preference_loss_weight": 2.0,
    },
}
MASKED = [(), (1,)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", MASKED, ids=["all pairs", "one pair masked"])
@pytest.mark.parametrize("source", ["column", "file"])
def test_loss_is_treg(variant, masked, source, nemo, tmp_path):
    examples = make_examples()
    data, options = make_data(examples, masked), VARIANTS[variant]
    given, more = data, {}
    if source == "file":
        write_annotated(tmp_path / "annotated.parquet", examples, {})
        given, more = (
            without(data, "token_rewards"),
            {"treg_token_rewards": tmp_path / "annotated.parquet"},
        )
    loss_fn = integration.TRegLossFn(
        make_config(treg_alpha=0.5, **options, **more), use_fused_linear_logprobs=True
    )
    found, expected = step(loss_fn, given), step(oracle(options, 0.5), data)
    assert_same(found, expected)
    assert found[1]["treg_loss"] == pytest.approx(expected[1]["treg_loss"], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", MASKED, ids=["all pairs", "one pair masked"])
def test_alpha_0_is_dpo(variant, masked, nemo):
    """NeMo-RL's own loss and metrics to the bit, rewards or not; and that is the formula above."""
    data, options = make_data(make_examples(), masked), VARIANTS[variant]
    own = step(nemo.DPOLossFn(make_config(**options)), data)
    found = step(
        integration.TRegLossFn(make_config(treg_alpha=0, **options)), without(data, "token_rewards")
    )
    assert found[1] == own[1] and torch.equal(found[0], own[0])
    assert all(torch.equal(a, b) for a, b in zip(found[2], own[2], strict=True))
    assert_same(found, step(oracle(options, 0.0), data))


def test_rewards_of_what_is_not_scored_have_no_part(nemo):
    """A column may hold anything there, NaN too."""
    data = make_data(make_examples(), masked=(1,))
    expected = step(oracle({}, 0.5), data)
    scored = (data["token_mask"] > 0) & (data["sample_mask"] > 0)[:, None]
    rewards = torch.where(scored, data["token_rewards"], float("nan"))
    found = step(
        integration.TRegLossFn(make_config(treg_alpha=0.5)), data | {"token_rewards": rewards}
    )
    assert_same(found, expected)


def test_rows_in_another_order(nemo):
    """As sequence packing leaves them, with pair_index and is_chosen."""
    data = make_data(make_examples())
    expected = step(oracle({}, 0.5), data)
    order = torch.tensor([3, 0, 4, 2, 5, 1])
    mixed = {name: x[order] for name, x in data.items()} | {
        "pair_index": order // 2,
        "is_chosen": order % 2 == 0,
    }
    assert_same(step(integration.TRegLossFn(make_config(treg_alpha=0.5)), mixed), expected)


def test_protocol_is_that_of_dpo(nemo):
    config = make_config(treg_alpha=0.5)
    own, ours = nemo.DPOLossFn(config, True), integration.TRegLossFn(config, True)
    names = [
        name for name in dir(own) if not name.startswith("_") and not callable(getattr(own, name))
    ]
    assert {"loss_type", "input_type", "metric_normalizations", "use_fused_linear_logprobs"} <= set(
        names
    )
    for name in names:
        assert getattr(ours, name) == getattr(own, name)
    assert not hasattr(ours, "cu_seqlens")


def test_validation_is_dpos(nemo):
    data = make_data(make_examples())
    with torch.no_grad():
        own = step(nemo.DPOLossFn(make_config()), data)
        found = step(
            integration.TRegLossFn(make_config(treg_alpha=0.5)), without(data, "token_rewards")
        )
    assert found[:2] == own[:2]


def test_a_worker_gets_the_path_and_not_the_rewards(nemo, tmp_path, monkeypatch):
    """NeMo-RL pickles the loss function for every step; workers have other working directories."""
    examples = make_examples()
    for x in examples:
        x["chosen_token_rewards"][0] = 0.123
    write_annotated(tmp_path / "annotated.parquet", examples, {})
    monkeypatch.chdir(tmp_path)
    loss_fn = integration.TRegLossFn(
        make_config(treg_alpha=0.5, treg_token_rewards="annotated.parquet")
    )
    sent = pickle.dumps(loss_fn)
    assert len(sent) < 2000
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    integration._token_rewards.cache_clear()
    data = make_data(examples)
    assert_same(
        step(pickle.loads(sent), without(data, "token_rewards")), step(oracle({}, 0.5), data)
    )


def test_the_last_token_may_differ(nemo, tmp_path):
    examples = make_examples()
    write_annotated(tmp_path / "annotated.parquet", examples, {})
    loss_fn = integration.TRegLossFn(
        make_config(treg_token_rewards=tmp_path / "annotated.parquet", treg_alpha=0.5)
    )
    data = make_data(examples)
    ends = torch.arange(6), data["input_lengths"] - 1
    data["input_ids"][ends] = (data["input_ids"][ends] + 1) % V
    data["token_rewards"][ends] = 0
    assert_same(step(loss_fn, without(data, "token_rewards")), step(oracle({}, 0.5), data))


def test_a_mapping_is_a_config(nemo, monkeypatch):
    """As the TypedDict of earlier versions."""
    seen = []
    monkeypatch.setattr(
        integration, "_dpo_loss_fn", lambda: lambda cfg: seen.append(cfg) or SimpleNamespace()
    )
    loss_fn = integration.TRegLossFn({"treg_alpha": 0.7})
    assert loss_fn.alpha == 0.7 and loss_fn.file is None and seen == [{"treg_alpha": 0.7}]


def test_refuses(nemo, tmp_path):
    examples = make_examples()
    data = make_data(examples)
    with pytest.raises(ValueError, match="treg_alpha: expected a number >= 0, got -1"):
        integration.TRegLossFn(make_config(treg_alpha=-1))
    with pytest.raises(FileNotFoundError, match="no such file"):
        integration.TRegLossFn(make_config(treg_token_rewards=str(tmp_path / "none.parquet")))
    with pytest.raises(ValueError, match=r"set dpo\.treg_token_rewards to an annotated file"):
        step(integration.TRegLossFn(make_config()), without(data, "token_rewards"))
    with pytest.raises(
        ValueError, match=r"token_rewards: expected the shape of input_ids \[6, 16\], got \[6, 15\]"
    ):
        step(
            integration.TRegLossFn(make_config()),
            data | {"token_rewards": data["token_rewards"][:, 1:]},
        )
    write_annotated(tmp_path / "annotated.parquet", examples[:2], {})
    loss_fn = integration.TRegLossFn(make_config(treg_token_rewards=tmp_path / "annotated.parquet"))
    with pytest.raises(ValueError, match="input_ids: expected sequences of"):
        step(loss_fn, without(data, "token_rewards"))


def test_without_nemo_rl(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nemo_rl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nemo_rl", None)
    with pytest.raises(ImportError, match="nemo_rl: expected NeMo-RL"):
        integration.TRegLossFn(make_config())


def test_example(nemo, tmp_path, monkeypatch):
    """run_dpo.py finds the loss where dpo.setup() looks it up, and its own arguments."""
    examples = make_examples()
    write_annotated(tmp_path / "annotated.parquet", examples, {})
    script = (
        "import sys\nimport nemo_rl.algorithms.dpo as dpo\ndpo.ran(list(sys.argv), dpo.DPOLossFn)\n"
    )
    (tmp_path / "run_dpo.py").write_text(script)
    found = []
    monkeypatch.setattr(nemo.dpo, "ran", lambda *args: found.append(args), raising=False)
    example = str(Path(__file__).parents[2] / "examples" / "nemo_rl_treg.py")
    monkeypatch.setattr(
        sys, "argv", [example, str(tmp_path / "run_dpo.py"), "--config", "dpo.yaml"]
    )
    runpy.run_path(example, run_name="__main__")
    ((argv, cls),) = found
    assert argv == [str(tmp_path / "run_dpo.py"), "--config", "dpo.yaml"]
    data = make_data(examples)
    loss_fn = cls(
        make_config(treg_token_rewards=tmp_path / "annotated.parquet"),
        use_fused_linear_logprobs=False,
    )
    assert_same(step(loss_fn, without(data, "token_rewards")), step(oracle({}, 0.25), data))
