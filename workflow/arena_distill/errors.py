"""The one exception that is meant for a person."""


class InputError(Exception):
    """Bad input from a person: a file, the configuration, the data.

    The message says what is wrong, where (file, row, column, key) and what to do. The command
    line prints it as ``error: <message>`` and exits with 1, without a traceback.
    """
