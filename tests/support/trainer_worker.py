"""Tiny trainings, shared by test_trainer.py and the processes that it starts.

python tests/support/trainer_worker.py killed DIR WHEN
torchrun --nproc_per_node 2 tests/support/trainer_worker.py ddp DIR

The first dies of SIGKILL: WHEN is "step:5" for after that step, or "save:4" for while saving it.
"""

import faulthandler
import functools
import gc
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerState,
)

from treg.trainer import TRegConfig, TRegTrainer

VOCAB = 64
BETA = 0.3
SIDES = ("chosen", "rejected")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            head_dim=8,
            final_logit_softcapping=3.0,
            sliding_window=4,
            attn_implementation="eager",
        )
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.4)),
}


def make_model(family: str = "llama", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return FAMILIES[family]().eval()


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters that change the output already."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    return perturb(model, 0.3)


@torch.no_grad()
def perturb(model: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    for p in model.parameters():
        if p.requires_grad:
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_pairs(n: int, seed: int = 0) -> list[dict]:
    """Annotated examples without reference log-probs; completions of 1 to 8 tokens."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        pair = {"prompt_ids": random.integers(3, VOCAB, random.integers(1, 6)).astype(np.int32)}
        for side in SIDES:
            length = random.integers(1, 9)
            pair[f"{side}_ids"] = random.integers(3, VOCAB, length).astype(np.int32)
            pair[f"{side}_token_rewards"] = random.uniform(-0.5, 0.5, length).astype(np.float32)
        pairs.append(pair)
    return pairs


def with_marks(pairs: list[dict], seed: int = 7) -> list[dict]:
    """Examples whose tokens are marked at random: good, bad or not at all."""
    random, found = np.random.default_rng(seed), []
    for pair in pairs:
        marks = {s: random.choice([-0.5, 0.0, 2.0], len(pair[f"{s}_ids"])) for s in SIDES}
        found.append(pair | {f"{s}_marks": x.astype(np.float32) for s, x in marks.items()})
    return found


def dense_logps(model: torch.nn.Module, pair: dict, side: str) -> torch.Tensor:
    """Log-probs of a completion's tokens, by the model's own logits of this one sequence."""
    prompt, completion = (torch.from_numpy(pair[f"{x}_ids"]).long() for x in ("prompt", side))
    ids = torch.cat([prompt, completion])[None]
    logits = model(input_ids=ids).logits[0, -len(completion) - 1 : -1]  # virtual tokens may precede
    return logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]


@torch.no_grad()
def with_reference(
    pairs: list[dict], model: torch.nn.Module, per_token: bool = False
) -> list[dict]:
    found = []
    for pair in pairs:
        logps = {side: dense_logps(model, pair, side).double().numpy() for side in SIDES}
        pair = pair | {f"ref_{side}_logps": x.sum() for side, x in logps.items()}
        found.append(
            pair
            | ({f"ref_{side}_token_logps": x for side, x in logps.items()} if per_token else {})
        )
    return found


def make_config(output_dir, **kwargs) -> TRegConfig:
    defaults = {
        "beta": BETA,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
    }
    return TRegConfig(str(output_dir), **defaults | kwargs)


def make_trainer(
    output_dir, model, pairs, ref_model=None, eval_dataset=None, callbacks=None, **kwargs
) -> TRegTrainer:
    return TRegTrainer(
        model,
        ref_model,
        make_config(output_dir, **kwargs),
        pairs,
        eval_dataset,
        tokenizer(),
        callbacks=callbacks,
    )


class Gradients(TrainerCallback):
    """Of each optimizer step, by parameter."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )


def assert_same(found, expected, rel=1e-5):
    """Of all parameters together, and of each one that is not zero but for roundings."""
    assert found.keys() == expected.keys()
    total = torch.cat([x.flatten().double() for x in expected.values()]).norm()
    assert total > 1e-4
    for name, x in expected.items():
        off = (found[name].double() - x).norm()
        assert off <= rel * max(x.norm(), 1e-2 * total), f"{name}: {off / x.norm():.1e}"


def first_step(tmp_path, model, pairs, ref_model=None, **options):
    """The gradients of the first step and its log line."""
    gradients = Gradients()
    options = {"per_device_train_batch_size": len(pairs)} | options
    trainer = make_trainer(
        tmp_path, model, pairs, ref_model, callbacks=[gradients], max_steps=1, **options
    )
    trainer.train()
    return gradients.steps[0], trainer.state.log_history[0]


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def resumable(output_dir, callbacks=(), **kwargs) -> TRegTrainer:
    """Six AdamW steps of two micro-batches over an epoch and a half of packs; a checkpoint every
    second step.
    """
    model = make_model()
    pairs = with_reference(make_pairs(16), model)
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "learning_rate": 3e-3,
        "packing": True,
        "token_budget": 50,
    }
    return make_trainer(
        output_dir,
        model,
        pairs,
        eval_dataset=with_reference(make_pairs(3, seed=9), model),
        callbacks=list(callbacks),
        **options | kwargs,
    )


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(output_dir: Path, when: str) -> None:
    event, step = when.split(":")
    if event == "save":
        save = TrainerState.save_to_json
        TrainerState.save_to_json = lambda self, path: (
            die() if self.global_step == int(step) else save(self, path)
        )
    resumable(output_dir, [At(int(step), die)] if event == "step" else []).train()


# what two processes do in halves: (model, reference, options); batches are of 4 items in all
SHARED = {
    "padded": ("tied", "model", {"gradient_accumulation_steps": 2}),
    "packs": ("llama", "sums", {"packing": True, "token_budget": 32}),
    "lora": ("llama", "adapters", {"packing": True}),
}


def shared_trainer(name: str, output_dir: Path, batch: int, callbacks=(), **more) -> TRegTrainer:
    family, source, options = SHARED[name]
    model = make_model(family).double()
    ref_model = make_model(family).double() if source == "model" else None
    pairs, held_out = with_marks(make_pairs(24)), with_marks(make_pairs(5, seed=9))
    if source == "sums":
        pairs, held_out = with_reference(pairs, model), with_reference(held_out, model)
    model = with_lora(model) if source == "adapters" else perturb(model)
    return make_trainer(
        output_dir,
        model,
        pairs,
        ref_model,
        held_out,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        max_steps=2,
        callbacks=list(callbacks),
        **options,
        **more,
    )


def half(name: str, output_dir: Path) -> None:
    rank = int(os.environ["RANK"])
    gradients = Gradients()
    trainer = shared_trainer(name, output_dir / name, 2, [gradients], ddp_backend="gloo")
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(output_dir / name / f"saved-{rank}")
    torch.save(
        (gradients.steps, trainer.state.log_history, metrics), output_dir / f"{name}-{rank}.pt"
    )


def ddp(output_dir: Path) -> None:
    for name in SHARED:
        half(name, output_dir)
    # No DDP model may outlive the group: freeing it would then join gloo's threads under the GIL,
    # for which such a thread may be waiting to free the tensors of the last collective (torch
    # 2.13).
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(280, exit=True)  # before test_trainer.py loses patience
    {"killed": killed, "ddp": ddp}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
