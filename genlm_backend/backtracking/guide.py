"""guide: text of a grammar from any model, by letting it write, checking, and correcting where it left the grammar.

A stretch of text is drawn unchecked. What the grammar cannot read is taken back up to the start of the terminal at
fault, one of the terminals expected there is written instead, and, where the rest still fits, the rest is put back.
Text that is unfinished is alive and costs no correction; text that is complete ends where the grammar ends. This is a
procedure: what comes out is no conditional of the model (for that, see `GrammarRule`).
"""

from __future__ import annotations

import html as html_text
import logging
import re
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import regex

from genlm_backend.backtracking.grammar_rule import GrammarRule
from genlm_backend.backtracking.parser import Candidate, CandidateText, Parser, escaped
from genlm_backend.backtracking.rules import KEEP, Halt, Prompt, Rule, Step, Verdict
from genlm_backend.backtracking.stopping import StopStrings, Tail
from genlm_backend.backtracking.text_models import TextFunction, continuation
from genlm_backend.backtracking.walk import walk
from genlm_backend.backtracking.writing import bytes_of, whole_characters
from genlm_backend.batching import run_sync
from genlm_backend.errors import InvalidGrammar, InvalidQuery
from genlm_backend.llm.base import AsyncLM
from genlm_backend.potentials.grammar import Grammar
from genlm_backend.potentials.limits import Limits

logger = logging.getLogger(__name__)

_N_HEALED = 3  # tokens before a seam that are written anew, so that the model may join across it
_MOST_OF_A_CANDIDATE = 24  # tokens
_WORDS_REPLACED = 3  # by a candidate, at most, where the rest is put back


class Correction(NamedTuple):
    """One correction.

    Attributes:
        original_pred: The text before.
        corrected_pred: The text after.
        selected_candidate: What was written.
        type: "single_candidate" or "draft_gen" (the model chose), with "_middle_fill" where the rest was put back; or
            "taken_back", where no candidate could be written without changing `seed_str`.
    """

    original_pred: str
    corrected_pred: str
    selected_candidate: str
    type: str


@dataclass
class Guided:
    """What `guide` came to.

    Attributes:
        response: The text, without prompt and stop text.
        valid: Whether it is a whole text of the grammar. It is always a beginning of one.
        num_grammar_corrections: How many were made.
        correction_log: Which.
        process_time_seconds: From call to return.
        html: A picture of what was written, taken back, corrected and healed; None unless asked for.
    """

    response: str
    valid: bool
    num_grammar_corrections: int
    correction_log: list[Correction]
    process_time_seconds: float
    html: str | None

    def to_list(self) -> list[dict[str, Any]]:
        """The corrections as dictionaries."""
        return [correction._asdict() for correction in self.correction_log]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def guide(
    model: Any,
    parser: Parser,
    prompt: str,
    tokenizer: Any = None,
    draft_model: Any = None,
    seed_str: str | None = None,
    max_grammar_corrections: int = 3,
    stop_at: str | Sequence[str] | None = None,
    token_healing: bool = True,
    top_p: float = 0.9,
    temperature: float = 0.6,
    max_new_tokens: int = 32,
    save_html: bool = True,
    verbose: bool = False,
    *,
    seed: int | None = None,
) -> Guided:
    """`aguide` for callers that cannot await; works inside a running event loop, and blocks it."""
    return run_sync(
        aguide(
            model,
            parser,
            prompt,
            tokenizer,
            draft_model,
            seed_str,
            max_grammar_corrections,
            stop_at,
            token_healing,
            top_p,
            temperature,
            max_new_tokens,
            save_html,
            verbose,
            seed=seed,
        )
    )


