"""Files that are complete or absent, locks between processes, and folders that can be written to."""

import contextlib
import errno
import io
import os
from pathlib import Path

import filelock

from support.errors import UserError


def check_writable(folder):
    """Raise UserError if `folder` is not, or could not become, a folder that can be written to."""
    nearest = next(p for p in [folder, *folder.absolute().parents] if os.path.exists(p))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--outf {folder}: {nearest} is not a writable folder; choose another --outf")


def make_folder(folder):
    """Make the folder of --outf, and those above it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--outf {folder} cannot be made ({error.strerror}); choose another --outf") from None


def write_atomically(path, write, sync=True, keep=None):
    """Call write(file), so that `path` holds all that it wrote, or stays as it was. Raises OSError.

    sync: wait until the file is on the disk, and read it back to compare. keep: the path to which the file that was
    there before is renamed.
    """
    path, content = Path(path), io.BytesIO()
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    write(content)
    try:
        with open(partial, "wb") as file:
            file.write(content.getbuffer())
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if sync and not content_equals(partial, content):
            raise OSError(errno.EIO, "the file reads differently from what was written")
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if sync:
            sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path} could not be written ({error.strerror}); files saved before it are intact") from None
        raise


def content_equals(path, content):
    """Return whether the file `path` holds exactly the bytes of `content`, a BytesIO."""
    content.seek(0)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            if block != content.read(1 << 20):
                return False
    return not content.read(1)


def sync_folder(folder):
    """Wait until `folder` itself is on the disk, so that a rename in it survives a crash."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def try_lock(path):
    """Lock the file `path`; return the lock, or None if another process has it. A lock ends with its process.

    On a file system without locks (some network drives) it returns a lock that excludes no other process.
    """
    # A soft lock, which is a plain file, would remain after its process is killed.
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    except (OSError, NotImplementedError):
        pass
    return lock


@contextlib.contextmanager
def locked(path):
    """Hold the lock of the file `path`; wait while another process has it."""
    lock = try_lock(path)
    if lock is None:
        print(f"waiting for another process that holds {path}")
        lock = filelock.FileLock(path, fallback_to_soft=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
