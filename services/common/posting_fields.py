"""The members of a posting that hold its company, its title and its level."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

from services.common.errors import UsageError

Path: TypeAlias = tuple[str, ...]
# A name that no posting contains.
_NO_LEVEL = "\x7f"
_FORBIDDEN_CHARACTERS = re.compile('["\\\\\0-\x1f\ud800-\udfff]')


@dataclass(frozen=True, slots=True)
class PostingFields:
    """Paths of member names, from the posting down to company and title, and the name of the level."""

    company: Path = ("company",)
    title: Path = ("title",)
    level: str = "seniority"

    @classmethod
    def parse(cls, *, company: str, title: str, level: str | None = None) -> "PostingFields":
        """Read the values of the flags; None: the command has no such flag. Raises UsageError."""
        if level is None:
            fields = cls.parse(company=company, title=title, level=_NO_LEVEL)
            return cls(fields.company, fields.title)
        paths = {"--company-field": company, "--title-field": title, "--level-field": level}
        for flag, text in paths.items():
            if not all(text.split(".")) or _FORBIDDEN_CHARACTERS.search(text):
                message = f"{flag} {text!r}: must be the name of a member, without quotes and backslashes"
                raise UsageError(message)
        fields = cls(tuple(company.split(".")), tuple(title.split(".")), level)
        if "." in level:
            message = (
                f"--level-field {level!r}: the level is a member of the posting itself; only "
                "--company-field and --title-field take a dotted path"
            )
            raise UsageError(message)
        if level in {fields.company[0], fields.title[0]}:
            message = f"--level-field {level!r} would replace the company or the title"
            raise UsageError(message)
        short, long = sorted((fields.company, fields.title), key=len)
        if short != long and long[: len(short)] == short:
            message = f"--company-field {company!r} and --title-field {title!r}: one is inside the other"
            raise UsageError(message)
        return fields

    def read_pair(self, posting: Any) -> tuple[str, str]:
        """Return company and title of a posting as `json` reads it. Raises ValueError."""
        return text_at(posting, self.company), text_at(posting, self.title)

    def make_struct(self, name: str, level: Any, default: Any = msgspec.NODEFAULT) -> type[msgspec.Struct]:
        """Return a type that reads company, title and, as its member `level`, the level.

        `getter` finds the first two in an instance.
        """
        tree: dict[str, Any] = {}
        for path in (self.company, self.title):
            branch = tree
            for step in path[:-1]:
                branch = branch.setdefault(step, {})
            branch[path[-1]] = str
        return _define_struct(name, tree, [("level", level, default)], {"level": self.level})

    @property
    def pair_getter(self) -> "attrgetter[Any]":
        """What returns company and title of an instance of `struct`."""
        return attrgetter(_attribute_path(self.company), _attribute_path(self.title))


DEFAULT_FIELDS = PostingFields()


def text_at(posting: Any, path: Path) -> str:
    """Return the string at the path. Raises ValueError that names what is wrong."""
    value = posting
    for depth, step in enumerate(path):
        if not isinstance(value, dict):
            message = f"{'.'.join(path[:depth])} is not an object"
            raise ValueError(message)  # noqa: TRY004 - it is the text that is wrong
        if step not in value:
            message = f"{'.'.join(path[: depth + 1])} is missing"
            raise ValueError(message)
        value = value[step]
    if not isinstance(value, str):
        message = f"{'.'.join(path)} is not a string"
        raise ValueError(message)  # noqa: TRY004 - it is the text that is wrong
    return value


def _define_struct(
    name: str, tree: Mapping[str, Any], more: list[Any], names: Mapping[str, str]
) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for step, below in tree.items():
        kind = below if below is str else _define_struct(f"{name}_", below, [], {})
        fields.append((_identifier(step), kind))
    renamed = {_identifier(step): step for step in tree}
    return msgspec.defstruct(name, [*fields, *more], rename={**renamed, **names}, gc=False, frozen=True)


def _identifier(step: str) -> str:
    """Return an identifier for a member's name: its own could be any text."""
    return "f_" + step.encode().hex()


def _attribute_path(path: Path) -> str:
    return ".".join(map(_identifier, path))
