"""Weights in 4 bits below adapters: QLoRA, arXiv 2305.14314, by bitsandbytes."""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig


def check_4bit() -> None:
    """ValueError where nothing can run weights in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "load_in_4bit: expected the package bitsandbytes, found none; install it with: pip "
            "install bitsandbytes"
        )


def quantization(device: torch.device, bf16: bool) -> dict[str, Any]:
    """Options of from_pretrained: NF4 with doubly quantized constants, as the paper has it, onto
    the device; products in bfloat16 with bf16, else in float32. The head stays as it is.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}
