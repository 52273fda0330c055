"""Images in an archive, read from it without unpacking it; zip archives."""

import collections
import hashlib
import io
import os
import posixpath
import stat
import zipfile
from typing import NamedTuple

from support.errors import UserError, error_text
from support.formats import open_image
from support.image_folder import MAX_BYTES, ImageFiles, extension_of
from support.seekable_gzip import check_expansion
from support.sources import size_and_mtime

# Python's readers of other methods can take any amount of memory.
COMPRESSION_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Member(NamedTuple):
    """A file in an archive."""

    size: int
    location: str | int  # its name in a zip archive, its position in a tar archive
    flaw: str = ""  # why it cannot be read


class ArchiveSource(ImageFiles):
    """All images in the archive `root`. Each process that reads images opens it for itself.

    A subclass has: open(), which returns an open archive; list_members(), the (name, Member) of all files in `opened`;
    read(member), the bytes of one.
    """

    opened = None

    def __init__(self, root):
        super().__init__(root)
        self.last = None, b""  # number and content of the image that was read last
        try:
            self.opened = self.open()
            self.members = dict(self.list_members())
        except UserError:
            raise
        except Exception as error:  # damage can raise anything
            raise UserError(
                f"--dataroot {root}: the archive cannot be read ({error_text(error)}); download it again, or unpack it"
                " and name the folder"
            ) from None
        finally:
            self.close()
        self.find_images(walk(self.members))

    def prepare_for_workers(self):
        self.close()  # processes that share an open file would also share the position in it

    def close(self):
        if self.opened:
            self.opened.close()
        self.opened, self.last = None, (None, b"")

    def __getstate__(self):
        return self.__dict__ | {"opened": None, "last": (None, b"")}

    def __getitem__(self, i):
        return open_image(io.BytesIO(self.content(i)), extension_of(self.names[i]))

    def content(self, i):
        """Return the bytes of image i. Raises ValueError if it is a link, too large or cut off; or anything else."""
        if self.last[0] == i:  # the first time it is decoded, the second time its digest is computed
            return self.last[1]
        member = self.members[self.names[i]]
        if member.flaw:
            raise ValueError(member.flaw)
        if member.size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        if not self.opened:
            self.opened = self.open()
        content = self.read(member)
        if len(content) != member.size:
            raise ValueError("cut off")
        self.last = i, content
        return content

    def digest(self, i):
        return hashlib.sha256(self.content(i)).hexdigest()

    def fingerprint(self):
        return [self.location, *size_and_mtime(self.root)]

    def portable_fingerprint(self, fingerprint):
        return [(name, self.members[name].size) for name in self.names]


class ZipSource(ArchiveSource):
    """All images in a zip archive."""

    def open(self):
        return zipfile.ZipFile(self.root)

    def list_members(self):
        infos = [info for info in self.opened.infolist() if not info.is_dir()]
        check_expansion(sum(info.file_size for info in infos), os.path.getsize(self.root))
        for info in infos:
            if info.flag_bits & 1:
                raise UserError(f"--dataroot {self.root}: the archive has a password; unpack it and name the folder")
            if info.compress_type not in COMPRESSION_METHODS:
                method = zipfile.compressor_names.get(info.compress_type, info.compress_type)
                raise UserError(
                    f"--dataroot {self.root}: the archive is compressed by a method that is not read here ({method});"
                    " unpack it and name the folder"
                )
            flaw = "a link" if stat.S_ISLNK(info.external_attr >> 16) else ""
            yield file_name(info.filename.replace("\\", "/")), Member(info.file_size, info.filename, flaw)

    def read(self, member):
        return self.opened.read(member.location)


def file_name(name):
    """Return the name of a file in an archive, a path with slashes, as that of a file below a folder."""
    return os.path.join("", *(part for part in posixpath.normpath(name).split("/") if part not in ("", ".", "..")))


def walk(names):
    """Yield (folder, folders in it, files in it) as os.walk does, for file names such as a/b.png."""
    files, subfolders = collections.defaultdict(list), collections.defaultdict(set)
    for name in names:
        *folders, file = name.split(os.sep)
        path = os.curdir
        for folder in folders:
            subfolders[path].add(folder)
            path = os.path.normpath(os.path.join(path, folder))
        files[path].append(file)
    waiting = [os.curdir]
    while waiting:
        path = waiting.pop()
        folders = sorted(subfolders[path])
        yield path, folders, files[path]
        waiting += [os.path.normpath(os.path.join(path, folder)) for folder in folders]
