"""Errors of a run. The message of each is one sentence that a user can act on."""

from services.common.errors import CommandError, FileError
from services.common.grpc_details import format_status


class AccountingError(FileError):
    """Lines read differ from augmented + rejected + blank: a defect. The output is not completed."""

    def __init__(self, *, lines_in: int, augmented: int, rejected: int, blank: int) -> None:
        super().__init__(
            f"{lines_in} lines in, but {augmented} augmented + {rejected} rejected + {blank} blank"
        )


class NoLineAugmentedError(FileError):
    """Every line of the file was rejected. The file fails, even when rejected lines are tolerated.

    `format_hint` names the format that the file seems to have instead. Without one, the message gives the
    reason of the first rejected line.
    """

    def __init__(
        self, *, rejected: int, first_rejected: tuple[int, str], format_hint: str | None = None
    ) -> None:
        number, reason = first_rejected
        cause = f"it is {format_hint}" if format_hint else f"line {number}: {reason}"
        super().__init__(f"no line can be augmented ({rejected:,} rejected): {cause}")


class RpcFailedError(FileError):
    """The levels of a file's pairs could not be obtained. Gives the last status and how long it was retried.

    The text that came with the status is logged at debug only, since it may quote the request.
    """

    def __init__(self, *, target: str, code: str, details: str, tried_seconds: float | None = None) -> None:
        tried = "" if tried_seconds is None else f" (retried for {tried_seconds:.1f} s)"
        super().__init__(f"{target} answered {format_status(code, details)}{tried}")
        self.code = code


class TerminatedError(CommandError):
    """SIGTERM ended the run. No partial output is left."""

    exit_code = 143
