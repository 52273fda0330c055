"""The error that a user can fix, and texts for messages."""

import textwrap


class UserError(ValueError):
    """An error that the user can fix: its one-line message names the option or file, and says what to do."""


def error_text(error):
    """Return an exception's message as one line of at most about 200 characters, cut between words."""
    return textwrap.shorten(str(error), 200, placeholder=" ...", break_on_hyphens=False) or type(error).__name__


def counted(number, noun):
    """Return "1 image" or "2 images"."""
    return f"{number:,} {noun}" + "s" * (number != 1)
