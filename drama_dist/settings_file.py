"""Reading settings: a tree of pydantic dataclasses from a YAML file and `section.key=value` overrides.

Scalars arrive as the text that was written, and the declared type alone says what they mean: `language: no` is the
text "no". Covers the errors, which name file and line or the override. What settings there are is in settings.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from drama_dist.run.files import write_text

T = TypeVar("T")
Location = tuple[str | int, ...]  # keys and positions, from the outermost
Origins = dict[Location, str]  # where a value stands: FILE:LINE, or the override

_NULLS = ("", "~", "null", "Null", "NULL")
_UNSET = object()  # the value of ???, which has to be set
_NOT_TEXT = {"tag:yaml.org,2002:null": None, "!unset": _UNSET}  # scalars that are not in quotes
_PROBLEMS = 3  # are told at once


class SettingsError(ValueError):
    """Settings that cannot be used: for each problem a line with its origin, key, value and what is allowed."""


def read_yaml(kind: type[T], path: Path, overrides: Sequence[str]) -> T:
    """Settings of this kind from a file and overrides; raises FileNotFoundError and SettingsError."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such settings file")
    if path.is_dir():
        raise SettingsError(f"{path}: expected a settings file, found a folder")
    origins: Origins = {}
    values = _read_file(path, origins)
    declared = _declared(kind)
    for name, section in declared.items():
        if dataclasses.is_dataclass(section) and values.get(name) is None:
            values[name] = {}
    for override in overrides:
        _apply(override, declared, values, origins)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise SettingsError(_describe(error, str(path), origins, declared)) from None


def read_json(kind: type[T], text: str | bytes, source: str) -> T:
    """Settings of this kind from a JSON object; SettingsError names the source and the key."""
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise SettingsError(_describe(error, source, {}, _declared(kind))) from None


def write_yaml(values: dict[str, Any], path: Path) -> None:
    """Write plain values so that all text is read back as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False))


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            problem = "anchors, aliases and tags (&, *, !) mean nothing here; put text into quotes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("!unset", re.compile(r"\?\?\?$"), ["?"])


def _read_file(path: Path, origins: Origins) -> dict[str | int, Any]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"{path}:{line}: not UTF-8 text; save the file in UTF-8") from None
    values = _parse(text, (), origins, lambda line: f"{path}:{line}")
    if not isinstance(values, dict):
        raise SettingsError(f"{path}:1: expected sections with keys, found {shown(values)}")
    return values


def _apply(override: str, declared: Mapping[str, Any], values: dict[str | int, Any], origins: Origins) -> None:
    """Put the value of `section.key=value` in place of the file's."""
    source = f"override {shown(override)}"
    key, equals, text = override.partition("=")
    kind, location = declared.get(key), tuple(key.split("."))
    if not equals or dataclasses.is_dataclass(kind):
        raise SettingsError(f"{source}: expected section.key=value, for example train.steps=100")
    if kind is None:
        raise SettingsError(f"{source}: {_unknown(location, declared)}")
    *sections, name = location
    holder = values[sections[0]] if sections else values
    origins[location] = source
    if isinstance(holder, dict):  # else what the file has there is refused
        holder[name] = _read_override(text, kind, location, origins, source)


def _read_override(text: str, kind: Any, location: Location, origins: Origins, source: str) -> Any:
    """Text as it is where the setting is text, or may be; YAML for lists, maps and numbers."""
    kinds = (kind,) if get_origin(kind) in (None, list, dict, Literal) else get_args(kind)  # of a union
    if str in kinds or any(get_origin(one) is Literal for one in kinds):
        return None if types.NoneType in kinds and text in _NULLS else text
    return _parse(text, location, origins, lambda line: source)


