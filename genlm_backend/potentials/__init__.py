"""Potentials: weights of token sequences, from language models, grammars and other constraints, and their products."""

from genlm_backend.potentials.base import Constraint, Potential
from genlm_backend.potentials.combinators import Product, Tempered

__all__ = ["Constraint", "Potential", "Product", "Tempered"]
