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

from tests.breaks import ROOT, Break, caches, decoding, families, passes

COPIED = ("specstream_mlx", "convert", "cli", "tests", "benchmarks", "pyproject.toml")
BREAKS = tuple(broken for area in (decoding, passes, caches, families) for broken in area.BREAKS)


def goes_unnoticed(broken: Break, test_file: Path, copy: Path) -> bool:
    """Break a copy of the repository, run the break's test, and mend the copy; True when the test still passes."""
    file = copy / broken.file
    text = file.read_text(encoding="utf-8")
    file.write_text(broken.applied(text), encoding="utf-8")
    try:
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [str(test_file), "-k", broken.test]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        finished = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        file.write_text(text, encoding="utf-8")
    if finished.returncode not in (0, 1):
        raise SystemExit(f"{broken.name}: the tests did not run:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    return finished.returncode == 0


def main() -> int:
    """Break one thing after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="only breaks whose name holds one of these words")
    wanted = parser.parse_args().names
    unnoticed = 0
    chosen = [broken for broken in BREAKS if not wanted or any(word in broken.name for word in wanted)]
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        files = [broken.test_file for broken in chosen]
        for broken, file in zip(chosen, files, strict=True):
            passed = goes_unnoticed(broken, file, Path(folder))
            unnoticed += passed
            print(f"{'GOES UNNOTICED' if passed else 'red':14} {broken.name}  ({broken.test})", flush=True)
    print(f"{len(chosen) - unnoticed} of {len(chosen)} breaks are caught")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