def _parse(text: str, location: Location, origins: Origins, source: Callable[[int], str]) -> Any:
    """YAML as dicts, lists, text, None and _UNSET; notes where each value stands. source: names a line, from 1."""
    try:
        return _value(yaml.compose(text, Loader=_Loader), location, origins, source)
    except SettingsError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position) + 1, f"character {text[error.position]!r}"
    except RecursionError:
        line, problem = 1, "nested too deeply"
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, a version of thousands of digits
        line, problem = 1, str(error)
    hint = "; indent with blanks, not tabs" if r"'\t'" in problem else ""
    raise SettingsError(f"{source(line)}: cannot be read as YAML: {problem}{hint}")


def _value(node: Any, location: Location, origins: Origins, source: Callable[[int], str]) -> Any:
    if not isinstance(node, yaml.CollectionNode):
        return None if node is None else _NOT_TEXT.get(node.tag, node.value)
    values: dict[str | int, Any] = {}
    is_map = isinstance(node, yaml.MappingNode)
    pairs: Any = node.value if is_map else enumerate(node.value)
    for key, inner in pairs:
        name, begin = (key.value, key) if is_map else (key, inner)
        here, where = (*location, name), source(begin.start_mark.line + 1)
        if isinstance(name, list):
            raise SettingsError(f"{where}: found a list or map where a key should be")
        if name in values:
            raise SettingsError(f"{where}: {_dotted(here)}: named twice, first at {origins[here]}")
        origins[here] = where
        values[name] = _value(inner, here, origins, source)
    return values if is_map else list(values.values())


def _describe(error: ValidationError, source: str, origins: Origins, declared: Mapping[str, Any]) -> str:
    """The first few problems, a line each."""
    problems = [_sentence(item, source, origins, declared) for item in error.errors(include_url=False)]
    more = f" (and {len(problems) - _PROBLEMS} more problems)" if len(problems) > _PROBLEMS else ""
    return "\n".join(problems[:_PROBLEMS]) + more


def _sentence(item: Any, source: str, origins: Origins, declared: Mapping[str, Any]) -> str:
    location, value, cause = item["loc"], item["input"], item.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):  # names settings that do not fit each other, of which one was given
        named = [tuple(name.split(".")) for name in re.findall(r"[a-z]+\.\w+", str(cause))]
        return f"{next((origins[name] for name in named if name in origins), source)}: {cause}"
    parents = (location[:end] for end in range(len(location), 0, -1))
    where, key = next((origins[parent] for parent in parents if parent in origins), source), _dotted(location)
    if item["type"] == "missing" or value is _UNSET:
        return f"{where}: {key}: no value; set it in the file or as {key}=VALUE"
    if item["type"] == "unexpected_keyword_argument":
        return f"{where}: {_unknown(location, declared)}"
    problem = cause or item["msg"].replace("Input should be", "must be")
    return f"{where}: {key + '=' if key else ''}{shown(value)}: {problem}"


def _unknown(location: Location, declared: Mapping[str, Any]) -> str:
    key, last = _dotted(location), location[-1]
    namesakes = [name for name in declared if name.rpartition(".")[2] == last]
    alike = [name for name in declared if ("." in name) == ("." in key)]
    if close := namesakes or difflib.get_close_matches(key, alike, n=1, cutoff=0.75):
        return f"{key}: no such setting; did you mean {' or '.join(close)}?"
    section = key.rpartition(".")[0] if key.rpartition(".")[0] in declared else ""
    beside = (name for name in declared if name.rpartition(".")[0] == section)
    return f"{key}: no such setting; known are {', '.join(beside)}"


def _declared(kind: Any) -> dict[str, Any]:
    """The type of every section and setting, by dotted key."""
    declared: dict[str, Any] = {}
    for name, inner in get_type_hints(kind).items():
        section = _declared(inner) if dataclasses.is_dataclass(inner) else {}
        declared |= {name: inner} | {f"{name}.{key}": of for key, of in section.items()}
    return declared


def _dotted(location: Location) -> str:
    key = ".".join(map(str, location))
    return key if key.isprintable() and len(key) < 80 else shown(key)


def shown(value: Any) -> str:
    """A value as messages have it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
