"""What surrounds the tests: a cache directory of their own, and signals as a terminal leaves them."""

import os
import signal

import pytest


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


@pytest.fixture(autouse=True, scope="session")
def _interrupts_arrive():
    """A shell's background jobs ignore SIGINT, and so would the programs that the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
