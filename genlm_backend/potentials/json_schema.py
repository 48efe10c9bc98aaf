"""Whether a text is a JSON Schema, and small enough, before llguidance reads it; and what llguidance does not see.

llguidance itself refuses, by name, the keywords and formats that it knows and does not enforce (`not`, `uniqueItems`,
`if`, ...), and `oneOf` whose branches it cannot tell apart. It tells keys apart by how they are spelled, and counts a
key as often as it is written; JSON knows "\\u0061" as "a", and has each key once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from genlm_backend.errors import GrammarTooComplex, InvalidGrammar, UnsupportedGrammar
from genlm_backend.potentials.limits import Limits, check_nesting

_KIND = "JSON Schema"
_RAISE = "lower it, or raise `limits` if you trust the schema's author"


def text_of(schema: Mapping[str, Any] | bool | str) -> str:
    """The schema as JSON text.

    Raises:
        InvalidGrammar: It holds what JSON has not.
        GrammarTooComplex: It nests too deeply.
    """
    if isinstance(schema, str):
        return schema
    try:
        return json.dumps(schema, default=_as_dict)
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:
        raise InvalidGrammar(_KIND, f"it cannot be written as JSON: {error}", "correct it") from None


def _as_dict(part: object) -> dict[Any, Any]:
    if isinstance(part, Mapping):
        return dict(part)
    raise TypeError(f"it holds {part!r:.100}, of type {type(part).__name__}")


def _too_deep() -> GrammarTooComplex:
    return GrammarTooComplex(_KIND, "its parts nest too deeply to be read", "flatten it")


_WITH_COLON = re.compile(r'("(?:[^"\\]|\\.)*+")(\s*:)?')


def spells_keys_plainly(text: bytes) -> bool:
    """Whether no key of a JSON text has an escape that it does not need, and so could be another key in disguise."""
    if b"\\" not in text:
        return True
    keys = [found[1] for found in _WITH_COLON.finditer(text.decode()) if found[2]]
    return all(json.dumps(json.loads(key), ensure_ascii=False) == key for key in keys)


def checked_schema(text: str, limits: Limits) -> dict[str, Any]:
    """The schema as an object, with some formats as patterns.

    Raises:
        InvalidGrammar: It is no JSON object, nor `true`; or its drafts disagree about what it means.
        UnsupportedGrammar: Nothing that satisfies it could be written; or it counts properties that may be repeated.
        GrammarTooComplex: It is too large.
    """
    check_nesting(_KIND, text, limits)
    try:
        return _checked(text, limits)
    except RecursionError:
        raise _too_deep() from None


def _checked(text: str, limits: Limits) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise InvalidGrammar(_KIND, f"it is no JSON: {error}", "correct it") from None
    if schema is True:
        return {}
    if schema is False:
        raise InvalidGrammar(_KIND, "the schema `false` allows no text", "correct it")
    if not isinstance(schema, dict):
        raise InvalidGrammar(_KIND, f"it is a JSON {type(schema).__name__}", "expected an object or a boolean")
    n_squared = sum(_check_object(part, schema, limits) for part in _objects(schema))
    if n_squared > limits.properties**2:
        raise GrammarTooComplex(
            _KIND, f"it has objects of too many properties; one of {limits.properties:,} is the most", _RAISE
        )
    strict: dict[str, Any] = _with_strict_formats(schema)
    return strict


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object that is a schema; all objects, where a reference may make a schema of what is none."""
    everything = list(_dicts(schema))
    if any(_leads_astray(part.get("$ref")) for part in everything):
        yield from everything
        return
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            yield part
            for key, value in part.items():
                if key in _NAMED and isinstance(value, dict):
                    pending.extend(value.values())
                elif key not in _VALUES:
                    pending.append(value)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield part
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)


def _leads_astray(reference: object) -> bool:
    """Whether it may lead into a value, or to a collection of schemas."""
    names = unquote(reference).split("/") if isinstance(reference, str) else [""]
    return names[-1] in _NAMED or not _VALUES.isdisjoint(names)


def _check_object(part: dict[str, Any], schema: dict[str, Any], limits: Limits) -> int:
    """Refuse what drafts read differently, and huge counts; the square of the number of properties."""
    draft = str(schema.get("$schema", "2020-12"))
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(part.get(key), bool) and "draft-04" not in draft:
            raise InvalidGrammar(_KIND, f"{key} is a boolean, as only in draft-04", "name the draft in $schema")
    if isinstance(part.get("items"), list) and "2020-12" in draft:
        raise InvalidGrammar(_KIND, "items is a list, as before draft 2020-12", "name the draft in $schema")
    if "multipleOf" in part and any(_is_below_zero(part.get(key)) for key in ("maximum", "exclusiveMaximum")):
        raise UnsupportedGrammar(_KIND, "multipleOf of numbers below 0", "leave multipleOf out")
    for key in ("minItems", "maxItems", "minProperties", "maxProperties"):
        count = part.get(key)
        if isinstance(count, int | float) and count > limits.repetitions:
            raise GrammarTooComplex(_KIND, f"{key} is {count:,}, more than {limits.repetitions:,}", _RAISE)
    least, required = part.get("minProperties"), part.get("required")
    most = 1 + (len({name for name in required if isinstance(name, str)}) if isinstance(required, list) else 0)
    if isinstance(least, int | float) and least > most:  # a second key could be the first one again
        what = f"minProperties is {least:,}, more than the required properties and one"
        raise UnsupportedGrammar(_KIND, what, f"require properties by name, or lower it to {most}")
    properties = part.get("properties")
    return len(properties) ** 2 if isinstance(properties, dict) else 0


def _is_below_zero(bound: object) -> bool:
    return isinstance(bound, int | float) and not isinstance(bound, bool) and bound < 0


# llguidance's own patterns of these allow 29 February in every year, and the 60th second of every minute.
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_HOUR_AND_MINUTE = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_AND_MINUTE}:[0-5][0-9](?:\.[0-9]+)?(?:[Zz]|[+-]{_HOUR_AND_MINUTE})"
_STRICT = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}[Tt]{_TIME}$"}

_VALUES = frozenset({"enum", "const", "default", "examples", "example"})  # hold values, not schemas
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def _with_strict_formats(schema: Any) -> Any:
    """The schema with the formats of `_STRICT` written as patterns, wherever a schema stands in it."""
    if isinstance(schema, list):
        return [_with_strict_formats(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            strict[key] = {name: _with_strict_formats(part) for name, part in value.items()}
        else:
            strict[key] = value if key in _VALUES else _with_strict_formats(value)
    pattern = _STRICT.get(strict["format"]) if isinstance(strict.get("format"), str) else None
    if pattern is None:
        return strict
    del strict["format"]
    if "pattern" not in strict:
        return {**strict, "pattern": pattern}
    return {**strict, "allOf": [*strict.get("allOf", []), {"pattern": pattern}]}
