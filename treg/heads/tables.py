"""Where transformers' models keep the parts of a head: names of config attributes, and of modules.

The tables hold what is known of each model; the check of `treg.heads.checks` refuses a model that
they misread.
"""

from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# attributes of the text config, and the power to which their value enters logit_scale
SCALES = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,  # minicpm3 divides the hidden states: the same, its head has no bias
    "logits_mup_width_multiplier": -1,
}
# attributes of the text config that hold the softcap
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# attributes of the text config that hold the number of rows of the weight that are used
VOCABS = ("unpadded_vocab_size",)

# model types where an attribute misleads: another power of it, or 0 where it is there and not used
EXCEPTIONS = {
    "gemma3": {"final_logit_softcapping": 0},
    "hyperclovax": {"logits_scaling": 1},
    "mpt": {"logit_scale": 0},
}

# model types whose attention looks at places in a row where it should look at positions, which a
# few tokens do not show
BY_PLACE = {
    "big_bird": "block-sparse attention by places in the row",
    "gpt_neo": "local attention by places in the row",
}

# What is applied between backbone and projection, in order: a module by its name, or a function.
Steps = tuple[str | Callable[[Tensor], Tensor], ...]
# A model is read by the first row of whose modules it has every one.
BEFORE: tuple[Steps, ...] = (
    ("cls.predictions.transform",),  # bert and its kin
    ("cls.predictions.dense", "cls.predictions.activation", "cls.predictions.LayerNorm"),  # rembert
    ("lm_head.dense", F.gelu, "lm_head.layer_norm"),  # roberta and its kin
    ("generator_predictions",),  # electra
    ("lm_head.dense", "lm_head.act", "lm_head.norm"),  # modernbert-decoder
)


def steps_before(model: PreTrainedModel) -> Steps:
    """What stands between the backbone and the projection of a model; () where nothing does."""
    modules = {name for name, _ in model.named_modules()}
    for steps in BEFORE:
        names = {step for step in steps if isinstance(step, str)}
        if names <= modules:
            return steps
    return ()


def logit_scale_of(model: PreTrainedModel) -> float:
    """The factor of the logits, 1 where there is none."""
    powers = SCALES | EXCEPTIONS.get(model.config.model_type, {})
    scale = 1.0
    for name in SCALES:
        value = _number(model, name)
        if value is not None:
            scale *= value ** powers[name]
    return scale


def softcap_of(model: PreTrainedModel) -> float | None:
    """The bound that tanh keeps the logits in, None where there is none."""
    return _first_number(model, SOFTCAPS)


def used_vocab(model: PreTrainedModel) -> int | None:
    """How many rows of the weight make logits, None where all do."""
    vocab = _first_number(model, VOCABS)
    return None if vocab is None else int(vocab)


def _first_number(model: PreTrainedModel, names: Iterable[str]) -> float | None:
    for name in names:
        value = _number(model, name)
        if value is not None:
            return value
    return None


def _number(model: PreTrainedModel, name: str) -> float | None:
    """That attribute of the text config, None where it is no number or is not used."""
    exceptions = EXCEPTIONS.get(model.config.model_type, {})
    if exceptions.get(name) == 0:
        return None
    value = getattr(model.config.get_text_config(), name, None)
    return value if isinstance(value, int | float) else None
