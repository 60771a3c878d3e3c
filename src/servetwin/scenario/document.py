"""A YAML document as plain data, and back.

Types follow the core schema of YAML 1.2, so that `1e3` is a number and `no`, `on`, `1:30` are texts. Duplicate keys,
which YAML readers like to drop in silence, are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from servetwin.errors import InputError

_TYPES = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)
"""Tag, pattern of the texts that have it, and the characters with which such a text starts (\\0: it may be empty)."""
_DIGITS = 100
"""Longest number in characters; Python refuses to convert much longer ones."""


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Mark] = {}
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in seen:
                first = seen[key].line + 1
                message = f"the key {key!r} stands twice (first in line {first})"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen[key] = key_node.start_mark
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Nothing: merge keys (`<<`) are no part of YAML 1.2."""


def _int(reader: _Reader, node: yaml.ScalarNode) -> int:
    text = reader.construct_scalar(node)
    if len(text) > _DIGITS:
        raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(reader: _Reader, node: yaml.ScalarNode) -> float:
    return float(reader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Writer(yaml.SafeDumper):
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(writer: _Writer, text: str) -> yaml.ScalarNode:
    """A text; one with rare line breaks (NEL, LS, PS) escaped, for plain YAML would read them back as spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _name, _pattern, _characters in _TYPES:
    _starts = ["" if character == "\0" else character for character in _characters]
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _starts)
_Writer.add_representer(str, _text)
_Reader.add_constructor("tag:yaml.org,2002:int", _int)
_Reader.add_constructor("tag:yaml.org,2002:float", _float)


def parse(text: str, where: str) -> Any:
    """The single document in `text`. Raises InputError with the line and column of what is wrong."""
    try:
        return yaml.load(text, Loader=_Reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else None
        raise InputError(f"not valid YAML: {_problem(error)}", where=where, field=place) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"not valid YAML: the character {_character(error)!r} may not stand in a text file"
        raise InputError(message, where=where, field=f"line {line}") from None
    except RecursionError:
        raise InputError("not valid YAML: nested too deeply", where=where) from None


def _character(error: yaml.reader.ReaderError) -> str:
    return chr(error.character) if isinstance(error.character, int) else str(error.character)


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or str(error)
    if "'\\t'" in problem:
        return "a tab may not indent a line (use spaces)"
    if "but found another document" in problem:
        return "more than one document in the file"
    return f"{problem} {error.context}" if error.context and error.context.startswith("while") else problem


def write(data: Any) -> str:
    """`data` as YAML, in the order in which it comes; `parse` reads the same back."""
    text: str = yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)
    return text
