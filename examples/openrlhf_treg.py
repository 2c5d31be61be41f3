r"""OpenRLHF's DPO with T-REG: its own command line and its own data, with three lines before it.

    treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet
    deepspeed examples/openrlhf_treg.py --model.model_name_or_path MODEL \
        --data.dataset prefs.jsonl --data.apply_chat_template --data.max_len 1024 \
        --model.beta 0.01 ...

The flags are those of openrlhf.cli.train_dpo.
Token rewards are found by token ids: annotate with the model's tokenizer and chat template, and
max_length 1024.
"""

import runpy

from treg.integrations import openrlhf

openrlhf.install("annotated.parquet", alpha=0.25)
runpy.run_module("openrlhf.cli.train_dpo", run_name="__main__", alter_sys=True)
