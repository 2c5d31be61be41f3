"""Axolotl's DPO with T-REG: TRL's own numbers without the regularizer, dense ones with it.

TRL is the installed one. Stubs stand for what is used of Axolotl 0.19.0: `BasePlugin` and
`PluginManager` (src/axolotl/integrations/base.py), the merging of a plugin's options
(integrations/config.py), `AxolotlDPOTrainer` (core/trainers/dpo/trainer.py) and the way in which
`HFRLTrainerBuilder` (core/builders/rl.py) makes one.
"""

import copy
import importlib
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from dense_dpo import (
    ALPHA,
    BETA,
    F32,
    VOCAB,
    Gradients,
    assert_same,
    oracle,
    perturbed,
    watch_dtypes,
)
from tiny import tiny_llama, tiny_tokenizer
from torch.nn import functional

from treg.data import load_pairs
from treg.data.annotated import write_annotated

pydantic = pytest.importorskip("pydantic")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

NAME = "treg.integrations.axolotl"
CONFIG = {"rl": "dpo", "plugins": [f"{NAME}.TRegPlugin"], "trainer_cls": f"{NAME}.TRegDPOTrainer"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "axolotl_treg.yml"

# -- Axolotl


class BasePlugin:
    """Hooks that return nothing."""

    def __init__(self): ...
    def register(self, cfg): ...
    def get_input_args(self): ...
    def get_training_args_mixin(self): ...
    def get_training_args(self, cfg): ...
    def get_trainer_cls(self, cfg): ...
    def pre_model_load(self, cfg): ...
    def post_model_load(self, cfg, model): ...
    def post_trainer_create(self, cfg, trainer): ...


def named(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


class Cfg(dict):
    """DictDefault: what is missing is None."""

    __getattr__ = __missing__ = lambda self, name: self.get(name)


class InputConfig(pydantic.BaseModel):
    rl: str | None = None
    rl_beta: float | None = None
    plugins: list[str] | None = None
    trainer_cls: str | None = None
    context_parallel_size: int | None = None


@dataclass
class TrainingMixins:
    pretraining: bool | None = None


class AxolotlDPOTrainer(trl.DPOTrainer):
    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags
        self.optimizer = None
        self.model_accepts_loss_kwargs = False


class Axolotl:
    """validate_config, and then ModelLoader and HFRLTrainerBuilder, as far as a plugin sees of
    them.
    """

    def __init__(self, config):
        self.plugins = [named(name)() for name in config.get("plugins", [])]
        for plugin in self.plugins:
            plugin.register(config)
        inputs = [named(x) for plugin in self.plugins if (x := plugin.get_input_args())]
        checked = type("AxolotlInputConfig", (InputConfig, *inputs), {})(**config)
        self.cfg = Cfg(checked.model_dump(exclude_none=True))
        mixins = [named(x) for plugin in self.plugins if (x := plugin.get_training_args_mixin())]
        merged = type("AxolotlTrainingMixins", (TrainingMixins, *mixins), {})
        self.args_cls = dataclass(type("AxolotlDPOConfig", (merged, trl.DPOConfig), {}))

    def build(
        self, output_dir, model, model_ref, rows, *, callbacks=(), peft_config=None, **kwargs
    ):
        """kwargs: of DPOConfig."""
        for plugin in self.plugins:
            plugin.pre_model_load(self.cfg)
        for x in filter(None, (model, model_ref)):
            for plugin in self.plugins:
                plugin.post_model_load(self.cfg, x)
        kwargs = {"beta": self.cfg.rl_beta, "remove_unused_columns": False} | kwargs
        for plugin in self.plugins:
            kwargs |= plugin.get_training_args(self.cfg) or {}
        args = self.args_cls(output_dir=str(output_dir), logging_first_step=True, **kwargs)
        assert not any(plugin.get_trainer_cls(self.cfg) for plugin in self.plugins)
        trainer_cls = named(self.cfg.trainer_cls) if self.cfg.trainer_cls else AxolotlDPOTrainer
        given = {} if peft_config is None else {"peft_config": peft_config}
        name = (
            "tokenizer"
            if "tokenizer" in inspect.signature(trainer_cls).parameters
            else "processing_class"
        )
        trainer = trainer_cls(
            model,
            model_ref,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows),
            callbacks=list(callbacks),
            **given,
            **{name: tiny_tokenizer(chat=False)},
        )
        for plugin in self.plugins:
            plugin.post_trainer_create(self.cfg, trainer)
        return trainer


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """treg.integrations.axolotl over the stubs."""
    stubs = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.core": {},
        "axolotl.core.trainers": {},
        "axolotl.core.trainers.dpo": {},
        "axolotl.core.trainers.dpo.trainer": {"AxolotlDPOTrainer": AxolotlDPOTrainer},
    }
    for name, content in stubs.items():
        stub = ModuleType(name)
        vars(stub).update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


