"""From the contexts that are asked to the requests of one wave: pure functions on the ledger, no vLLM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from genlm_backend.cache.prefix_tree import n_common
from genlm_backend.llm.service import Context
from genlm_backend.llm.vllm.ledger import Ledger, Match, Session


class Target(NamedTuple):
    """One request of a wave: what it holds when the wave is done, and where its first tokens come from.

    Attributes:
        context: Adapter and tokens to be held.
        source: The session that holds its first `n_shared` tokens; None if there is none.
        n_shared: How many tokens need no computing, at most all but the last.
        is_extension: It continues `source` itself; otherwise it is a request of its own, forked from `source` or new.
    """

    context: Context
    source: Session | None
    n_shared: int
    is_extension: bool

    def n_blocks(self, block_size: int) -> int:
        """Most blocks of keys and values it will take from the pool."""
        n_held = -(-self.n_shared // block_size) if self.is_extension else self.n_shared // block_size
        return -(-len(self.context.token_ids) // block_size) - n_held


def next_wave(ledger: Ledger, pending: Sequence[Context]) -> list[Target]:
    """Requests that can be computed together, so that each new token is computed once.

    No two of them have a new token in common. Where contexts do, the wave holds their longest common prefix instead,
    and they themselves come in a later wave. Continuations of a session come first, because they need no new slot, then
    forks, then new requests.
    """
    groups: dict[tuple[str | None, tuple[int, int], int], list[tuple[Context, Match]]] = defaultdict(list)
    for context in pending:
        ids = context.token_ids
        match = ledger.match(context.adapter, ids, len(ids) - 1)  # the last token is computed: it makes the row
        groups[context.adapter, match.place, ids[match.length]].append((context, match))
    extended: set[str] = set()
    targets = []
    for members in groups.values():
        context, match = members[0]
        if len(members) > 1:
            context = _common_prefix([member for member, _ in members], match.length)
        session = match.session
        is_extension = session is not None and match.length == session.length and session.name not in extended
        if is_extension:
            assert session is not None
            extended.add(session.name)
        targets.append(Target(context, session, match.length, is_extension))
    return sorted(targets, key=_order)


def _common_prefix(contexts: Sequence[Context], start: int) -> Context:
    """The longest common prefix of contexts that agree up to `start` and one more token."""
    low, high = list(min(contexts).token_ids), list(max(contexts).token_ids)
    end = start + n_common(low[start:], high, start, min(len(low), len(high)))
    return Context(contexts[0].adapter, tuple(low[:end]))


def _order(target: Target) -> int:
    return 0 if target.is_extension else 1 if target.source is not None else 2
