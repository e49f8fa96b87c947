"""Reports: results as a page that needs nothing else, and as tables and pictures for other documents."""

from __future__ import annotations

from sav_jax.eval.report.write import write_report

__all__ = ["write_report"]
