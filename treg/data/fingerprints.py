"""Which model and which tokenizer it is, in a few letters.

A model is its weights and what of its configuration changes numbers. Its fingerprint is
"2-WEIGHTS-CONFIG": the 2 is the version of the form; files of earlier versions have one without.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PROBE = "The quick brown fox, 12345 + 6.78 = ?\n\tdéjà vu — 東京 🙂 def f(x): return x"
FORM = "2"
SAMPLES = 64  # values of a tensor that the first form looked at
CHUNK = 1 << 22  # values that are mixed at a time, a multiple of the 4 in a word
WORD = 4
# odd numbers of 64 bits without a pattern, as int64
ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
# of a configuration: what names, loads or trains a model, and does not change what it computes
NO_NUMBERS = {
    *("transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"),
    *("attn_implementation", "experts_implementation", "return_dict", "output_hidden_states"),
    *("output_attentions", "output_router_logits", "router_aux_loss_coef", "id2label", "label2id"),
    *("problem_type", "num_labels", "finetuning_task", "task_specific_params", "torchscript"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "initializer_factor"),
    *("gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp"),
}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary, the chat template, the end-of-sequence token, and the ids of a
    probe text.
    """
    vocabulary, probe = sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"]
    state = [vocabulary, tokenizer.chat_template, tokenizer.eos_token_id, probe]
    return hashlib.sha256(json.dumps(state, ensure_ascii=True).encode()).hexdigest()[:16]


def model_fingerprint(model: torch.nn.Module, *, adapters: bool = False) -> str:
    """The parameters' names, shapes and all their values, rounded to bfloat16, and the
    configuration (see `config_of`).

    So a checkpoint has one fingerprint in float32 and in bfloat16, and one that has been trained
    has another. float16 has a smaller range than either: loaded in it, a checkpoint with tiny
    weights is another model. adapters: whether those on the model count, with the factor that
    scales each (alpha / r of LoRA); without them a PEFT model has the fingerprint of its bare
    checkpoint.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters() if adapters else _base_parameters(model):
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(checksum(parameter).to_bytes(8, "little", signed=True))
    _add_scales(digest, model, adapters)
    config = json.dumps(config_of(model), sort_keys=True)
    config = hashlib.sha256(config.encode()).hexdigest()[:8]
    return f"{FORM}-{digest.hexdigest()[:16]}-{config}"


def sampled_fingerprint(model: torch.nn.Module, *, adapters: bool = False) -> str:
    """The first form: 64 values of each parameter, and nothing of the configuration."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters() if adapters else _base_parameters(model):
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(
            0, flat.shape[0] - 1, min(SAMPLES, flat.shape[0]), dtype=torch.float64
        ).long()
        sample = flat[at.to(flat.device)].bfloat16().float().cpu()
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    _add_scales(digest, model, adapters)
    return digest.hexdigest()[:16]


def _add_scales(digest: Any, model: torch.nn.Module, adapters: bool) -> None:
    if not adapters:
        return
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        # of PEFT's layers a dict by adapter; attention has a number of that name
        if isinstance(scaling, dict) and hasattr(module, "active_adapters"):
            digest.update(f"{name}{sorted(scaling.items())}".encode())


def _base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of the checkpoint itself, by their own names: without adapters, and copies
    that are trained.
    """
    # PEFT methods name their own weights by a prefix: lora_, ia3_, ...
    adapter = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    for name, parameter in model.named_parameters():
        if adapter in name or ".modules_to_save." in name or ".trainable_tokens_" in name:
            continue
        name = name.removeprefix("base_model.model.")
        for wrapper in (".base_layer", ".original_module", ".token_adapter"):
            name = name.replace(wrapper, "")
        yield name, parameter


@torch.no_grad()
def checksum(values: Tensor) -> int:
    """A sum over the bytes of all values, rounded to bfloat16, in which every place has a factor of
    its own. In integers modulo 2^64, so that it is the same on every device.
    """
    if values.is_meta:
        return 0
    flat = values.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.shape[0], CHUNK):
        part = flat[start : start + CHUNK]
        words = -(-part.shape[0] // WORD)
        padded = torch.zeros(words * WORD, dtype=torch.bfloat16, device=flat.device)
        padded[: part.shape[0]] = part
        first = start // WORD
        places = torch.arange(first, first + words, device=flat.device)
        mixed = (padded.view(torch.int64) ^ (places * ODD[0])) * ODD[1]
        mixed = (mixed ^ (mixed >> 32)) * ODD[2]
        total += (mixed ^ (mixed >> 29)).sum()
    return int(total.item())


def config_of(model: Any) -> dict[str, Any]:
    """What of a model's configuration may change its log-probs, by name: all but private names,
    dropout, and what names, loads or trains a model.
    """
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", dict)
    found = to_dict()
    return json.loads(json.dumps(_with_numbers(found), default=str))


def _with_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in config.items():
        name = str(name)
        idle = name in NO_NUMBERS or name.startswith("_") or "dropout" in name or "pdrop" in name
        if not idle and value is not None:
            found[name] = _with_numbers(value) if isinstance(value, Mapping) else value
    return found


def other_config(made: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Where two configurations differ, in words; None: nowhere. Names that only one of them has do
    not count: versions of transformers have different ones.
    """
    for name in sorted(made.keys() & now.keys()):
        was, is_now = made[name], now[name]
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            within = other_config(was, is_now)
            if within is not None:
                return f"{name}.{within}"
        elif was != is_now:
            return f"{name} {was!r}, now it is {is_now!r}"
    return None
