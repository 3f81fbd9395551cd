"""The base of every error that a command may show to its user."""


class CommandError(Exception):
    """Ends a command with one clear line on standard error; `exit_code` is the process's."""

    exit_code = 1


class UsageError(CommandError):
    """What the user asked for cannot be meant: exit code 2."""

    exit_code = 2
