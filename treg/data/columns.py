"""The names of the annotated file's columns."""

from collections.abc import Iterable, Sequence

from treg.data.batches import MASK_COLUMNS, SIDES


def stream_columns(stream: str) -> tuple[str, str]:
    """The two columns of a stream."""
    chosen, rejected = (f"{side}_{stream}" for side in SIDES)
    return chosen, rejected


ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REWARD_COLUMNS = stream_columns("token_rewards")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
REF_TOKEN_COLUMNS = ("ref_chosen_token_logps", "ref_rejected_token_logps")
TEXT_COLUMNS = ("prompt_text", "chosen_text", "rejected_text")
DESCRIPTION = "treg"  # a key of the metadata too
CHECKSUM = "treg_checksum"
OWN_COLUMNS = (
    *("index", "where", *ID_COLUMNS, *REF_COLUMNS, *REF_TOKEN_COLUMNS, *TEXT_COLUMNS),
    *(*MASK_COLUMNS, DESCRIPTION, CHECKSUM),
)


def groups_of(present: Iterable[str], streams: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The columns that a file must have, in groups: ids, those of each stream, and those of the
    reference of which it has one.
    """
    present = set(present)
    groups: dict[str, tuple[str, ...]] = {"ids": ID_COLUMNS}
    groups |= {stream: stream_columns(stream) for stream in streams}
    optional = {"reference": REF_COLUMNS, "reference_tokens": REF_TOKEN_COLUMNS}
    optional["masks"] = MASK_COLUMNS
    for name, group in optional.items():
        if present & set(group):
            groups[name] = group
    return groups
