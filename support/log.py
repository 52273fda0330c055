"""log.csv: a row for every few steps of a run."""

import csv
import errno
import math
import os

from support.files import write_atomically

MEASURED = ("fid", "contrast")  # at saves, where asked for
OPTIONAL = (*MEASURED, "loss_D_real", "loss_D_fake")  # old logs lack the last two


class Log:
    """The rows of a run's log.csv as dictionaries of its columns, and the file. Only its last row ever changes.

    step_columns: the columns of what a step reports.
    """

    def __init__(self, path, step_columns):
        self.path, self.rows, self.file, self.last_row_offset = path, [], None, 0
        self.columns = ("epoch", "step", "images", *step_columns, "images_per_s", *MEASURED)

    def open(self, steps=None):
        """Start an empty file; or, for a run that resumes after `steps` steps, keep the rows up to there."""
        if steps is not None and self.path.is_file():
            text = self.path.read_text(encoding="utf-8")
            rows = map(self.parse, csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))  # complete lines
            self.rows = [row for row in rows if row and row["step"] <= steps]
        lines = [f"{line}\n".encode() for line in (",".join(self.columns), *map(self.as_line, self.rows))]
        write_atomically(self.path, lambda file: file.writelines(lines))
        self.last_row_offset = sum(map(len, lines[:-1]))
        self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - as long as the run
        self.file.seek(0, os.SEEK_END)

    def parse(self, row):
        """Return a row of the file with numbers, or None if it is incomplete or damaged."""
        try:
            numbers = {k: int(v) if v.isdigit() else float(v) for k, v in row.items() if k in self.columns and v}
        except ValueError:
            return None
        return numbers if numbers.keys() | set(OPTIONAL) >= set(self.columns) else None

    def add_row(self, row):
        """Append a row: all columns but those of MEASURED. Raises OSError."""
        self.rows.append(row)
        self.last_row_offset = self.file.tell()
        self.write_last_row()

    def write_last_row(self):
        """Write the last row, with all that was measured, over what the file has of it. Raises OSError."""
        line = f"{self.as_line(self.rows[-1])}\n".encode()
        try:
            self.file.seek(self.last_row_offset)
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.truncate()  # the row may have been longer before
        except OSError as error:
            raise OSError(
                f"{self.path} could not be written ({error.strerror}); files saved before are intact"
            ) from None

    def close(self):
        if self.file:
            self.file.close()

    def is_lowest(self, distance):
        """Return whether an FID is lower than all in the log."""
        return distance < min((row["fid"] for row in self.rows if "fid" in row), default=math.inf)

    def add_measurement(self, column, value):
        """Add a value of a column of MEASURED to the last row. Raises OSError."""
        self.rows[-1][column] = value
        self.write_last_row()

    def as_line(self, row):
        values = (row.get(column, "") for column in self.columns)
        return ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
