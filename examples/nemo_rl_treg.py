r"""NeMo-RL's DPO with T-REG: examples/run_dpo.py of NeMo-RL as it is, with another loss.

    treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet
    uv run examples/nemo_rl_treg.py examples/run_dpo.py --config examples/configs/dpo.yaml \
        ++dpo.treg_token_rewards=annotated.parquet ++dpo.treg_alpha=0.25 policy.model_name=MODEL ...

Run it in NeMo-RL's folder, with treg installed in its environments, the workers' too. Token rewards
are found by token ids: annotate with the model's tokenizer and chat template.
"""

import runpy
import sys

import nemo_rl.algorithms.dpo as dpo

from treg.integrations.nemo_rl import TRegLossFn

dpo.DPOLossFn = TRegLossFn
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
