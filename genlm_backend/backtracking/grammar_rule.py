"""GrammarRule: a constraint as a rule of the walk, so that a text never leaves a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from genlm_backend.backtracking.rules import BoolRow, Keep, Prompt, Rule, Step, Undo, Verdict
from genlm_backend.errors import InvalidQuery
from genlm_backend.potentials.base import Constraint

if TYPE_CHECKING:
    from genlm_backend.backtracking.walk import Outcome


class GrammarRule(Rule[Any]):
    """Takes back what leaves a constraint; what can still become a text of it is kept, finished or not.

    With `every=1` each token is checked as it is drawn: one question to the constraint for each, no mask. In mode
    `mask` of the walk, tokens outside are not drawn at all. Both give the same distribution. With `every=k`
    (lookahead), k tokens are drawn unchecked, then all behind the longest part that the constraint reads is taken back:
    worth it where asking costs more than drawing. Where the text ends sooner, the rest is checked there.

    Text that ends for lack of room may be unfinished, and with `when_exhausted="accept"` it may leave the grammar; ask
    `accepts(outcome)`.

    Args:
        constraint: Over the tokens of the model that walks, such as `Grammar.json_schema(llm, ...)`.
        every: How many tokens are drawn between checks.

    Raises:
        InvalidQuery: `every` is below 1.
    """

    def __init__(self, constraint: Constraint, *, every: int = 1) -> None:
        if every < 1:
            raise InvalidQuery(f"every is {every!r}; expected 1 or more")
        self.constraint = constraint
        self.every = every
        self.reach = every

    def init(self, prompt: Prompt) -> _Read:
        return _Read(self.constraint.start(), (), prompt.eos)

    def step(self, state: _Read, step: Step) -> tuple[_Read, Verdict]:
        longer = state._replace(unread=(*state.unread, step.token_id), lengths=(*state.lengths, len(step.piece)))
        if len(longer.unread) < self.every and not step.is_end:
            return longer, Keep(hold=len(longer.unread))
        return self._checked(longer, ends=step.is_end)

    def end(self, state: _Read) -> Verdict:
        return self._checked(state, ends=False)[1]

    def allowed(self, state: _Read) -> BoolRow | None:
        """None between checks: what is unread decides nothing yet."""
        if self.every > 1:
            return None
        mask = self.constraint.mask(state.read)
        row: BoolRow = mask[: self.constraint.n_tokens]
        row[list(state.eos)] = mask[self.constraint.end]
        return row

    def allows(self, state: _Read, token_id: int) -> bool:
        return self.constraint.allows(state.read, self.constraint.end if token_id in state.eos else token_id)

    def foreseen(self, state: _Read) -> Sequence[int]:
        return () if state.unread else self.constraint.foreseen(state.read)

    @property
    def masks(self) -> bool:
        return self.every == 1

    def accepts(self, outcome: Outcome, place: int = 0) -> bool:
        """Whether the text of a walk is a whole text of the constraint; a stop string that ended it counts as part.

        Args:
            outcome: Of a walk with this rule.
            place: Of this rule among the rules of the walk.
        """
        return self.is_valid(outcome.state[place])

    def is_valid(self, state: _Read) -> bool:
        """Whether the text at this state of the rule is a whole text of the constraint."""
        if not state.eos.isdisjoint(state.unread):
            return False  # it ended where it may not, since nobody heard the objection
        read = state.read
        for token_id in state.unread:
            read = self.constraint.extend(read, token_id)
        return self.constraint.is_complete(read)

    def _checked(self, state: _Read, ends: bool) -> tuple[_Read, Verdict]:
        """Read what was drawn since the last check; the fault, if any, is the first token that cannot be read."""
        read = state.read
        for i, token_id in enumerate(state.unread):
            is_last = ends and i == len(state.unread) - 1
            symbol = self.constraint.end if is_last else token_id
            if not self.constraint.allows(read, symbol):
                n_late = len(state.unread) - 1 - i
                return state, Undo(n_late + 1, late=n_late, why=self._why(symbol), tail=sum(state.lengths[i:]))
            read = read if is_last else self.constraint.extend(read, token_id)
        return _Read(read, (), state.eos), Keep()

    def _why(self, symbol: int) -> str:
        return "the text may not end here" if symbol == self.constraint.end else "it leaves the grammar"


class _Read(NamedTuple):
    """The constraint's state, the tokens drawn since, the tokens that end a text, and the bytes of each unread one."""

    read: Any
    unread: tuple[int, ...]
    eos: frozenset[int]
    lengths: tuple[int, ...] = ()
