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
REGEX = r" (a|the) [a-z ]+\."
PROMPTS = {"regex": "Montreal is", "json": "Here is a person as compact JSON, with name, city and age: "}
MAX_TOKENS = {"regex": 40, "json": 40}
ESS_THRESHOLD = 0.5
