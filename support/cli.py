"""Command lines: options refused in one line, and output that cannot end a run."""

import argparse
import contextlib
import difflib
import io
import math
import os
import sys

from support.errors import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Refuse the command line in one line, without argparse's usage text."""
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            known = {simplified(option): option for option in self._option_string_actions}
            near = difflib.get_close_matches(simplified(unknown[0].partition("=")[0]), known, 1)
            advice = f"did you mean {known[near[0]]}?" if near else "--help lists the options"
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
        return args

    def typed_options(self, argv):
        """Return the names of the options that the command line `argv` names, not those that have defaults only."""
        unset = dict.fromkeys(vars(self.parse_args(argv)))  # no option has the value None when it is typed
        found = vars(self.parse_args(argv, argparse.Namespace(**unset)))
        return {name for name, value in found.items() if value is not None}


def simplified(option):
    """Return an option's name as it is compared with a misspelt one: --image-size and --imageSize are equal."""
    return option.lower().replace("-", "").replace("_", "")


def number(kind, low, below=math.inf):
    """Return a `type` for argparse: a number of `kind` (int or float) in [low, below)."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            upper = f" and below {below}" if below < math.inf else "" if kind is int else " and finite"
            raise argparse.ArgumentTypeError(f"must be at least {low}{upper}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it where `text` is no number at all
    return parse


def option_name(name):
    """Return an option as it is typed: image_size is --imageSize."""
    known = {"image_size": "imageSize", "batch_size": "batchSize", "manual_seed": "manualSeed"}
    known |= {"num_output": "num_output"}
    return "--" + known.get(name, name.replace("_", "-"))


def check_options_have_effect(typed, table):
    """Raise UserError if one of the options `typed` has no effect; table: rows of (name, has no effect, why)."""
    for name, has_no_effect, why in table:
        if name in typed and has_no_effect:
            raise UserError(f"{option_name(name)} has no effect here: {why}")


class TolerantStream:
    """A text stream that drops what it cannot write: a terminal that is gone must not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_output():
    """Keep a failed write to standard output or error from ending the program: a closed pipe, a lost terminal, ...

    A missing stream is replaced by one that drops everything. Characters that the terminal cannot show are written as
    escapes. Streams that are no files, as in a notebook, stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; the first file opened would get its number
            stream = open(os.devnull, "w")  # noqa: SIM115 - as long as the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, TolerantStream(stream))
