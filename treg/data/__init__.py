"""Preference files -> token ids -> batches."""

from treg.data.batches import LOSS_KEYS, SIDES, PairCollator, first_pairs, pack_pairs, pair_tokens
from treg.data.card import dataset_card
from treg.data.encode import EncodeOptions, Pair, encode, load_pairs, prompt_text
from treg.data.examples import ExampleLoader
from treg.data.reading import read_rows
from treg.data.report import Report, RowProblem
from treg.data.rows import Preference, common_prefix, parse_row, text_of

__all__ = [
    "LOSS_KEYS",
    "SIDES",
    "EncodeOptions",
    "ExampleLoader",
    "Pair",
    "PairCollator",
    "Preference",
    "Report",
    "RowProblem",
    "common_prefix",
    "dataset_card",
    "encode",
    "first_pairs",
    "load_pairs",
    "pack_pairs",
    "pair_tokens",
    "parse_row",
    "prompt_text",
    "read_rows",
    "text_of",
]
