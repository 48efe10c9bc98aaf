"""What was computed, addressed by tokens."""

from genlm_backend.cache.prefix_tree import Match, PrefixTree
from genlm_backend.cache.row_memo import RowMemo

__all__ = ["Match", "PrefixTree", "RowMemo"]
