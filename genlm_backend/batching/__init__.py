"""From many waiting coroutines to few calls of an engine."""

from genlm_backend.batching.batcher import Batcher, Job
from genlm_backend.batching.blocking import run_apart, run_sync

__all__ = ["Batcher", "Job", "run_apart", "run_sync"]
