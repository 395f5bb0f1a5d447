"""A lock that one process holds until it lets go or dies. Knows nothing about what it guards."""

import contextlib
import errno
import os
import time
import warnings
from pathlib import Path

LOCK = ".lock"
"""Its name in the folder of a run."""

# What a file system that has no locks answers (some network file systems of clusters).
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class Lock:
    """A file that says which process holds it; the system takes the lock from a process that dies.

    So what a killed process leaves is an unlocked file, which is no obstacle. The file is removed when it is let go.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first, second = Lock(Path(folder, "lock")), Lock(Path(folder, "lock"))
    ...     first.take(), second.take(), second.holder() == str(os.getpid())
    ...     first.give_back()
    ...     second.take()
    ...     second.give_back()
    (True, False, True)
    True
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Takes the lock, now or (`wait`) when its holder is done; False when another holds it.

        Raises OSError for a folder that cannot be written, and warns where the file system has no locks.
        """
        assert self._descriptor is None
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _lock(descriptor, wait):
                    os.close(descriptor)
                    return False
                if _is(descriptor, self.file):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                    self._descriptor = descriptor
                    return True
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its holder removed it between our opening and our locking

    def is_held(self) -> bool:
        """Whether a living process holds it; asked without taking it."""
        try:
            descriptor = os.open(self.file, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            return not _lock(descriptor, wait=False)
        finally:
            os.close(descriptor)  # which also lets go

    def holder(self) -> str:
        """The id of the process that holds the lock, as it wrote it down."""
        try:
            return self.file.read_text(encoding="ascii") or "unknown"
        except FileNotFoundError:
            return "just ended"

    def give_back(self) -> None:
        """Lets go, and removes the file; nothing happens where nothing is held."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        if os.name == "nt":  # removes no file that is open
            os.close(descriptor)
            with contextlib.suppress(OSError):  # somebody else has opened it since
                self.file.unlink()
        else:
            with contextlib.suppress(OSError):  # the disk has become read-only, say: an unlocked file is no obstacle
                self.file.unlink()
            os.close(descriptor)


def _is(descriptor: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


if os.name == "nt":
    import msvcrt

    # A locked byte cannot be read: this one lies far behind the process's id.
    _BYTE = 1 << 30

    def _lock(descriptor: int, wait: bool) -> bool:
        while True:
            os.lseek(descriptor, _BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            except OSError:
                if not wait:
                    return False
                time.sleep(0.1)
            else:
                os.lseek(descriptor, 0, os.SEEK_SET)
                return True

else:
    import fcntl

    def _lock(descriptor: int, wait: bool) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"this file system has no locks ({error.strerror}): see to it that no second process writes here",
                stacklevel=4,
            )
        return True
