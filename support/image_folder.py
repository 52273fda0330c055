"""Image files: which of them are taken for images, in a folder or an archive; reading those of a folder."""

import collections
import hashlib
import os
import stat
from pathlib import Path

from support.errors import UserError, counted
from support.formats import OLD_EXTENSIONS, open_image, readable_formats
from support.sources import Source, size_and_mtime

MAX_BYTES = 2**29  # of an image file; with Pillow's limit of 89 million pixels, decoding takes less than 2 GB
DERIVED = ("@eaDir", "__MACOSX")  # folders in which a NAS or macOS stores thumbnails and metadata
SAMPLE = 100  # files of each extension that a survey opens


class ImageFiles(Source):
    """All images among the files below `root`: flat, in class folders or deeper. Hidden ones are left out.

    A subclass lists the files and reads them. old_rules: take the images that old runs took, which are the files with
    OLD_EXTENSIONS alone, but also those in hidden folders.
    """

    def __init__(self, root, old_rules=False):
        self.root, self.unreadable_folders, self.old_rules = Path(root), {}, old_rules
        self.location = str(self.root.resolve())
        self.names, self.other_files, self.other_folders = [], collections.Counter(), []

    def find_images(self, walk):
        """Find the images of `walk`, which yields (folder, folders in it, files in it) as os.walk does.

        Folders are relative to `root`. Those that are removed from the list are not entered. Raises UserError if there
        are no images.
        """
        self.classify_files(walk)
        self.names.sort()
        self.passed_over = describe_passed_over(self.other_files, self.other_folders)
        if not self.names:
            kinds = ", ".join(f"*{extension}" for extension in OLD_EXTENSIONS)
            found = f" (passed over {self.passed_over})" if self.passed_over else ""
            heic = [extension for extension in (".heic", ".heif") if extension in self.other_files]
            found += f"; convert the {' and '.join(heic)} files to .jpg first" if heic else ""
            raise UserError(
                f"--dataroot {self.root}: no images; looked for {kinds}, ... in it and below, as"
                f" {self.root}/any/name.jpg{found}"
            )

    def classify_files(self, walk):
        """Add the files of `walk` that are images to `names`, and count the others."""
        extensions = OLD_EXTENSIONS if self.old_rules else readable_formats()
        for folder, subfolders, names in walk:
            prefix = "" if folder == os.curdir else folder + os.sep  # os.path.join takes a second for 200,000 names
            if {"args.json", "log.csv", "checkpoint.pth"} <= set(names):  # a run folder holds generated images
                if folder == os.curdir:
                    raise UserError(f"--dataroot {self.root} is a run folder, of generated images; name another folder")
                self.other_folders.append(folder)
                subfolders.clear()
                continue
            if not self.old_rules:
                not_entered = [name for name in subfolders if name.startswith(".") or name in DERIVED]
                self.other_folders += [prefix + name for name in not_entered]
                subfolders[:] = [name for name in subfolders if name not in not_entered]
            for name in names:
                extension = extension_of(name)
                if name.startswith("."):
                    continue
                if extension in extensions:
                    self.names.append(prefix + name)
                else:
                    self.other_files[extension or "without extension"] += 1

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return self.names[i]

    def sample_indices(self):
        by_extension = {}
        for i, name in enumerate(self.names):
            by_extension.setdefault(extension_of(name), []).append(i)
        return [i for indices in by_extension.values() for i in indices[:: -(-len(indices) // SAMPLE)]]


class FolderSource(ImageFiles):
    """All images below the folder `root`."""

    def __init__(self, root, old_rules=False):
        super().__init__(root, old_rules)
        if not os.path.isdir(self.root):  # a Path could raise instead
            raise UserError(f"--dataroot {root}: there is no such folder")
        self.find_images(self.walk())

    def walk(self):
        seen = set()
        for folder, subfolders, names in os.walk(self.root, onerror=self.cannot_list, followlinks=True):
            seen.add(os.path.realpath(folder))
            yield os.path.relpath(folder, self.root), subfolders, names
            # Links can form a loop.
            subfolders[:] = sorted(d for d in subfolders if os.path.realpath(os.path.join(folder, d)) not in seen)

    def cannot_list(self, error):
        self.unreadable_folders[str(error.filename)] = error.strerror

    def by_old_rules(self):
        return FolderSource(self.root, old_rules=True)

    def path(self, i):
        """Return the path of image i. Raises ValueError if it is no file or too large a one, OSError if it is gone."""
        path = os.path.join(self.root, self.names[i])
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device could take for ever
            raise ValueError("not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MB")
        return path

    def __getitem__(self, i):
        return open_image(self.path(i), extension_of(self.names[i]))

    def digest(self, i):
        digest = hashlib.sha256()
        with open(self.path(i), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def fingerprint(self):
        root = os.path.join(self.root, "")
        return [self.location, [(name, *size_and_mtime(root + name)) for name in self.names]]

    def portable_fingerprint(self, fingerprint):
        return [file[:2] for file in fingerprint[1]]


def extension_of(path):
    return os.path.splitext(path)[1].lower()


def describe_passed_over(counts, folders):
    """Return "30 .heic, 4 .mp4, 2 folders: .thumbnails, @eaDir" of a Counter of extensions and a list of folders."""
    common = counts.most_common(5)
    parts = [f"{count:,} {extension}" for extension, count in common]
    rest = sum(counts.values()) - sum(count for _, count in common)
    parts += [f"{rest:,} others"] if rest else []
    if folders:
        names = ", ".join(sorted(folders)[:3]) + (", ..." if len(folders) > 3 else "")
        parts.append(f"{counted(len(folders), 'folder')}: {names}")
    return ", ".join(parts)
