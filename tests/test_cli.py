"""support/cli.py: options refused in one line, and output that cannot end a program."""

import argparse
import contextlib
import io
import math
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from support.cli import Parser, TolerantStream, check_options_have_effect, number, protect_output
from support.errors import UserError


class Broken(io.TextIOBase):
    """A stream of which every write and flush fails; closed or not."""

    encoding = "nothing"

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


def test_a_command_line_is_refused_in_one_line(capsys):
    parser = Parser(prog="program.py")
    parser.add_argument("--count", type=number(int, 1))
    parser.add_argument("--imageSize")
    for arguments, words in (
        (["--count", "0"], "argument --count: must be at least 1, not 0"),
        (["--count", "x"], "argument --count: invalid int value: 'x'"),
        (["--other"], "unrecognized arguments: --other; --help lists the options"),
        (["--image-size=8", "x"], "unrecognized arguments: --image-size=8 x; did you mean --imageSize?"),
        (["--coutn", "8"], "unrecognized arguments: --coutn 8; did you mean --count?"),
        (["x"], "unrecognized arguments: x; --help lists the options"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2
        assert capsys.readouterr() == ("", f"program.py: {words}\n")


def test_what_is_typed_is_told_from_defaults():
    parser = Parser(prog="program.py")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--imageSize", dest="image_size", default=2)
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--slow", action="store_true")
    assert parser.typed_options([]) == set()
    assert parser.typed_options(["--count", "1", "--im", "0", "--no-fast"]) == {"count", "image_size", "fast"}
    assert parser.typed_options(["--count=0", "--slow"]) == {"count", "slow"}


def test_an_option_without_effect_is_refused_if_it_is_typed():
    table = (("log_every", False, "no"), ("batch_size", True, "because"), ("num_output", True, "none"))
    check_options_have_effect({"log_every", "other"}, table)
    for name, words in (
        ("batch_size", "--batchSize has no effect here: because"),
        ("num_output", "--num_output has no"),
    ):
        with pytest.raises(UserError, match=words):
            check_options_have_effect({"log_every", name}, table)


def test_numbers_are_within_their_bounds():
    for parse, good in ((number(int, 0), ["0", "7", " 9"]), (number(float, 0, 1), ["0", "0.999"])):
        assert [parse(text) for text in good] == [float(text) for text in good]
    for parse, text, words in (
        (number(int, 1), "0", "must be at least 1, not 0"),
        (number(int, 0, 2**32), "4294967296", "must be at least 0 and below 4294967296, not 4294967296"),
        (number(float, 0), "inf", "must be at least 0 and finite, not inf"),
        (number(float, 0), "nan", "must be at least 0 and finite, not nan"),
        (number(float, 0, 1), "1", "must be at least 0 and below 1, not 1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            parse(text)
        assert str(refusal.value) == words
    for text in ("1.5", "", "one"):
        with pytest.raises(ValueError, match="invalid literal"):
            number(int, 0)(text)
    assert number(float, 0, math.inf).__name__ == "float"


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left"), ValueError("it is closed")])
def test_a_tolerant_stream_drops_what_it_cannot_write(error):
    stream = TolerantStream(Broken(error))
    assert stream.write("four") == 4
    stream.flush()
    print("a line", file=stream, flush=True)
    assert stream.encoding == "nothing"
    with pytest.raises(KeyError):  # a fault of the program is no fault of the stream
        TolerantStream(Broken(KeyError())).write("x")


def test_a_tolerant_stream_writes_what_it_can():
    stream = TolerantStream(inner := io.StringIO())
    print("a line", file=stream, flush=True)
    stream.writelines(["and ", "more"])
    assert inner.getvalue() == "a line\nand more"
    assert not stream.isatty()


def test_streams_that_are_no_files_stay_as_they_are(monkeypatch):
    said = io.StringIO()  # as in a notebook
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        protect_output()
        assert (sys.stdout, sys.stderr) == (said, said)


def test_missing_and_closed_streams_and_names_that_cannot_be_shown_are_no_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)  # closed by the caller, as `>&-` does
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(file := io.BytesIO(), "ascii"))
    protect_output()
    assert sys.stdout.write("dropped") == 7
    print("ü and", os.fsdecode(b"c\xff"), file=sys.stderr, flush=True)
    assert file.getvalue().decode("ascii").splitlines() == ["\\xfc and c\\udcff"]
    sys.stderr.close()
    print("dropped", file=sys.stderr, flush=True)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_program_ends_with_0_whatever_becomes_of_its_output(tmp_path):
    """Also at its end, when Python flushes what is left."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from support.cli import protect_output; protect_output()\n"
    code += "print('x' * 9); print('y', file=sys.stderr); open('kept', 'w').write('z')"
    for redirection in (">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true"):
        # The code of the program, not of the reader of its pipe.
        script = f'cd "$3"; rm -f kept; {{ "$0" -c "$1" "$2"; echo $? >code; }} {redirection}'
        subprocess.run(["sh", "-c", script, sys.executable, code, ROOT, tmp_path], timeout=60, check=True)
        assert (tmp_path / "code").read_text() == "0\n", redirection
        assert (tmp_path / "kept").read_text() == "z", redirection
