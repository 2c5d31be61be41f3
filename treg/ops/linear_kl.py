from typing import Any


def linear_kl(*a: Any, **k: Any) -> Any:
    raise NotImplementedError
