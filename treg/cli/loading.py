"""What several commands need: models, tokenizers, options of annotation, a word to the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.cli.options import RewardsOptions
from treg.data import EncodeOptions
from treg.rewards import DEFAULT_SOURCE, loading
from treg.rewards.annotate import AnnotateOptions, process_state


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    loading.check_folder("model", path)
    with loading.no_code_of(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_model(
    path: str, dtype: str, device: Any = None, attn_implementation: str | None = None
) -> Any:
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    loading.check_folder("model", path)
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with loading.no_code_of(path):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, **more
        )
    return model if device is None else model.to(device)


def check_data(name: str, path: str) -> None:
    """ValueError for data without a name, which a path takes for the current folder."""
    if not path.strip():
        raise ValueError(f"{name}: expected a file, a folder or a hub name, got {path!r}")


def annotate_options(
    rewards: RewardsOptions,
    max_length: int | None,
    *,
    per_token: bool,
    reference: bool = True,
    keep_columns: Sequence[str] = (),
) -> AnnotateOptions:
    """Options of annotation, from those of the command line."""
    source_options = dict(rewards.rewards_options)
    if rewards.prompts is not None:
        if "prompts" in source_options:
            raise ValueError("prompts: expected --prompts or --rewards.prompts, got both")
        source_options["prompts"] = rewards.prompts
    return AnnotateOptions(
        EncodeOptions(max_length),
        tokens_per_batch=rewards.tokens_per_batch,
        per_token=per_token,
        share_prefix=not rewards.no_share_prefix,
        rewards=rewards.rewards or DEFAULT_SOURCE,
        rewards_options=source_options,
        reference=reference,
        shaping=tuple(rewards.shape or ()),
        keep_columns=tuple(keep_columns),
    )


def drawable(history: list[dict[str, Any]]) -> bool:
    return any("loss" in x or "eval_loss" in x for x in history)


def say(*parts: Any) -> None:
    """To the terminal, once under several processes."""
    if process_state().is_main_process:
        print(*parts, sep="\n")
