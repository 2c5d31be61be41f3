"""A thin trainer over transformers' own loop."""

from treg.trainer.config import TRegConfig
from treg.trainer.trainer import TRegTrainer

__all__ = ["TRegConfig", "TRegTrainer"]
