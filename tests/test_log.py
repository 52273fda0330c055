"""support/log.py: the columns and rows of log.csv, also of logs that a kill cut off or an earlier version wrote."""

import csv

import pytest
from helpers import files

from support.log import Log
from training import StepResult

COLUMNS = ["epoch", "step", "images", "loss_D", "loss_D_real", "loss_D_fake", "loss_G", "D_x", "D_G_z1", "D_G_z2"]
COLUMNS += ["images_per_s", "fid", "contrast"]
MEANS = COLUMNS[:-2]
EARLIER = [name for name in COLUMNS if name not in ("loss_D_real", "loss_D_fake", "contrast")]


def new_log(path):
    return Log(path, StepResult._fields)


def row_at(step, columns=MEANS):
    """Return a row with another number in each column."""
    return {name: 0.25 + i + step for i, name in enumerate(columns)} | {"epoch": step // 4, "step": step, "images": 8}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def log(tmp_path):
    """A log with the rows of three steps."""
    log = new_log(tmp_path / "log.csv")
    log.open()
    for step in (1, 2, 3):
        log.add_row(row_at(step))
    return log


def test_each_row_is_in_the_file_at_once(log):
    rows = read(log.path)
    assert [list(row) for row in rows] == [COLUMNS] * 3
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == log.rows
    assert [row["fid"] for row in rows] == [""] * 3
    assert log.rows == [row_at(step) for step in (1, 2, 3)]


def test_a_resumed_log_keeps_the_rows_up_to_its_checkpoint(log):
    log.add_measurement("fid", 17.5)  # of step 3
    log.add_measurement("contrast", 0.75)
    log.add_row(row_at(4))
    for steps, kept in ((9, 4), (3, 3), (2, 2), (0, 0)):
        again = new_log(log.path)
        again.open(steps)
        assert again.rows == log.rows[:kept]
        again.add_row(row_at(kept + 1))
        assert [row["step"] for row in read(log.path)] == [str(step) for step in range(1, kept + 2)]
        again.file.close()
    assert again.rows == [row_at(1)]


def test_a_new_log_replaces_one_that_is_there(log):
    again = new_log(log.path)
    again.open()
    assert (again.rows, read(log.path)) == ([], [])


def test_every_digit_is_kept(tmp_path):
    log = new_log(tmp_path / "log.csv")
    log.open()
    row = dict.fromkeys(MEANS, 0.25) | {"epoch": 24, "step": 1_234_567, "images": 5_064_975}
    log.add_row(row)
    text = log.path.read_text()
    assert "\n24,1234567,5064975,0.25," in text
    again = new_log(log.path)
    again.open(1_234_567)
    assert log.path.read_text() == text
    assert again.rows == [row]
    assert [type(again.rows[0][name]) for name in ("epoch", "step", "images")] == [int] * 3


# In the third, all columns are there, but the last number is not complete; the fourth is damaged.
@pytest.mark.parametrize("cut", ["0,3,8,9,9,9", "0", "0,3,8,9,9,9,9,9,9,9,12", "0,3,8,9,9,9,9,9,9,\0\0,12,\n", "\n\n"])
def test_a_row_that_a_kill_cut_off_is_left_out(log, cut):
    expected = log.path.read_text()
    with open(log.path, "a") as file:
        file.write(cut)
    new_log(log.path).open(3)
    assert log.path.read_text() == expected


@pytest.mark.parametrize("distances", [False, True])
def test_logs_of_earlier_versions_keep_every_row(tmp_path, distances):
    """They have no contrast, loss_D_real and loss_D_fake; the oldest ones have no fid either."""
    columns = EARLIER if distances else EARLIER[:-1]
    rows = [row_at(step, EARLIER[:-1]) | ({"fid": 3.5} if distances and step == 2 else {}) for step in (1, 2, 3)]
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    (tmp_path / "log.csv").write_text("\n".join([*lines, "1,4,8,0.5"]))  # the last one cut off
    log = new_log(tmp_path / "log.csv")
    log.open(3)
    assert log.rows == rows
    log.add_row(row_at(4))
    written = read(log.path)
    assert [list(row) for row in written] == [COLUMNS] * 4
    assert [(row["loss_D_real"], row["loss_D_fake"]) for row in written] == [("", "")] * 3 + [("8.25", "9.25")]
    for row, old in zip(written, rows, strict=False):
        assert {name: float(row[name]) for name in old} == old


def test_a_closed_log_leaves_no_open_file(log):
    file = log.file
    log.close()
    assert file.closed
    Log(log.path, []).close()  # which was never opened, as in all processes but the first


def test_distances_belong_to_the_last_row_and_the_lowest_is_known(log):
    assert log.is_lowest(1e9)  # none was measured
    log.add_measurement("fid", 20.0)
    log.add_row(row_at(4))
    assert not log.is_lowest(20.0)
    assert log.is_lowest(19.5)
    log.add_measurement("fid", 19.5)
    assert [row["fid"] for row in read(log.path)] == ["", "", "20", "19.5"]
    again = new_log(log.path)
    again.open(4)
    assert again.rows == log.rows
    assert not again.is_lowest(19.75)
    again.add_row(row_at(5))  # the file goes on after it was rewritten
    assert [row["step"] for row in read(log.path)] == list("12345")
    assert files(log.path.parent) == [log.path]


def test_a_measurement_changes_the_last_row_in_place(log):
    """The file stays the same one, which another program may be following."""
    before = log.path.read_text()
    log.add_measurement("contrast", 0.123456)
    assert log.path.read_text() == before[:-1] + "0.123456\n"
    log.add_measurement("contrast", 0.5)
    assert log.path.read_text() == before[:-1] + "0.5\n"
    log.close()
    again = new_log(log.path)
    again.open(3)
    inode = again.path.stat().st_ino
    again.add_measurement("fid", 7.5)
    again.add_row(row_at(4))
    again.add_measurement("contrast", 0.25)
    assert again.path.stat().st_ino == inode
    assert [(row["fid"], row["contrast"]) for row in read(log.path)] == [("", "")] * 2 + [("7.5", "0.5"), ("", "0.25")]
