"""Read the parameters of a tool: a JSON schema, in the forms that data sets have.

A parameter that a schema names and that its rendering would leave out is a loss without a word. So
what is clear becomes the standard form, {"type": "object", "properties": {...}}, and the rest is
refused by its name.
"""

from __future__ import annotations

import json
from typing import Any

from gptoss_jax.errors import UserError

Schema = dict[str, Any]

_VALUES = ("default", "const", "enum", "examples", "example")  # keys that hold values
_NAMED = "properties"  # the key that holds schemas by name
_UNIONS = ("oneOf", "anyOf", "allOf")
# Keys of a schema whose value may be an object.
_HOLDERS = frozenset(
    [
        *(*_VALUES, *_UNIONS, _NAMED, "items", "prefixItems", "contains", "not", "if", "then"),
        *("else", "additionalProperties", "additionalItems", "unevaluatedProperties", "xml"),
        *("unevaluatedItems", "propertyNames", "patternProperties", "dependentSchemas", "$defs"),
        *("dependencies", "dependentRequired", "definitions", "discriminator", "externalDocs"),
    ]
)
# Keys whose value may be text that is the name of a type by chance.
_WORDS = frozenset({"type", "title", "description", "format", "pattern", "nullable", *_VALUES})
# What may stand beside parameters that are given by name.
_BESIDE = ("title", "description", "required", "additionalProperties", "strict")
_TYPES = {
    **{name: name for name in ("object", "number", "integer", "string", "boolean", "array")},
    "null": "null",
    "dict": "object",
    "float": "number",
    "double": "number",
    "int": "integer",
    "long": "integer",
    "str": "string",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
}


def read_parameters(value: Any, where: str) -> Schema:
    """Return the parameters of a tool as a JSON schema that `tools.render_type` renders.

    `value` is a schema, also as JSON text, or parameters by name: {"city": {"type": "string"}}.
    `where` is its place, for errors.

    Raises:
        UserError: it is no schema, or it names a parameter where a schema has none.
    """
    schema = from_json(value, where)
    if not isinstance(schema, dict):
        raise UserError(f"{where} is no JSON schema")
    schema = _without_nulls(schema)
    standard = {_NAMED, *_UNIONS, "$ref"} & schema.keys()
    if schema and not standard and not isinstance(schema.get("type"), str | list):
        return _by_name(schema, where)
    return _read(schema, where)


def _by_name(schema: Schema, where: str) -> Schema:
    """Read {"city": {"type": "string"}, ...}: parameters by name, without `properties`."""
    properties, needed = {}, []
    beside = {
        k: v
        for k, v in schema.items()
        if not isinstance(v, dict) and (k in _BESIDE or k.startswith("$"))
    }
    named = {k: v for k, v in schema.items() if k not in beside}
    if not named:  # perhaps descriptions of parameters called so
        named = {k: beside[k] for k in ("title", "description") if k in beside}
    for name, value in named.items():
        if not isinstance(value, dict) or not _is_schema(value):
            raise UserError(
                f"{where}.{name} is no JSON schema: parameters have a type and properties"
            )
        value, kind_of = dict(value), value.get("type")
        own = value.pop("required", None) if isinstance(value.get("required"), bool) else None
        if isinstance(kind_of, str) and "," in kind_of:  # "str, optional"
            value["type"], *more = (word.strip() for word in kind_of.split(","))
            own = False if "optional" in more else own
        properties[name] = _read(value, f"{where}.{name}")
        if own if own is not None else "default" not in value:
            needed.append(name)
    if not properties:
        return schema
    required = beside["required"] if isinstance(beside.get("required"), list) else needed
    return {**beside, "type": "object", "properties": properties, "required": required}


