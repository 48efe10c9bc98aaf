"""Plain data to JSON and back, exactly: tuples, bytes, infinities and tensors stay what they are."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genlm_backend.llm.queries import Drawn, TopTokens

_NAMED = {"Drawn": Drawn, "TopTokens": TopTokens}


def save(path: str | Path, form: str, data: dict[str, Any]) -> None:
    """Write plain data with the name of its form.

    Raises:
        TypeError: Something in it is not plain; says what.
    """
    text = json.dumps({"form": form, **{key: encode(value) for key, value in data.items()}}, allow_nan=False)
    Path(path).write_text(text, encoding="utf-8")


def load(path: str | Path, form: str) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        ValueError: The file is not JSON, or has another form.
    """
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    found = data.pop("form", None) if isinstance(data, dict) else None
    if found != form:
        raise ValueError(f"{path} is {found or 'something else'}, expected {form}")
    return {key: decode(value) for key, value in data.items()}


def encode(value: Any) -> Any:
    """A value as JSON has it; what JSON has not is a dict with one key that begins with "!".

    Raises:
        TypeError: It is not plain data.
    """
    if isinstance(value, np.bool_ | np.integer | np.floating):
        value = value.item()
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"!float": str(value)}
        case list():
            return [encode(item) for item in value]
        case tuple() if type(value).__name__ in _NAMED:
            return {"!" + type(value).__name__: [encode(item) for item in value]}
        case tuple():
            return {"!tuple": [encode(item) for item in value]}
        case bytes():
            return {"!bytes": base64.b64encode(value).decode()}
        case dict() if all(isinstance(key, str) and not key.startswith("!") for key in value):
            return {key: encode(item) for key, item in value.items()}
        case dict():
            return {"!dict": [[encode(key), encode(item)] for key, item in value.items()]}
        case torch.Tensor() | np.ndarray():
            array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
            kind = "!tensor" if isinstance(value, torch.Tensor) else "!array"
            return {kind: [str(array.dtype), list(array.shape), base64.b64encode(array.tobytes()).decode()]}
    raise TypeError(
        f"a {type(value).__name__} cannot be saved: programs whose results are saved draw and return plain data "
        "(None, bool, int, float, str, bytes, lists, tuples, dicts, tensors)"
    )


def decode(value: Any) -> Any:
    """What `encode` encoded."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        match kind:
            case "!float":
                return float(content)
            case "!tuple":
                return tuple(decode(item) for item in content)
            case "!bytes":
                return base64.b64decode(content)
            case "!dict":
                return {decode(key): decode(item) for key, item in content}
            case "!tensor" | "!array":
                dtype, shape, data = content
                array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
                return torch.from_numpy(array) if kind == "!tensor" else array
        if kind[1:] in _NAMED and kind.startswith("!"):
            return _NAMED[kind[1:]](*(decode(item) for item in content))
    return {key: decode(item) for key, item in value.items()}
