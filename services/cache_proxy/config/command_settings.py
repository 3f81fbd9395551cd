"""Settings of the cache commands, besides those of the cache itself."""

from dataclasses import dataclass

from services.common import limits, options
from services.common.errors import UsageError
from services.common.options import flag
from services.common.posting_fields import PostingFields


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputSettings:
    """How a command prints its result."""

    json: bool = flag("--json", options.BOOL, "false", text="for machines: one JSON object")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSettings:
    """The pair that a command acts on."""

    company: str | None = flag("--company", options.TEXT, text="the pair's company")
    title: str | None = flag("--title", options.TEXT, text="the pair's title")

    @property
    def pair(self) -> tuple[str, str] | None:
        """Return company and title, or None if neither is given. Raises `UsageError` if only one is."""
        if self.company is None and self.title is None:
            return None
        if self.company is None or self.title is None:
            raise UsageError("give both --company and --title")
        try:
            (self.company + self.title).encode()
        except UnicodeEncodeError as error:
            raise UsageError("--company and --title must be valid UTF-8") from error
        return self.company, self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class ScopeSettings:
    """Which pairs are invalidated."""

    all: bool = flag("--all", options.BOOL, "false", text="every pair of the model version")


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmSettings:
    """Settings of `warm`."""

    again: bool = flag("--again", options.BOOL, "false", text="from the beginning, whatever earlier runs did")
    company_field: str = flag(
        "--company-field", options.TEXT, "company", text="member that holds the company; may be a dotted path"
    )
    title_field: str = flag(
        "--title-field", options.TEXT, "title", text="member that holds the title; may be a dotted path"
    )
    level_field: str = flag(
        "--level-field", options.TEXT, "seniority", text="member of the posting that holds the level"
    )
    max_line_bytes: int = flag(
        "--max-line-bytes", options.SIZE, "4MiB", text="a longer line is skipped; several are held at a time"
    )
    max_zstd_window_bytes: int = flag(
        "--max-zstd-window", options.SIZE, "8MiB", text="a file compressed with a larger window fails"
    )
    endpoint_url: str | None = flag("--endpoint-url", options.HTTP_URL, text="S3-compatible endpoint")
    progress: bool | None = flag("--progress", options.BOOL, text="progress bar (default: on a terminal)")

    def __post_init__(self) -> None:
        """Reject limits that are out of range, and invalid field names."""
        _ = self.fields
        limits.check_limits(self.max_line_bytes, self.max_zstd_window_bytes)

    @property
    def fields(self) -> PostingFields:
        """Return the field names of a posting. Raises `UsageError` if they are invalid."""
        return PostingFields.parse(company=self.company_field, title=self.title_field, level=self.level_field)
