"""How a Hugging Face model is read: its head, and the log-probs of its tokens without logits."""

from treg.heads.install import (
    check_branches,
    check_sequences,
    install_head,
    resolve_head,
    run_head,
)
from treg.heads.sharing import PromptSharing, SharedRows, share_prompts
from treg.heads.spec import HeadSpec

__all__ = [
    "HeadSpec",
    "PromptSharing",
    "SharedRows",
    "check_branches",
    "check_sequences",
    "install_head",
    "resolve_head",
    "run_head",
    "share_prompts",
]