# -- rows, trainers and the dense step
# -

ROWS = [
    {
        "prompt": "Once upon a time there was",
        "chosen": " a little fox who lived in a wood.",
        "rejected": " an owl.",
    },
    {
        "prompt": "The owl said that the answer",
        "chosen": " is 42.",
        "rejected": " is better: the sun or the moon?",
    },
    {
        "prompt": "Rewrite the answer",
        "chosen": " of the assistant and keep it short.",
        "rejected": " said the user.",
    },
]


@pytest.fixture(scope="module")
def pairs():
    """What `treg annotate` makes of ROWS, but for the rewards, which are random."""
    random, found = np.random.default_rng(0), []
    for i, pair in enumerate(load_pairs(ROWS, tiny_tokenizer(chat=False))[0]):
        row = {
            "index": i,
            "where": str(i),
            "ref_chosen_logps": 0.0,
            "ref_rejected_logps": 0.0,
            **pair.example,
        }
        for side in ("chosen", "rejected"):
            row[f"{side}_token_rewards"] = random.uniform(
                -0.5, 0.5, len(row[f"{side}_ids"])
            ).astype(np.float32)
        found.append(row)
    assert len({len(x["chosen_ids"]) for x in found} | {len(x["rejected_ids"]) for x in found}) > 2
    return found


@pytest.fixture
def annotated(tmp_path, pairs):
    write_annotated(tmp_path / "annotated.parquet", pairs, {})
    return str(tmp_path / "annotated.parquet")


@pytest.fixture
def models():
    """A reference, and a policy that has moved away from it."""
    model = tiny_llama(VOCAB)
    return perturbed(model), model


QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_steps": 1,
    "learning_rate": 1e-2,
    "dataloader_pin_memory": False,
    "max_grad_norm": 0.0,
    "optim": "sgd",
}


def train(tmp_path, config, model, model_ref, rows=ROWS, **kwargs):
    """The trainer after its training, gradients of its first step, and its log lines."""
    gradients = Gradients()
    trainer = Axolotl({"rl_beta": BETA} | config).build(
        tmp_path, model, model_ref, rows, callbacks=[gradients], **QUIET | kwargs
    )
    trainer.train()
    return (
        trainer,
        gradients.steps[0],
        [line for line in trainer.state.log_history if "loss" in line],
    )


def config(path=None, alpha=ALPHA):
    return CONFIG | {"treg_alpha": alpha} | ({} if path is None else {"treg_token_rewards": path})


SMOOTHED = {"robust": 0.2, "exo_pair": 0.1}
TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]


def options_of(name):
    return {"label_smoothing": SMOOTHED[name]} if name in SMOOTHED else {}


def test_loss_types_are_those_that_are_tested(module):
    assert list(module.LOSS_TYPES.items()) == [(name, name in SMOOTHED) for name in TYPES]


# -- one step


