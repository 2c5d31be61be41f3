"""How a Hugging Face model is read: its head, and the log-probs of its tokens without logits."""

from treg.heads.install import check_sequences, install_head, resolve_head, run_head
from treg.heads.spec import HeadSpec

__all__ = ["HeadSpec", "check_sequences", "install_head", "resolve_head", "run_head"]
