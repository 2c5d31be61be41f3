"""What tests of several files here need."""

import pytest


@pytest.fixture
def verl_modules(monkeypatch):
    """verl's modules, as verl_stub.py has them; what is patched in them is undone."""
    from verl_stub import patchable

    yield from patchable(monkeypatch)