@pytest.mark.parametrize("name", TYPES)
def test_without_the_regularizer_it_is_trl(models, tmp_path, name):
    options = {"loss_type": [name]} | options_of(name)
    _, grads, (expected,) = train(tmp_path, {"rl": "dpo"}, *map(copy.deepcopy, models), **options)
    _, found_grads, (found,) = train(tmp_path, config(alpha=0), *models, **options)
    assert_same(found_grads, grads)
    own = {"treg/reg_loss", "treg/weight", "treg/reward_chosen", "treg/reward_rejected"}
    assert found.keys() - own == expected.keys()
    for key in expected.keys() - {"grad_norm"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", TYPES)
def test_with_the_regularizer_it_is_treg(models, tmp_path, annotated, pairs, name):
    loss, reg, grads = oracle(*models, pairs, ALPHA, loss_type=name, **options_of(name))
    _, found_grads, (line,) = train(
        tmp_path,
        config(annotated),
        *map(copy.deepcopy, models),
        loss_type=[name],
        **options_of(name),
    )
    assert_same(found_grads, grads)
    assert line["loss"] == pytest.approx(loss, rel=F32, abs=1e-5)
    assert line["treg/reg_loss"] == pytest.approx(reg, rel=F32)


def trained_from(trainer):
    """Gradients and log line of the first step of a trainer as it is."""
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.steps[0], trainer.state.log_history[0]


def move_adapter(model):
    for name, p in model.named_parameters():
        if "lora_B.default" in name or "modules_to_save.default" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))


@pytest.mark.parametrize("trained", [None, ["lm_head"]], ids=["adapters", "adapters and the head"])
@pytest.mark.parametrize("alpha", [0, ALPHA])
def test_the_reference_is_the_model_without_its_adapter(tmp_path, annotated, pairs, alpha, trained):
    peft = pytest.importorskip("peft")
    peft_config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=trained
    )
    trainer = Axolotl({"rl_beta": BETA} | config(annotated, alpha)).build(
        tmp_path, tiny_llama(VOCAB), None, ROWS, peft_config=peft_config, **QUIET
    )
    move_adapter(trainer.model)
    same = peft.get_peft_model(
        tiny_llama(VOCAB), peft_config
    )  # TRL's forward would not go with a copy
    same.load_state_dict(trainer.model.state_dict())
    loss, _, grads = oracle(same, None, pairs, alpha)
    found, line = trained_from(trainer)
    assert_same(found, grads)
    assert line["loss"] == pytest.approx(loss, rel=F32)


def test_the_reference_is_the_adapter_as_it_was(tmp_path, annotated, pairs):
    peft = pytest.importorskip("peft")
    given = peft.get_peft_model(
        tiny_llama(VOCAB), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    move_adapter(given)
    before, after = copy.deepcopy(given), copy.deepcopy(given)
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(
        tmp_path, given, None, ROWS, **QUIET
    )
    with torch.no_grad():
        for model in (given, after):
            for name, p in model.named_parameters():
                if "lora_B.default" in name:
                    p.mul_(1.5)
    loss, _, grads = oracle(after, before, pairs, ALPHA)
    found, line = trained_from(trainer)
    assert_same(found, grads)
    assert line["loss"] == pytest.approx(loss, rel=F32)


def test_the_reference_is_loaded_by_trl(tmp_path, annotated, pairs):
    tiny_llama(VOCAB).save_pretrained(tmp_path / "base")
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for p, x in zip(policy.parameters(), perturbed(policy).parameters(), strict=True):
            p.copy_(x)
    loss, _, grads = oracle(policy, tiny_llama(VOCAB), pairs, ALPHA)
    _, found, (line,) = train(tmp_path, config(annotated), policy, None)
    assert_same(found, grads)
    assert line["loss"] == pytest.approx(loss, rel=F32)


def test_reference_log_probs_computed_beforehand(models, tmp_path, annotated, pairs):
    """And then the reference does not run any more."""
    policy, ref = models
    loss, _, grads = oracle(policy, ref, pairs, ALPHA)
    kwargs = QUIET | {"precompute_ref_log_probs": True}
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(
        tmp_path, policy, ref, ROWS, **kwargs
    )
    ref.forward = None
    found, line = trained_from(trainer)
    assert_same(found, grads, 1e-4)
    assert line["loss"] == pytest.approx(loss, rel=1e-4)


def test_no_logits_are_made(models, tmp_path, annotated, monkeypatch):
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(tmp_path, *models, ROWS, **QUIET)
    rows, linear = [], functional.linear
    monkeypatch.setattr(
        functional, "linear", lambda x, w, b=None: rows.append(w.shape[0]) or linear(x, w, b)
    )
    trainer.train()
    assert rows and VOCAB not in rows


def test_the_model_gets_its_own_inputs(models, tmp_path, annotated):
    """Others would be passed on to where they are not known."""
    seen = set()
    for model in models:
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        )
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(tmp_path, *models, ROWS, **QUIET)
    seen.clear()  # checks of the head
    trainer.train()
    assert seen == {"input_ids", "attention_mask", "use_cache"}


