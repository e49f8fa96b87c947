"""AIM as a method: the demonstrations of in-context learning, read once and shown as virtual tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from eval_made import grey_split, grey_task, made_features, read_features
from test_aim import made_aim

import sav_jax
from sav_jax import UserError
from sav_jax.aim import DemonstrationBank, after_demonstrations
from sav_jax.eval.methods import METHODS, Settings
from sav_jax.extract import plan_prompts

# Log-probabilities of order ten in another program and other company.
SCORES = 1e-4


def test_the_model_reads_virtual_tokens(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    """Against the library's own generation and option scoring after a bank's demonstrations."""
    split = grey_split()
    task = dataclasses.replace(grey_task(), answers={"dark": "black"})
    aim = made_aim(lmm)
    aim.save(tmp_path / "aim")
    settings = Settings(shots=2, demonstrations=3, seed=1, aim=str(tmp_path / "aim"))
    runs = []
    for _ in range(2):
        features = read_features(lambda: lmm, split, task=task, settings=settings, cache=str(tmp_path / "cache"))
        icl, written, likely = (METHODS[name].run(features) for name in ("icl", "aim", "aim-likelihood"))
        runs.append((features.reader.passes, features.reader.demonstration_passes))
    queries = len(split.queries)
    # A demonstration is read again by another run: only prompts are in the feature cache.
    assert runs == [(2 * queries, 3), (0, 3)]
    assert written.facts["demonstrations"] == icl.facts["demonstrations"]
    chosen = [
        next(item for item in split.support if item.example.id == name) for name in written.facts["demonstrations"]
    ]
    shown = [dataclasses.replace(item.example, label=task.answer(item.label)) for item in chosen]
    tokens = DemonstrationBank(lmm, aim).get(shown)
    prompts = [after_demonstrations(item.example, tokens, aim.layout) for item in split.queries]
    answers = [task.answer(label) for label in split.labels]
    expected = sav_jax.score_options(lmm, prompts, answers, progress=False)
    assert likely.scores is not None
    np.testing.assert_allclose(likely.scores, expected, rtol=0, atol=SCORES)
    assert written.texts == tuple(g.text for g in sav_jax.generate(lmm, prompts, 3, progress=False))
    lengths = [len(prompt.token_ids) for prompt in plan_prompts(lmm, prompts)]
    assert written.facts["prompt_tokens"] == round(float(np.mean(lengths)), 1) < icl.facts["prompt_tokens"]
    sizes = lmm.config.text
    per_token = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * 4
    assert written.facts["cache_bytes"] == round(float(np.mean(lengths)) * per_token)


def test_bad_options(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="methods aim and aim-likelihood need a projection: --aim DIR"):
        METHODS["aim"].run(made_features(grey_split()))
    dataclasses.replace(made_aim(lmm), model="another", name="a larger model").save(tmp_path / "aim")
    features = read_features(lambda: lmm, grey_split(), settings=Settings(shots=2, aim=str(tmp_path / "aim")))
    with pytest.raises(UserError, match="the projection was trained for a larger model"):
        METHODS["aim-likelihood"].run(features)