async def aguide(
    model: Any,
    parser: Parser,
    prompt: str,
    tokenizer: Any = None,
    draft_model: Any = None,
    seed_str: str | None = None,
    max_grammar_corrections: int = 3,
    stop_at: str | Sequence[str] | None = None,
    token_healing: bool = True,
    top_p: float = 0.9,
    temperature: float = 0.6,
    max_new_tokens: int = 32,
    save_html: bool = True,
    verbose: bool = False,
    *,
    seed: int | None = None,
) -> Guided:
    """A text of a grammar that continues a prompt.

    Args:
        model: An `AsyncLM`, the name of one, a loaded Hugging Face model, or a function from a prompt to its
            continuation, sync or async: any API. What is opened for a name or a loaded model is closed again.
        parser: From `load_parser`.
        prompt: What to continue.
        tokenizer: That of a loaded Hugging Face model.
        draft_model: Chooses among candidates; None is the model itself. Kinds as for `model`.
        seed_str: The text begins with this, whatever is corrected.
        max_grammar_corrections: Most corrections.
        stop_at: Strings before which the text ends, looked for in what follows prompt and `seed_str`.
        token_healing: Let the model choose anew the last tokens before each seam, up to three, with the same bytes:
            also those of the prompt, of which the first stays.
        top_p: Of the draws of an `AsyncLM`; a function draws as it likes.
        temperature: Likewise.
        max_new_tokens: Of one stretch between checks, without those of healed text. In all it is at most
            `max_new_tokens * (max_grammar_corrections + 1)`, and the candidates. A function bounds its own answers.
        save_html: Draw the picture; no file is written.
        verbose: Log each correction at level INFO.
        seed: Equal seeds give equal texts; None takes a fresh one.

    Raises:
        InvalidGrammar: `seed_str` is no beginning of a text of the grammar.
        InvalidQuery: A bound is negative, a string of `stop_at` is empty, or a function answers with neither text nor
            None.
        GenlmError: What the model raises.
    """
    if max_grammar_corrections < 0 or max_new_tokens < 1:
        raise InvalidQuery("max_grammar_corrections is at least 0, and max_new_tokens at least 1")
    started = time.perf_counter()
    stops = [stop_at] if isinstance(stop_at, str) else list(stop_at or ())
    if not all(stops):
        raise InvalidQuery(
            f"stop_at is {stop_at!r}, which has an empty string; expected one or more characters in each"
        )
    state = _State(seed_str or "", seed=seed_str or "")
    if not parser.is_viable(state.text):
        raise InvalidGrammar("seed_str", f"{seed_str!r} begins no text of the grammar", "correct it, or leave it out")
    if not state.text:
        state.write(_only_beginning(parser), "candidate")
    state.trace[:0] = [("seed", seed_str)] if seed_str else []
    async with AsyncExitStack() as opened:
        writer = drafter = _writer_of(opened, model, tokenizer, top_p, temperature, max_new_tokens, token_healing, seed)
        if draft_model is not None:
            drafter = _writer_of(opened, draft_model, tokenizer, top_p, 0.0, max_new_tokens, True, seed)
        for _ in range(max_grammar_corrections + 1):
            piece, is_over, n_healed = await writer.write(prompt, state.text, stops)
            state.mark(n_healed, "healed")
            piece, is_stopped = _until_stop(state, piece, stops)
            is_over = is_over or is_stopped
            is_done = await _read(state, piece, is_over, parser, prompt, drafter, max_grammar_corrections, verbose)
            if is_done:
                break
    return Guided(
        response=state.text,
        valid=parser.is_valid(state.text),
        num_grammar_corrections=len(state.corrections),
        correction_log=state.corrections,
        process_time_seconds=time.perf_counter() - started,
        html=_picture(prompt, state.trace) if save_html else None,
    )


def _until_stop(state: _State, piece: str, stops: Sequence[str]) -> tuple[str, bool]:
    """A piece up to a stop string that ends in it, and whether there is one; the text loses what it had of that."""
    whole, n_before, n_seed = state.text + piece, len(state.text), len(state.seed)
    starts = [whole.find(stop, max(n_seed, n_before - len(stop) + 1)) for stop in stops]
    end = min((start for start in starts if start >= 0), default=None)
    if end is not None:
        state.cut(end)
    return whole[len(state.text) : end], end is not None


async def _read(
    state: _State,
    piece: str,
    is_over: bool,
    parser: Parser,
    prompt: str,
    drafter: _Writer,
    max_corrections: int,
    verbose: bool,
) -> bool:
    """Take what the model wrote into the text, corrected where it must be; whether the text is finished."""
    before, prediction = state.text, state.text + piece
    n_viable = parser.n_viable(prediction)
    viable = prediction[:n_viable]
    if n_viable < len(prediction) and parser.is_valid(viable):
        state.write(viable[len(before) :], "written")
        state.trace.append(("taken back", prediction[n_viable:]))
        return True
    if n_viable == len(prediction) and (not is_over or parser.is_valid(prediction)):
        state.write(piece, "written")
        return is_over or (parser.is_valid(prediction) and not parser.may_go_on(prediction))
    if len(state.corrections) >= max_corrections:
        state.write(viable[len(before) :], "written")
        state.trace.append(("taken back", prediction[n_viable:]))
        return True
    return not await _correct(state, prediction, parser, prompt, drafter, verbose)


