"""Command lines and run files -> frozen dataclasses, with one set of errors.  No torch here.

A run file (TOML) is flags written down: both are read into words per key, and the words are
converted in one place by the type of the field.  tyro draws the help; the words are read here
because an error should be one sentence that names file and key, and because a negative number or
a text that begins with a dash is a value like any other.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


def parse(config: type[Config], argv: list[str], prog: str | None = None) -> Config:
    """Parse `[run.toml] [--key value ...]`; a later value wins over an earlier one.

    A TOML file is the same keys and values written down, so both go one way from here: text per
    key, converted by the type of its field.  Booleans are true or false, a tuple takes one or
    more values and may be given several times, `none` is the absent value of an optional field,
    `-` and `_` in keys are one.
    Fields marked `tyro.conf.Positional` take the words that no key precedes; tyro draws `--help`.

    Raises:
        ValueError: a file that is missing or not TOML, an unknown key, a value of the wrong type,
            or values that contradict each other; one line that names file and key.
        SystemExit: after --help.
    """
    if "--help" in argv or "-h" in argv:
        import tyro  # 0.1 s, and only the help needs it

        tyro.cli(config, args=["--help"], prog=prog, config=(tyro.conf.FlagConversionOff,))
    if not (argv and argv[0].endswith(".toml")) or _positional(config):
        return _build(config, _read_argv(config, argv))
    written = _read_file(config, Path(argv[0])) | _read_argv(config, argv[1:])
    try:
        return _build(config, written)
    except ValueError as error:
        if len(argv) > 1 or str(error).startswith(argv[0]):
            raise
        raise ValueError(f"{argv[0]}: {error}") from None


class Written(NamedTuple):
    """What was written for one key, and where."""

    place: str
    words: list[str]


def _read_file(config: type, path: Path) -> dict[str, Written]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such run file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    known = _entries(config)
    written = {}
    for key, value in _keys_of(table):
        _check_key(key, known, f"{path}: ")
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and get_origin(known[key]) is not tuple:
            raise ValueError(f"{path}: {key} takes one value, not a list")
        for item in values:
            if not isinstance(item, str | bool | int | float):
                raise ValueError(f"{path}: {key} = {item}: not a text, number or boolean")
        written[key] = Written(f"{path}: ", [_word(item) for item in values])
    return written


def _word(value: str | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keys_of(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_argv(config: type, argv: list[str]) -> dict[str, Written]:
    known = _entries(config)
    free = _positional(config)
    written: dict[str, Written] = {}
    words = list(argv)
    loose: list[str] = []
    while words:
        word = words.pop(0)
        if not _is_key(word):
            loose.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        _check_key(key, known, "--")
        if equals:
            taken = [value]
        elif get_origin(known[key]) is tuple:
            taken = []
            while words and not _is_key(words[0]):
                taken.append(words.pop(0))
        elif known[key] is bool and (not words or words[0].lower() not in ("true", "false")):
            taken = ["true"]  # --key alone
        else:
            if not words or _is_key(words[0]):
                raise ValueError(f"--{name} needs a value")
            taken = [words.pop(0)]
        if get_origin(known[key]) is tuple and key in written:
            taken = [*written[key].words, *taken]  # --key a --key b
        written[key] = Written("--", taken)
    for n, key in enumerate(free):
        many = get_origin(known[key]) is tuple
        if many and n == len(free) - 1:
            written[key], loose = Written("", loose), []
        elif loose:
            written[key] = Written("", [loose.pop(0)])
    if loose:
        raise ValueError(f"unexpected argument {loose[0]!r}")
    return written


def _is_key(word: str) -> bool:
    return word.startswith("--") and word[2:3].isalpha()


def _check_key(key: str, known: dict[str, Any], place: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{place}{key}: unknown key{hint}" if place != "--" else
                         f"unknown option --{key}{hint}")  # fmt: skip


def _build(config: type[Config], written: dict[str, Written], prefix: str = "") -> Config:
    hints = _hints(config)
    values: dict[str, Any] = {}
    for entry in fields(config):  # type: ignore[arg-type]
        kind, key = hints[entry.name], f"{prefix}{entry.name}"
        if is_dataclass(kind):
            values[entry.name] = _build(kind, written, f"{key}.")  # type: ignore[arg-type]
        elif key in written and not (written[key].place == "" and not written[key].words):
            values[entry.name] = _convert(kind, key, written[key])
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{key} is missing")
    return config(**values)


def _convert(kind: Any, key: str, written: Written) -> Any:
    """The value of one key, in the type of its field."""
    place, words = written
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(_convert(inner, key, Written(place, [word])) for word in words)
    (word,) = words
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in options and word.lower() == "none":
        return None
    (plain,) = (option for option in options if option is not NoneType)
    try:
        if get_origin(plain) is Literal:
            (value,) = (choice for choice in get_args(plain) if str(choice) == word)
            return value
        if plain is bool:
            return {"true": True, "false": False}[word.lower()]
        return plain(word)
    except (ValueError, KeyError):
        rule = {
            int: "a whole number", float: "a number", bool: "true or false",
        }.get(plain) or f"one of {', '.join(map(str, get_args(plain)))}"  # fmt: skip
        raise ValueError(f"{place}{key} = {word}: must be {rule}") from None


def _hints(config: type) -> dict[str, Any]:
    """Type of every field, `Annotated` taken off."""
    return get_type_hints(config)


def _entries(config: type, prefix: str = "") -> dict[str, Any]:
    """Every key a config takes, dotted, with its type."""
    entries: dict[str, Any] = {}
    hints = _hints(config)
    for entry in fields(config):
        kind = hints[entry.name]
        if is_dataclass(kind):
            entries |= _entries(kind, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
        else:
            entries[f"{prefix}{entry.name}"] = kind
    return entries


def _positional(config: type) -> list[str]:
    """Fields whose annotation carries tyro's mark for positional arguments."""
    annotated = get_type_hints(config, include_extras=True)
    return [
        entry.name
        for entry in fields(config)
        if any("POSITIONAL" in repr(mark).upper() for mark in get_args(annotated[entry.name])[1:])
    ]
