"""treg: the loss head of token-level preference optimization.

Importing this package imports torch and nothing heavier: Triton is loaded by the first call that
needs it.
"""

from treg.checks import is_debug, set_debug
from treg.ops import fused_treg_loss, linear_logprobs

__all__ = ["fused_treg_loss", "is_debug", "linear_logprobs", "set_debug"]
__version__ = "0.1.0"

# modules that have moved are found under their old names for one release
__path__ = [*__path__, f"{__path__[0]}/old_names"]
