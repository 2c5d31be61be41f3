"""T-REG in LLaMA-Factory: its own `stage: dpo` configuration, and annotated.parquet from `treg
annotate`.

    python examples/llamafactory_treg.py dpo.yaml
    torchrun --nproc_per_node 8 examples/llamafactory_treg.py dpo.yaml
"""

from llamafactory.train.tuner import run_exp

from treg.integrations.llamafactory import patch

if __name__ == "__main__":
    patch("annotated.parquet", alpha=0.25)
    run_exp()
