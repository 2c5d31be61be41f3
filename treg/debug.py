"""One process-wide switch: whether value checks that would make a GPU wait are made."""

_debug = False


def set_debug(enabled: bool) -> None:
    """Turn value checks of GPU tensors on or off (off at start).

    Checks of values (a target outside the vocabulary, NaN in token_rewards, a sequence without a scored token, ...)
    are always made on CPU tensors. On a GPU each one waits for the device, so they are made only after
    `set_debug(True)`. Checks of shapes, dtypes and devices are always made.
    """
    global _debug
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__}")
    _debug = enabled


def is_debug() -> bool:
    """Whether value checks of GPU tensors are on."""
    return _debug
