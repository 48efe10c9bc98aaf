"""What was computed, addressed by tokens."""

from genlm_backend.cache.prefix_tree import Match, PrefixTree
from genlm_backend.cache.row_memo import RowMemo
from genlm_backend.cache.row_memory import RowMemory

__all__ = ["Match", "PrefixTree", "RowMemo", "RowMemory"]
