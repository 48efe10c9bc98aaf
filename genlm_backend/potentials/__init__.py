"""Potentials: weights of token sequences, from language models, grammars and other constraints, and their products."""

from genlm_backend.potentials.base import Constraint, Potential
from genlm_backend.potentials.combinators import Product, Tempered
from genlm_backend.potentials.context_free import ContextFree
from genlm_backend.potentials.grammar import Grammar, GrammarVocabulary
from genlm_backend.potentials.language_model import LanguageModel
from genlm_backend.potentials.lifting import Lifted
from genlm_backend.potentials.limits import Limits
from genlm_backend.potentials.predicate import BytePredicate
from genlm_backend.potentials.strings import StringSet

__all__ = [
    "BytePredicate",
    "Constraint",
    "ContextFree",
    "Grammar",
    "GrammarVocabulary",
    "LanguageModel",
    "Lifted",
    "Limits",
    "Potential",
    "Product",
    "StringSet",
    "Tempered",
]
