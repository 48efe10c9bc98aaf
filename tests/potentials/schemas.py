"""200 JSON Schemas of the shapes that are published: written out below, and assembled from parts with a fixed seed."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}


def record(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def array(items: Schema, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


POINT = record(["type", "coordinates"], type={"const": "Point"}, coordinates=array({"type": "number"}, 2, 3))
ADDRESS = record(
    ["street", "city", "zip"],
    street=STRING,
    city={"type": "string", "minLength": 2, "maxLength": 20},
    zip={"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"},
    country={"enum": ["CA", "FR", "KE", "IN"]},
)
WRITTEN: list[Schema] = [
    {"$ref": "#/$defs/address", "$defs": {"address": ADDRESS}},
    record(
        ["name", "version"],
        name={"type": "string", "pattern": "^[a-z][a-z0-9-]{0,20}$"},
        version={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        private={"type": "boolean"},
        scripts={"type": "object", "additionalProperties": STRING, "maxProperties": 2},
        keywords=array(STRING),
        license={"enum": ["MIT", "Apache-2.0", None]},
    ),
    record(
        ["type", "geometry", "properties"],
        type={"const": "Feature"},
        geometry={"oneOf": [POINT, {"type": "null"}]},
        properties={"type": ["object", "null"], "maxProperties": 2, "additionalProperties": {"type": "number"}},
        bbox=array({"type": "number", "minimum": -180, "maximum": 180}, 4, 4),
    ),
    record(
        ["id", "lines", "issued", "currency"],
        id={"type": "string", "format": "uuid"},
        issued={"type": "string", "format": "date"},
        due={"type": "string", "format": "date-time"},
        currency={"type": "string", "pattern": "^[A-Z]{3}$"},
        lines=array(
            record(
                ["item", "quantity", "price"],
                item=STRING,
                quantity={"type": "integer", "minimum": 1, "maximum": 999},
                price={"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.01},
            ),
            1,
            3,
        ),
    ),
    {
        "$ref": "#/$defs/node",
        "$defs": {"node": record(["value"], value=INTEGER, children=array({"$ref": "#/$defs/node"}, 0, 2))},
    },
    {
        "$defs": {
            "expression": {
                "anyOf": [
                    {"type": "number"},
                    record(
                        ["op", "args"], op={"enum": ["+", "-", "*"]}, args=array({"$ref": "#/$defs/expression"}, 1, 2)
                    ),
                ]
            }
        },
        "$ref": "#/$defs/expression",
    },
    record(
        ["function", "arguments"],
        function={"enum": ["search", "open", "close"]},
        arguments={
            "type": "object",
            "patternProperties": {"^x-": STRING},
            "additionalProperties": False,
            "maxProperties": 2,
        },
    ),
    {
        "oneOf": [
            record(["kind", "radius"], kind={"const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0}),
            record(["kind", "side"], kind={"const": "square"}, side={"type": "number", "exclusiveMinimum": 0}),
            record(["kind", "sides"], kind={"const": "polygon"}, sides=array({"type": "number"}, 3, 4)),
        ]
    },
    {
        "type": "object",
        "properties": {"level": {"enum": ["debug", "info", "error"]}, "message": STRING},
        "required": ["level", "message", "time"],
        "additionalProperties": {"type": ["string", "integer", "boolean"]},
        "maxProperties": 4,
    },
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [STRING, INTEGER],
        "additionalItems": False,
    },
    {"type": "array", "prefixItems": [{"const": "move"}, INTEGER, INTEGER], "items": False, "minItems": 3},
    {"$schema": "http://json-schema.org/draft-04/schema#", "type": "number", "minimum": 0, "exclusiveMinimum": True},
    {
        "allOf": [
            {"type": "object", "properties": {"a": STRING}, "required": ["a"], "maxProperties": 3},
            {"properties": {"b": INTEGER}, "required": ["b"]},
        ]
    },
    record(
        ["host", "port"],
        host={"type": "string", "format": "hostname"},
        port={"type": "integer", "minimum": 1, "maximum": 65535},
        ip={"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
    ),
    record(["every"], every={"type": "string", "format": "duration"}, at={"type": "string", "format": "time"}),
    record(["email"], email={"type": "string", "format": "email"}, site={"type": "string", "format": "uri"}),
    {"enum": ["a", 1, None, True, {"k": [1, "x"]}, [], 2.5, 'quo"te', "new\nline", "é"]},
    {"const": {"nested": {"list": [1, 2, {"deep": None}]}}},
    {"type": ["string", "null"], "maxLength": 5},
    {},
]


def assembled(rng: random.Random) -> Schema:
    """One more schema: objects, arrays, enums, bounded numbers, formats, references and unions, a few levels deep."""
    schema = part(rng, 3)
    if rng.random() < 0.4:
        name = rng.choice(["item", "thing", "entry"])
        schema = {
            "$defs": {name: part(rng, 1)},
            **record(
                ["first"], first={"$ref": f"#/$defs/{name}"}, more=array({"$ref": f"#/$defs/{name}"}), rest=schema
            ),
        }
    return schema


def part(rng: random.Random, depth: int) -> Schema:
    leaves = [number, text, formatted, chosen, patterned]
    branches = [thing, listing, union, mapping]
    return rng.choice(leaves + branches * 2 if depth else leaves)(rng, depth - 1)


def number(rng: random.Random, depth: int) -> Schema:
    low, width = rng.randint(-1000, 1000), rng.choice([0, 1, 7, 100, 12345])
    kind = rng.choice(["integer", "number"])
    bounds = rng.choice(
        [["minimum"], ["maximum"], ["minimum", "maximum"], ["exclusiveMinimum", "exclusiveMaximum"], []]
    )
    schema: Schema = {"type": kind}
    for bound in bounds:
        schema[bound] = low if bound.endswith("inimum") else low + width + 2
        if kind == "number":
            schema[bound] += rng.choice([0, 0.5, 0.125])
    if kind == "integer" and low > 0 and rng.random() < 0.4:
        schema["multipleOf"] = rng.choice([1, 2, 3])
        schema.pop("exclusiveMinimum", None)
        schema.pop("exclusiveMaximum", None)
        if "minimum" in schema and "maximum" in schema:
            schema["maximum"] += 3
    return schema


def text(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 4)
    return {
        "type": "string",
        **rng.choice([{}, {"minLength": low}, {"maxLength": low}, {"minLength": low, "maxLength": low + 5}]),
    }


def formatted(rng: random.Random, depth: int) -> Schema:
    formats = ["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri"]
    return {"type": "string", "format": rng.choice(formats)}


def patterned(rng: random.Random, depth: int) -> Schema:
    patterns = [
        "^[A-Z]{2,3}-[0-9]{1,4}$",
        "^(yes|no)$",
        "^#[0-9a-f]{6}$",
        r"^\+?[0-9 ]{3,12}$",
        "[aeiou]",
        r"^\S+@\S+$",
    ]
    return {"type": "string", "pattern": rng.choice(patterns)}


def chosen(rng: random.Random, depth: int) -> Schema:
    values = ["red", "green", "light blue", 1, 2.5, None, False, "", [1], {"a": 1}, 'a"b', "\\"]
    return {"enum": rng.sample(values, rng.randint(1, 5))} if rng.random() < 0.8 else {"const": rng.choice(values)}


def thing(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(
        ["id", "name", "first name", "größe", "a/b", "tags", "x-1", "value", "$ref-like", "format"], rng.randint(1, 4)
    )
    schema: Schema = {
        "type": "object",
        "title": "A thing",
        "description": "With a description",
        "properties": {name: part(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
    }
    extra = rng.choice([False, False, {"type": "boolean"}, True])
    schema["additionalProperties"] = extra
    if extra:
        schema["maxProperties"] = len(names) + 1
        schema["required"] = names  # the engine counts properties only where all named ones are required
    return schema


def listing(rng: random.Random, depth: int) -> Schema:
    low = rng.randint(0, 2)
    return array(part(rng, depth), low, low + rng.randint(0, 2))


def mapping(rng: random.Random, depth: int) -> Schema:
    values = part(rng, depth)
    if rng.random() < 0.5:
        return {
            "type": "object",
            "additionalProperties": values,
            "minProperties": rng.randint(0, 1),
            "maxProperties": 2,
        }
    return {
        "type": "object",
        "patternProperties": {"^[a-z]{1,5}$": values},
        "additionalProperties": False,
        "maxProperties": 2,
    }


def union(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.5:
        return {"anyOf": [part(rng, depth) for _ in range(rng.randint(2, 3))]}
    branches = [text(rng, depth), number(rng, depth), {"type": "null"}, listing(rng, depth), thing(rng, depth)]
    return {"oneOf": rng.sample(branches, rng.randint(2, 4))}


def corpus(n: int) -> list[Schema]:
    """The written ones, then assembled ones that are all different."""
    found = {json.dumps(schema): schema for schema in WRITTEN}
    for seed in itertools.count():
        if len(found) == n:
            return list(found.values())
        schema = assembled(random.Random(seed))
        found.setdefault(json.dumps(schema), schema)
    raise AssertionError


ALL = corpus(200)
