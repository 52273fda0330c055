"""The error that a user can mend, and texts for messages."""

import textwrap


class UserError(ValueError):
    """A request, file or folder that the user can mend. The message is one line that names it and the way out."""


def error_text(error):
    """Return an exception's message as one line of at most about 200 characters."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def counted(number, noun):
    """Return "1 image" or "2 images"."""
    return f"{number:,} {noun}" + "s" * (number != 1)
