"""Spec strings: "int4-g64-asym" <-> Format. A family is a name, a builder and the words it understands after its name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from quantlib.errors import FormatError
from quantlib.formats.base import Format


@dataclass(frozen=True)
class Word:
    """One option word of a spec string: `pattern` (a whole-word regex), the keyword it sets, and its value.

    A callable value receives the regex match; `shown` is how messages write the word.
    """

    pattern: str
    keyword: str
    value: Any
    shown: str


@dataclass(frozen=True)
class Family:
    """A named builder of formats: build(**keywords) -> Format; keywords come from `words` or from the caller."""

    name: str
    build: Callable[..., Format]
    words: tuple[Word, ...] = ()
    summary: str = ""


def single(fmt: Format, summary: str = "") -> Family:
    """The family of one format, which takes no words."""
    return Family(fmt.name, lambda: fmt, summary=summary)


_FAMILIES: dict[str, Family] = {}


def register(entry: Family | Format) -> None:
    """Add a family, or a single format under its own name. Raises FormatError where the name is taken."""
    family = entry if isinstance(entry, Family) else single(entry)
    if family.name in _FAMILIES:
        raise FormatError(f"format {family.name!r} is registered already")
    _FAMILIES[family.name] = family
    _parse.cache_clear()


def unregister(name: str) -> None:
    """Take a family out again (for tests and notebooks)."""
    _FAMILIES.pop(name, None)
    _parse.cache_clear()


def families() -> tuple[Family, ...]:
    """Every registered family, in the order of registration."""
    return tuple(_FAMILIES.values())


def list_formats() -> list[str]:
    """The canonical spec string of every family's default format, in the order of registration."""
    return [family.build().name for family in _FAMILIES.values()]


def get_format(spec: str | Format, **keywords: Any) -> Format:
    """The format that a spec string names, e.g. "int4-g64-asym"; keywords say the same: get_format("int4", group_size=64).

    Raises FormatError for an unknown family, word or keyword (naming the known ones and the nearest), or an impossible value.
    """
    if isinstance(spec, Format):
        if keywords:
            raise FormatError(f"{spec.name} is a format already and takes no keywords ({', '.join(keywords)})")
        return spec
    if not isinstance(spec, str):
        raise FormatError(f"a format is named by a string or a Format, found {type(spec).__name__}")
    if not keywords:
        return _parse(spec)
    return _build(spec, keywords)


@lru_cache(maxsize=512)
def _parse(spec: str) -> Format:
    return _build(spec, {})


def _build(spec: str, keywords: dict[str, Any]) -> Format:
    text = spec.strip().lower()
    family = _find_family(spec, text)
    rest = text[len(family.name) :].strip("-")
    options: dict[str, Any] = {}
    for text_word in rest.split("-") if rest else []:
        word, match = _find_word(spec, family, text_word)
        if word.keyword in options:
            raise FormatError(f"{spec!r} sets {word.keyword} twice")
        options[word.keyword] = word.value(match) if callable(word.value) else word.value
    for keyword in keywords:
        if keyword in options and options[keyword] != keywords[keyword]:
            raise FormatError(f"{spec!r} and the keyword {keyword}={keywords[keyword]!r} disagree")
    try:
        return family.build(**(options | keywords))
    except TypeError:
        known = sorted({word.keyword for word in family.words})
        raise FormatError(
            f"{family.name!r} does not take {sorted(options | keywords)}; it takes {known or 'no keywords'}"
        ) from None


def _find_family(spec: str, text: str) -> Family:
    matches = [name for name in _FAMILIES if text == name or text.startswith(name + "-")]
    if matches:
        return _FAMILIES[max(matches, key=len)]
    nearest = difflib.get_close_matches(text.split("-")[0], _FAMILIES, n=1, cutoff=0.0)
    raise FormatError(
        f"unknown format {spec!r}; did you mean {nearest[0]!r}? Known: {', '.join(_FAMILIES)}"
        if nearest
        else f"unknown format {spec!r}: none is registered"
    )


def _find_word(spec: str, family: Family, text: str) -> tuple[Word, re.Match[str]]:
    for word in family.words:
        match = re.fullmatch(word.pattern, text)
        if match:
            return word, match
    shown = [word.shown for word in family.words]
    if not shown:
        raise FormatError(f"unknown word {text!r} in {spec!r}: {family.name} takes no options")
    nearest = difflib.get_close_matches(text, shown, n=1, cutoff=0.0)[0]
    raise FormatError(f"unknown word {text!r} in {spec!r}; did you mean {nearest!r}? {family.name} takes: {', '.join(shown)}")


def group_word(keyword: str = "group_size") -> Word:
    """The word g64, g128 ...: how many weights of a row share a scale."""
    return Word(r"g(\d+)", keyword, lambda match: int(match.group(1)), "g<N>")


def check_group_size(family: str, group_size: Any) -> int | None:
    """A group size (a positive multiple of 8) or None for a whole row; raises FormatError otherwise."""
    if group_size is None or group_size == -1:
        return None
    if not isinstance(group_size, int) or group_size <= 0 or group_size % 8:
        raise FormatError(
            f"{family}: group_size={group_size!r} can't be; expected a positive multiple of 8, "
            "or None for one scale per output channel"
        )
    return group_size
