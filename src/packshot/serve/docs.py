"""The page at ``/docs``: the OpenAPI schema as HTML, without scripts and without anything from another server."""

from __future__ import annotations

import html

from packshot.serve.schemas import Json

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
th, td { border: 1px solid #8888; padding: .3rem .5rem; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, monospace; } pre { overflow-x: auto; border: 1px solid #8888; padding: .6rem; }
"""
EXAMPLE = """curl -f ADDRESS/generate -H "Authorization: Bearer KEY" -H "Accept: image/png" \\
  -F product_file=@product.png -F surface="a white marble table" -o picture.png"""


def without_null(schema: Json) -> None:
    """Take ``null`` out of the alternatives of a form's fields, in place: a form has no way to send it."""
    for field in schema.get("properties", {}).values():
        choices = [choice for choice in field.get("anyOf", []) if choice != {"type": "null"}]
        if len(choices) == 1:
            del field["anyOf"]
            field.update(choices[0])


def clean_schema(schema: Json) -> Json:
    """The published schema, with forms as they can be sent."""
    for name, component in schema["components"]["schemas"].items():
        if name.endswith("Form"):
            without_null(component)
    return schema


def resolve(part: Json, schema: Json) -> Json:
    """A part of the schema, or what it refers to."""
    if "$ref" not in part:
        return part
    return schema["components"]["schemas"][part["$ref"].rsplit("/", 1)[1]]


def kind_of(field: Json) -> str:
    """The type of a field in words, with its range."""
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    name = field.get("type", "")
    if field.get("format") == "binary" or "contentMediaType" in field:
        name = "file"
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
    if name == "array":
        name = f"list of {kind_of(field['items'])}"
    words = {"minimum": "from", "maximum": "to", "exclusiveMaximum": "below", "maxLength": "up to"}
    limits = [f"{word} {field[key]}" for key, word in words.items() if key in field]
    unit = " characters" if "maxLength" in field else ""
    return " ".join([name, *limits]) + unit


def row(cells: list[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def fields_table(form: Json) -> str:
    """The fields of a form or an answer."""
    required = form.get("required", [])
    rows = [row(["field", "type", "meaning"], "th")]
    for name, field in form.get("properties", {}).items():
        marked = f"{name} (required)" if name in required else name
        rows.append(row([marked, kind_of(field), field.get("description", "")]))
    return "<table>" + "".join(rows) + "</table>"


def endpoint(method: str, path: str, operation: Json, schema: Json) -> str:
    """One endpoint: what it is for, its form, its answer."""
    key = " · needs a key" if operation.get("security") else ""
    parts = [f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"]
    parts.append(f"<p>{html.escape(operation.get('description', operation.get('summary', '')))}{key}</p>")
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>Request, {html.escape(media)}</h3>" + fields_table(resolve(content["schema"], schema)))
    for status, answer in operation.get("responses", {}).items():
        for media, content in answer.get("content", {}).items():
            name = "Errors" if status == "default" else f"Answer {status}"
            parts.append(f"<h3>{html.escape(name)}, {html.escape(media)}</h3>")
            body = resolve(content.get("schema", {}), schema)
            if body.get("properties"):
                parts.append(fields_table(body))
    return "".join(parts)


def docs_page(schema: Json) -> str:
    """The whole page."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>Packshot API</title><style>{STYLE}</style></head><body><main>",
        f"<h1>Packshot API {html.escape(schema['info']['version'])}</h1>",
        '<p>For client generators: <a href="openapi.json">openapi.json</a>. <a href="./">The page</a> draws pictures ',
        "with this API. Keys are sent as <code>Authorization: Bearer KEY</code>.</p>",
        f"<pre>{html.escape(EXAMPLE)}</pre>",
    ]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(endpoint(method, path, operation, schema))
    return "".join([*parts, "</main></body></html>"])
