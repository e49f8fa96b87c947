"""What is asked of LLaVA-OneVision alone, or of one family for all (the rest is in ``test_families.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference, picture
from families import case_example, run_together

import sav_jax
from sav_jax.batching import assemble, plan_batches
from sav_jax.extract import plan_prompts

PARITY, INVARIANCE = 1e-4, 1e-5  # as in test_families.py


def test_capture_contract(lmm: sav_jax.LMM) -> None:
    """One collection, one leaf, [L, B, R, N, H]; any positions; no logits unless asked."""
    example = case_example("odd")
    prompts = plan_prompts(lmm, [example])
    plan = plan_batches(prompts, 1)[0]
    length = len(prompts[0].token_ids)
    batch = assemble(plan, prompts, [lmm.processor.pixels(example.load_images())])
    every = replace(batch, read_positions=np.arange(length, dtype=np.int32)[None])

    def run(logits: str, batch: Any) -> Any:
        return lmm.module.apply({"params": lmm.params}, batch, logits=logits, mutable=["intermediates"])

    output, state = jax.eval_shape(lambda: run("none", every))
    assert len(jax.tree.leaves(state)) == 1
    leaf = state["intermediates"]["language_model"]["layers"]["self_attn"]["head_outputs"]
    assert leaf.shape == (4, 1, length, 10, 4)
    assert output.logits is None
    jitted = jax.jit(run, static_argnums=0)
    output, state = jitted("all", every)
    assert output.logits.shape == (1, plan.bucket.tokens, lmm.config.text.vocab_size)
    (heads,) = jax.tree.leaves(state)
    last, state = jitted("read", batch)
    np.testing.assert_allclose(jax.tree.leaves(state)[0], heads[:, :, -1:], rtol=0, atol=INVARIANCE)
    np.testing.assert_allclose(last.logits[:, 0], output.logits[:, length - 1], rtol=0, atol=INVARIANCE)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"vision_feature_layer": -2}, id="feature layer -2"),
        pytest.param({"vision_feature_layer": 1}, id="feature layer 1"),
        pytest.param({"multimodal_projector_bias": False}, id="no projector bias"),
        pytest.param({"projector_hidden_act": "gelu_pytorch_tanh"}, id="projector activation"),
    ],
)
def test_config_options(make_reference: Callable[..., Reference], options: dict[str, object]) -> None:
    reference = make_reference(**options)
    lmm = sav_jax.load(reference.directory)
    example = sav_jax.Example("What is it?", (picture(37, 53),))
    theirs = reference.inputs(lmm.processor.text(example.question, 1), example.load_images())
    heads, logits = reference.run(theirs)
    ours = run_together(lmm, [example])
    np.testing.assert_allclose(ours[0][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(ours[1][0], logits, rtol=0, atol=PARITY)


def test_a_mesh_gives_the_same_heads_whatever_the_batch(reference: Reference, lmm: sav_jax.LMM) -> None:
    """Five rows in batches of two, on eight devices."""
    sharded = sav_jax.load(reference.directory, mesh=jax.sharding.Mesh(np.array(jax.devices()), ("data",)))
    rows = [case_example(name) for name in ("odd", "square", "two", "text only", "wide")]
    ours, theirs = (sav_jax.extract_heads(m, rows, batch_size=2, progress=False) for m in (sharded, lmm))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=INVARIANCE)


def test_bfloat16_stays_close_and_keeps_its_dtype(reference: Reference, lmm: sav_jax.LMM) -> None:
    half = sav_jax.load(reference.directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    heads, exact = (sav_jax.extract_heads(m, [case_example("square")], progress=False)[0] for m in (half, lmm))
    cosine = (heads * exact).sum(-1) / np.linalg.norm(heads, axis=-1) / np.linalg.norm(exact, axis=-1)
    # bfloat16 keeps 8 bits: a relative error of 2^-8 per operation, some 30 in a row along four layers, adds up to
    # about 2^-8 * sqrt(30) = 2 % of a vector, whose cosine then is 1 - 0.02^2 / 2; the median head must be well within
    # ten times that.
    assert np.median(1 - cosine) < 2e-3


def test_next_token_logits_are_those_of_the_reference(reference: Reference, lmm: sav_jax.LMM) -> None:
    names = ["odd", "two, marked", "text only"]
    ours = sav_jax.next_token_logits(lmm, [case_example(name) for name in names], batch_size=4, progress=False)
    for row, name in zip(ours, names, strict=True):
        example = case_example(name)
        text = lmm.processor.text(example.question, len(example.images))
        _, logits = reference.run(reference.inputs(text, example.load_images()))
        np.testing.assert_allclose(row, logits, rtol=0, atol=PARITY)
