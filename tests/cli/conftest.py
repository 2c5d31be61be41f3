import pytest
import undrawn


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """Curves are not drawn, but for a test that asks for the fixture `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("treg.cli.train.plot_curves", undrawn.plot_curves)


@pytest.fixture
def drawn():
    """Training draws its curves."""
