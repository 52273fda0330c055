"""A gzip file as a stream that can be read from any position."""

import bisect
import zlib
from typing import Any, NamedTuple

POINTS = 1_000  # states of the decompressor in memory at most, of about 60 KB each
INPUT, BLOCK = 2**14, 2**18  # bytes that are read, and decompressed, at a time at most
MAX_EXPANSION = 200  # times the size of an archive; JPEG and PNG files hardly shrink when they are compressed again
ALWAYS_ALLOWED = 2**30  # bytes to which any archive may expand


class Point(NamedTuple):
    """A position in a gzip file from which decompression can start."""

    position: int  # in the decompressed bytes
    offset: int  # in the file
    state: Any  # a zlib.decompressobj that has read all before


class SeekableGzip:
    """The decompressed bytes of the gzip file `path`; read, seek and tell are as in other binary files.

    Reading forward adds to `points`, a list of Point that several streams of the same file may share. A seek starts at
    the last point before its target. Raises EOFError, zlib.error or ValueError where the file is damaged.
    """

    def __init__(self, path, points=None):
        self.file, self.points = open(path, "rb"), [] if points is None else points  # noqa: SIM115 - see close
        self.spacing = 2 * BLOCK  # of points, in decompressed bytes; it doubles when there are too many
        if not self.points:
            self.points.append(Point(0, 0, zlib.decompressobj(31)))  # 31: gzip with its checksum
        self.start_at(self.points[0])

    def start_at(self, point):
        self.position, self.offset, self.state = point.position, point.offset, point.state.copy()

    def tell(self):
        return self.position

    def seek(self, position):
        point = self.points[bisect.bisect_right(self.points, position, key=lambda point: point.position) - 1]
        if position < self.position or point.position > self.position:
            self.start_at(point)
        while self.position < position and self.read_block(position - self.position):
            pass

    def read(self, size):
        blocks = []
        while size > 0 and (block := self.read_block(size)):
            blocks.append(block)
            size -= len(block)
        return b"".join(blocks)

    def read_block(self, size):
        """Return the next bytes, at most `size`, and b"" at the end."""
        block = b""
        while not block:
            self.file.seek(self.offset)
            data = self.file.read(INPUT)
            if self.state.eof:  # several gzip files may follow each other, and zeros may follow them
                if not data.strip(b"\0"):
                    return b""
                self.state = zlib.decompressobj(31)
            if not data:
                raise EOFError("it is cut off")
            block = self.state.decompress(data, min(size, BLOCK))
            rest = self.state.unused_data if self.state.eof else self.state.unconsumed_tail
            self.offset += len(data) - len(rest)
        self.position += len(block)
        if self.position - self.points[-1].position >= self.spacing:
            self.points.append(Point(self.position, self.offset, self.state.copy()))
        if len(self.points) > POINTS:
            del self.points[1::2]
            self.spacing *= 2
        check_expansion(self.position, self.offset)
        return block

    def close(self):
        self.file.close()


def check_expansion(size, compressed):
    """Raise ValueError if `compressed` bytes of an archive expand to more than images do."""
    if size > max(ALWAYS_ALLOWED, MAX_EXPANSION * compressed):
        raise ValueError(f"it expands to more than {MAX_EXPANSION} times its size, which archives of images do not")
