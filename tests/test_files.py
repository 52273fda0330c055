"""support/files.py: files that are complete or absent, locks that end with their process, folders to write to."""

import errno
import io
import os
import stat
import subprocess
import sys
import threading

import filelock
import pytest
from helpers import ROOT, files

from support.errors import UserError
from support.files import check_writable, content_equals, locked, make_folder, try_lock, write_atomically

HOLD_LOCK = [sys.executable, ROOT / "tests" / "programs" / "hold_lock.py"]
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes and rights as Linux has them")


def contents_of(folder):
    return {path.name: path.read_bytes() for path in files(folder)}


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the lock of tmp_path / "lock"."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*HOLD_LOCK, tmp_path / "lock"], **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# Files


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_written_completely_and_keeps_the_one_before(tmp_path, sync):
    for content in (b"first", b"second", b"third"):
        write_atomically(tmp_path / "a", lambda file, content=content: file.write(content), sync, tmp_path / "before")
    assert contents_of(tmp_path) == {"a": b"third", "before": b"second"}
    write_atomically(str(tmp_path / "a"), lambda file: file.write(b"fourth"), sync)
    assert contents_of(tmp_path) == {"a": b"fourth", "before": b"second"}


@needs_linux
def test_files_have_the_rights_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", lambda file: file.write(b"abc"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert (tmp_path / "a").read_bytes() == b"abc"


@needs_linux
def test_a_file_that_reads_differently_from_what_was_written_replaces_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.pwrite(descriptor, b"X", 1))  # a disk that loses a byte
    with pytest.raises(OSError, match=r"a could not be written \(the file reads differently from what was written"):
        write_atomically(tmp_path / "a", lambda file: file.write(b"new"), keep=tmp_path / "before")
    assert contents_of(tmp_path) == {"a": b"old"}


def test_content_is_compared_to_its_last_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (2 << 20))
    for content, same in ((2 << 20, True), ((2 << 20) + 1, False), ((2 << 20) - 1, False), (0, False)):
        assert content_equals(tmp_path / "a", io.BytesIO(b"x" * content)) == same


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no"), SystemExit(3)])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_):
        raise failure

    with pytest.raises(type(failure)):  # while the content is made
        write_atomically(tmp_path / "a", fail)
    assert contents_of(tmp_path) == {"a": b"old"}
    monkeypatch.setattr(os, "replace", fail)  # when everything is written
    with pytest.raises(type(failure)) as raised:
        write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert contents_of(tmp_path) == {"a": b"old"}
    if isinstance(failure, OSError):
        reason = "could not be written (No space left on device); files saved before it are intact"
        assert str(raised.value) == f"{tmp_path / 'a'} {reason}"


# Locks


@needs_linux
def test_a_lock_excludes_other_processes_and_ends_with_its_process(tmp_path, holder):
    assert try_lock(tmp_path / "lock") is None
    holder.kill()  # it cannot release anything
    holder.wait()
    lock = try_lock(tmp_path / "lock")
    assert lock.is_locked
    other = subprocess.run([*HOLD_LOCK, tmp_path / "lock"], input="", capture_output=True, text=True)
    assert other.stdout == "refused\n"
    lock.release()
    assert try_lock(tmp_path / "lock").is_locked


@needs_linux
def test_locked_waits_until_the_other_process_has_ended(tmp_path, holder, capsys):
    timer = threading.Timer(0.2, holder.kill)
    timer.start()
    with locked(tmp_path / "lock"):
        assert not timer.is_alive()  # it waited
        assert try_lock(tmp_path / "lock") is None
    assert capsys.readouterr().out == f"waiting for another process that holds {tmp_path / 'lock'}\n"
    assert try_lock(tmp_path / "lock").is_locked


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_without_locks_nobody_is_excluded(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "_acquire", fail)  # a network drive
    assert try_lock(tmp_path / "lock") is not None
    assert try_lock(tmp_path / "lock") is not None
    with locked(tmp_path / "lock"):
        pass


# Folders


def test_folders_that_cannot_be_written_to_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    check_writable(tmp_path / "new" / "and deep")
    assert files(tmp_path) == [tmp_path / "file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"--outf {folder}: {tmp_path / 'file'} is not a writable folder"):
            check_writable(folder)
    monkeypatch.setattr(os, "access", lambda *_: False)  # another user's; test_faults.py has one mounted read-only
    with pytest.raises(UserError, match=f"{tmp_path} is not a writable folder"):
        check_writable(tmp_path / "new")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()

    def cannot_make(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")  # as in /proc, for root as well

    monkeypatch.setattr(type(tmp_path), "mkdir", cannot_make)
    with pytest.raises(UserError, match=r"--outf .*x cannot be made \(No such file or directory\); choose another"):
        make_folder(tmp_path / "x")
