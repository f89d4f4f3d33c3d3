"""What surrounds the tests: nothing of the machine, of its load or of another test decides how one ends."""

import os
import signal

# Before anything imports them: the libraries of Hugging Face read this once, and a command that goes offline leaves
# them so, which would let the order of the tests decide which of them could reach a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time, and no limit on how long a busy machine takes for one.
settings.register_profile(
    "tests", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="session")
def _own_cache_directory(tmp_path_factory):
    """Nothing that a developer has calibrated reaches the tests, and nothing of the tests reaches them."""
    before = os.environ.get("SPECSTREAM_MLX_CACHE")
    os.environ["SPECSTREAM_MLX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SPECSTREAM_MLX_CACHE"]
    else:
        os.environ["SPECSTREAM_MLX_CACHE"] = before


@pytest.fixture(autouse=True)
def _environment():
    """The program changes its environment, which is its own; the tests' is not."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch):
    """A program that a busy machine slows down would write lines of progress; none of the tests counts on them."""
    monkeypatch.setattr("specstream_cli.terminal.clock", lambda: 0.0)


@pytest.fixture(autouse=True, scope="session")
def _signals_arrive():
    """A shell's background jobs ignore SIGINT, those of ``nohup`` SIGHUP; so would the programs that tests start."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: signal.SIG_DFL,
    }
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
