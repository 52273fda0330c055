"""Images in a .tar or .tar.gz archive, read from it without unpacking it."""

import posixpath
import tarfile

from support.archives import ArchiveSource, Member, file_name
from support.seekable_gzip import SeekableGzip

MAX_LINKS = 8  # that lead to each other


class TarSource(ArchiveSource):
    """All images in a tar archive, which may be compressed by gzip. Links to files of the archive are followed."""

    points = None  # of SeekableGzip, for all processes that are forks of this one

    def open(self):
        file = open(self.root, "rb")  # noqa: SIM115 - see close
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_gzip:
            return file
        file.close()
        if self.points is None:
            self.points = []
        return SeekableGzip(self.root, self.points)

    def __getstate__(self):
        return super().__getstate__() | {"points": None}

    def read(self, member):
        self.opened.seek(member.location)
        return self.opened.read(member.size)

    def list_members(self):
        if isinstance(self.opened, SeekableGzip):
            print(f"decompressing {self.root} to find its images")
        files, links = {}, {}
        with tarfile.open(fileobj=self.opened, mode="r:") as archive:
            while info := archive.next():
                if info.size < 0:  # it would lead back, and so to an endless loop
                    raise ValueError("the header of a file is damaged")
                archive.members.clear()  # it would keep a kilobyte for each file
                name = file_name(info.name)
                links.pop(name, None)  # of files with the same name, the last counts
                if info.islnk():
                    links[name] = file_name(info.linkname)
                elif info.issym():
                    links[name] = file_name(posixpath.join(posixpath.dirname(info.name), info.linkname))
                if not info.isdir():
                    flaw = "" if info.isreg() and info.sparse is None else "not a plain file"
                    files[name] = Member(info.size, info.offset_data, flaw)
            end = archive.offset
        self.check_end(end)
        for name, target in links.items():
            for _ in range(MAX_LINKS):
                target = links.get(target, target)
            files[name] = files.get(target, Member(0, 0, "a link to no file of the archive"))
        return files

    def check_end(self, end):
        """Raise an error if the archive is damaged at its `end`, or continues there.

        tarfile takes the damaged header of a file for the end.
        """
        self.opened.seek(end)
        if self.opened.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError("the header of a file is damaged")
        while isinstance(self.opened, SeekableGzip) and self.opened.read(1 << 20):
            pass  # to the checksum
