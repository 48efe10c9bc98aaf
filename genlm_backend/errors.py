"""Every error this package raises on purpose, by cause and by who can act.

    GenlmError
        InvalidRequest (ValueError)         the caller: fix the arguments
            EmptyPrompt
            TokenIdError
            ContextTooLong
            UnknownAdapter
            InvalidQuery
            InvalidEngineOption
            WeightsMismatch
            InvalidDevice
            NoSuchNode
            InvalidPotential
            InvalidGrammar
                UnsupportedGrammar
                GrammarTooComplex
        UnknownBackend (ValueError)
            UnknownTrieBackend
        BackendUnavailable (ImportError)    the environment: install something
        ModelNotFound (OSError)
        UnsafeWeights (ValueError)
        RemoteCodeRefused (ValueError)
        UnsupportedModel (ValueError)       the model: use another one, or another engine
        VocabularyError (ValueError)
        DuplicateWord (ValueError)          one vocabulary entry twice in a trie
        EvaluationFailed (RuntimeError)     the forward pass of one request raised
            NonFiniteLogits
            EngineStalled
            EngineNotStarted
        NoTokenAllowed (ValueError)         mathematics: a mask excludes every possible token
        RuleRefused (ValueError)            backtracking: a rule does not fit this walk
        WalkExhausted (RuntimeError)        backtracking: a walk spent its budget, or nothing is left to draw
        ModelClosed (RuntimeError)          life-cycle
            QueriesReset
            ForkedEngine

        InvalidWeights (ValueError)         sequential Monte Carlo
        InvalidProgram (ValueError)
        InferenceFailed (RuntimeError)      a run ended early; `.result` is what it had
            AllParticlesDead
            NonFiniteWeight
            ParticleFailed
        ReplayMismatch (RuntimeError)

    SlowPathWarning (UserWarning)           correct, but slower than it could be; says why

Each class takes the data and builds the message: what came, what was expected, what to do. All of them pickle.
"""

from __future__ import annotations

from typing import Any


class GenlmError(Exception):
    """Base of every error raised on purpose by this package."""

    def __init__(self, *data: object) -> None:
        self.data = data
        super().__init__(*data)

    def __reduce__(self) -> tuple[type[GenlmError], tuple[object, ...]]:
        return type(self), self.data

    def __str__(self) -> str:
        return self.message(*self.data)

    @staticmethod
    def message(*data: object) -> str:
        """The text for the data given to the constructor."""
        return " ".join(map(str, data))


class InvalidRequest(GenlmError, ValueError):
    """The arguments of a call cannot be served; nothing was computed."""


class EmptyPrompt(InvalidRequest):
    """`token_ids` has no token; a language model needs at least one."""

    @staticmethod
    def message(*data: object) -> str:
        return "Token ids must not be empty: got no token; start with the tokenizer's bos_token_id or a prompt"


class TokenIdError(InvalidRequest):
    """One entry of `token_ids` is not the id of a token of this model.

    Data: position, what is there, number of ids; the argument's name, unless `token_ids`.
    """

    @staticmethod
    def message(*data: object) -> str:
        position, what, bound, *names = data
        name = names[0] if names else "token_ids"
        where = name if position is None else f"{name}[{position}]"
        return f"{where} is {what}; expected integers from 0 to {int(str(bound)) - 1}"


class ContextTooLong(InvalidRequest):
    """The prompt leaves no room in the model's context. Data: length, limit."""

    @staticmethod
    def message(*data: object) -> str:
        length, limit = data
        return f"the context has {length} tokens; this model takes at most {limit}: shorten the prompt or stop earlier"


class UnknownAdapter(InvalidRequest):
    """`lora_name` names no adapter of this model. Data: name, known names."""

    @staticmethod
    def message(*data: object) -> str:
        name, known = data
        return f"unknown adapter {name!r}; known adapters: {known or 'none'}; add one first, or pass lora_name=None"


class InvalidQuery(InvalidRequest):
    """A query does not fit the model's rows. Data: the reason."""


class InvalidEngineOption(InvalidRequest):
    """An option of an engine cannot be used here. Data: option, its value, the reason and what to do."""

    @staticmethod
    def message(*data: object) -> str:
        option, value, reason = data
        return f"engine option {option}={value!r}: {reason}"


class WeightsMismatch(InvalidRequest):
    """Weights, or masses to draw, do not fit a trie. Data: what came, what was expected."""

    @staticmethod
    def message(*data: object) -> str:
        came, expected = data
        return f"got {came}; expected {expected}"


class InvalidDevice(InvalidRequest):
    """Nothing can be computed on this device. Data: device, the reason."""

    @staticmethod
    def message(*data: object) -> str:
        device, reason = data
        return f"Invalid device: {device!r}: {reason}"