async def _correct(
    state: _State, prediction: str, parser: Parser, prompt: str, drafter: _Writer, verbose: bool
) -> bool:
    """Write a terminal that the grammar expects where it stops; whether there is one."""
    expected = parser.expected(prediction)
    prefix = expected.prefix[: parser.n_viable(expected.prefix)]

    def joined(text: str) -> str:
        """Prefix and text, with a blank between words where the grammar takes one; "" where it takes neither."""
        blanks = (" ", "") if prefix[-1:].isalnum() and text[:1].isalnum() else ("",)
        wholes = (prefix + blank + text for blank in blanks if text)
        return next((whole for whole in wholes if whole.startswith(state.seed) and parser.is_viable(whole)), "")

    keeps_seed = len(prefix) >= len(state.seed)
    usable = [c for c in expected.candidates if (c.is_regex and keeps_seed) or joined(c.text)]
    if not usable and not keeps_seed:
        viable = prediction[: parser.n_viable(prediction)]
        state.replace(viable, prediction)
        state.corrections.append(Correction(prediction, viable, "", "taken_back"))
        return True
    if not usable:
        state.replace(prefix, prediction)
        return False
    if len(usable) == 1 and not usable[0].is_regex:
        chosen, kind = usable[0].text, "single_candidate"
    else:
        chosen, kind = await drafter.choose(prompt, prefix, usable, parser.limits.lark_s), "draft_gen"
    corrected = joined(chosen)
    if not corrected:
        openings = (parser.opening(candidate) for candidate in usable)  # texts first
        chosen = next((text for text in openings if joined(text)), "")
        corrected = joined(chosen)
    if not corrected:
        state.replace(prefix, prediction)
        return False
    rest = prediction[len(prefix) :]
    for _ in range(_WORDS_REPLACED + 1):
        if rest.strip() and parser.is_viable(corrected + rest):
            corrected, kind = corrected + rest, f"{kind}_middle_fill"
            break
        rest = re.sub(r"^\s*\S+", "", rest)
    state.replace(prefix, prediction)
    state.write(corrected[len(prefix) :], "candidate")
    state.corrections.append(Correction(prediction, corrected, chosen, kind))
    if verbose:
        logger.info("%s: %r after %r", kind, chosen, prefix[-40:])
    return True


def choose_candidate(candidates: Sequence[str], prefix: str, draft_model: Any) -> str:
    """The candidate that a model would most readily go on with after a prefix.

    Candidates are taken as texts; those of `obtain_correction_pairs` that are expressions (they have `is_regex`) are
    taken as such, and what comes is a text that one matches, or "" if the model says none.

    Raises:
        InvalidQuery: There is no candidate.
    """
    if not candidates:
        raise InvalidQuery("there is no candidate to choose")

    async def chosen() -> str:
        async with AsyncExitStack() as opened:
            drafter = _writer_of(opened, draft_model, None, 1.0, 0.0, _MOST_OF_A_CANDIDATE, True, 0)
            return await drafter.choose("", prefix, [_as_candidate(text) for text in candidates], Limits().lark_s)

    return run_sync(chosen())


def _as_candidate(text: str) -> Candidate:
    if isinstance(text, CandidateText):
        return Candidate(str(text), text.is_regex, text.flags)
    return Candidate(text, False)


@dataclass
class _State:
    """The text so far, what it begins with for good, and how it came to be."""

    text: str
    seed: str = ""
    corrections: list[Correction] = field(default_factory=list)
    trace: list[tuple[str, str]] = field(default_factory=list)

    def write(self, piece: str, how: str) -> None:
        self.text += piece
        if piece:
            self.trace.append((how, piece))

    def replace(self, prefix: str, prediction: str) -> None:
        """Go to a prefix of a prediction, which may be shorter than the text."""
        if len(prefix) >= len(self.text):
            self.write(prefix[len(self.text) :], "written")
        else:
            self.cut(len(prefix))
        self.trace.append(("taken back", prediction[len(prefix) :]))

    def cut(self, n: int) -> None:
        """Keep at most n characters."""
        self.mark(len(self.text) - n, "")
        self.text = self.text[:n]

    def mark(self, n: int, how: str) -> None:
        """The last n characters of the text came to be otherwise; with "" they are no longer part of it."""
        at = len(self.trace)
        while n > 0 and at > 0:
            at -= 1
            before, piece = self.trace[at]
            if before != "taken back":
                cut = max(0, len(piece) - n)
                n -= len(piece) - cut
                parts = [(before, piece[:cut]), (how, piece[cut:])]
                self.trace[at : at + 1] = [(kind, text) for kind, text in parts if kind and text]


