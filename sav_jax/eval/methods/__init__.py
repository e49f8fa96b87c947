"""Ways to answer a task's queries, by name. Each is a small file that reads the same features."""

from __future__ import annotations

from sav_jax.eval.methods import aim, asking, centroid, dual, hec, icl, knn, lora, mtv, probes, reference, sav
from sav_jax.eval.methods.base import Method, Outcome, Settings

_MODULES = (reference, asking, icl, aim, mtv, lora, dual, sav, hec, centroid, knn, probes)

METHODS: dict[str, Method] = {method.name: method for module in _MODULES for method in module.METHODS}
"""The methods known by name."""

__all__ = ["METHODS", "Method", "Outcome", "Settings"]
