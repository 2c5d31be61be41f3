"""treg merge: adapters into the weights of the model that they were trained on."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from treg.cli.loading import DTYPES, load_tokenizer, say
from treg.cli.options import MergeOptions, parse
from treg.rewards.loading import check_folder

TOLERANCE = 1e-3  # largest difference of log-probs in float32, nats
PROBE = 16  # tokens


def run(argv: list[str]) -> None:
    (options,) = parse("merge", argv, (MergeOptions,))
    if options.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {options.dtype!r}")
    output = Path(options.output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output: expected a new or empty folder, got {output}, which has files")
    base = options.model or _base_of(options.adapter)
    there = Path(options.adapter) / "tokenizer_config.json"
    tokenizer = load_tokenizer(options.adapter if there.exists() else base)
    write_merged(base, options.adapter, output, tokenizer, options.dtype)


def write_merged(
    base: str, adapter: str, output: Path, tokenizer: Any, dtype: str = "auto"
) -> None:
    """Write the model of base with the adapter in its weights, and say how near it is to the two.

    Weights in 16 bits round what the adapter adds.
    """
    merged, expected, own_dtype = merge(base, adapter)
    kind = own_dtype if dtype == "auto" else getattr(torch, dtype)
    merged.to(kind)
    rounded = (_logprobs(merged).float() - expected).abs().max().item()
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    say(
        f"wrote {output}: the whole model, in {str(kind).removeprefix('torch.')}; its log-probs "
        f"differ by {rounded:.1e} nats at most from those with the adapter in float32"
    )


def merge(base: str, adapter: str) -> tuple[Any, torch.Tensor, torch.dtype]:
    """The model of base with the adapter in its weights, in float32; log-probs of a probe with the
    adapter beside them; and the dtype of base's checkpoint.

    Raises:
        ValueError: the adapter does not fit, or the merged model is another one.
    """
    from peft import PeftModel

    check_folder("model", base)
    check_folder("adapter", adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    own_dtype = model.dtype
    try:
        adapted: Any = PeftModel.from_pretrained(model.float(), adapter).eval()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"adapter: expected an adapter of {base}, got {adapter}: {error}"
        ) from error
    before = _logprobs(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    difference = (_logprobs(merged) - before).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"adapter: expected the log-probs of the merged model within {TOLERANCE} nats of those "
            f"with the adapter, got a difference of {difference:.2g}; keep the adapter as it is"
        )
    return merged, before, own_dtype


@torch.no_grad()
def _logprobs(model: Any) -> torch.Tensor:
    """[1, PROBE, V] of tokens from all over the vocabulary."""
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, size - 1, PROBE).long()[None]
    return model(input_ids=ids).logits.log_softmax(-1)


def _base_of(adapter: str) -> str:
    from peft import PeftConfig

    check_folder("adapter", adapter)
    try:
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    except (ValueError, OSError) as error:
        raise ValueError(
            f"adapter: expected a folder or hub name of a PEFT adapter, got {adapter!r}: {error}"
        ) from error
    if not base:
        raise ValueError(f"model: expected --model beside {adapter}, which does not say its base")
    return base