class NoSuchNode(InvalidRequest):
    """A trie has no such node. Data: what was asked for, number of nodes."""

    @staticmethod
    def message(*data: object) -> str:
        node, n_nodes = data
        return f"the trie has no node {node!r}; expected 0 to {int(str(n_nodes)) - 1}, or a prefix of one of its tokens"


class InvalidPotential(InvalidRequest):
    """A potential cannot be made, or used, like this. Data: what came, what was expected."""

    @staticmethod
    def message(*data: object) -> str:
        came, expected = data
        return f"got {came}; expected {expected}"


class InvalidGrammar(InvalidRequest):
    """A grammar, schema or expression is none. Data: what it was read as, what is wrong with it, what to do."""

    @staticmethod
    def message(*data: object) -> str:
        what, wrong, remedy = data
        return f"{what}: {wrong}; {remedy}"


class UnsupportedGrammar(InvalidGrammar):
    """A grammar uses a feature that its engine does not have; data as in `InvalidGrammar`, the feature named."""


class GrammarTooComplex(InvalidGrammar):
    """A grammar needs more time, states or memory than its limits allow; data as in `InvalidGrammar`."""


class UnknownBackend(GenlmError, ValueError):
    """`backend` names no engine. Data: name, known names."""

    @staticmethod
    def message(*data: object) -> str:
        name, known = data
        return f"Invalid backend: {name!r}; expected one of {known}"


class UnknownTrieBackend(UnknownBackend):
    """`backend` names no trie. Data: name, known names."""

    @staticmethod
    def message(*data: object) -> str:
        name, known = data
        return f"Unknown backend: {name!r}; expected one of {known}"


class BackendUnavailable(GenlmError, ImportError):
    """An optional package is missing. Data: what needs it, the install command; or None, and what to use instead."""

    @staticmethod
    def message(*data: object) -> str:
        what, command, *instead = data
        if command is None:
            return f"{what} is no part of genlm_backend; use {instead[0]}"
        return f"{what} is not installed; install it with: {command}"


class ModelNotFound(GenlmError, OSError):
    """No model is known by this name here. Data: name, how to get it."""

    @staticmethod
    def message(*data: object) -> str:
        name, remedy = data
        return f"no model {name!r} was found here; {remedy}"


class UnsafeWeights(GenlmError, ValueError):
    """The weights are pickles, which can run code when loaded. Data: model name, the option that allows them."""

    @staticmethod
    def message(*data: object) -> str:
        name, option = data
        return (
            f"{name!r} has no safetensors weights, only pickles, which can run code when loaded; "
            f"convert them, or pass {option} if you trust their source"
        )


class RemoteCodeRefused(GenlmError, ValueError):
    """The model brings code of its own. Data: model name."""

    @staticmethod
    def message(*data: object) -> str:
        return f"{data[0]!r} wants to run code of its own; pass trust_remote_code=True if you have read and trust it"


class UnsupportedModel(GenlmError, ValueError):
    """This engine cannot serve this model. Data: what it is, what to do."""

    @staticmethod
    def message(*data: object) -> str:
        what, remedy = data
        return f"{what}; {remedy}"


class VocabularyError(GenlmError, ValueError):
    """The tokenizer's vocabulary cannot be turned into bytes. Data: the reason."""

    @staticmethod
    def message(*data: object) -> str:
        return f"Could not decode byte representation of token vocabulary from tokenizer: {data[0]}"


class DuplicateWord(GenlmError, ValueError):
    """A trie's vocabulary has one token twice. Data: the token's key, its first and second position."""

    @staticmethod
    def message(*data: object) -> str:
        word, first, second = data
        return f"Duplicate word in vocabulary: {word!r} is entry {first} and entry {second}; leave one out"


class EvaluationFailed(GenlmError, RuntimeError):
    """Computing this request raised; the cause is chained. Data: number of tokens, the cause in words."""

    @staticmethod
    def message(*data: object) -> str:
        n_tokens, cause = data
        return f"evaluating a context of {n_tokens} tokens failed: {cause}; other requests are not affected"


class NonFiniteLogits(EvaluationFailed):
    """The model returned NaN, or no finite logit, for this context; nothing was cached. Data: number of tokens."""

    @staticmethod
    def message(*data: object) -> str:
        return f"the model's logits for a context of {data[0]} tokens are not finite; try float32, or check the weights"


class EngineStalled(EvaluationFailed):
    """The engine computes nothing although this context waits. Data: number of tokens, what it holds."""

    @staticmethod
    def message(*data: object) -> str:
        n_tokens, holds = data
        return (
            f"the engine schedules nothing although a context of {n_tokens} tokens waits ({holds}); "
            "give it more memory for keys and values (engine_opts={'kv_cache_memory_bytes': ...})"
        )


