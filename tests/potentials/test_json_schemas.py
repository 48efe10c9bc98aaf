"""Everything written under a JSON Schema is valid for it, says the jsonschema package; the rest is refused by name."""

from __future__ import annotations

import json
import types
from typing import Any

import jsonschema
import pytest
from transformers import PreTrainedTokenizerFast

from genlm_backend.errors import GrammarTooComplex, InvalidGrammar, UnsupportedGrammar
from genlm_backend.potentials import Grammar, GrammarVocabulary, Limits
from genlm_backend.testing import check_potential
from genlm_backend.tokenization import decode_vocab
from tests.potentials import schemas
from tests.potentials.sampling_texts import RandomWriter

pytestmark = pytest.mark.thorough

TEXTS_EACH = 3


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer_512: PreTrainedTokenizerFast) -> GrammarVocabulary:
    return GrammarVocabulary(decode_vocab(tiny_tokenizer_512)[0])


def validator_of(schema: Any) -> Any:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def test_there_are_200_different_schemas() -> None:
    assert len({json.dumps(schema) for schema in schemas.ALL}) == 200


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_everything_written_is_valid(vocabulary: GrammarVocabulary, first: int) -> None:
    n_unfinished = 0
    for number in range(first, first + 20):
        schema = schemas.ALL[number]
        validator = validator_of(schema)
        grammar = Grammar.json_schema(vocabulary, schema)
        writer = RandomWriter(vocabulary.byte_vocab, seed=number)
        for _ in range(TEXTS_EACH):
            text = writer.write(grammar)
            n_unfinished += text is None
            if text is not None:
                wrong = [error.message for error in validator.iter_errors(json.loads(text))]
                assert not wrong, f"schema {number} {json.dumps(schema)}: {text!r}: {wrong}"
    assert n_unfinished <= 2, f"{n_unfinished} of {20 * TEXTS_EACH} texts came to no end"


