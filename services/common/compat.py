"""Names of newer Python versions that this project supports Python 3.11 without."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import override
else:
    _Method = TypeVar("_Method", bound=Callable[..., Any])

    def override(method: _Method) -> _Method:
        """Mark a method that overrides or implements a documented one (`typing.override` of Python 3.12)."""
        return method


__all__ = ["override"]
