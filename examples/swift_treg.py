r"""T-REG in ms-swift: a plugin for its DPO, and annotated.parquet from `treg annotate`.

    swift rlhf --rlhf_type dpo --model MODEL --dataset prefs.jsonl \
        --external_plugins examples/swift_treg.py ...
"""

from treg.integrations.swift import patch

patch("annotated.parquet", alpha=0.25)