class _Writer:
    """Writes text after text, and chooses among candidates."""

    async def write(self, prompt: str, text: str, stops: Sequence[str]) -> tuple[str, bool, int]:
        """A stretch of text, whether the model ended there, and how many characters before it have other tokens now."""
        raise NotImplementedError

    async def choose(self, prompt: str, prefix: str, candidates: Sequence[Candidate], seconds: float) -> str:
        """One of the candidates, or a text that the expression of one matches, within so many seconds for each."""
        raise NotImplementedError


class _FunctionWriter(_Writer):
    def __init__(self, function: TextFunction) -> None:
        self._function = function

    async def write(self, prompt: str, text: str, stops: Sequence[str]) -> tuple[str, bool, int]:
        piece = await continuation(self._function, prompt + text)
        return piece, not piece, 0

    async def choose(self, prompt: str, prefix: str, candidates: Sequence[Candidate], seconds: float) -> str:
        """What the function goes on with if it is a candidate; else the candidate that shares most with it."""
        said = (await continuation(self._function, prompt + prefix)).lstrip()
        for candidate in candidates:
            if found := _beginning(candidate, said, seconds):
                return found
        plain = [candidate.text for candidate in candidates if not candidate.is_regex]
        return max(plain, key=lambda text: _n_common(text, said), default="")


class _ModelWriter(_Writer):
    def __init__(
        self, llm: AsyncLM, top_p: float, temperature: float, max_new_tokens: int, heals: bool, seed: int | None
    ) -> None:
        self._llm = llm
        self._filters: dict[str, Any] = {"temperature": temperature, "top_p": top_p if temperature else None}
        self._max_new_tokens = max_new_tokens
        self._heals = heals
        self._seed = seed
        self._n_written = 0

    async def write(self, prompt: str, text: str, stops: Sequence[str]) -> tuple[str, bool, int]:
        token_ids, healed = self._seam(prompt + text)
        self._n_written += 1
        n_healed = len(healed.encode())
        rules: list[Rule[Any]] = [_NewTokens(n_healed, self._max_new_tokens, stops)]
        if healed:
            rules.append(GrammarRule(Grammar.regex(self._llm, f"{escaped(healed)}(?s:.*)")))  # the same bytes
        outcome = await walk(
            self._llm,
            token_ids,
            rules,
            max_new_tokens=self._max_new_tokens + n_healed,  # at most so many; the first rule ends the stretch
            mode="mask" if healed else "local",
            seed=self._seed,
            lineage=(self._n_written,),
            **self._filters,
        )
        written = outcome.text
        if outcome.reason not in ("eos", "stop"):  # the next stretch writes a character that is unfinished
            data = bytes_of(self._llm, outcome.token_ids)
            written = data[: whole_characters(data)].decode("utf-8", "replace")
        is_written = written.startswith(healed)
        piece = written[len(healed) :] if is_written else ""
        before = self._llm.tokenizer.encode(prompt + text)[len(token_ids) :]
        is_as_before = list(before) == outcome.token_ids[: len(before)]
        return piece, outcome.reason in ("eos", "stop"), len(healed) if is_written and not is_as_before else 0

    async def choose(self, prompt: str, prefix: str, candidates: Sequence[Candidate], seconds: float) -> str:
        """Greedily, among the texts of all candidates that llguidance takes; they need no clock."""
        token_ids, healed = self._seam(prompt + prefix)
        options = "|".join(f"(?:{c.pattern})" for c in candidates if not c.is_regex or self._compiled(c.pattern))
        blank = " ?" if prefix and not prefix[-1:].isspace() else ""
        constraint = self._compiled(f"{escaped(healed)}{blank}(?:{options})") if options else None
        if constraint is None:
            return ""
        state, ids = constraint.start(), list(token_ids)
        for _ in range(_MOST_OF_A_CANDIDATE + len(healed)):
            mask = constraint.mask(state)
            if constraint.is_complete(state) and not mask[:-1].any():
                break
            if not mask[:-1].any():
                return ""
            row = await self._llm.next_token_logprobs(ids)
            if constraint.is_complete(state) and not mask[int(row.argmax())]:
                break  # the model would rather go on with something else
            best = row.cpu().masked_fill(_as_tensor(~mask[:-1]), float("-inf"))
            ids.append(int(best.argmax()))
            state = constraint.extend(state, ids[-1])
        written = bytes_of(self._llm, ids[len(token_ids) :]).decode("utf-8", "ignore")
        return written[len(healed) :].lstrip() if constraint.is_complete(state) else ""

    def _compiled(self, pattern: str) -> Grammar | None:
        try:
            return Grammar.regex(self._llm, pattern)
        except InvalidGrammar:
            return None

    def _seam(self, whole: str) -> tuple[list[int], str]:
        """The tokens to continue, and the text of those left out, to be written anew."""
        token_ids: list[int] = list(self._llm.tokenizer.encode(whole))
        n_healed = 0
        if self._heals:
            while n_healed < min(_N_HEALED, len(token_ids) - 1):
                if self._llm.byte_vocab[token_ids[-1 - n_healed]].is_special:
                    break
                n_healed += 1
        kept = token_ids[: len(token_ids) - n_healed]
        try:
            return kept, bytes_of(self._llm, token_ids[len(kept) :]).decode()
        except UnicodeDecodeError:  # a character lies across the seam
            return token_ids, ""


