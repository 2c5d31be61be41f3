import pytest
import undrawn


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """Curves are not drawn, but for a test that asks for the fixture `drawn`."""
    if "drawn" not in request.fixturenames:
        for command in ("train", "inspect"):
            monkeypatch.setattr(f"treg.cli.{command}.plot_curves", undrawn.plot_curves)


@pytest.fixture
def drawn():
    """Commands draw curves."""
