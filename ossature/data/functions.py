"""Tools in the instructions of harmony: JSON schemas as types of TypeScript.

The chat template and openai-harmony write the same of plain arguments, and differ in what is
nested, has alternatives or defaults.  Both are followed with their odd line breaks; tests compare
random schemas with what these two give.

Source: openai/gpt-oss-20b `chat_template.jinja`; openai/harmony `src/encoding.rs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Style = Literal["template", "openai"]
Schema = dict[str, Any]
NAMES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def functions(tools: Sequence[dict[str, Any]], style: Style) -> str:
    """The namespace of functions."""
    lines = ["## functions", "", "namespace functions {", ""]
    for tool in tools:
        description = tool.get("description") or ""
        if style == "template":
            lines.append(f"// {description}")
            argument = _arguments(tool.get("parameters") or {})
        else:
            lines += [f"// {line}" for line in description.splitlines()]
            argument = f"_: {_type(tool['parameters'], '')}" if tool.get("parameters") else ""
        lines += [f"type {tool['name']} = ({argument}) => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# As the template writes it.


def _arguments(parameters: Schema) -> str:
    lines = []
    required = parameters.get("required") or []
    for name, spec in (parameters.get("properties") or {}).items():
        if spec.get("description"):
            lines.append(f"// {spec['description']}")
        optional = "" if name in required else "?"
        lines.append(f"{name}{optional}: {_template_type(spec)}{_template_default(spec)},")
    return "\n".join(["_: {", *lines, "}"]) if lines else ""


def _template_default(spec: Schema) -> str:
    """The default; the comma after it is in the comment."""
    if "default" not in spec:
        return ""
    if spec.get("enum"):
        return f", // default: {spec['default']}"
    if spec.get("oneOf"):
        return f"// default: {spec['default']}"
    return f", // default: {_json(spec['default'])}"


def _template_type(spec: Schema) -> str:
    kind = spec.get("type")
    null = " | null" if spec.get("nullable") else ""
    if kind == "array":
        items = spec.get("items")
        if not items:
            return "any[]" + null
        named = items.get("type")
        inner = NAMES.get(named, "") if isinstance(named, str) else ""
        inner = inner or _template_type(items)
        too_long = inner == "object | object" or len(inner) > 50
        return ("any[]" if too_long else f"{inner}[]") + null
    if isinstance(kind, list) and kind:
        return " | ".join(kind)
    if spec.get("oneOf"):
        # It means to write "any" where one of several is an object, and never does: what Jinja sets
        # inside a loop is forgotten after it.
        return " | \n".join(_template_variant(variant) for variant in spec["oneOf"])
    if kind == "string":
        if spec.get("enum"):
            return " | ".join(f'"{value}"' for value in spec["enum"])
        return "string" + null
    if isinstance(kind, str) and kind in NAMES:
        return NAMES[kind]
    if kind == "object":
        if not spec.get("properties"):
            return "object"
        required = spec.get("required") or []
        parts = [
            f"{name}{'' if name in required else '?'}: \n{' ' * 16}{_template_type(inner)}"
            for name, inner in spec["properties"].items()
        ]
        return "{\n" + ", ".join(parts) + "}"
    return "any"


def _template_variant(variant: Schema) -> str:
    written = _template_type(variant)
    if variant.get("description"):
        written += f"// {variant['description']}"
    if "default" in variant:
        written += f"{' ' * 20}// default: {_json(variant['default'])}"
    return written


# As openai-harmony writes it.


def _type(spec: Schema, indent: str) -> str:
    kind = spec.get("type")
    if isinstance(spec.get("oneOf"), list):
        variants = [_variant(variant, indent, None) for variant in spec["oneOf"]]
        return "".join(f"\n{indent} | {variant}" for variant in variants)
    if isinstance(kind, list) and kind:
        return " | ".join("number" if name == "integer" else name for name in kind)
    if kind == "object":
        head = f"{indent}// {spec['description']}\n" if "description" in spec else ""
        required = spec.get("required") or []
        properties = (spec.get("properties") or {}).items()
        lines = [
            line
            for name, inner in properties
            for line in _property(name + ("" if name in required else "?"), inner, indent)
        ]
        return head + "{\n" + "".join(f"{line}\n" for line in lines) + f"{indent}}}"
    if kind == "string" and spec.get("enum"):
        return " | ".join(f'"{value}"' for value in spec["enum"] if isinstance(value, str))
    if kind == "array":
        return f"{_type(spec['items'], indent)}[]" if "items" in spec else "Array<any>"
    return NAMES.get(kind, "any") if isinstance(kind, str) else "any"


def _property(name: str, spec: Schema, indent: str) -> Iterator[str]:
    """Lines of one property, with its comments."""
    description = spec.get("description")
    if "title" in spec:
        yield f"{indent}// {spec['title']}"
        yield f"{indent}//"
    if "oneOf" not in spec and description is not None:
        yield f"{indent}// {description}"
    if spec.get("examples"):
        yield f"{indent}// Examples:"
        for example in spec["examples"]:
            if isinstance(example, str):
                yield f'{indent}// - "{example}"'
    if isinstance(spec.get("oneOf"), list):
        yield from _alternatives(name, spec, indent)
        return
    written = _nullable(_type(spec, f"{indent}    "), spec)
    yield f"{indent}{name}: {written},{_default(spec, ' // ') if 'oneOf' not in spec else ''}"


def _alternatives(name: str, spec: Schema, indent: str) -> Iterator[str]:
    """Lines of a property that is one of several types."""
    variants, description = spec["oneOf"], spec.get("description")
    above = description is not None and (
        not variants or variants[0].get("description") != description
    )
    if above:
        yield f"{indent}// {description}"
    if "default" in spec:
        yield _default(spec, f"{indent}// ")
    yield f"{indent}{name}:"
    for n, variant in enumerate(variants):
        said = variant.get("description") if n == 0 and above else description
        yield f"{indent} | {_variant(variant, indent, said)}"
    yield f"{indent},"


def _variant(variant: Schema, indent: str, said: str | None) -> str:
    """A type and, after it, its description, unless that was said, and default."""
    written = _nullable(_type(variant, f"{indent}   "), variant)
    description = variant.get("description")
    notes = [description] if description is not None and description != said else []
    notes += [_default(variant, "")] if "default" in variant else []
    return f"{written} // {' '.join(notes)}" if notes else written


def _nullable(written: str, spec: Schema) -> str:
    return f"{written} | null" if spec.get("nullable") and "null" not in written else written


def _default(spec: Schema, before: str) -> str:
    if "default" not in spec:
        return ""
    value = spec["default"]
    plain = isinstance(value, str) and spec.get("enum")
    return f"{before}default: {value if plain else _json(value)}"
