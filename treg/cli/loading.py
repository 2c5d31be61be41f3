"""What several commands need: models, tokenizers, options of annotation, a word to the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from treg.cli.options import RewardsOptions, RowOptions
from treg.data import EncodeOptions, parse_columns
from treg.data.annotated import stream_columns
from treg.data.batches import LOSS_STREAMS
from treg.data.mixture import check_sources
from treg.rewards import DEFAULT_SOURCE, loading
from treg.rewards.annotate import AnnotateOptions, process_state
from treg.rewards.signal import signal_lines

SHORT = ("bfloat16", "float16")
DTYPES = ("auto", "float32", *SHORT)


def load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    loading.check_folder("model", path)
    with loading.no_code_of(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


# of every command and device where none is asked for: where the reference's roundings are not those
# of training, the first margins are not 0
DEFAULT_DTYPE = "float32"


def load_model(
    path: str,
    dtype: str | None,
    device: Any = None,
    attn_implementation: str | None = None,
    **options: Any,
) -> Any:
    """A causal LM from a folder or the hub, on the device.

    Args:
        dtype: float32, bfloat16, float16 or auto; None: DEFAULT_DTYPE. A word is said where that is
            not the checkpoint's, and where 16 bits will run on a CPU.
        device: None: it stays on the CPU for now, and nothing is said.
        options: others of from_pretrained.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    loading.check_folder("model", path)
    chosen = dtype or DEFAULT_DTYPE
    if device is not None:
        _tell_of_dtype(path, dtype, chosen, torch.device(device))
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        with loading.no_code_of(path):
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=chosen, trust_remote_code=False, **options
            )
    except ImportError as error:
        if attn_implementation is None:
            raise
        raise ValueError(
            f"attn_implementation: expected one that is installed, such as sdpa, got "
            f"{attn_implementation!r}: {str(error).splitlines()[0]}"
        ) from error
    return model if device is None else model.to(device)


def data_of(name: str, given: Sequence[str] | None) -> list[str]:
    """The sources that an option names, one or several.

    Raises:
        ValueError: none, one without a name, one twice.
    """
    paths = list(given or [])
    check_sources(name, paths)
    return paths


def _tell_of_dtype(path: str, asked: str | None, chosen: str, device: torch.device) -> None:
    """What a person could not guess about the dtype of a model."""
    with loading.no_code_of(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    own = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if asked is None and own in SHORT:
        fast = "which is faster on a CPU" if device.type == "cpu" else "twice the memory"
        say(
            f"{path}: in float32, {fast}, as every command unless --dtype says otherwise; the "
            f"checkpoint is in {own}, which --dtype auto keeps"
        )
    tell_of_short(f"--dtype {chosen}", own if chosen == "auto" else chosen, device)


def tell_of_short(option: str, dtype: str, device: torch.device) -> None:
    """A word where 16 bits will run on a CPU. option: what asks for them."""
    if dtype in SHORT and device.type == "cpu":
        say(f"{option}: {dtype} takes several times as long as float32 on most CPUs")


def encode_options(rows: RowOptions, max_length: int | None) -> EncodeOptions:
    """How rows become token ids, from the options of the command line."""
    return EncodeOptions(
        max_length,
        chat=False if rows.plain_text else None,
        columns=parse_columns(rows.columns),
        turns=rows.turns,  # pyright: ignore[reportArgumentType]
        date=rows.date,
    )


def annotate_options(
    rewards: RewardsOptions,
    encode: EncodeOptions,
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
        encode,
        tokens_per_batch=rewards.tokens_per_batch,
        per_token=per_token,
        share_prefix=not rewards.no_share_prefix,
        rewards=rewards.rewards or DEFAULT_SOURCE,
        rewards_options=source_options,
        reference=reference,
        shaping=tuple(rewards.shape or ()),
        keep_columns=tuple(keep_columns),
    )


def signal_of(
    examples: Sequence[Mapping[str, Any]], alpha: float, *, length_normalised: bool = False
) -> list[str]:
    """What the signals of annotated examples that a loss takes say: see `treg.rewards.signal`."""
    there = [x for x in LOSS_STREAMS if stream_columns(x)[0] in examples[0]]
    return signal_lines(examples, there, alpha, length_normalised=length_normalised)


def autocast(device: torch.device, *, bf16: bool, fp16: bool = False) -> torch.autocast:
    """Forwards as a training with --bf16 or --fp16 has them."""
    dtype = torch.bfloat16 if bf16 else torch.float16
    return torch.autocast(device.type, dtype, enabled=bf16 or fp16)


def drawable(history: list[dict[str, Any]]) -> bool:
    return any("loss" in x or "eval_loss" in x for x in history)


def say(*parts: Any) -> None:
    """To the terminal, once under several processes."""
    if parts and process_state().is_main_process:
        print(*parts, sep="\n")
