"""``python -m sav_jax``: the same command line as ``sav-jax``."""

from __future__ import annotations

from sav_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
