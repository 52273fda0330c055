"""Command-line options refused in one line, and output that no name can end."""

import argparse
import io
import math
import sys


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Refuse a request in one line, without argparse's usage text."""
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, low, below=math.inf):
    """Return a type for argparse: a number of `kind` in [low, below)."""

    def parse(text):
        value = kind(text)
        if not low <= value < below:
            upper = f" and below {below}" if below < math.inf else "" if kind is int else " and finite"
            raise argparse.ArgumentTypeError(f"must be at least {low}{upper}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `text` is no number at all
    return parse


def show_any_name():
    """Have names that the terminal cannot show written with escapes: they are no reason to end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors="backslashreplace")
