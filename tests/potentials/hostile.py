"""Grammars and schemas written to hurt: each is refused by name, or finishes, within bounds of time and memory."""

from __future__ import annotations

import json
from typing import Any


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def nested_text(depth: int) -> str:
    return '{"type":"array","items":' * depth + '{"type":"integer"}' + "}" * depth


def ladder(n: int) -> dict[str, Any]:
    """Each definition refers to the next one twice."""
    defs = {
        f"a{i}": {
            "type": "object",
            "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}, "y": {"$ref": f"#/$defs/a{i + 1}"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        }
        for i in range(n)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**defs, f"a{n}": {"type": "integer"}}}


STRING = {"type": "string"}
HOSTILE: dict[str, tuple[str, str]] = {
    "nested quantifiers": ("regex", "(((((((a*)*)*)*)*)*)*)*b"),
    "nested plus": ("regex", "(a+)+" * 30 + "$"),
    "huge repeat": ("regex", "a{1000000}"),
    "repeat of repeat": ("regex", "((a{1000}){1000}){1000}"),
    "optional then same": ("regex", "a?" * 5000 + "a" * 5000),
    "n-th from the end": ("regex", "[ab]*a[ab]{25}"),
    "several from the end": ("regex", "(.*a.{20})(.*b.{20})(.*c.{20})"),
    "deep parentheses": ("regex", "(" * 10_000 + "a" + ")" * 10_000),
    "unicode classes": ("regex", r"(\p{L}{1,200}\p{N}{1,200}){1,50}"),
    "wide alternation": ("regex", "|".join(f"{i:x}.*{i:o}" for i in range(3000))),
    "10,000 deep schema": ("json", nested_text(10_000)),
    "90 deep schema": ("json", nested_text(45)),
    "ladder of references": ("json", json.dumps(ladder(60))),
    "reference to itself": ("json", json.dumps({"$ref": "#"})),
    "infinite object": (
        "json",
        json.dumps(
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
        ),
    ),
    "huge maxItems": ("json", json.dumps({"type": "array", "items": STRING, "minItems": 10**9})),
    "huge maxLength": ("json", json.dumps({"type": "string", "minLength": 10**9, "maxLength": 10**9})),
    "pattern in schema": ("json", json.dumps({"type": "string", "pattern": "^([a-z]{1,1000}){1,1000}$"})),
    "20,000 optional properties": (
        "json",
        json.dumps(
            {"type": "object", "properties": {f"p{i}": STRING for i in range(20_000)}, "additionalProperties": False}
        ),
    ),
    "product of allOf and anyOf": (
        "json",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": STRING}} for j in range(8)]} for i in range(12)]}),
    ),
    "huge enum": ("json", json.dumps({"enum": [f"value number {i}" for i in range(200_000)]})),
    "left recursion": ("lark", 'start: a\na: a a | "x" |\n'),
    "ambiguous": ("lark", 'start: e\ne: e e e e | e e e | e e | "a"\n'),
    "doubling rules": ("lark", "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(40)) + 'a40: "x"\n'),
    "doubling terminals": (
        "lark",
        "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"\n',
    ),
    "terminal of itself": ("lark", 'start: A\nA: "x" A\n'),
    "huge repetition": ("lark", 'start: "a"~1000000\n'),
    "repetition of repetition": ("lark", "start: (((A~100)~100)~100)~100\nA: /a/\n"),
    "deep groups": ("lark", "start: " + "(" * 10_000 + '"a"' + ")" * 10_000 + "\n"),
    "no end": ("lark", 'start: "a" start\n'),
    "long rule": ("lark", "start: " + ' "a"' * 200_000 + "\n"),
}
