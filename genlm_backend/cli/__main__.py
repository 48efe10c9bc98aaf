"""`python -m genlm_backend.cli` is the command `genlm-backend`."""

from __future__ import annotations

from genlm_backend.cli import main

if __name__ == "__main__":
    main()
