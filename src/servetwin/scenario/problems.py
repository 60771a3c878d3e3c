"""One InputError for what pydantic found: the field as a person writes it, what stands there, what may stand there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from servetwin.errors import InputError, nearest
from servetwin.scenario.quantities import LARGEST
from servetwin.scenario.schema import Scenario

Json = dict[str, Any]
_FIRST = ("extra_forbidden", "union_tag_invalid", "literal_error")
"""Misspelt names come first: a missing field is most often their consequence."""

_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "more than"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "less than"),
)
_MESSAGES = {"string_too_short": "is empty", "too_short": "is empty", "finite_number": "not a finite number"}


def input_error(error: ValidationError, where: str | None) -> InputError:
    """The most telling of the errors in `error`."""
    found = error.errors(include_url=False)
    return _translate(min(found, key=lambda one: one["type"] not in _FIRST), where)


def _translate(error: ErrorDetails, where: str | None) -> InputError:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    field, node, members = _place(error["loc"])

    def wrong(message: str, allowed: str | None, found: object = None, hint: str | None = None) -> InputError:
        return InputError(message, where=where, field=field, found=short(found), allowed=allowed, hint=hint)

    if kind == "section":  # raised by a section about one of its fields
        field = join(field, context["field"])
        return wrong(context["message"], context["allowed"], context["found"], context["hint"])
    if kind == "quantity":
        return wrong(context["message"], context["allowed"], value, context.get("hint"))
    if kind == "missing":
        return wrong("missing", allowed_text(node))
    if kind == "extra_forbidden":
        key, names = str(error["loc"][-1]), list(node.get("properties", {}))
        if any(key in member.get("properties", {}) for member in members):
            return wrong(f"does not go with {error['loc'][-2]!r}", ", ".join(names))
        return wrong("unknown key", ", ".join(names), hint=nearest(key, names))
    choices = _choices(node)
    if kind.startswith("union_tag") and isinstance(value, dict):  # only lengths choose by a name in the mapping
        field, value, allowed = join(field, "distribution"), value.get("distribution"), ", ".join(choices)
        if value is None:
            return wrong("missing", allowed)
    elif kind == "less_than_equal" and context["le"] >= LARGEST:
        allowed = f"at most {context['le']}"
    else:
        allowed = allowed_text(node)
    hint = nearest(value, choices) if isinstance(value, str) and choices else None
    message = "has too few entries" if kind == "too_short" and value else _MESSAGES.get(kind, "not valid")
    return wrong(message, allowed, "null" if value is None else value, hint)


def join(path: str, part: str | int) -> str:
    """`path` extended by a key or an index: `pools[0].device`."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    return f"{path}.{part}" if path else part


def _place(loc: Sequence[str | int]) -> tuple[str, Json, list[Json]]:
    """The field at `loc` as a person writes it, what the JSON Schema says about it (of an unknown key: about the
    mapping that it stands in), and the members of the union that the mapping belongs to.

    pydantic puts the names of union members into `loc`; they are no keys of the file.
    """
    schema = Scenario.model_json_schema()
    definitions, path = schema["$defs"], ""
    node: Json = schema
    members: list[Json] = []
    for position, part in enumerate(loc):
        options = [_resolved(option, definitions) for option in node.get("oneOf") or node.get("anyOf") or ()]
        member = next((option for option in options if isinstance(part, str) and part == _member(option)), None)
        if member is not None:
            node, members = member, options
            continue
        path = join(path, part)
        if isinstance(part, int):
            node = _resolved(node.get("items", {}), definitions)
        elif part in node.get("properties", {}):
            node = _resolved(node["properties"][part], definitions)
        elif isinstance(node.get("additionalProperties"), dict):
            node = _resolved(node["additionalProperties"], definitions)
        elif position < len(loc) - 1:
            node = {}
        if position < len(loc) - 1:
            members = []
    return path, node, members


def _resolved(node: Json, definitions: Json) -> Json:
    """`node` without references, and without `null` as an option: nobody is told to write null."""
    if "$ref" in node:
        target: Json = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return _resolved(target, definitions)
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    if len(options) == 1:
        about = {"about": node["description"]} if "description" in node else {}
        return {**_resolved(options[0], definitions), **about}
    if "oneOf" in node:
        options = node["oneOf"]
    if options:
        return {"oneOf": [_resolved(option, definitions) for option in options]}
    return node


def _member(option: Json) -> str:
    """The tag of a union member."""
    if "properties" in option:
        tag = option["properties"].get("distribution", {}).get("const")
        return str(tag or next(iter(option["properties"])))
    return str(option["const"]) if "const" in option else "number"


def _choices(node: Json) -> list[str]:
    if "enum" in node:
        return [str(value) for value in node["enum"]]
    if "const" in node:
        return [str(node["const"])]
    return [_member(option) for option in node.get("oneOf", ()) if "properties" in option or "const" in option]


def allowed_text(node: Json) -> str:
    """What the JSON Schema `node` allows, in words."""
    options = node.get("oneOf", ())
    if any(option.get("type") == "integer" for option in options):
        return f"a whole number, at least 1, or a distribution of {', '.join(_choices(node))}"
    if any(_member(option) == "number" for option in options):
        return f"a time with its unit, such as 200ms, or a distribution of {', '.join(_choices(node))}"
    if options:
        return ", or ".join(allowed_text(option) for option in options)
    if choices := _choices(node):
        return ", ".join(choices)
    kind = node.get("type")
    if kind in ("integer", "number"):
        words = ["a whole number" if kind == "integer" else "a number"]
        words += [f"{phrase} {node[key]}" for key, phrase in _BOUNDS if key in node and node[key] < LARGEST]
        return ", ".join(words)
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        least = node.get("minItems", 1)
        return "a list with one entry at least" if least < 2 else f"a list with at least {least} entries"
    if "properties" in node:
        return "a mapping with " + ", ".join(node["properties"])
    if kind == "object":
        return node.get("about") or node.get("description") or "a mapping"
    text: str | None = node.get("about") or node.get("description")
    return text if kind == "string" and text else "a text"


def short(value: object) -> object:
    """`value` as an error shows it: long ones are cut."""
    text = repr(value)
    return value if len(text) <= 80 else text[:77] + "..."
