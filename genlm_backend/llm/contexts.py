"""From what a caller passes as token ids to the immutable identity of a request."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence

import numpy as np
import torch

from genlm_backend.errors import ContextTooLong, EmptyPrompt, TokenIdError


def checked_ids(token_ids: object, n_ids: int, max_length: int | None) -> tuple[int, ...]:
    """A tuple of Python integers: a snapshot that later changes of the caller's list do not reach.

    Args:
        token_ids: A list, tuple or other sequence of integers, or a one-dimensional integer array or tensor.
        n_ids: Ids are 0 to `n_ids - 1`.
        max_length: Most tokens the model's context holds, the next token included; None if there is no limit.

    Raises:
        EmptyPrompt: No token.
        TokenIdError: An entry is no integer (bool, float, str, None and nested sequences are none) or out of range.
        ContextTooLong: At or over the context length, so that the next token would not fit.
    """
    match token_ids:
        case tuple():  # first: the others take longer to tell apart than to read
            ids = tuple(token_ids)
        case torch.Tensor() | np.ndarray():
            kind = np.dtype(token_ids.dtype).kind if isinstance(token_ids, np.ndarray) else _kind(token_ids)
            if token_ids.ndim != 1 or kind not in "iu":
                what = f"an array of {token_ids.dtype} and shape {tuple(token_ids.shape)}"
                raise TokenIdError(None, what, n_ids)
            ids = tuple(token_ids.tolist())
        case str() | bytes() | bytearray():
            raise TokenIdError(None, described(token_ids), n_ids)
        case Sequence():
            ids = tuple(token_ids)
        case _:
            raise TokenIdError(None, described(token_ids), n_ids)
    if not ids:
        raise EmptyPrompt()
    if set(map(type, ids)) != {int}:
        ids = tuple(_checked_id(position, value, n_ids) for position, value in enumerate(ids))
    if min(ids) < 0 or max(ids) >= n_ids:
        position = next(i for i, value in enumerate(ids) if not 0 <= value < n_ids)
        raise TokenIdError(position, described(ids[position]), n_ids)
    if max_length is not None and len(ids) >= max_length:
        raise ContextTooLong(len(ids), max_length - 1)
    return ids


def described(value: object) -> str:
    """A value in a few words, for an error that can be pickled and holds on to nothing."""
    try:
        shown = reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        shown = "a huge number"
    return f"{shown} ({type(value).__name__})"


def _checked_id(position: int, value: object, n_ids: int) -> int:
    is_bool = isinstance(value, bool | np.bool_) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    if is_bool or not hasattr(value, "__index__") or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim):
        raise TokenIdError(position, described(value), n_ids)
    try:
        return operator.index(value)
    except TypeError as error:
        raise TokenIdError(position, described(value), n_ids) from error


def _kind(tensor: torch.Tensor) -> str:
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return "i" if is_integer else "f"
