"""Sequential Monte Carlo: particles as coroutines, exact bookkeeping, reproducible from a seed."""

from genlm_backend.smc.awrs import AWRS
from genlm_backend.smc.context import Context
from genlm_backend.smc.distributions import Bernoulli, Categorical, Geometric, Normal
from genlm_backend.smc.engine import resume, smc
from genlm_backend.smc.enumeration import enumerate_exactly
from genlm_backend.smc.gibbs import Chain, particle_gibbs
from genlm_backend.smc.islands import Islands, islands, resume_islands
from genlm_backend.smc.moves import Move, regenerate
from genlm_backend.smc.programs import Done, Particle, program
from genlm_backend.smc.proposals import Direct, Guided, Proposal, Proposed, TopK
from genlm_backend.smc.recording import Recording
from genlm_backend.smc.result import Result
from genlm_backend.smc.sequences import after_bytes, after_tokens, every_token, sequences
from genlm_backend.smc.strict import strict
from genlm_backend.smc.walks import WalkProposal

__all__ = [
    "AWRS",
    "Bernoulli",
    "Categorical",
    "Chain",
    "Context",
    "Direct",
    "Done",
    "Geometric",
    "Guided",
    "Islands",
    "Move",
    "Normal",
    "Particle",
    "Proposal",
    "Proposed",
    "Recording",
    "Result",
    "TopK",
    "WalkProposal",
    "after_bytes",
    "after_tokens",
    "enumerate_exactly",
    "every_token",
    "islands",
    "particle_gibbs",
    "program",
    "regenerate",
    "resume",
    "resume_islands",
    "sequences",
    "smc",
    "strict",
]
