"""Putting a directory in place so that a kill or a power cut at any moment leaves nothing or a complete one.

    .NAME.partial-XXXX    being written by the process that holds its lock; without a lock it is rubbish
    .NAME.replaced-XXXX   a complete earlier output, moved aside for an instant where two directories cannot be swapped

The lock is an ``flock`` on the directory itself: it vanishes with its process and leaves no file behind.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PARTIAL, REPLACED = "partial", "replaced"
_CANNOT_SWAP = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_AT_FDCWD = -100


@contextlib.contextmanager
def replaced_directory(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty hidden sibling of ``target`` that takes its place when the block succeeds.

    What a killed process left of an earlier attempt is cleared first. When the block fails, the parents that were made
    for the target go too.

    Args:
        target: the directory.
        check: raises when ``target`` may not be replaced; called before anything is made, and again at the end.

    Raises:
        OSError: it cannot be written; whatever ``target`` held is still there.
    """
    temporary, lock, made = target, None, []
    try:
        recover(target)
        check()
        for parent in reversed([parent for parent in target.parents if not parent.exists()]):
            parent.mkdir(exist_ok=True)
            made.append(parent)
        while lock is None and temporary == target:
            temporary = hidden_name(target, PARTIAL)
            try:
                lock = create_locked(temporary)
            except BlockingIOError:  # another run took it for rubbish before it was locked
                temporary = target
        yield temporary
        sync_tree(temporary)
        check()
        if target.exists():
            swap(temporary, target)
        else:
            temporary.rename(target)
        for parent in (target.parent, *(parent.parent for parent in made)):
            sync(parent)
        made = []
    finally:
        if temporary != target:
            _remove(temporary)  # after a swap, what was there before
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            for parent in reversed(made):
                parent.rmdir()


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def hidden_name(target: Path, kind: str) -> Path:
    """A new hidden name beside ``target``."""
    return target.parent / f".{_stem(target)}.{kind}-{secrets.token_hex(6)}"


def _stem(target: Path) -> str:
    """The target's name, shortened where a suffix would make it too long for a file system, still its own."""
    name = target.name
    return name if len(name) <= 80 else f"{name[:60]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def create_locked(path: Path) -> int | None:
    """Create and lock a directory; the lock is None in a file system without locks.

    Raises:
        BlockingIOError: another run's cleaning was faster than the lock; choose another name.
        OSError: it cannot be created.
    """
    path.mkdir()
    try:
        return take_lock(path)
    except BlockingIOError:
        raise
    except OSError:
        return None


def take_lock(directory: Path) -> int:
    """Lock a directory until the returned descriptor is closed or the process ends.

    Raises:
        BlockingIOError: another process holds it, or it is gone.
        OSError: this file system has no locks.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise BlockingIOError(errno.EAGAIN, "gone") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), directory.lstat()):
                return descriptor
        raise BlockingIOError(errno.EAGAIN, "gone")
    except BaseException:
        os.close(descriptor)
        raise


def recover(target: Path) -> None:
    """Clear what killed runs left beside ``target``; an output that one had moved aside returns to its place."""
    for moved in _left_behind(target, REPLACED):
        if target.exists() or target.is_symlink():
            rubbish = hidden_name(target, PARTIAL)  # from here on it is never taken for a complete output
            moved.rename(rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)
        else:
            moved.rename(target)
            sync(target.parent)
    for partial in _left_behind(target, PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)


def _left_behind(target: Path, kind: str) -> Iterator[Path]:
    """Directories of ``kind`` that no living process holds, each locked while it is dealt with."""
    name = re.compile(rf"\.{re.escape(_stem(target))}\.{kind}-[0-9a-f]{{12}}")
    try:
        found = sorted(path for path in target.parent.iterdir() if name.fullmatch(path.name))
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):
            lock = take_lock(path)
            try:
                yield path
            finally:
                os.close(lock)


def swap(new: Path, old: Path) -> None:
    """Put ``new`` where ``old`` is and ``old`` where ``new`` is: at once where the system can, else in three steps.

    Raises:
        OSError: ``old`` is in its place again.
    """
    if _exchange(new, old):
        return
    moved = hidden_name(old, REPLACED)
    lock: int | None = None
    with contextlib.suppress(OSError):
        lock = take_lock(old)  # or another run would move it back in between
    try:
        old.rename(moved)
        new.rename(old)
    finally:
        if moved.exists():
            moved.rename(new if old.exists() else old)
        if lock is not None:
            os.close(lock)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(a, b, _SWAP)
        else:
            failed = libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _SWAP)
    except AttributeError:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync_tree(directory: Path) -> None:
    """Bring every file of ``directory`` and the directories themselves to the disk."""
    for path in [*sorted(directory.rglob("*")), directory]:
        sync(path)


def sync(path: Path) -> None:
    """Bring one file or directory to the disk, past the drive's own cache on macOS."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is None:
            os.fsync(descriptor)
        else:
            fcntl.fcntl(descriptor, full)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)
