"""Break the code on purpose and see the tests turn red.

    scripts/with-openblas python -m tests.breaks [NAME ...]

Each break is one edit of one file, made in a temporary copy of the repository, with the test that must catch it. The
exit code is 1 when a break goes unnoticed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.breaks import (
    Break,
    adapters,
    caches,
    command_line,
    convert,
    decoding,
    families,
    heads,
    passes,
    recipes,
    train_command,
    training,
)

ROOT = Path(__file__).parents[2]
COPIED = ("specstream_mlx", "convert", "cli", "tests", "benchmarks", "pyproject.toml")
AREAS = (decoding, passes, caches, families, heads, adapters, training, train_command, convert, command_line, recipes)
BREAKS = tuple(broken for area in AREAS for broken in area.BREAKS)


def goes_unnoticed(broken: Break) -> bool:
    """Apply one break to a copy and run its test; True when the test still passes."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        file = Path(folder) / broken.file
        text = file.read_text(encoding="utf-8")
        if text.count(broken.old) != 1:
            raise SystemExit(f"{broken.name}: {broken.file} holds the text to break {text.count(broken.old)} times")
        file.write_text(text.replace(broken.old, broken.new), encoding="utf-8")
        test, _, name = broken.test.partition("::")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
        command += ["-k", name] if name else []
        environment = os.environ | {"PYTHONPATH": folder}
        finished = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode not in (0, 1):
            raise SystemExit(
                f"{broken.name}: the tests did not run:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}"
            )
        return finished.returncode == 0


def main() -> int:
    """Break one thing after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="only breaks whose name holds one of these words")
    wanted = parser.parse_args().names
    unnoticed = 0
    chosen = [broken for broken in BREAKS if not wanted or any(word in broken.name for word in wanted)]
    for broken in chosen:
        passed = goes_unnoticed(broken)
        unnoticed += passed
        print(f"{'GOES UNNOTICED' if passed else 'red':14} {broken.name}  ({broken.test})", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks are caught")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
