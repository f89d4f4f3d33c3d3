"""A conversion stopped at any moment: the output is absent or complete, and the next run clears what was left.

The conversions run in children forked from one process that has imported the converter and computed nothing, so a
kill costs milliseconds. ``KILL`` counts Python's audit events (every file, directory, rename and lock the
conversion touches raises one just before it happens) and ``os.fsync``, and kills its process at the n-th.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from convert_cases import CONFIG, Case, snapshot

from specstream_convert import convert
from specstream_mlx.errors import UsageError
from specstream_mlx.formats import atomic

ROOT = Path(__file__).parents[2]
SERVER = """
import json, os, signal, sys
from pathlib import Path
from specstream_cli.app import main
import specstream_convert, specstream_mlx.formats.atomic as atomic
import mlx_lm.models.llama, mlx_lm.tokenizer_utils
main(["convert", "--hf-path", ".", "--adapter-path", "/nothing", "--mlx-path", "/nothing/out"])

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock", "shutil.rmtree")

seen = 0

def kill_at(n, number, root):
    def count(event, arguments=()):
        global seen
        if event not in EVENTS or (event == "open" and not str(arguments[0]).startswith(root + "/.out.")):
            return
        seen += 1
        if seen == n:
            os.kill(os.getpid(), number)
    fsync = os.fsync
    def counted(descriptor):
        count("os.rename")
        fsync(descriptor)
    os.fsync = counted
    sys.addaudithook(count)

for line in sys.stdin:
    job = json.loads(line)
    events, counter = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stderr = sys.stdout = open(os.devnull, "w")
        if job["no_swap"]:
            atomic._exchange = lambda first, second: False
        kill_at(job["n"], job["signal"], job["root"])
        if job["seconds"]:  # nothing of Python runs at SIGPROF
            signal.setitimer(signal.ITIMER_PROF, job["seconds"])
        code = main(job["words"])
        os.write(counter, str(seen).encode())
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    answer = {"status": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}
    os.close(counter)
    answer["events"] = int(os.read(events, 10) or 0)
    os.close(events)
    print(json.dumps(answer), flush=True)