class EngineNotStarted(EvaluationFailed):
    """No thread could be started for the engine, so nothing was computed. Data: the cause in words."""

    @staticmethod
    def message(*data: object) -> str:
        return f"the engine's thread did not start ({data[0]}); end other threads or raise their limit, and ask again"


class NoTokenAllowed(GenlmError, ValueError):
    """A draw excludes every token that has probability. Data: number of tokens its mask allows; its filters, if any."""

    @staticmethod
    def message(*data: object) -> str:
        n_allowed, *filters = data
        allowed = f"no token can be drawn: the mask allows {n_allowed} tokens"
        if not filters:
            return f"{allowed}, all of probability zero; it is a dead end"
        return f"{allowed}, none of those that {filters[0]} leaves; draw with weaker filters, or take it as a dead end"


class RuleRefused(GenlmError, ValueError):
    """A rule cannot serve in this walk. Data: the rules' names, where, the reason."""

    @staticmethod
    def message(*data: object) -> str:
        names, where, reason = data
        listed = ", ".join(map(str, names)) if isinstance(names, list | tuple) else str(names)
        return f"{listed} cannot be used with {where}: {reason}"


class WalkExhausted(GenlmError, RuntimeError):
    """A walk ended before its text. Data: "budget" or "dead end", tokens at hand, rollbacks, tokens drawn."""

    @staticmethod
    def message(*data: object) -> str:
        reason, n_tokens, n_undos, n_draws = data
        what = "its budget is spent" if reason == "budget" else "every token it could draw was taken back"
        return (
            f"the walk cannot go on: {what}, with {n_tokens} tokens at hand after {n_undos} rollbacks and {n_draws} "
            "draws; raise the budget, relax the rules or the filters, or pass when_exhausted='stop' or 'accept'"
        )


class ModelClosed(GenlmError, RuntimeError):
    """The model was closed. Data: none."""

    @staticmethod
    def message(*data: object) -> str:
        return "this model was closed; load it again"


class QueriesReset(ModelClosed):
    """`reset_async_queries` dropped this request before it was computed. Data: none."""

    @staticmethod
    def message(*data: object) -> str:
        return "this request was dropped by reset_async_queries before it was computed; ask again"


class ForkedEngine(ModelClosed):
    """A process forked from the one that loaded the model asked it. Data: parent pid, own pid."""

    @staticmethod
    def message(*data: object) -> str:
        loaded, here = data
        return f"the model was loaded in process {loaded} and cannot be used in its fork {here}; load it there"


class InvalidWeights(GenlmError, ValueError):
    """Nothing can be drawn by these log-weights. Data: the first few of them, how many there are."""

    @staticmethod
    def message(*data: object) -> str:
        first, n = data
        return f"{n} log-weights, first {first}: expected no NaN, no +inf, and at least one above -inf"


class InvalidProgram(GenlmError, ValueError):
    """A program asked its context for something that has no meaning. Data: what it did, what to do."""

    @staticmethod
    def message(*data: object) -> str:
        what, remedy = data
        return f"{what}; {remedy}"


class InferenceFailed(GenlmError, RuntimeError):
    """A run of particles ended before its end.

    Attributes:
        result: The population after the last whole step, a `genlm_backend.smc.Result`; from `particle_gibbs` what was
            visited so far, a `Chain`; or None. It is not pickled.
    """

    result: Any = None


class AllParticlesDead(InferenceFailed):
    """No particle has weight left. Data: step, number of particles."""

    @staticmethod
    def message(*data: object) -> str:
        step, n = data
        return (
            f"all {n} particles have weight zero at step {step}: the constraint cannot be met from any of them; "
            "use more particles, a proposal that knows the constraint, or on_failure='mark' to get the result so far"
        )


class NonFiniteWeight(InferenceFailed):
    """A particle's log-weight became NaN or +inf. Data: step, particle, the value."""

    @staticmethod
    def message(*data: object) -> str:
        step, particle, value = data
        return (
            f"particle {particle} has log-weight {value} at step {step}; expected a number below +inf (-inf is dead): "
            "look at what it scores there"
        )


class ParticleFailed(InferenceFailed):
    """The code of a particle raised; the cause is chained. Data: step, particle, the cause in words."""

    @staticmethod
    def message(*data: object) -> str:
        step, particle, cause = data
        return f"particle {particle} raised at step {step}: {cause}; all others were stopped"


class ReplayMismatch(GenlmError, RuntimeError):
    """A program run again did not ask what its recording holds. Data: where, what was asked, what is recorded."""

    @staticmethod
    def message(*data: object) -> str:
        where, asked, recorded = data
        return (
            f"{where}: the program asked for {asked}, its recording has {recorded}; between two runs only what the "
            "context answers may differ: look for randomness, time or shared state outside of it"
        )


class SlowPathWarning(UserWarning):
    """What was asked for is served correctly but more slowly than usual; the text says why."""
