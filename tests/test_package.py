"""What ``import specstream_mlx`` gives, and what it does not start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import specstream_mlx
from specstream_mlx import errors, options

SOURCE = Path(specstream_mlx.__file__)


def test_public_names_are_sorted_complete_and_there():
    assert specstream_mlx.__all__ == sorted(specstream_mlx.__all__)
    assert set(specstream_mlx.__all__) == set(specstream_mlx._HOMES)
    for name in specstream_mlx.__all__:
        assert getattr(specstream_mlx, name).__name__ == name
        assert name in dir(specstream_mlx)


def test_what_a_type_checker_sees_is_what_is_imported_when_asked_for():
    (guarded,) = (node for node in ast.parse(SOURCE.read_text("utf-8")).body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("specstream_mlx.")
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == specstream_mlx._HOMES


def test_every_error_and_every_plain_type_of_options_is_public():
    classes = {
        name
        for module in (errors, options)
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert classes <= set(specstream_mlx.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'specstream_mlx' has no attribute 'streem_generate'"):
        specstream_mlx.streem_generate  # noqa: B018


def test_errors_and_plain_types_do_not_start_mlx():
    code = (
        "import sys, specstream_mlx\n"
        "specstream_mlx.UsageError, specstream_mlx.DraftOptions, specstream_mlx.default_model_path\n"
        "from specstream_mlx.formats.config import StreamConfig\n"
        "from specstream_mlx.options import DraftMode\n"
        "print(sorted({'mlx', 'mlx_lm', 'numpy', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert found.stdout == "[]\n"
