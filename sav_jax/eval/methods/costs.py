"""What prompts with demonstrations cost, beside what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sav_jax.aim import cache_bytes_per_token
from sav_jax.eval.features import Features
from sav_jax.examples import Example
from sav_jax.extract import plan_prompts
from sav_jax.reading import Readings


def answered(features: Features, prompts: Sequence[Example]) -> tuple[Readings, dict[str, Any]]:
    """Likelihoods and answers of queries after demonstrations, and as facts their cost.

    Args:
      features: of the split.
      prompts: Q queries with their demonstrations.

    Returns:
      The readings; ``prompt_tokens`` of a query on average (virtual ones count like others), ``cache_bytes``, the
      memory of their keys and values, and, of what was not in the feature cache, ``query_passes`` and
      ``query_seconds`` in the model.
    """
    reader = features.reader
    lmm = reader.lmm
    lengths = [len(prompt.token_ids) for prompt in plan_prompts(lmm, prompts)]
    tokens = float(np.mean(lengths)) if lengths else 0.0
    seconds = reader.seconds
    readings = features.answers(prompts)
    seconds = reader.seconds - seconds
    facts: dict[str, Any] = {
        "prompt_tokens": round(tokens, 1),
        "cache_bytes": round(tokens * cache_bytes_per_token(lmm)),
    }
    if seconds > 0 and readings.passes:
        facts |= {"query_passes": readings.passes, "query_seconds": round(seconds, 3)}
    return readings, facts
