"""`python -m api.typed > api/client/types.py`: the types of the client, out of the OpenAPI document."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from textwrap import indent
from typing import Any

from api.document import document

_HEAD = '''"""What the API takes and answers, as JSON. Made by `python -m api.typed`; do not edit."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict
'''
_PLAIN = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}


def types_text() -> str:
    """The module, as it is committed."""
    schemas = document()["components"]["schemas"]
    return "".join([_HEAD, *(part for name, schema in schemas.items() for part in _declared(name, schema))])


def _declared(name: str, schema: dict[str, Any]) -> Iterator[str]:
    if "enum" in schema:
        values = "".join(f"    {json.dumps(value)},\n" for value in schema["enum"])
        yield f"\n\n{name} = Literal[\n{values}]\n"
        return
    yield f"\n\nclass {name}(TypedDict):\n"
    said = schema["description"] + "\n" * ("\n" in schema["description"])
    yield indent(f'"""{said}"""\n\n', "    ")
    for field, of in schema["properties"].items():
        kind = _type(of)
        yield f"    {field}: {kind if field in schema.get('required', ()) else f'NotRequired[{kind}]'}\n"


def _type(schema: dict[str, Any]) -> str:
    """The type of a value, as Python writes it."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return f"Literal[{', '.join(map(_literal, values))}]"
    for each in ("anyOf", "oneOf"):
        if each in schema:
            return " | ".join(_type(kind) for kind in schema[each])
    match schema.get("type"):
        case "array":
            return f"list[{_type(schema['items'])}]"
        case "object":
            values = schema.get("additionalProperties", True)
            return f"dict[str, {'Any' if values is True else _type(values)}]"
        case None:
            return "Any"
        case plain:
            return _PLAIN[plain]


def _literal(value: str | bool | int) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    sys.stdout.write(types_text())