class _New(NamedTuple):
    """Healed bytes that are still to come, new tokens, and the end of the new text."""

    n_to_go: int
    n_tokens: int
    tail: Tail


class _NewTokens(Rule[_New]):
    """Ends a text after so many tokens that reach beyond its first, healed bytes, or before a stop string there."""

    forbids = False

    def __init__(self, n_healed: int, most: int, stops: Sequence[str]) -> None:
        self._n_healed = n_healed
        self._most = most
        self._stops = StopStrings(stops) if stops else None

    def init(self, prompt: Prompt) -> _New:
        return _New(self._n_healed, 0, Tail(b""))

    def step(self, state: _New, step: Step) -> tuple[_New, Verdict]:
        piece, tail = step.piece[state.n_to_go :], state.tail
        verdict: Verdict = KEEP
        n_tokens = state.n_tokens + bool(piece)
        if self._stops is not None:
            tail, verdict = self._stops.step(tail, step._replace(piece=piece))
        if n_tokens >= self._most and not step.is_end and not isinstance(verdict, Halt):
            verdict = Halt("length")
        return _New(max(state.n_to_go - len(step.piece), 0), n_tokens, tail), verdict


def _writer_of(
    opened: AsyncExitStack,
    model: Any,
    tokenizer: Any,
    top_p: float,
    temperature: float,
    max_new_tokens: int,
    heals: bool,
    seed: int | None,
) -> _Writer:
    """A writer on any kind of model; what it opens itself is closed with `opened`."""
    if isinstance(model, str):
        from genlm_backend.llm import load_model_by_name

        model = load_model_by_name(model)
        opened.push_async_exit(model)
    elif not isinstance(model, AsyncLM) and hasattr(model, "get_input_embeddings"):
        from genlm_backend.llm import AsyncTransformer

        model = AsyncTransformer(model, tokenizer)
        opened.push_async_exit(model)
    if isinstance(model, AsyncLM):
        return _ModelWriter(model, top_p, temperature, max_new_tokens, heals, seed)
    if callable(model):
        return _FunctionWriter(model)
    raise InvalidQuery(f"model is a {type(model).__name__}; expected an AsyncLM, a model, its name, or a function")


def _only_beginning(parser: Parser) -> str:
    """The one terminal that every text begins with; "" if there is a choice, or none."""
    if parser.is_valid(""):
        return ""
    candidates = parser.expected("").candidates
    return candidates[0].text if len(candidates) == 1 and not candidates[0].is_regex else ""


def _beginning(candidate: Candidate, said: str, seconds: float) -> str:
    """What a text begins with of a candidate; "" if it is nothing, or takes longer than so many seconds."""
    try:
        found = regex.match(candidate.pattern, said, timeout=seconds)
    except TimeoutError as error:
        if str(error) != "regex timed out":  # from a handler of signals
            raise
        return ""
    return found[0] if found else ""


def _n_common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _as_tensor(mask: Any) -> Any:
    import torch

    return torch.from_numpy(mask)


_COLOURS = {
    "written": "#2e7d32",
    "candidate": "#1565c0",
    "taken back": "#c62828",
    "healed": "#b45f06",
    "seed": "#6d4c41",
}


def _picture(prompt: str, trace: Sequence[tuple[str, str]]) -> str:
    """Spans in the order of events, and a legend: what was taken back is struck through, where it stood."""
    spans = [f'<span style="color:#757575">{html_text.escape(prompt)}</span>']
    spans += [_span(how, piece) for how, piece in trace]
    legend = " ".join(_span(how, how) for how in _COLOURS)
    return (
        f'<pre style="white-space:pre-wrap">{"".join(spans)}</pre>'
        f'<p style="font:13px system-ui,sans-serif">{legend}</p>'
    )


def _span(how: str, text: str) -> str:
    struck = ";text-decoration:line-through" if how == "taken back" else ""
    return f'<span title="{how}" style="color:{_COLOURS[how]}{struck}">{html_text.escape(text)}</span>'
