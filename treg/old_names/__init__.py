"""Modules under the names of the last release, which the next one drops. They are found as
`treg.NAME`.
"""

import warnings


def moved(old: str, new: str) -> None:
    """Tell whoever imports the old name; called by a module of that name."""
    text = f"{old} is now {new}; the next release drops the old name"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
