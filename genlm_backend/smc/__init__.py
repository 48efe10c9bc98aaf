"""Sequential Monte Carlo: particles as coroutines, exact bookkeeping, reproducible from a seed."""

from genlm_backend.smc.awrs import AWRS
from genlm_backend.smc.context import Context
from genlm_backend.smc.distributions import Bernoulli, Categorical, Geometric, Normal
from genlm_backend.smc.engine import resume, smc
from genlm_backend.smc.moves import Move, regenerate
from genlm_backend.smc.programs import Done, Particle, program
from genlm_backend.smc.proposals import Direct, Proposal, Proposed, TopK
from genlm_backend.smc.recording import Recording
from genlm_backend.smc.result import Result

__all__ = [
    "AWRS",
    "Bernoulli",
    "Categorical",
    "Context",
    "Direct",
    "Done",
    "Geometric",
    "Move",
    "Normal",
    "Particle",
    "Proposal",
    "Proposed",
    "Recording",
    "Result",
    "TopK",
    "program",
    "regenerate",
    "resume",
    "smc",
]
