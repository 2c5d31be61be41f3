"""T-REG in TRL's DPOTrainer, token credit in its GRPOTrainer, and treg's log-probs under TRL
trainers that compute them in chunks.

    TRegGRPOTrainer           GRPO with an advantage for each token: token rewards of any source,
                              returns, GAE, macro actions; the rest is TRL's own
    TRegDPOTrainer            TRL's own loss (any loss_type, or several), metrics, evaluation and
                              reference, on log-probs of treg, plus the T-REG regularizer
    patch_chunked_logprobs    one function of TRL swapped: DPO, KTO, SFT, GRPO, RLOO as they are

For TRL >= 1.15, which computes log-probs inside the model's forward; earlier versions have other
hooks.
"""

import importlib.metadata

from packaging.version import Version

MINIMUM = "1.15"
try:
    _installed = importlib.metadata.version("trl")
except importlib.metadata.PackageNotFoundError as error:
    raise ImportError(
        "trl: expected TRL to be installed (pip install 'treg-losses[train,trl]'): these trainers "
        "extend TRL's; or use treg.trainer.TRegTrainer, which needs no TRL"
    ) from error
if Version(_installed) < Version(MINIMUM):
    raise ImportError(
        f"trl: expected >= {MINIMUM}, got {_installed}; upgrade it, or use treg.trainer.TRegTrainer"
    )

from treg.integrations.trl.online import TRegGRPOTrainer  # noqa: E402
from treg.integrations.trl.online_config import TRegGRPOConfig  # noqa: E402
from treg.integrations.trl.patch import patch_chunked_logprobs  # noqa: E402
from treg.integrations.trl.trainer import TRegDPOConfig, TRegDPOTrainer  # noqa: E402

__all__ = [
    "TRegDPOConfig",
    "TRegDPOTrainer",
    "TRegGRPOConfig",
    "TRegGRPOTrainer",
    "patch_chunked_logprobs",
]
