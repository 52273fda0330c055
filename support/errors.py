"""The errors that a user can mend. Each message is one line."""


class DataError(ValueError):
    """The pictures asked for cannot be had. The message is one line that says what was looked for, and where."""


class ModelError(ValueError):
    """A size no network can have, or a file that does not hold the weights asked for. The message is one line."""


class RunError(Exception):
    """A run folder that cannot be used as asked, or a run that cannot go on. The message is one line."""


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
