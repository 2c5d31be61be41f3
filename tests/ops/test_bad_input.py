"""What the public ops refuse, and that the message names the argument, what was expected and what
came.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from helpers import DEVICE, GPU

import treg
import treg.checks
from treg import fused_treg_loss, linear_logprobs
from treg.ops.options import HeadOptions

ROOT = Path(__file__).resolve().parents[2]
NAN, INF = float("nan"), float("inf")
V, D = 7, 3
IGNORED = -100


def head():
    """What both ops take: 4 sequences of 3 tokens, the last of each sequence ignored."""
    target = torch.tensor([[0, 6, IGNORED], [1, 2, IGNORED], [3, 3, IGNORED], [5, 4, IGNORED]])
    return {"hidden": torch.randn(4, 3, D), "weight": torch.randn(V, D), "target": target}


def padded():
    return head() | {"token_rewards": torch.rand(4, 3) - 0.5, "ref_logps": -torch.rand(4)}


def packed():
    flat = {k: v if k == "weight" else v.flatten(0, 1) for k, v in head().items()}
    flat |= {"token_rewards": torch.rand(12) - 0.5, "ref_logps": -torch.rand(4)}
    return flat | {"cu_seqlens": torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)}


def weighted():
    return padded() | {"ref_logps": -torch.rand(4, 3), "token_weights": torch.rand(4, 3)}


LOGPROBS = (linear_logprobs, head)
PADDED = (fused_treg_loss, padded)
PACKED = (fused_treg_loss, packed)
WEIGHTED = (fused_treg_loss, weighted)
BOTH = (LOGPROBS, PADDED)

FLOAT_MATRIX = torch.zeros(4, 3)
TARGET = head()["target"]


def at(x, index, value):
    x = x.clone()
    x[index] = value
    return x


def cu(*ends, dtype=torch.int32):
    return torch.tensor(ends, dtype=dtype)


# (calls, what is changed, the argument named [a pattern], what was expected, what came)
# The exception is TypeError where a tensor was expected and something else came, else ValueError.
ROWS = [
    # -- no tensor
    (
        BOTH,
        {"hidden": numpy.zeros((4, 3, D))},
        "hidden",
        r"expected a torch\.Tensor",
        "got ndarray",
    ),
    (BOTH, {"hidden": None}, "hidden", r"expected a torch\.Tensor", "got NoneType"),
    (BOTH, {"weight": [[0.0] * D] * V}, "weight", r"expected a torch\.Tensor", "got list"),
    (BOTH, {"target": TARGET.tolist()}, "target", r"expected a torch\.Tensor", "got list"),
    (BOTH, {"bias": 0.0}, "bias", r"expected a torch\.Tensor or None", "got float"),
    (
        [PADDED],
        {"token_rewards": numpy.zeros((4, 3))},
        "token_rewards",
        r"expected a torch\.Tensor",
        "got ndarray",
    ),
    (
        [PADDED],
        {"token_rewards": None},
        "token_rewards",
        r"expected a torch\.Tensor",
        "got NoneType",
    ),
    ([PADDED], {"ref_logps": 0.0}, "ref_logps", r"expected a torch\.Tensor or None", "got float"),
    (
        [WEIGHTED],
        {"token_weights": [1.0]},
        "token_weights",
        r"expected a torch\.Tensor or None",
        "got list",
    ),
    (
        [PACKED],
        {"cu_seqlens": [0, 3, 6, 9, 12]},
        "cu_seqlens",
        r"expected a torch\.Tensor or None",
        "got list",
    ),
    # -- hidden
    (BOTH, {"hidden": torch.tensor(1.0)}, "hidden", r"\[\.\.\., D\]", r"got \[\]"),
    (BOTH, {"hidden": torch.zeros(4, 3, 0)}, "hidden", "D >= 1", r"got \[4, 3, 0\]"),
    (
        BOTH,
        {"hidden": torch.zeros(4, 3, D, dtype=torch.int64)},
        "hidden",
        "torch.float32",
        "got torch.int64",
    ),
    (
        BOTH,
        {"hidden": torch.zeros(4, 3, D, dtype=torch.bool)},
        "hidden",
        "torch.float32",
        "got torch.bool",
    ),
    (
        BOTH,
        {"hidden": torch.zeros(4, 3, D, dtype=torch.complex64)},
        "hidden",
        "torch.float32",
        "got torch.complex64",
    ),
    (
        BOTH,
        {"hidden": torch.zeros(4, 3, D).to(torch.float8_e4m3fn)},
        "hidden",
        "torch.float32",
        "got torch.float8",
    ),
    (BOTH, {"hidden": torch.zeros(4, 3, D, device="meta")}, "hidden|weight", "expected", "meta"),
    (BOTH, {"hidden": torch.zeros(4, 3, D).to_sparse()}, "hidden", "expected", "sparse"),
    (
        [PADDED],
        {"hidden": torch.zeros(12, D), "target": TARGET.flatten()},
        "hidden",
        r"\[2B, T, D\]",
        r"got \[12, 3\]",
    ),
    (
        [PACKED],
        {"hidden": torch.zeros(4, 3, D), "target": TARGET},
        "hidden",
        r"\[N, D\]",
        r"got \[4, 3, 3\]",
    ),
    (
        [PADDED],
        {"hidden": torch.zeros(3, 3, D), "target": TARGET[:3]},
        "hidden",
        "even number >= 2",
        "got 3",
    ),
    (
        [PADDED],
        {"hidden": torch.zeros(0, 3, D), "target": TARGET[:0]},
        "hidden",
        "even number >= 2",
        "got 0",
    ),
    # -- weight
    (BOTH, {"weight": torch.zeros(V)}, "weight", r"\[V, D\]", r"got \[7\]"),
    (BOTH, {"weight": torch.zeros(1, V, D)}, "weight", r"\[V, D\]", r"got \[1, 7, 3\]"),
    (BOTH, {"weight": torch.zeros(0, D)}, "weight", "V >= 1", r"got \[0, 3\]"),
    (BOTH, {"weight": torch.zeros(D, V)}, "weight", r"\[V, 3\]", r"got \[3, 7\].*transposed\?"),
    (
        BOTH,
        {"weight": torch.zeros(V, D, dtype=torch.bfloat16)},
        "weight",
        "torch.float32",
        "got torch.bfloat16",
    ),
    (
        BOTH,
        {"weight": torch.zeros(V, D, dtype=torch.float64)},
        "weight",
        "torch.float32",
        "got torch.float64",
    ),
    (
        BOTH,
        {"weight": torch.zeros(V, D, dtype=torch.int64)},
        "weight",
        "torch.float32",
        "got torch.int64",
    ),
    (
        BOTH,
        {"weight": torch.zeros(V, D, device="meta")},
        "weight",
        "with values",
        "the meta device",
    ),
    (BOTH, {"weight": torch.zeros(V, D).to_sparse()}, "weight", "expected", "sparse"),
    # -- target
    (BOTH, {"target": TARGET.int()}, "target", "torch.int64", r"got torch\.int32.*long\(\)"),
    (
        BOTH,
        {"target": FLOAT_MATRIX.clone().requires_grad_()},
        "target",
        "torch.int64",
        "got torch.float32",
    ),
    (BOTH, {"target": TARGET[:, :2]}, "target", r"\[4, 3\]", r"got \[4, 2\]"),
    (BOTH, {"target": TARGET.flatten()}, "target", r"\[4, 3\]", r"got \[12\]"),
    (BOTH, {"target": TARGET.unsqueeze(-1)}, "target", r"\[4, 3\]", r"got \[4, 3, 1\]"),
    (BOTH, {"target": TARGET.to("meta")}, "target", "with values", "the meta device"),
    (BOTH, {"target": TARGET.to_sparse()}, "target", "expected", "sparse"),
    (
        BOTH,
        {"target": at(TARGET, (1, 1), V)},
        "target",
        r"\[0, 7\).*-100",
        r"got 7 at index \[1, 1\]",
    ),
    (
        BOTH,
        {"target": at(TARGET, (2, 0), -1)},
        "target",
        r"\[0, 7\).*-100",
        r"got -1 at index \[2, 0\]",
    ),
    (BOTH, {"ignore_index": -1}, "target", r"\[0, 7\).*-1", r"got -100 at index \[0, 2\]"),
    (
        [PADDED],
        {"target": at(TARGET, 2, IGNORED)},
        "target",
        "a scored token in every",
        "none in sequence 2 of 4",
    ),
    (
        *(
            [PADDED],
            {
                "hidden": torch.zeros(4, 0, D),
                "target": TARGET[:, :0],
                "token_rewards": FLOAT_MATRIX[:, :0],
            },
        ),
        *("target", "a scored token in every", "none in sequence 0 of 4"),
    ),
    (
        [PACKED],
        {"cu_seqlens": cu(0, 3, 6, 6, 12)},
        "target",
        "a scored token in every",
        "none in sequence 2 of 4",
    ),
    (
        [PACKED],
        {"cu_seqlens": cu(0, 3, 8, 9, 12)},
        "target",
        "a scored token in every",
        "none in sequence 2 of 4",
    ),
    # -- bias
    (BOTH, {"bias": torch.zeros(D)}, "bias", r"\[7\]", r"got \[3\]"),
    (BOTH, {"bias": torch.tensor(0.0)}, "bias", r"\[7\]", r"got \[\]"),
    (BOTH, {"bias": torch.zeros(1, V)}, "bias", r"\[7\]", r"got \[1, 7\]"),
    (
        BOTH,
        {"bias": torch.zeros(V, dtype=torch.int64)},
        "bias",
        "floating-point",
        "got torch.int64",
    ),
    (
        BOTH,
        {"bias": torch.zeros(V, dtype=torch.complex64)},
        "bias",
        "floating-point",
        "got torch.complex64",
    ),
    (
        BOTH,
        {"bias": torch.zeros(V).to(torch.float8_e4m3fn)},
        "bias",
        "expected",
        "got torch.float8",
    ),
    (BOTH, {"bias": torch.zeros(V, device="meta")}, "bias", "with values", "the meta device"),
    (BOTH, {"bias": torch.zeros(V).to_sparse()}, "bias", "expected", "sparse"),
    # -- scalars of the head
    (BOTH, {"logit_scale": NAN}, "logit_scale", "a finite number", "got nan"),
    (BOTH, {"logit_scale": INF}, "logit_scale", "a finite number", "got inf"),
    (BOTH, {"logit_scale": None}, "logit_scale", "a finite number", "got None"),
    (BOTH, {"logit_scale": True}, "logit_scale", "a finite number", "got True"),
    (BOTH, {"logit_scale": torch.tensor(1.0)}, "logit_scale", "a finite number", "got tensor"),
    (BOTH, {"logit_scale": 10**400}, "logit_scale", "a finite number", "got 1000"),
    (BOTH, {"softcap": 0}, "softcap", "a finite number > 0 or None", "got 0"),
    (BOTH, {"softcap": -30.0}, "softcap", "a finite number > 0 or None", "got -30"),
    (BOTH, {"softcap": NAN}, "softcap", "a finite number > 0 or None", "got nan"),
    (BOTH, {"softcap": "30"}, "softcap", "a finite number > 0 or None", "got '30'"),
    (BOTH, {"temperature": 0.0}, "temperature", "a finite number > 0", "got 0"),
    (BOTH, {"temperature": -1.0}, "temperature", "a finite number > 0", "got -1"),
    (BOTH, {"temperature": INF}, "temperature", "a finite number > 0", "got inf"),
    (BOTH, {"temperature": None}, "temperature", "a finite number > 0", "got None"),
    (BOTH, {"temperature": True}, "temperature", "a finite number > 0", "got True"),
    (BOTH, {"ignore_index": -100.0}, "ignore_index", "an int", "got -100.0"),
    (BOTH, {"ignore_index": None}, "ignore_index", "an int", "got None"),
    (BOTH, {"ignore_index": False}, "ignore_index", "an int", "got False"),
    (BOTH, {"ignore_index": 2**70}, "ignore_index", "expected", "got 1180591620717411303424"),
    # -- how it is computed
    (BOTH, {"impl": "cuda"}, "impl", "None, 'torch' or 'triton'", "got 'cuda'"),
    (BOTH, {"impl": True}, "impl", "None, 'torch' or 'triton'", "got True"),
    (BOTH, {"impl": ["torch"]}, "impl", "None, 'torch' or 'triton'", r"got \['torch'\]"),
    (BOTH, {"memory_budget": 0}, "memory_budget", r"bytes > 0 \(int\)", "got 0"),
    (BOTH, {"memory_budget": -1}, "memory_budget", r"bytes > 0 \(int\)", "got -1"),
    (BOTH, {"memory_budget": 1e9}, "memory_budget", r"bytes > 0 \(int\)", "got 1000000000.0"),
    (BOTH, {"memory_budget": True}, "memory_budget", r"bytes > 0 \(int\)", "got True"),
    (
        BOTH,
        {"memory_budget": "1GB"},
        "memory_budget",
        r"bytes > 0 \(int\), 'least' or None",
        "got '1GB'",
    ),
    (
        BOTH,
        {"memory_budget": 1000},
        "memory_budget",
        r"at least \d+ bytes \(one row at V=7\)",
        "got 1000",
    ),
    (BOTH, {"filter_eps": -0.1}, "filter_eps", "0 <= value < 1", "got -0.1"),
    (BOTH, {"filter_eps": 1.0}, "filter_eps", "0 <= value < 1", "got 1.0"),
    (BOTH, {"filter_eps": float("nan")}, "filter_eps", "a finite number or None", "got nan"),
    (BOTH, {"filter_eps": True}, "filter_eps", "a finite number or None", "got True"),
    (BOTH, {"filter_eps": "1e-4"}, "filter_eps", "a finite number or None", "got '1e-4'"),
    (BOTH, {"logits_dtype": torch.float16}, "logits_dtype", "torch.float32", "got torch.float16"),
    (BOTH, {"logits_dtype": "float32"}, "logits_dtype", "torch.float32", "got 'float32'"),
    (
        [LOGPROBS],
        {"outputs": ("lse", "perplexity")},
        "outputs",
        "'entropy'",
        r"got \('lse', 'perplexity'\)",
    ),
    ([LOGPROBS], {"outputs": "lse"}, "outputs", "a tuple", "got 'lse'"),
    ([LOGPROBS], {"outputs": ("logprobs",)}, "outputs", "a tuple", r"got \('logprobs',\)"),
    ([LOGPROBS], {"outputs": ([],)}, "outputs", "a tuple", r"got \(\[\],\)"),
    ([LOGPROBS], {"outputs": None}, "outputs", "a tuple", "got None"),
    ([LOGPROBS], {"outputs": 1}, "outputs", "a tuple", "got 1"),
    # -- token_rewards
    ([PADDED], {"token_rewards": torch.zeros(4)}, "token_rewards", r"\[4, 3\]", r"got \[4\]"),
    (
        [PADDED],
        {"token_rewards": torch.zeros(4, 3, 1)},
        "token_rewards",
        r"\[4, 3\]",
        r"got \[4, 3, 1\]",
    ),
    ([PACKED], {"token_rewards": FLOAT_MATRIX}, "token_rewards", r"\[12\]", r"got \[4, 3\]"),
    (
        [PADDED],
        {"token_rewards": FLOAT_MATRIX.long()},
        "token_rewards",
        "floating-point",
        "got torch.int64",
    ),
    (
        [PADDED],
        {"token_rewards": FLOAT_MATRIX.bool()},
        "token_rewards",
        "floating-point",
        "got torch.bool",
    ),
    (
        [PADDED],
        {"token_rewards": FLOAT_MATRIX.to(torch.complex64)},
        "token_rewards",
        "floating",
        "got torch.complex64",
    ),
    (
        [PADDED],
        {"token_rewards": FLOAT_MATRIX.to(torch.float8_e4m3fn)},
        "token_rewards",
        "expected",
        "torch.float8",
    ),
    (
        [PADDED],
        {"token_rewards": FLOAT_MATRIX.to("meta")},
        "token_rewards",
        "with values",
        "the meta device",
    ),
    ([PADDED], {"token_rewards": FLOAT_MATRIX.to_sparse()}, "token_rewards", "expected", "sparse"),
    (
        [PADDED],
        {"token_rewards": at(FLOAT_MATRIX, (2, 1), NAN)},
        "token_rewards",
        "finite",
        r"nan at index \[2, 1\]",
    ),
    (
        [PADDED],
        {"token_rewards": at(FLOAT_MATRIX, (0, 0), -INF)},
        "token_rewards",
        "finite",
        r"-inf at index \[0, 0\]",
    ),
    # -- ref_logps
    ([PADDED], {"ref_logps": None}, "ref_logps", "a tensor for loss_type='dpo'", "got None"),
    (
        [PADDED],
        {"loss_type": "simpo"},
        "ref_logps",
        "None for the reference-free loss_type='simpo'",
        "got a tensor",
    ),
    (
        [PADDED],
        {"loss_type": "orpo"},
        "ref_logps",
        "None for the reference-free loss_type='orpo'",
        "got a tensor",
    ),
    (
        [PADDED],
        {"loss_type": "cpo"},
        "ref_logps",
        "None for the reference-free loss_type='cpo'",
        "got a tensor",
    ),
    (
        [WEIGHTED],
        {"ref_logps": torch.zeros(4)},
        "ref_logps",
        "per-token .* token_weights",
        "got per-sequence sums",
    ),
    (
        [PADDED],
        {"ref_logps": torch.zeros(2)},
        "ref_logps",
        r"\[4\] sums, or \[4, 3\]",
        r"got \[2\]",
    ),
    (
        [PADDED],
        {"ref_logps": torch.zeros(4, 1)},
        "ref_logps",
        r"\[4\] sums, or \[4, 3\]",
        r"got \[4, 1\]",
    ),
    (
        [PADDED],
        {"ref_logps": torch.tensor(0.0)},
        "ref_logps",
        r"\[4\] sums, or \[4, 3\]",
        r"got \[\]",
    ),
    ([PACKED], {"ref_logps": FLOAT_MATRIX}, "ref_logps", r"\[4\] sums, or \[12\]", r"got \[4, 3\]"),
    (
        [PADDED],
        {"ref_logps": torch.zeros(4, dtype=torch.int64)},
        "ref_logps",
        "floating-point",
        "got torch.int64",
    ),
    (
        [PADDED],
        {"ref_logps": torch.zeros(4).to(torch.complex64)},
        "ref_logps",
        "floating-point",
        "got torch.complex64",
    ),
    (
        [PADDED],
        {"ref_logps": torch.zeros(4).to(torch.float8_e4m3fn)},
        "ref_logps",
        "expected",
        "torch.float8",
    ),
    (
        [PADDED],
        {"ref_logps": torch.zeros(4, device="meta")},
        "ref_logps",
        "with values",
        "the meta device",
    ),
    ([PADDED], {"ref_logps": torch.zeros(4).to_sparse()}, "ref_logps", "expected", "sparse"),
    (
        [PADDED],
        {"ref_logps": at(torch.zeros(4), 3, NAN)},
        "ref_logps",
        "finite",
        r"nan at index \[3\]",
    ),
    (
        [PADDED],
        {"ref_logps": at(torch.zeros(4), 1, INF)},
        "ref_logps",
        "finite",
        r"inf at index \[1\]",
    ),
    (
        [PADDED],
        {"ref_logps": at(FLOAT_MATRIX, (1, 0), -INF)},
        "ref_logps",
        "finite",
        r"-inf at index \[1, 0\]",
    ),
    # -- token_weights
    ([WEIGHTED], {"token_weights": torch.ones(4)}, "token_weights", r"\[4, 3\]", r"got \[4\]"),
    (
        [WEIGHTED],
        {"token_weights": FLOAT_MATRIX.long()},
        "token_weights",
        "floating-point",
        "got torch.int64",
    ),
    (
        [WEIGHTED],
        {"token_weights": FLOAT_MATRIX.to("meta")},
        "token_weights",
        "with values",
        "the meta device",
    ),
    (
        [WEIGHTED],
        {"token_weights": at(FLOAT_MATRIX, (0, 1), -0.5)},
        "token_weights",
        ">= 0",
        "got -0.5",
    ),
    (
        [WEIGHTED],
        {"token_weights": at(FLOAT_MATRIX, (3, 1), NAN)},
        "token_weights",
        "finite",
        r"nan at index \[3, 1\]",
    ),
    # -- cu_seqlens
    ([PACKED], {"cu_seqlens": cu(1, 3, 6, 9, 12)}, "cu_seqlens", "start at 0", "got 1"),
    (
        [PACKED],
        {"cu_seqlens": cu(0, 6, 3, 9, 12)},
        "cu_seqlens",
        "not to decrease",
        r"got \[0, 6, 3, 9, 12\]",
    ),
    ([PACKED], {"cu_seqlens": cu(0, 3, 6, 9, 11)}, "cu_seqlens", "end at N=12", "got 11"),
    ([PACKED], {"cu_seqlens": cu(0, 3, 6, 9, 13)}, "cu_seqlens", "end at N=12", "got 13"),
    ([PACKED], {"cu_seqlens": cu(0, 3, 6, 12)}, "cu_seqlens", "even number >= 2", "got 3"),
    ([PACKED], {"cu_seqlens": cu(0, 12)}, "cu_seqlens", "even number >= 2", "got 1"),
    ([PACKED], {"cu_seqlens": cu()}, "cu_seqlens", "expected", "got"),
    (
        [PACKED],
        {"cu_seqlens": cu(0, 3, 6, 9, 12, dtype=torch.float32)},
        "cu_seqlens",
        "int32",
        "torch.float32",
    ),
    (
        [PACKED],
        {"cu_seqlens": cu(0, 3, 6, 9, 12, dtype=torch.int16)},
        "cu_seqlens",
        "int32",
        "torch.int16",
    ),
    (
        [PACKED],
        {"cu_seqlens": cu(0, 3, 6, 9, 12).view(1, 5)},
        "cu_seqlens",
        r"\[2B\+1\]",
        r"got \[1, 5\]",
    ),
    ([PACKED], {"cu_seqlens": torch.tensor(0)}, "cu_seqlens", r"\[2B\+1\]", r"got \[\]"),
    ([PACKED], {"cu_seqlens": cu(0, 3, 6, 9, 12).to("meta")}, "cu_seqlens", "expected", "meta"),
    ([PACKED], {"cu_seqlens": cu(0, 3, 6, 9, 12).to_sparse()}, "cu_seqlens", "expected", "sparse"),
    # -- options of the loss
    ([PADDED], {"beta": 0.0}, "beta", "> 0", "got 0"),
    ([PADDED], {"beta": -0.1}, "beta", "> 0", "got -0.1"),
    ([PADDED], {"beta": NAN}, "beta", "a finite number", "got nan"),
    ([PADDED], {"beta": "0.1"}, "beta", "a finite number", "got '0.1'"),
    ([PADDED], {"beta": True}, "beta", "a finite number", "got True"),
    ([PADDED], {"beta": 10**400}, "beta", "a finite number", "got 1000"),
    ([PADDED], {"alpha": -0.25}, "alpha", ">= 0", "got -0.25"),
    ([PADDED], {"alpha": INF}, "alpha", "a finite number", "got inf"),
    ([PADDED], {"alpha": "0.25"}, "alpha", "a finite number", "got '0.25'"),
    ([PADDED], {"alpha": False}, "alpha", "a finite number", "got False"),
    ([PADDED], {"gamma": 0.5}, "gamma", "0 for loss_type='dpo'", "got 0.5"),
    ([PADDED], {"gamma": NAN}, "gamma", "a finite number", "got nan"),
    ([PADDED], {"label_smoothing": 0.5}, "label_smoothing", "0 <= value < 0.5", "got 0.5"),
    ([PADDED], {"label_smoothing": -0.1}, "label_smoothing", "0 <= value < 0.5", "got -0.1"),
    ([PADDED], {"label_smoothing": NAN}, "label_smoothing", "a finite number", "got nan"),
    (
        [PADDED],
        {"label_smoothing": 0.1, "loss_type": "ipo"},
        "label_smoothing",
        "0 for loss_type='ipo'",
        "got 0.1",
    ),
    (
        [PADDED],
        {"label_smoothing": 0.1, "loss_type": "hinge"},
        "label_smoothing",
        "0 for loss_type='hinge'",
        "got 0.1",
    ),
    (
        [PADDED],
        {"loss_type": "exo_pair"},
        "label_smoothing",
        "> 0 for loss_type='exo_pair'",
        "got 0",
    ),
    ([PADDED], {"loss_type": "dop"}, "loss_type", "'simpo'", r"got 'dop'; did you mean 'dpo'\?"),
    (
        [PADDED],
        {"loss_type": "sim_po"},
        "loss_type",
        "'simpo'",
        r"got 'sim_po'; did you mean 'simpo'\?",
    ),
    (
        [PADDED],
        {"loss_type": "apo-zero"},
        "loss_type",
        "'apo_zero'",
        r"got 'apo-zero'; did you mean 'apo_zero'\?",
    ),
    ([PADDED], {"loss_type": "xyz"}, "loss_type", "'simpo'", "got 'xyz'$"),
    ([PADDED], {"loss_type": None}, "loss_type", "'simpo'", "got None"),
    ([PADDED], {"loss_type": ["dpo"]}, "loss_type", "'simpo'", r"got \['dpo'\]"),
    ([PADDED], {"weighting": "none"}, "weighting", "'gradient' or 'static'", "got 'none'"),
    ([PADDED], {"weighting": None}, "weighting", "'gradient' or 'static'", "got None"),
    (
        [PADDED],
        {"reduction": "batchmean"},
        "reduction",
        "'mean', 'sum' or 'none'",
        "got 'batchmean'",
    ),
    ([PADDED], {"reduction": None}, "reduction", "'mean', 'sum' or 'none'", "got None"),
]


def case_id(fn, changed):
    return f"{fn.__name__[:6]}-" + ",".join(f"{k}={label_of(v)}" for k, v in changed.items())


def label_of(x):
    if isinstance(x, torch.Tensor):
        kind = x.device.type if x.layout == torch.strided else "sparse"
        return f"{str(x.dtype)[6:]}{list(x.shape)}-{kind}"
    return str(x)[:12] if isinstance(x, str | int | float | bool | None) else type(x).__name__


@pytest.mark.parametrize(
    ("fn", "make", "changed", "argument", "expected", "came"),
    [
        pytest.param(*call, *row, id=case_id(call[0], row[0]))
        for calls, *row in ROWS
        for call in calls
    ],
)
def test_refused_by_name(fn, make, changed, argument, expected, came):
    kind = TypeError if re.search(r"torch\\?\.Tensor", expected) else ValueError
    with pytest.raises((ValueError, TypeError)) as caught:
        fn(**make() | {"impl": "torch"} | changed)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert re.match(f"({argument}): expected", message), message
    assert re.search(expected, message) and re.search(came, message), message


@pytest.mark.parametrize(("fn", "make"), [LOGPROBS, PADDED, PACKED, WEIGHTED])
def test_without_the_change_it_is_accepted(fn, make):
    """Each row above is refused for what it changes and nothing else."""
    for given in (
        make(),
        make() | {"impl": "torch", "memory_budget": 1 << 30, "logits_dtype": torch.float32},
    ):
        assert torch.isfinite(fn(**given)[0]).all()


# -- accepted although it looks odd


@pytest.mark.parametrize("garbage", [NAN, INF, -1.0])
@pytest.mark.parametrize("name", ["token_rewards", "ref_logps", "token_weights"])
@pytest.mark.parametrize("frozen", [True, False])
def test_ignored_positions_may_hold_anything(name, garbage, frozen):
    """The same loss and the same gradients as with 0 there."""
    given = weighted()
    ignored = given["target"] == IGNORED

    def run(value):
        hidden = given["hidden"].clone().requires_grad_()
        weight = given["weight"].clone().requires_grad_(not frozen)
        spoilt = {name: torch.where(ignored, value, given[name])}
        out = fused_treg_loss(**given | {"hidden": hidden, "weight": weight} | spoilt, impl="torch")
        out.loss.backward()
        return out.loss, hidden.grad, weight.grad

    for found, expected in zip(run(garbage), run(0.0), strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected)


@pytest.mark.parametrize(
    "outputs",
    [
        ["entropy", "lse"],
        ("lse", "entropy", "lse"),
        {"lse": 1, "entropy": 2},
        numpy.array(["lse", "entropy"]),
    ],
    ids=str,
)
def test_names_of_outputs_in_any_container(outputs):
    out = linear_logprobs(**head(), outputs=outputs)
    assert out.lse is not None and out.entropy is not None and out.mean_logit is None


def test_outputs_from_a_generator_are_not_lost():
    """One that a check has used up is either taken in whole or refused."""
    try:
        out = linear_logprobs(**head(), outputs=(name for name in ("lse", "entropy")))
    except ValueError as error:
        assert str(error).startswith("outputs: expected a tuple")
    else:
        assert out.lse is not None and out.entropy is not None


@pytest.mark.parametrize("ignore_index", [3, 50])
def test_any_index_may_be_ignored(ignore_index):
    """Also one inside or above the vocabulary: its rows are 0, the others as before."""
    given = head()
    plain = linear_logprobs(**given).logprobs
    target = torch.where(given["target"] == IGNORED, ignore_index, given["target"])
    found = linear_logprobs(**given | {"target": target}, ignore_index=ignore_index).logprobs
    assert torch.equal(found, torch.where(target == ignore_index, 0.0, plain))


def test_smallest_vocabulary_and_hidden_size():
    out = linear_logprobs(
        torch.randn(4, D), torch.randn(1, D), torch.zeros(4, dtype=torch.int64), impl="torch"
    )
    assert out.logprobs.tolist() == [0.0] * 4  # the one token is certain
    out = linear_logprobs(
        torch.tensor([[2.0]]), torch.tensor([[0.0], [1.0]]), torch.tensor([0]), impl="torch"
    )
    assert out.logprobs.item() == pytest.approx(-2.126928)  # -log(1 + e^2)


def test_no_rows_at_all():
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.ones(V, D, requires_grad=True)
    out = linear_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), outputs=("lse", "is_top1"), impl="torch"
    )
    assert out.logprobs.shape == out.lse.shape == out.is_top1.shape == (0,)
    out.logprobs.sum().backward()
    assert hidden.grad.shape == (0, D)
    assert torch.equal(weight.grad, torch.zeros(V, D))


def test_rewards_may_be_left_out_without_the_regularizer():
    given = padded()
    expected = fused_treg_loss(**given, alpha=0.0).loss
    assert torch.equal(fused_treg_loss(**given | {"token_rewards": None}, alpha=0.0).loss, expected)
    assert torch.equal(fused_treg_loss(**given | {"token_rewards": None}, alpha=0).loss, expected)


# -- conditions around the call


@pytest.mark.parametrize(
    ("changed", "came"),
    [
        ({"hidden": torch.zeros(4, 3, D, dtype=torch.int64)}, "got torch.int64"),
        ({"hidden": torch.zeros(4, 3, D, dtype=torch.complex64)}, "got torch.complex64"),
        ({"weight": torch.zeros(V, D, dtype=torch.bool)}, "got torch.bool"),
        ({"weight": torch.zeros(V, D, dtype=torch.float64)}, "got torch.float64"),
    ],
    ids=["int", "complex", "bool", "double"],
)
@pytest.mark.parametrize(("fn", "make"), [LOGPROBS, PADDED])
def test_autocast_casts_no_more_than_a_linear_layer_does(fn, make, changed, came):
    """torch.autocast leaves integers, complex numbers and float64 alone, and a linear layer then
    refuses them.
    """
    given = make() | changed
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(given["hidden"], given["weight"])
        with pytest.raises(ValueError, match=f"^({'|'.join(changed)}): expected .*{came}"):
            fn(**given, impl="torch")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("fn", "make"), [LOGPROBS, PADDED])
def test_the_least_memory_budget_that_is_named_is_enough(fn, make, dtype, frozen):
    """Also for the backward; one byte less is not."""
    given = make()
    given["hidden"] = given["hidden"].to(dtype).requires_grad_()
    given["weight"] = given["weight"].to(dtype).requires_grad_(not frozen)
    with pytest.raises(ValueError, match="memory_budget: expected at least") as caught:
        fn(**given, impl="torch", memory_budget=1)
    least = int(re.search(r"at least (\d+) bytes", str(caught.value)).group(1))
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        fn(**given, impl="torch", memory_budget=least - 1)
    fn(**given, impl="torch", memory_budget=least)[0].sum().backward()
    found = given["hidden"].grad
    given["hidden"].grad = None
    fn(**given, impl="torch")[0].sum().backward()
    torch.testing.assert_close(found, given["hidden"].grad)


@pytest.mark.parametrize(("fn", "make"), [LOGPROBS, PADDED, PACKED])
def test_inference_mode_changes_nothing(fn, make):
    given = make()
    expected = fn(**given, impl="torch")
    with torch.inference_mode():
        found = fn(**given, impl="torch")
    for name, x in expected._asdict().items():
        assert (x is None and getattr(found, name) is None) or torch.equal(
            getattr(found, name), x
        ), name


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_constants_made_in_inference_mode(frozen, reduction):
    """Rewards and reference log-probs come from models that are run so."""
    given = weighted()
    with torch.inference_mode():
        made = {
            name: given[name].clone() for name in ("token_rewards", "ref_logps", "token_weights")
        }

    def gradient(constants):
        hidden = given["hidden"].clone().requires_grad_()
        weight = given["weight"].clone().requires_grad_(not frozen)
        more = {"hidden": hidden, "weight": weight, "reduction": reduction, "impl": "torch"}
        fused_treg_loss(**given | constants | more).loss.sum().backward()
        return hidden.grad

    assert torch.equal(gradient(made), gradient({}))


def test_float64_is_for_the_torch_implementation_only():
    given = {k: v.to(DEVICE) for k, v in head().items()}
    given |= {name: given[name].double() for name in ("hidden", "weight")}
    with pytest.raises(
        ValueError, match=r"^hidden: expected one of .* for impl='triton', got torch\.float64"
    ):
        linear_logprobs(**given, impl="triton")
    assert linear_logprobs(**given, impl="torch").logprobs.dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"^logits_dtype: expected .* got torch\.float32 .* torch\.float64"
    ):
        linear_logprobs(**given, impl="torch", logits_dtype=torch.float32)


def test_triton_takes_no_logits_dtype():
    given = {k: v.to(DEVICE) for k, v in head().items()}
    with pytest.raises(ValueError, match=r"^logits_dtype: expected None, .* impl='triton'"):
        linear_logprobs(**given, impl="triton", logits_dtype=torch.float32)


TRITON_ON_CPU = """
import torch, treg
hidden, weight = torch.zeros(4, 1, 3), torch.zeros(7, 3)
target = torch.zeros(4, 1, dtype=torch.int64)
inputs = hidden, weight, target
for call in (
    lambda: treg.linear_logprobs(*inputs, impl="triton"),
    lambda: treg.fused_treg_loss(*inputs, torch.zeros(4, 1), torch.zeros(4), impl="triton"),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_triton_on_cpu_tensors_without_its_interpreter():
    """A name never falls back. In a process of its own: the interpreter is chosen when Triton is
    imported.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", TRITON_ON_CPU], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    message = (
        "impl: expected 'torch' for tensors on cpu ('triton' needs a GPU, or its interpreter), "
        "got 'triton'"
    )
    assert done.stdout.splitlines() == [message] * 2


def test_triton_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "treg_kernels.configs", None)  # makes its import fail
    with pytest.raises(
        ValueError, match=r"^impl: expected 'torch' where Triton is not installed, got 'triton'"
    ):
        linear_logprobs(**head(), impl="triton")
    assert torch.isfinite(linear_logprobs(**head()).logprobs).all()  # CPU tensors need none of it


# -- the debug switch


@pytest.fixture
def debug_off():
    yield
    treg.set_debug(False)


def test_debug_is_off_until_it_is_set(debug_off):
    assert treg.is_debug() is False
    treg.set_debug(True)
    assert treg.is_debug() is True
    treg.set_debug(False)
    assert treg.is_debug() is False


@pytest.mark.parametrize("enabled", [False, True])
def test_cpu_values_are_checked_either_way(enabled, debug_off):
    treg.set_debug(enabled)
    with pytest.raises(ValueError, match=r"^ref_logps: expected finite values, got nan"):
        fused_treg_loss(**padded() | {"ref_logps": at(torch.zeros(4), 2, NAN)}, impl="torch")


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="values of GPU tensors")
def test_gpu_values_are_checked_on_request(debug_off):
    """A NaN goes through until the checks are on; a check of shapes does not wait for that."""
    given = {k: v.cuda() for k, v in padded().items()} | {
        "ref_logps": at(torch.zeros(4), 2, NAN).cuda()
    }
    assert fused_treg_loss(**given).loss.isnan()
    treg.set_debug(True)
    with pytest.raises(
        ValueError, match=r"^ref_logps: expected finite values, got nan at index \[2\]"
    ):
        fused_treg_loss(**given)
    treg.set_debug(False)
    with pytest.raises(ValueError, match=r"^ref_logps: expected \[4\] sums"):
        fused_treg_loss(**given | {"ref_logps": torch.zeros(3).cuda()})


def test_no_filter_beside_a_shard():
    """A shard needs a process group: here its check alone."""
    head = (torch.zeros(4, D), torch.zeros(V, D), torch.zeros(4, dtype=torch.int64), None)
    options = HeadOptions(
        logit_scale=1.0,
        softcap=None,
        temperature=1.0,
        ignore_index=-100,
        outputs=(),
        impl="torch",
        memory_budget=None,
        logits_dtype=None,
        shard=object(),
        filter_eps=0.0,
    )
    with pytest.raises(ValueError, match=r"^filter_eps: expected None beside a shard, got 0\.0"):
        options.call(*head)
