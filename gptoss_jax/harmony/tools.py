"""Render function tools as the TypeScript-like text of Harmony's developer message.

The format is that of openai-harmony 0.0.8, because the models were trained on that text. Its
oddities are kept: for example, a nested object's description is between the colon and the brace.
"""

from __future__ import annotations

import json
import math
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import dialects

Schema = Any  # a JSON schema: a dict; any other JSON value is treated as an empty schema


def render_tools(tools: list[dict[str, Any]]) -> str:
    """Return the `# Tools` section for function tools.

    A tool is `{"name", "description"?, "parameters"?}`, an object with that as its "function", or
    another form that `dialects.read_tools` reads. Parameters are a JSON schema. Raises UserError
    that names the tool and the field.
    """
    lines = ["# Tools", "", "## functions", "", "namespace functions {", ""]
    for i, function in enumerate(dialects.read_tools(tools)):
        where = f"tools[{i}]"
        name = function.get("name")
        description = function.get("description") or ""
        parameters = function.get("parameters")
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}.name is missing or no text")
        if not isinstance(description, str):
            raise UserError(f"{where}.description is no text")
        lines += [f"// {line}" for line in _lines(description)]
        argument = "" if parameters is None else f"_: {render_type(parameters, '')}"
        lines += [f"type {name} = ({argument}) => any;", ""]
    lines.append("} // namespace functions")
    return "\n".join(lines)


def render_type(schema: Schema, indent: str) -> str:
    """Return the type that a JSON schema describes; its further lines begin with `indent`."""
    schema = schema if isinstance(schema, dict) else {}
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(f"\n{indent} | {_variant(v, indent)}" for v in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if k == "integer" else k for k in kind if isinstance(k, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        values = schema.get("enum")
        values = values if isinstance(values, list) else []
        return " | ".join(f'"{v}"' for v in values if isinstance(v, str)) or "string"
    if kind == "array":
        return f"{render_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _object(schema: dict[str, Any], indent: str) -> str:
    out = []
    if isinstance(schema.get("description"), str):
        out.append(f"{indent}// {schema['description']}\n")
    out.append("{\n")
    properties = schema.get("properties")
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    for name, value in properties.items() if isinstance(properties, dict) else ():
        mark = "" if name in required else "?"
        out.append(_property(f"{name}{mark}", value if isinstance(value, dict) else {}, indent))
    out.append(f"{indent}}}")
    return "".join(out)


def _property(name: str, schema: dict[str, Any], indent: str) -> str:
    """Return the lines of one property: its comments, then `name: type,`."""
    out = []
    if isinstance(schema.get("title"), str):
        out.append(f"{indent}// {schema['title']}\n{indent}//\n")
    description = schema.get("description")
    if "oneOf" not in schema and isinstance(description, str):
        out.append(f"{indent}// {description}\n")
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        out.append(f"{indent}// Examples:\n")
        out += [f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str)]
    if isinstance(schema.get("oneOf"), list):
        return "".join(out) + _union_property(name, schema, indent)
    default = ""
    if "default" in schema and "oneOf" not in schema:
        default = f" // {_default(schema)}"
    out.append(f"{indent}{name}: {_nullable(schema, f'{indent}    ')},{default}\n")
    return "".join(out)


def _union_property(name: str, schema: dict[str, Any], indent: str) -> str:
    """Return a property that is one of several types; each type has its own line and comment."""
    variants: list[Schema] = schema["oneOf"]
    description = schema.get("description")
    description = description if isinstance(description, str) else None
    first = variants[0] if variants and isinstance(variants[0], dict) else {}
    above = description is not None and first.get("description") != description
    out = [f"{indent}// {description}\n"] if above else []
    if "default" in schema:
        out.append(f"{indent}// {_default(schema)}\n")
    out.append(f"{indent}{name}:\n")
    for i, variant in enumerate(variants):
        fields = variant if isinstance(variant, dict) else {}
        comments = []
        own = fields.get("description")
        # The property's description replaces that of the first variant.
        if isinstance(own, str) and own != description and not (i == 0 and above):
            comments.append(own)
        if "default" in fields:
            comments.append(_default(fields))
        comment = f" // {' '.join(comments)}" if comments else ""
        out.append(f"{indent} | {_nullable(variant, f'{indent}   ')}{comment}\n")
    out.append(f"{indent},\n")
    return "".join(out)


def _variant(variant: Schema, indent: str) -> str:
    """Return one type of a union that is not a property, with its comment."""
    fields = variant if isinstance(variant, dict) else {}
    comments = []
    if isinstance(fields.get("description"), str):
        comments.append(fields["description"])
    if "default" in fields:
        default = fields["default"]
        # Here, unlike in a property, the default of an enum is also in quotes.
        quoted = isinstance(default, str) and _is_enum(fields)
        comments.append(f"default: {_json(default)}" if quoted else _default(fields))
    comment = f" // {' '.join(comments)}" if comments else ""
    return f"{_nullable(variant, f'{indent}   ')}{comment}"


def _nullable(schema: Schema, indent: str) -> str:
    text = render_type(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _is_enum(schema: dict[str, Any]) -> bool:
    values = schema.get("enum")
    return isinstance(values, list) and bool(values)


def _default(schema: dict[str, Any]) -> str:
    default = schema["default"]
    if not isinstance(default, str):
        return f"default: {_json(default)}"
    return f"default: {default}" if _is_enum(schema) else f'default: "{default}"'


def _json(value: Any) -> str:
    """Return a JSON value without spaces, with numbers as Rust's serde_json writes them.

    serde_json may misread the last digit of a number of more than 15 digits. We do not imitate it.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json(str(k))}:{_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return str(value)
    return _float(float(value))


def _float(value: float) -> str:
    if not math.isfinite(value):
        return "null"
    mantissa, _, exponent = repr(value).partition("e")
    if not exponent:
        return mantissa
    if int(exponent) == -5:  # the only exponent that Python writes and serde_json does not
        sign, digits = ("-", mantissa[1:]) if value < 0 else ("", mantissa)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{mantissa}e{int(exponent)}"


def _lines(text: str) -> list[str]:
    """Split at line feeds only; remove a carriage return before a line feed."""
    *whole, last = text.split("\n")
    return [line.removesuffix("\r") for line in whole] + ([last] if last else [])
