"""What can go wrong in an augmenting run. Each error is one sentence that a person can act on."""

from services.common.errors import CommandError, FileError
from services.common.grpc_details import format_status


class AccountingError(FileError):
    """Lines in are not augmented + rejected + blank: a defect, and the output is not completed."""

    def __init__(self, *, lines_in: int, augmented: int, rejected: int, blank: int) -> None:
        super().__init__(
            f"{lines_in} lines in, but {augmented} augmented + {rejected} rejected + {blank} blank"
        )


class NoLineAugmentedError(FileError):
    """Every line of the file was rejected: it is no output that anybody wants, whatever is tolerated.

    `hint` is what the file seems to be instead; else the first line's reason stands for all.
    """

    def __init__(
        self, *, rejected: int, first_rejected: tuple[int, str], format_hint: str | None = None
    ) -> None:
        number, reason = first_rejected
        why = f"it is {format_hint}" if format_hint else f"line {number}: {reason}"
        super().__init__(f"no line can be augmented ({rejected:,} rejected): {why}")


class RpcFailedError(FileError):
    """The answers for a file could not be had: its last status, and what was tried.

    Of what the server said in words only the log at debug tells: it may quote what was asked.
    """

    def __init__(self, *, target: str, code: str, details: str, tried_seconds: float | None = None) -> None:
        tried = "" if tried_seconds is None else f" (retried for {tried_seconds:.1f} s)"
        super().__init__(f"{target} answered {format_status(code, details)}{tried}")
        self.code = code


class TerminatedError(CommandError):
    """SIGTERM ended the run; nothing half-written is left."""

    exit_code = 143
