"""A dataset card for an annotated file, as the hub reads it."""

import json
from pathlib import Path

from treg.data.annotated import read_annotated, streams_of

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
CARD = """\
---
{license}task_categories:
- text-generation
tags:
- treg
- preference-optimization
- token-rewards
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: {file}
---

# Preference pairs with {streams}

{pairs} pairs of a chosen and a rejected answer. Each token of an answer has {streams}: numbers in
`chosen_STREAM` and `rejected_STREAM`, one for each id of `chosen_ids` and `rejected_ids`. The same
ids as text are in `prompt_text`, `chosen_text`, `rejected_text`. `ref_chosen_logps` and
`ref_rejected_logps`, where they are there, are sums of the reference model's log-probs, in nats.

Rows may be filtered, shuffled and put together with others; keep the columns `treg` and
`treg_checksum`, which say what made a row and whether it was changed.

```python
from datasets import load_dataset
from treg.data.annotated import read_annotated

examples, description = read_annotated(load_dataset("OWNER/NAME", split="train"))
```

## What made it

```json
{made_with}
```
"""


def dataset_card(file: str | Path, *, license: str | None = None) -> Path:
    """Write README.md beside an annotated file: what is in it and what made it.

    Args:
        license: as the hub names it, such as "apache-2.0"; None: the card says nothing of it.
    Returns:
        The path of the card.
    Raises:
        FileExistsError: there is a README.md; it is left as it is.
        ValueError: no annotated file.
    """
    file = Path(file)
    card = file.with_name("README.md")
    examples, meta = read_annotated(file)
    shown = ("fingerprint", "settings", "streams")
    made_with = {name: meta[name] for name in shown if name in meta}
    text = CARD.format(
        license="" if license is None else f"license: {json.dumps(license)}\n",
        size=next((name for most, name in SIZES if len(examples) < most), "n>1M"),
        file=json.dumps(file.name),
        streams=" and ".join(x.replace("_", " ") for x in streams_of(meta)),
        pairs=len(examples),
        made_with=json.dumps(made_with, indent=1),
    )
    with open(card, "x", encoding="utf-8") as opened:
        opened.write(text)
    return card
