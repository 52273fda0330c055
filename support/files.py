"""Files that are whole or absent, locks, and folders to write to."""

import contextlib
import errno
import io
import os
from pathlib import Path

from support.errors import RunError


def check_writable(folder):
    """Raise RunError if `folder` is not, or could not become, a folder that can be written to."""
    nearest = next(p for p in [folder, *folder.absolute().parents] if os.path.exists(p))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"--outf {folder}: {nearest} is not a folder that can be written to; choose another --outf")


def write_whole(path, write, sync=True, keep=None):
    """Call write(file) so that `path` is there complete or, whatever happens, as it was before. Raises OSError.

    sync: make sure that it is on the disk and reads as it was written, which takes a while. keep: where the file that
    was there goes.
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
        if sync and partial.read_bytes() != content.getbuffer():
            raise OSError(errno.EIO, "it does not read as it was written")
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if sync:
            sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(
                f"{path} could not be written ({error.strerror}); the files saved before it are whole"
            ) from None
        raise


def sync_folder(folder):
    """Make sure that the names in `folder` are on the disk as well as the files."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open one
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def locked(path):
    """Wait until no other process has the lock of the file `path`, and hold it; the lock dies with its holder.

    Where there are no such locks, as on Windows and on some network drives, two processes do the same work twice.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "r+b" if os.access(path, os.W_OK) else "rb") as file:  # over NFS, a lock needs one to write to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which has {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