def _read(schema: Any, where: str) -> Any:
    """Return a schema, and all schemas in it, with standard types and with `properties` by name."""
    if not isinstance(schema, dict):
        return schema
    read = dict(schema)
    if _NAMED in read:
        _read_properties(read, f"{where}.{_NAMED}")
        read.setdefault("type", "object")
    kinds = read.get("type")
    if isinstance(kinds, str | list):
        read["type"] = [*map(_standard, kinds)] if isinstance(kinds, list) else _standard(kinds)
    if "items" in read:
        read["items"] = _read(read["items"], f"{where}.items")
    for name in _UNIONS:
        if isinstance(read.get(name), list):
            read[name] = [_read(v, f"{where}.{name}[{i}]") for i, v in enumerate(read[name])]
    empty = read.get("type", "object") == "object" and not read.get(_NAMED)
    for name, value in read.items():
        if name.startswith("x-"):
            continue
        named = isinstance(value, dict) and name not in _HOLDERS and _holds_schema(value)
        typed = empty and isinstance(value, str) and name not in _WORDS and value.lower() in _TYPES
        if named or typed:
            raise UserError(
                f"{where} has {name!r} beside its type: put the parameters under properties"
            )
    return read


def _read_properties(schema: Schema, where: str) -> None:
    """Read the `properties` of a schema, in place: by name, as a list, or either as JSON text."""
    properties = from_json(schema[_NAMED], where)
    if isinstance(properties, list):
        named = {}
        for i, item in enumerate(properties):
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                raise UserError(f"{where}[{i}] is no JSON schema with a name")
            item = dict(item)
            if isinstance(item.get("required"), bool) and item.pop("required"):
                schema["required"] = [*(schema.get("required") or []), item["name"]]
            named[item.pop("name")] = item
        properties = named
    if not isinstance(properties, dict):
        raise UserError(f"{where} is neither an object nor a list of parameters")
    for name, value in properties.items():
        if not isinstance(value, dict | bool):
            raise UserError(f'{where}.{name} is no JSON schema: give {{"type": ...}}')
    schema[_NAMED] = {k: _read(v, f"{where}.{k}") for k, v in properties.items()}


def _standard(name: Any) -> Any:
    """Return the standard name of a type: of "STRING" (Gemini's) and "str", "string"."""
    return _TYPES.get(name.lower(), name) if isinstance(name, str) else name


def _is_schema(value: Schema) -> bool:
    says = {"type", "description", "enum", "properties", "items", "oneOf", "anyOf"}
    return bool(says & set(value))


def _holds_schema(value: Schema) -> bool:
    inner = (item for item in value.values() if isinstance(item, dict))
    return _is_schema(value) or any(map(_is_schema, inner))


def _without_nulls(schema: Any) -> Any:
    """Drop keys of a schema, and of the schemas in it, whose value is null.

    A default may be null, and is rendered so. But a table gives every schema the keys of all other
    ones, so where another key is null, a null default says nothing.
    """
    keep = ("const",) if _has_null(schema) else ("const", "default")

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {k: v for k, v in value.items() if v is not None or k in keep}
        of = dict.fromkeys(_VALUES, lambda v: v) | {_NAMED: named}
        return {k: of.get(k, clean)(v) for k, v in kept.items()}

    def named(schemas: Any) -> Any:
        if not isinstance(schemas, dict):
            return schemas
        return {name: clean(one) for name, one in schemas.items() if one is not None}

    return clean(schema)


def _has_null(schema: Any) -> bool:
    """Say whether a key of a schema, or of a schema in it, is null, apart from values."""
    if isinstance(schema, list):
        return any(map(_has_null, schema))
    if not isinstance(schema, dict):
        return False
    inner = (v for k, v in schema.items() if k not in (*_VALUES, _NAMED))
    named = schema.get(_NAMED)
    values = named.values() if isinstance(named, dict) else ()
    return any(value is None or _has_null(value) for value in (*inner, *values))


def from_json(value: Any, where: str) -> Any:
    """Return what a JSON text holds, None for an empty text, and any other value as it is.

    Raises:
        UserError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is text, and not JSON ({error})") from None
