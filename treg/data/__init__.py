"""Preference files -> token ids -> batches."""

from treg.data.batches import LOSS_KEYS, SIDES, PairCollator, first_pairs, pack_pairs, pair_tokens
from treg.data.card import dataset_card
from treg.data.encode import encode, load_pairs
from treg.data.examples import ExampleLoader
from treg.data.messages import Messages, common_prefix, shown_text, text_of
from treg.data.mixture import Mixture
from treg.data.names import parse_columns
from treg.data.pair import EncodeOptions, EncodeWork, Pair
from treg.data.reading import read_rows
from treg.data.rendering import Renderer, answer_end, conversation, prompt_text
from treg.data.report import Report, RowProblem, described
from treg.data.rows import Preference, parse_row

__all__ = [
    "LOSS_KEYS",
    "SIDES",
    "EncodeOptions",
    "EncodeWork",
    "ExampleLoader",
    "Messages",
    "Mixture",
    "Pair",
    "PairCollator",
    "Preference",
    "Renderer",
    "Report",
    "RowProblem",
    "answer_end",
    "common_prefix",
    "conversation",
    "dataset_card",
    "described",
    "encode",
    "first_pairs",
    "load_pairs",
    "pack_pairs",
    "pair_tokens",
    "parse_columns",
    "parse_row",
    "prompt_text",
    "read_rows",
    "shown_text",
    "text_of",
]
