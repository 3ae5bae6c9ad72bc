"""Make flags from a dataclass's fields, and the dataclass from parsed flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from shadowllm.config_fields import KEY, Option, without_none
from shadowllm.errors import UserError
from shadowllm.limits import check_whole

Group = argparse._ActionsContainer  # a parser or a group of a parser
Parse = Callable[[str], Any]
Config = TypeVar("Config")


def add_flags(
    group: Group,
    config: type[Any],
    *names: str,
    unset: bool = False,
    parse: Mapping[str, Parse] | None = None,
) -> None:
    """Add a flag for each field of a dataclass.

    Name, type, default and choices come from the field, and help from its line under "Attributes:". The field's
    `option` overrides them. A boolean field becomes a switch; if its default is True, the switch turns it off.

    Args:
        names: fields, in the order of their flags; if none are named, all that `option` made.
        unset: flags that are not given are None, and their help shows no default.
        parse: by field, the function that parses its text, if the type alone does not define it.
    """
    hints, documented = get_type_hints(config), attributes(config)
    for one in _fields(config, names):
        found = _option(one)
        text = found.help or documented.get(one.name, "")
        keywords = _keywords(_flag(one), found, hints[one.name], (parse or {}).get(one.name))
        default = None if unset else _default(one)
        if isinstance(default, bool):
            keywords = {"action": "store_false" if default else "store_true"}
        elif not unset:
            text += _told(found, default)
        if found.values and default is not None:
            default = next(name for name, value in found.values.items() if value == default)
        group.add_argument(_flag(one), default=default, help=text.replace("%", "%%") or None, **keywords)


def build(args: argparse.Namespace, config: type[Config], **given: Any) -> Config:
    """Make the dataclass from the flags. Fields without a flag, or whose flag was not given, have their default.

    Args:
        given: values of fields that do not come from flags.
    """
    return config(**(values(args, config) | given))


def values(args: argparse.Namespace, config: type[Any], *names: str) -> dict[str, Any]:
    """Return the values of flags (given or default) by field name, without those that are None."""
    found = {one: vars(args).get(_destination(one)) for one in _fields(config, names)}
    return {
        one.name: mapping[value] if (mapping := _option(one).values) else value
        for one, value in found.items()
        if value is not None
    }


def whole(flag: str, least: int, most: int) -> Parse:
    """Return the argparse type of a whole number within limits."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UserError(f"{flag} is {text!r}", "give a whole number") from None
        return check_whole(flag, value, least, most)

    return parse


def number(flag: str, kind: type[int] | type[float]) -> Parse:
    """Return the argparse type of a number without limits."""

    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{flag} is {text!r}", f"give a {'whole ' if kind is int else ''}number") from None

    return parse


def attributes(config: type[Any]) -> dict[str, str]:
    """Return the description of each attribute in a docstring, on one line without its full stop."""
    doc = config.__doc__ or ""
    _, _, section = doc.partition("Attributes:\n")
    section = re.split(r"\n\s*\n", section)[0]
    found = {}
    for names, text in re.findall(r"^ {8}(\w+(?:, \w+)*): (.*(?:\n {12}.*)*)", section, re.MULTILINE):
        for name in names.split(", "):
            found[name] = " ".join(text.split()).removesuffix(".")
    return found


def _fields(config: type[Any], names: Sequence[str]) -> Iterator[Field[Any]]:
    known = {one.name: one for one in fields(config)}
    return iter([known[name] for name in names] if names else [f for f in known.values() if KEY in f.metadata])


def _option(one: Field[Any]) -> Option:
    return one.metadata.get(KEY) or Option()


def _flag(one: Field[Any]) -> str:
    return _option(one).flag or f"--{one.name.replace('_', '-')}"


def _destination(one: Field[Any]) -> str:
    return _flag(one).removeprefix("--").replace("-", "_")


def _default(one: Field[Any]) -> Any:
    return None if one.default is MISSING else one.default


def _keywords(flag: str, found: Option, hint: Any, parse: Parse | None) -> dict[str, Any]:
    """Return the keywords of ``add_argument`` for a type."""
    keywords: dict[str, Any] = {"metavar": found.metavar} if found.metavar else {}
    hint = without_none(hint)
    if get_origin(hint) is Sequence:
        keywords["nargs"], hint = "+", get_args(hint)[0]
    if found.values or get_origin(hint) is Literal:
        return keywords | {"choices": tuple(found.values or get_args(hint))}
    if parse is None and found.least is not None:
        parse = whole(flag, found.least, found.most)
    if parse is None and hint in (int, float):
        parse = number(flag, hint)
    if parse is None and hint is Path:
        parse = Path
    return keywords | ({"type": parse} if parse else {})


def _told(found: Option, default: Any) -> str:
    """Return the default for the help: in words, or as the user would write it."""
    if found.otherwise:
        return f" (default: {found.otherwise})"
    if default is None or default == ():
        return ""
    names = {value: name for name, value in (found.values or {}).items()}
    return f" (default: {names.get(default, f'{default:g}' if isinstance(default, float) else default)})"
