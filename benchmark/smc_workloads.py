"""What `benchmark.smc` asks of each library; read in both environments, so only the standard library is used here."""

from __future__ import annotations

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "city": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
REGEXES = {
    "sentence": r" (a|the) [a-z ]+\.",  # may go on for ever
    "record": r" Name: [A-Z][a-z]{1,9}, born \d{4}-\d{2}-\d{2}, phone \(\d{3}\) \d{3}-\d{4}\.",  # about 35 tokens
}
PROMPTS = {
    "sentence": "Montreal is",
    "record": "The address book has one entry.",
    "json": "Here is a person as compact JSON, with name, city and age: ",
}
MAX_TOKENS = 40  # of text
ESS_THRESHOLD = 0.5
