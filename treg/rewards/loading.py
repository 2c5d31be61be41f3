"""Models and tokenizers that a source loads beside the run's own, by folder or hub name."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from treg.data.annotated import model_fingerprint


def load_model(kind: Any, option: str, path: str, what: str, **options: Any) -> tuple[Any, set]:
    """kind.from_pretrained(path, **options) in eval mode and frozen, and the names of the weights
    that its checkpoint does not have.

    Args:
        kind: an Auto class. option, what: for errors, the option and what it expects.
    Raises:
        ValueError: no such folder, or nothing that kind can load.
    """
    check_folder(f"rewards.{option}", path)
    try:
        with torch.inference_mode(False):
            model, info = kind.from_pretrained(
                path, output_loading_info=True, trust_remote_code=False, **options
            )
    except Exception as error:  # each kind of broken folder raises its own
        raise ValueError(
            f"rewards.{option}: expected a folder or hub name of {what}, got {path!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model.requires_grad_(False).eval(), set(info["missing_keys"])


def check_whole(missing: set[str], option: str, path: str, what: str) -> None:
    """ValueError where a checkpoint lacks weights: they would be random numbers."""
    if missing:
        raise ValueError(
            f"rewards.{option}: expected the checkpoint of {what}, got {path!r}, which lacks "
            f"{', '.join(sorted(missing)[:3])}"
        )


def load_tokenizer(name: str, path: str) -> Any:
    """The tokenizer of a folder or hub name. name: of the option that says path, for errors."""
    check_folder(name, path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as of models
        raise ValueError(
            f"{name}: expected a folder or hub name with a tokenizer, got {path!r}: "
            f"{type(error).__name__}: {error}"
        ) from error


@contextlib.contextmanager
def no_code_of(path: str) -> Iterator[None]:
    """What loads a folder or hub name with trust_remote_code=False in here says what that means.
    Unset, transformers would ask on the terminal whether to run what lies there.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path}: expected a model whose code is a part of transformers, got one that brings "
            "its own, which is not run; convert it to a type that transformers has"
        ) from error


def check_folder(name: str, path: str) -> None:
    """ValueError for a path that is no folder: the hub's word on it would be no help. name: of the
    option.
    """
    hub_name = path.count("/") == 1 and not path.startswith(("/", ".", "~"))
    if not Path(path).is_dir() and "/" in path and not hub_name:
        raise ValueError(f"{name}: no such folder: {path}")


def is_adapter(option: str, path: str) -> bool:
    """Whether a folder or hub name holds a PEFT adapter, and no whole model."""
    check_folder(f"rewards.{option}", path)
    return find_adapter_config_file(path) is not None


def adapter_config(option: str, path: str) -> Any:
    """The PeftConfig of an adapter. ValueError for one with virtual tokens, which no position of
    the text stands for.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"rewards.{option}: expected an adapter on the model's weights, such as LoRA, got "
            f"{kind}, whose virtual tokens are not read"
        )
    config.inference_mode = True
    return config


def add_adapter(model: nn.Module, config: Any, option: str, path: str) -> Any:
    """A PeftModel of model with the adapter that lies at path, frozen and in eval mode.

    No weight of model is changed.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    from peft import PeftModel

    wrong = f"rewards.{option}: expected an adapter that fits {type(model).__name__}, got {path!r}"
    try:
        with torch.inference_mode(False):
            adapted = PeftModel(model, config)
            unfit = _other_base_weights(adapted, path)
            if not unfit:
                result: Any = adapted.load_adapter(path, "default")
                unfit = [*result.missing_keys, *result.unexpected_keys]
    except Exception as error:  # PEFT and torch raise what they like
        raise ValueError(f"{wrong}: {type(error).__name__}: {error}") from error
    if unfit:
        raise ValueError(f"{wrong}, which differs in {', '.join(sorted(unfit)[:3])}")
    return adapted.requires_grad_(False).eval()


def _other_base_weights(adapted: nn.Module, path: str) -> list[str]:
    """Weights of the base that lie beside those of the adapter at path, and are not the base's.

    PEFT saves a head or embeddings that have an adapter, and would load them in place.
    """
    from peft.utils import load_peft_weights

    base = dict(adapted.named_parameters(remove_duplicate=False))
    different = []
    for name, saved in load_peft_weights(path, device="cpu").items():
        own = base.get(name)
        if own is not None and not torch.equal(saved.to(own.dtype), own.cpu()):
            different.append(name)
    return different


def with_adapter(model: Any, option: str, path: str) -> Any:
    """A causal LM that shares every weight of model and has the adapter at path besides.

    Modules are copied and parameters are not. So model gives the bits that it gave before, and the
    adapter costs its own weights only.

    Raises:
        ValueError: an adapter of another base; a model that has adapters already.
    """
    config = adapter_config(option, path)
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"rewards.{option}: expected a whole model beside a run's model that has adapters "
            f"itself, got the adapter {path!r}; merge it into its base, save that, and give it"
        )
    _check_base(model, config.base_model_name_or_path or "", option, path)
    parameters = list(model.parameters())
    trainable = [x.requires_grad for x in parameters]
    twin = copy.deepcopy(model, {id(x): x for x in [*parameters, *model.buffers()]})
    try:
        return add_adapter(twin, config, option, path)
    finally:
        for parameter, flag in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(flag)  # PEFT freezes what it wraps


def _check_base(model: Any, base: str, option: str, path: str) -> None:
    """ValueError unless an adapter's base is the run's model: by its name, or else by the
    fingerprint of what the name leads to.
    """
    own = model.config._name_or_path or ""
    if own == base or (own and base and Path(own).resolve() == Path(base).resolve()):
        return
    try:
        # an adapter without a base, or one whose base is gone, cannot be compared
        found, _ = load_model(AutoModelForCausalLM, option, base, "a causal LM", dtype="auto")
        same = model_fingerprint(found) == model_fingerprint(model)
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"rewards.{option}: expected an adapter of the run's model {own!r}, got {path!r}, of "
            f"{base!r}; run with --model {base}, or merge it and give the whole model"
        )
