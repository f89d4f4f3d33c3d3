"""Nothing that a developer has calibrated reaches the tests, and nothing of the tests reaches them."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache_directory(tmp_path_factory):
    before = os.environ.get("SPECSTREAM_MLX_CACHE")
    os.environ["SPECSTREAM_MLX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["SPECSTREAM_MLX_CACHE"]
    else:
        os.environ["SPECSTREAM_MLX_CACHE"] = before