"""


class Server:
    """Runs command lines in forked children; of the last one: its processor time, its events unless it was killed."""

    seconds = 0.0
    events = 0

    def __init__(self) -> None:
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "convert", ROOT / "cli")))
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(
        self,
        case: Case,
        *words: str,
        n: int = 0,
        number: int = signal.SIGKILL,
        no_swap: bool = False,
        seconds: float = 0.0,
    ) -> int:
        """Stop it at its ``n``-th event, or after ``seconds`` of processor time; the exit status."""
        command = ["convert", "--hf-path", str(case.base), "--adapter-path", str(case.adapter)]
        command += ["--mlx-path", str(case.out), "--no-verify", *words]
        job = {"words": command, "n": n, "signal": int(number), "no_swap": no_swap, "seconds": seconds}
        job["root"] = str(case.root)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        self.seconds, self.events = answer["seconds"], answer["events"]
        return int(answer["status"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if sys.platform == "darwin":
        pytest.skip("a forked child cannot use Metal")
    running = Server()
    yield running
    running.close()


def scale_of(case: Case) -> float | None:
    """The scale of a complete output whose every hash is right; None when there is no output."""
    if not case.out.exists():
        return None
    report = json.loads((case.out / "conversion_report.json").read_text())
    files = {path.relative_to(case.out).as_posix() for path in case.out.rglob("*") if path.is_file()}
    assert files == {*report["output_files"], "conversion_report.json"}
    for name, entry in report["output_files"].items():
        assert hashlib.sha256((case.out / name).read_bytes()).hexdigest() == entry["sha256"], name
    return float(report["lora"]["scale"])


def hidden(case: Case) -> list[str]:
    return sorted(path.name for path in case.root.iterdir() if path.name.startswith("."))


OLD, NEW = 2.0, 20.0  # scales of the two conversions


def with_old_output(case: Case) -> None:
    convert(case.options(verify=False))
    case.json(f"adapter/{CONFIG}", lambda raw: raw.update(lora_alpha=80))


def points(
    server: Server, case: Case, stride: int = 1, every_from: float = 1.0, **job: Any
) -> Iterator[tuple[int, int]]:
    """(n, exit status) for every ``stride``-th n up to the one that no longer stops the conversion.

    From this share of its events on, ``every_from``, for every n.
    """
    assert server.run(case.copy(case.root.parent / "whole"), "--overwrite", **job) == 0
    n, total = 1, server.events
    while n < 500:
        status = server.run(case, "--overwrite", n=n, **job)
        yield n, status
        if status == 0:
            assert n > total > 30
            return
        n += stride if n + stride <= every_from * total else 1
    raise AssertionError("the conversion has more events than expected")


def test_killed_at_every_step(server: Server, case: Case) -> None:
    """No output or a complete one; the next run (tried at every 5th step) succeeds and leaves no hidden directory."""
    left, steps = 0, 0
    for n, status in points(server, case):
        steps = n
        left += bool(hidden(case))
        assert status in (0, -signal.SIGKILL), n
        assert scale_of(case) in (None, OLD), n
        if n % 5 == 0:
            assert server.run(case, "--overwrite") == 0, n
            assert scale_of(case) == OLD
            assert hidden(case) == [], n
        shutil.rmtree(case.out, ignore_errors=True)
    assert steps > 30
    assert left > 15  # the kills do leave something; the next run clears it


@pytest.mark.parametrize("no_swap", [False, True], ids=["swapped at once", "moved aside"])
def test_killed_while_replacing(server: Server, case: Case, no_swap: bool) -> None:
    """The old output stays or the new one is complete; where it was moved aside, the next run puts it back."""
    with_old_output(case)
    old = case.copy(case.root.parent / "old").out
    seen = set()
    for n, status in points(server, case, 6, 0.6, no_swap=no_swap):
        assert status in (0, -signal.SIGKILL), n
        scale = scale_of(case)
        assert scale in (OLD, NEW) or (no_swap and scale is None), n
        seen.add(scale)
        if scale is None:
            with pytest.raises(UsageError, match="already exists"):
                convert(case.options(verify=False))
            assert scale_of(case) == OLD
            assert hidden(case) == []
        shutil.rmtree(case.out)
        shutil.copytree(old, case.out)
        atomic.recover(case.out)
        assert hidden(case) == [], n
    assert seen == {OLD, NEW} | ({None} if no_swap else set())


@pytest.mark.parametrize(("number", "stride"), [(signal.SIGINT, 1), (signal.SIGTERM, 5), (signal.SIGHUP, 9)])
def test_interrupted_at_every_step(server: Server, case: Case, number: int, stride: int) -> None:
    """Ctrl-C and its like leave nothing at all, and say 130."""
    with_old_output(case)
    before = snapshot(case.root)
    for n, status in points(server, case, stride, number=number):
        done = scale_of(case)
        assert status == 130 or (status == 0 and done == NEW), (n, status)
        assert done in (OLD, NEW), n
        assert snapshot(case.root) == before, n


def test_killed_at_any_time(server: Server, case: Case) -> None:
    """Kills spread over the conversion's own processor time instead of its steps."""
    assert server.run(case) == 0
    seconds, ends = server.seconds, set()
    for i in range(12):
        shutil.rmtree(case.out, ignore_errors=True)
        ends.add(server.run(case, seconds=max(seconds * i / 12, 1e-3)))
        assert scale_of(case) in (None, OLD)
    assert -signal.SIGPROF in ends <= {0, -signal.SIGPROF}
    assert server.run(case, "--overwrite") == 0
    assert hidden(case) == []


def test_a_living_run_is_left_alone(case: Case) -> None:
    """A second conversion to the same target does not delete what the first is still writing."""
    living = atomic.hidden_name(case.out, atomic.PARTIAL)
    lock = atomic.create_locked(living)
    dead = atomic.hidden_name(case.out, atomic.PARTIAL)
    dead.mkdir()
    other = case.root / ".other.partial-0123456789ab"
    other.mkdir()
    convert(case.options(verify=False))
    assert sorted(path.name for path in case.root.iterdir() if path.name.startswith(".")) == sorted(
        [living.name, other.name]
    )
    assert lock is not None
    os.close(lock)
    convert(case.options(verify=False, overwrite=True))
    assert hidden(case) == [other.name]


def test_without_locks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file system that has no locks a conversion works, and another run's directory is never touched."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    unknown = atomic.hidden_name(case.out, atomic.PARTIAL)
    unknown.mkdir()
    convert(case.options(verify=False))
    assert scale_of(case) == OLD
    assert hidden(case) == [unknown.name]


def test_everything_is_on_disk_before_the_rename(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and directory of the output is synced, and then the directory that gets its name."""
    synced: list[Path] = []
    real = atomic.sync

    def sync(path: Path) -> None:
        synced.append(path)
        assert not case.out.exists() or path == case.root
        real(path)

    monkeypatch.setattr(atomic, "sync", sync)
    convert(case.options(verify=False))
    assert synced[-1] == case.root
    names = {path.name for path in synced[:-1]}
    assert {path.name for path in case.out.rglob("*")} < names
    assert any(name.startswith(".out.partial-") for name in names)


def test_long_names_keep_apart(case: Case) -> None:
    """Two targets that share a long beginning do not share what a killed run left."""
    long = case.root / ("x" * 200)
    moved = atomic.hidden_name(case.root / ("x" * 199), atomic.REPLACED)
    moved.mkdir()
    convert(case.options(verify=False, mlx_path=long))
    assert (long / "conversion_report.json").exists()
    assert moved.exists()