def test_accumulated_batches(models, tmp_path, annotated, pairs):
    """Three batches of one pair: the mean of their gradients."""
    _, _, grads = oracle(*models, pairs, ALPHA)
    _, found, _ = train(
        tmp_path,
        config(annotated),
        *models,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
    )
    assert_same(found, grads)


def test_evaluation_and_training_go_on(models, tmp_path, annotated, pairs):
    loss, reg, _ = oracle(*models, pairs, ALPHA)
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(
        tmp_path, *models, ROWS, **QUIET | {"max_steps": 3}
    )
    trainer.evaluate()
    (line,) = trainer.state.log_history
    assert line["eval_loss"] == pytest.approx(loss, rel=F32)
    assert line["eval_treg/reg_loss"] == pytest.approx(reg, rel=F32)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["treg/reg_loss"] == pytest.approx(reg, rel=F32)
    assert lines[2]["loss"] < lines[1]["loss"] < lines[0]["loss"]
    tokens = sum(
        len(x["prompt_ids"]) + len(x[f"{side}_ids"])
        for x in pairs
        for side in ("chosen", "rejected")
    )
    assert [line["num_tokens"] for line in lines] == [tokens, 2 * tokens, 3 * tokens]


def test_mixed_precision(models, tmp_path, annotated, pairs, monkeypatch):
    """Policy and reference run as accelerate would have them: float32 weights under bfloat16."""
    monkeypatch.setenv(
        "ACCELERATE_MIXED_PRECISION", "no"
    )  # what transformers before 5 sets is undone afterwards
    loss, _, _ = oracle(*models, pairs, ALPHA)
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(
        tmp_path, *models, ROWS, **QUIET | {"bf16": True}
    )
    seen = watch_dtypes(*models)
    trainer.train()
    line = trainer.state.log_history[0]
    assert seen == {"policy": {torch.bfloat16}, "reference": {torch.bfloat16}}
    assert line["loss"] == pytest.approx(loss, rel=0.1)


# -- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": ["aot"]}, "loss_type: expected one of .*, got .*aot"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type: expected one of"),
        (
            {"loss_weights": [0.5]},
            r"loss_weights: expected none with T-REG in Axolotl, got \[0\.5\]",
        ),
        ({"ld_alpha": 0.5}, r"ld_alpha: expected None with T-REG in Axolotl, got 0\.5"),
        ({"use_weighting": True}, "use_weighting: expected False"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type: expected reverse_kl"),
        ({"loss_type": ["discopop"], "discopop_tau": 0.1}, r"discopop_tau: expected 0\.05"),
        (
            {"use_liger_kernel": True},
            "use_liger_kernel: expected False with T-REG in Axolotl, got True",
        ),
        ({"label_smoothing": 0.1}, "label_smoothing: expected 0 for loss_type='sigmoid'"),
    ],
)
def test_options_without_a_counterpart(models, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Axolotl({"rl_beta": BETA} | config(alpha=0)).build(
            tmp_path, *models, ROWS, **QUIET | options
        )


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rl": "simpo"}, "rl: expected dpo or ipo with treg's plugin, got 'simpo'"),
        ({"rl": None}, "rl: expected dpo or ipo"),
        (
            {"trainer_cls": None},
            f"trainer_cls: expected {NAME}.TRegDPOTrainer with treg's plugin, got None",
        ),
        ({"context_parallel_size": 2}, "context_parallel_size: expected 1 with T-REG, got 2"),
        ({"treg_alpha": -0.1}, "treg_alpha: expected a number >= 0, got -0.1"),
        (
            {"treg_token_rewards": None},
            "treg_token_rewards: expected the path of an annotated file",
        ),
        ({"treg_tail": "many"}, "treg_tail"),
    ],
)
def test_bad_configuration(given, message):
    """Before a model is loaded."""
    with pytest.raises(pydantic.ValidationError) as caught:
        Axolotl(config("annotated.parquet") | given)
    assert message in str(caught.value)


