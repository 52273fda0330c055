"""LSUN, read from its LMDB databases."""

import bisect
import hashlib
import io
import itertools
from pathlib import Path

import numpy as np

from support.errors import UserError
from support.formats import open_image
from support.sources import Source, size_and_mtime


class LsunSource(Source):
    """The images of LSUN's `<class>_lmdb` folders."""

    def __init__(self, folders):
        self.folders = [str(folder) for folder in folders]
        self.location = [str(Path(folder).resolve()) for folder in folders]
        self.ends = list(itertools.accumulate(self.open_database(folder).stat()["entries"] for folder in self.folders))
        self.keys, self.opened = [], []
        if not len(self):
            raise UserError(f"{' '.join(self.folders)}: the database is empty")

    def open_database(self, folder):
        try:
            import lmdb
        except ImportError:
            raise UserError("--dataset lsun needs the lmdb package: pip install lmdb") from None
        try:
            base = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise UserError(f"{folder} is not a database of LSUN: {error}") from None
        if Path(folder, "data.mdb").stat().st_size < (base.info()["last_pgno"] + 1) * base.stat()["psize"]:
            raise UserError(f"{folder}/data.mdb is cut off: download or copy it again")  # reading it would crash
        return base

    def prepare_for_workers(self):
        for folder in self.folders if not self.keys else ():
            with self.open_database(folder) as base, base.begin() as transaction:
                self.keys.append(np.array(list(transaction.cursor().iternext(values=False))))

    def close(self):
        for base in self.opened:
            base.close()
        self.opened = []

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        return open_image(io.BytesIO(self.content(i)))

    def digest(self, i):
        return hashlib.sha256(self.content(i)).hexdigest()

    def content(self, i):
        """Return the bytes of image i."""
        if not self.opened:  # in the process that reads: an open database does not survive a fork
            self.opened = [self.open_database(folder) for folder in self.folders]
        which = bisect.bisect_right(self.ends, i)
        key = self.keys[which][i - self.ends[which]]  # a negative index, from the end of its own database
        with self.opened[which].begin() as transaction:
            return transaction.get(bytes(key))

    def fingerprint(self):
        return [(folder, *size_and_mtime(Path(folder, "data.mdb"))) for folder in self.folders]

    def portable_fingerprint(self, fingerprint):
        return [(Path(folder).name, *size[:1]) for folder, *size in fingerprint]


def open_lsun(dataroot, image_size, classes):
    root = Path(dataroot or "data")
    if (root / "data.mdb").is_file():
        return LsunSource([root])
    names = dict.fromkeys(name.strip().removesuffix("_train") for name in classes.split(",") if name.strip())
    folders = [root / f"{name}_train_lmdb" for name in names]
    missing = [folder for folder in folders if not (folder / "data.mdb").is_file()]
    if missing or not folders:
        there = ", ".join(sorted(p.name.removesuffix("_train_lmdb") for p in root.glob("*_train_lmdb"))) or "none"
        looked_for = (missing or [root / "<class>_train_lmdb"])[0] / "data.mdb"
        raise UserError(f"--classes {classes}: looked for {looked_for}; classes in {root}: {there}")
    return LsunSource(folders)
