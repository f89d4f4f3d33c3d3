"""The PyTorch method stands alone: no MLX is started for it."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the twin needs the torch extra")

import specstream_torch

MODULES = sorted(module.name for module in pkgutil.iter_modules(specstream_torch.__path__, "specstream_torch."))


def test_no_module_of_the_twin_imports_mlx() -> None:
    """Red when: a module that it shares with the runtime imports MLX at its top."""
    assert len(MODULES) > 6
    code = (
        f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] in ('mlx', 'mlx_lm')))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "convert")))}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (ran.stdout, ran.returncode) == ("[]\n", 0), ran.stderr