def test_options_of_the_yaml():
    both = Axolotl(config("some.parquet", 0.5) | {"rl": "ipo", "treg_tail": 2})
    assert both.plugins[0].get_training_args(both.cfg) == {
        "treg_token_rewards": "some.parquet",
        "treg_alpha": 0.5,
        "treg_tail": 2,
    }
    plain = Axolotl(config(alpha=0))
    assert plain.plugins[0].get_training_args(plain.cfg) == {"treg_alpha": 0, "treg_tail": 0}


def test_without_the_plugin(models, tmp_path):
    with pytest.raises(TypeError, match=r"args: expected the plugin's treg_alpha, .* to plugins"):
        Axolotl({"rl": "dpo", "trainer_cls": CONFIG["trainer_cls"]}).build(
            tmp_path, *models, ROWS, **QUIET, beta=BETA
        )


def test_no_file(models, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Axolotl({"rl_beta": BETA} | config("absent.parquet")).build(
            tmp_path, *models, ROWS, **QUIET
        )


def test_another_end_of_a_response(models, tmp_path, pairs):
    """Annotated without the last token, which then has no reward."""
    sides = [
        f"{side}_{name}" for side in ("chosen", "rejected") for name in ("ids", "token_rewards")
    ]
    cut = [pair | {name: pair[name][:-1] for name in sides} for pair in pairs]
    rest = [
        pair
        | {
            f"{side}_token_rewards": np.append(short[f"{side}_token_rewards"], np.float32(0))
            for side in ("chosen", "rejected")
        }
        for pair, short in zip(pairs, cut, strict=True)
    ]
    write_annotated(tmp_path / "cut.parquet", cut, {})
    loss, _, grads = oracle(*models, rest, ALPHA)
    given = config(str(tmp_path / "cut.parquet")) | {"treg_tail": 1}
    _, found, (line,) = train(tmp_path, given, *models)
    assert_same(found, grads)
    assert line["loss"] == pytest.approx(loss, rel=F32)


def test_unknown_sequences(models, tmp_path, annotated):
    others = [row | {"prompt": f"{row['prompt']} now"} for row in ROWS]
    with pytest.raises(ValueError, match="chat template and truncation"):
        train(tmp_path, config(annotated), *models, others)


def test_logits_cannot_be_returned(models, tmp_path, annotated):
    trainer = Axolotl({"rl_beta": BETA} | config(annotated)).build(tmp_path, *models, ROWS, **QUIET)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with pytest.raises(ValueError, match="return_outputs: expected False, got True"):
        trainer.compute_loss(trainer.model, batch, return_outputs=True)


def test_router_loss(module, models, tmp_path):
    class Routed(AxolotlDPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.aux_loss_enabled = True

    sys.modules["axolotl.core.trainers.dpo.trainer"].AxolotlDPOTrainer = Routed
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0"):
        Axolotl({"rl_beta": BETA} | config(alpha=0)).build(tmp_path, *models, ROWS, **QUIET)


def test_another_trl(module):
    class Old:
        def compute_loss(self, model, inputs): ...

    class Other:
        def _compute_loss(self, model, inputs): ...

    for base in (Old, Other):
        with pytest.raises(
            TypeError,
            match=r"base: expected a trl\.DPOTrainer with _compute_loss\(model, inputs, ret",
        ):
            module.make_trainer(base)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        module.Other  # noqa: B018


def test_the_trainer_is_not_imported_with_the_plugin(module):
    """Axolotl merges plugins' arguments where it imports its trainers: that must come after all are
    registered.
    """
    assert "TRegDPOTrainer" not in vars(module)
    assert module.TRegDPOTrainer is module.TRegDPOTrainer and issubclass(
        module.TRegDPOTrainer, AxolotlDPOTrainer
    )


def test_example():
    given = yaml.safe_load(EXAMPLE.read_text())
    found = Axolotl(given)
    assert (
        isinstance(found.plugins[0], BasePlugin)
        and named(found.cfg.trainer_cls)._treg_base is AxolotlDPOTrainer
    )
    assert SimpleNamespace(**found.plugins[0].get_training_args(found.cfg)) == SimpleNamespace(
        treg_token_rewards="annotated.parquet", treg_alpha=0.25, treg_tail=0
    )