def test_a_text_that_is_not_valid_is_not_allowed(vocabulary: GrammarVocabulary) -> None:
    """The other way round, on one schema: what the grammar reads and what the validator accepts are the same."""
    schema = schemas.ADDRESS
    grammar, validator = Grammar.json_schema(vocabulary, schema), validator_of(schema)
    encode = vocabulary.words
    good = {"street": "1 Main", "city": "Oz", "zip": "12345"}
    for change, is_valid in [
        ({}, True),
        ({"zip": "12345-6789", "country": "KE"}, True),
        ({"zip": "1234"}, False),
        ({"country": "XX"}, False),
        ({"city": "O"}, False),
        ({"more": 1}, False),
    ]:
        value = {**good, **change}
        assert validator.is_valid(value) == is_valid
        assert grammar.is_complete(grammar.state_of(encode(json.dumps(value).encode()))) == is_valid


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, "dependentSchemas"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "array", "contains": {"type": "integer"}}, "contains"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "format": "uri-reference"}, "uri-reference"),
        ({"type": "string", "format": "idn-email"}, "idn-email"),
        ({"type": "string", "format": "no such"}, "no such"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}, "oneOf"),
        ({"oneOf": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 2}]}, "oneOf"),
        ({"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, "oneOf"),
        ({"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, "oneOf"),
        ({"oneOf": [True, {"type": "null"}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
        ({"patternProperties": {"a": {"type": "integer"}, "b": {"type": "string"}}}, "disjoint"),
        ({"$dynamicRef": "#x"}, "dynamicRef"),
        ({"properties": {"a": {}}, "maxProperties": 1}, "maxProperties"),
        ({"type": "integer", "multipleOf": 2, "maximum": -3}, "multipleOf"),
        ({"additionalProperties": {"type": "integer"}, "minProperties": 2}, "minProperties is 2"),
        ({"required": ["a", "a"], "minProperties": 3}, "minProperties is 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_enforced_is_refused_by_name(vocabulary: GrammarVocabulary, schema: Any, name: str) -> None:
    with pytest.raises(UnsupportedGrammar, match=name):
        Grammar.json_schema(vocabulary, schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "no JSON"),
        ("[1]", "a JSON list"),
        (False, "false"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "empty"),
        ({"$ref": "#"}, "no text"),
        ({"$ref": "#/nope"}, "nope"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "strin"}, "strin"),
        ({"minimum": 0, "exclusiveMinimum": True}, "draft-04"),
        ({"items": [{}]}, "2020-12"),
        ({"properties": {"example": {"items": [{}]}}}, "2020-12"),
        ({"const": b"bytes"}, "bytes"),
        ({("a", "b"): {}}, "tuple"),
    ],
)
def test_what_is_no_schema_is_refused(vocabulary: GrammarVocabulary, schema: Any, says: str) -> None:
    with pytest.raises(InvalidGrammar, match=says):
        Grammar.json_schema(vocabulary, schema)


@pytest.mark.parametrize("name", ["date", "time", "date-time"])
def test_formats_mean_what_the_format_checker_says(vocabulary: GrammarVocabulary, name: str) -> None:
    """llguidance's own patterns write 29 February in any year and second 60 in any minute."""
    schema = {
        "anyOf": [
            {"type": "string", "format": name, "pattern": "0"},
            schemas.record(["format"], format={"format": name, "type": "string"}),
        ]
    }
    grammar = Grammar.json_schema(vocabulary, schema)
    days = [
        "2023-02-29",
        "2024-02-29",
        "1900-02-29",
        "2000-02-29",
        "2023-04-31",
        "2023-04-30",
        "0000-01-01",
        "2023-13-01",
    ]
    times = ["23:59:60Z", "10:20:60Z", "10:20:59Z", "24:00:00Z", "10:20:30.5+01:30", "10:20:30", "10:20:30-24:00"]
    texts = {"date": days, "time": times, "date-time": [f"{d}T{t}" for d in days for t in times]}[name]
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    # 23:59:60Z is a leap second: right, and left out here, since which days have one is not in the text's form.
    for text in (text for text in texts if ":60" not in text or "23:59" not in text):
        for value in (text, {"format": text}):
            read = grammar.is_complete(grammar.state_of(vocabulary.words(json.dumps(value).encode())))
            assert read == checker.conforms(text, name), value


def test_white_space_can_be_left_out(vocabulary: GrammarVocabulary) -> None:
    schema = schemas.record(["a"], a=schemas.STRING)
    loose, tight = Grammar.json_schema(vocabulary, schema), Grammar.json_schema(vocabulary, schema, whitespace=False)
    for text, is_tight in [(b'{ "a" :\n\n\n "" }', False), (b'{"a": ""}', False), (b'{"a":"  \\n"}', True)]:
        token_ids = vocabulary.words(text)
        assert loose.is_complete(loose.state_of(token_ids))
        assert tight.is_complete(tight.state_of(token_ids)) == is_tight


def test_counts_and_sizes_are_bounded(vocabulary: GrammarVocabulary) -> None:
    with pytest.raises(GrammarTooComplex, match="minItems is 1,000,000,000"):
        Grammar.json_schema(vocabulary, {"type": "array", "minItems": 10**9})
    with pytest.raises(GrammarTooComplex, match="properties"):
        Grammar.json_schema(vocabulary, {"properties": {f"p{i}": {} for i in range(3000)}})
    Grammar.json_schema(vocabulary, {"enum": [{"maxItems": 10**9}], "properties": {"items": {"items": True}}})


def test_schemas_that_cannot_be_written_are_refused(vocabulary: GrammarVocabulary) -> None:
    circular: dict[str, Any] = {}
    circular["items"] = circular
    with pytest.raises(InvalidGrammar, match="Circular"):
        Grammar.json_schema(vocabulary, circular)
    deep: dict[str, Any] = {}
    for _ in range(10_000):
        deep = {"items": deep}
    with pytest.raises(GrammarTooComplex, match="nest"):
        Grammar.json_schema(vocabulary, deep)
    with pytest.raises(GrammarTooComplex, match="nest"):
        Grammar.json_schema(vocabulary, '{"items":' * 9_000 + "{}" + "}" * 9_000, limits=Limits(nesting=10_000))


def test_a_schema_may_be_any_mapping(vocabulary: GrammarVocabulary) -> None:
    schema = types.MappingProxyType({"properties": types.MappingProxyType({"a": {"type": "integer"}})})
    grammar = Grammar.json_schema(vocabulary, schema)
    assert grammar.is_complete(grammar.state_of(vocabulary.words(b'{"a": 1}')))
    assert not grammar.is_alive(grammar.state_of(vocabulary.words(b'{"a": "')))


@pytest.mark.parametrize("name", ["default", "example", "examples", "const", "enum"])
def test_names_hide_nothing_from_the_limits(vocabulary: GrammarVocabulary, name: str) -> None:
    limits = Limits(repetitions=5)
    long = {"type": "array", "items": {"type": "string"}, "minItems": 6}
    schemas_with_it = [
        {"properties": {name: long}, "required": [name]},
        {"$ref": f"#/$defs/{name}", "$defs": {name: long}},
        {"$ref": f"#/definitions/{name}", "definitions": {name: long}},
        {"$ref": "#/$defs", "$defs": long},
        {"$ref": "#/x/default", "x": {"default": long}},
        {"$ref": "#/%64efault", "default": long},
        {"$ref": "#/examples/0", "examples": [long]},
    ]
    for schema in schemas_with_it:
        with pytest.raises(GrammarTooComplex, match="minItems is 6"):
            Grammar.json_schema(vocabulary, schema, limits=limits)
    Grammar.json_schema(vocabulary, {"properties": {"a": {name: [long]}, "exclusiveMinimum": True}}, limits=limits)


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (r'{"a": 1}', True),
        (r'{"a": 1, "b": "x", "x1": true}', True),
        (r'{"a": 1, "c\"d\\": "x\n", "\n": 1, "e\u0001": 1}', True),
        (r'{"a": 1, "\u0061": "x"}', False),
        (r'{"a": 1, "a/b": 2, "a\/b": "x"}', False),
        (r'{"a": 1, "\n\t": 2, "\n\u0009": "x"}', False),
        (r'{"a": 1, "\u00781": "x"}', False),
        (r'{"a": 1, "b": [{"a": "\\u0061"}, {"c" : "\n"}]}', True),
    ],
)
async def test_a_name_cannot_be_spelled_in_another_way(
    vocabulary: GrammarVocabulary, text: str, is_valid: bool
) -> None:
    integer = {"type": "integer"}
    named = {"a": integer, "a/b": integer, "\n\t": integer}
    schema = {"properties": named, "required": ["a"], "patternProperties": {"^x": {"type": "boolean"}}}
    assert validator_of(schema).is_valid(json.loads(text)) == is_valid
    grammar = Grammar.json_schema(vocabulary, schema)
    token_ids = vocabulary.words(text.encode())
    assert grammar.is_complete(grammar.state_of(token_ids)) == is_valid
    await check_potential(grammar, [token_ids], symbols=range(0, 512, 9))


def test_keys_that_are_counted_differ(vocabulary: GrammarVocabulary) -> None:
    schema = {"required": ["a"], "additionalProperties": {"type": "integer"}, "minProperties": 2}
    grammar = Grammar.json_schema(vocabulary, schema)
    for text, is_valid in [('{"a": 1}', False), ('{"a": 1, "a": 2}', False), ('{"a": 1, "b": 2}', True)]:
        assert validator_of(schema).is_valid(json.loads(text)) == is_valid
        assert grammar.is_complete(grammar.state_of(vocabulary.words(text.encode()))) == is_valid
