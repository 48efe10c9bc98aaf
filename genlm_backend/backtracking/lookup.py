"""What may come next, looked up in what came before; pure.

Prompt lookup: Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with Reference", arXiv:2304.04487.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LONGEST = 3  # tokens at the end that are looked up; then fewer


def looked_up(ids: Sequence[int], n: int) -> list[int]:
    """The n tokens that followed the last few tokens where these stood before, at their last place; [] if nowhere.

    The longest end that stood before counts, of up to three tokens. A place less than n before the end is a cycle,
    and the guess goes round in it.
    """
    known = np.asarray(ids)
    for width in range(min(_LONGEST, len(known) - 1), 0, -1):
        n_places = len(known) - width
        is_place = np.ones(n_places, np.bool_)
        for offset in range(width):
            is_place &= known[offset : offset + n_places] == known[n_places + offset]
        places = np.flatnonzero(is_place)
        if len(places):
            followed = known[places[-1] + width :]
            return np.resize(followed, n).tolist() if n > 0 else []
    return []
