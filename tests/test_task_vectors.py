"""The search for heads to replace: its gradient, its losses and what it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkpoints import Reference, picture

import sav_jax
from sav_jax.examples import Example
from sav_jax.models.intervention import HeadEdit
from sav_jax.reading import read
from sav_jax.task_vectors import Recipe, Search, _Evaluation, find_heads, policy_gradient

# Log-likelihoods of order ten in another program and other company.
LOSS = 1e-4

ANSWERS = ["cat", "giraffe"]
TARGETS = np.array([0, 1, 1, 0, 1])
# Prompts of several lengths and numbers of images, which the search runs in one shape.
EXAMPLES = [
    Example("What is it?", (picture(37, 53),)),
    Example("What is the capital of France?"),
    Example("Is <image> left of <image>?", (picture(40, 30), picture(20, 60, 1))),
    Example("What is it, please?", (picture(30, 30, 2),)),
    Example("Which? " * 5),
]
SMALL = Recipe(steps=4, examples=2, masks=6, draws=3)


def random_values(lmm: sav_jax.LMM) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(lmm.heads_shape).astype(np.float32)


def losses_of_whole_prompts(lmm: sav_jax.LMM, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every example's answer, from passes over whole prompts."""
    edit = HeadEdit.replacing(values, mask)
    scores = read(lmm, EXAMPLES, ANSWERS, edit=edit, keep_heads=False, progress=False).scores
    return -scores[np.arange(len(TARGETS)), TARGETS]


def test_the_gradient_is_that_of_the_log_probability() -> None:
    """Against PyTorch's Bernoulli distribution and automatic differentiation."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.standard_normal((3, 4)), requires_grad=True)
    p = torch.sigmoid(logits)
    masks = torch.tensor(rng.random((7, 3, 4)) < 0.4)
    losses = torch.tensor(rng.standard_normal(7) * 3 + 5)
    scaled = (losses - losses.mean()) / (losses.std() + 1e-3)
    log_p = torch.distributions.Bernoulli(p).log_prob(masks.double()).sum((1, 2))
    (scaled * log_p).mean().backward()
    ours = policy_gradient(losses.numpy(), masks.numpy(), p.detach().numpy())
    assert logits.grad is not None
    np.testing.assert_allclose(ours, logits.grad.numpy(), rtol=0, atol=1e-12)
    # Equal losses and a single mask say nothing.
    np.testing.assert_array_equal(policy_gradient(np.ones(7), masks.numpy(), p.detach().numpy()), 0)
    np.testing.assert_array_equal(policy_gradient(np.ones(1), masks[:1].numpy(), p.detach().numpy()), 0)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_losses_are_those_of_whole_prompts(
    family: str, lmm: sav_jax.LMM, make_reference: Callable[..., Reference]
) -> None:
    """The last token on the cache of the others, for all masks, is as good as the whole prompt for each."""
    lmm = lmm if family == "llava_onevision" else sav_jax.load(make_reference(family).directory)
    values = random_values(lmm)
    evaluate = _Evaluation(lmm, EXAMPLES, ANSWERS, TARGETS, values, 2)
    masks = np.random.default_rng(1).random((10, *lmm.heads_shape[:2])) < 0.3
    parts = [np.array([0, 2]), np.array([1, 3]), np.array([4])]
    losses = np.concatenate([evaluate(batch, masks) for batch in evaluate.batches(parts)], axis=1)
    assert evaluate.passes == 5
    order = np.concatenate(parts)
    for row in (0, 9):
        expected = losses_of_whole_prompts(lmm, values, masks[row])
        np.testing.assert_allclose(losses[row], expected[order], rtol=0, atol=LOSS)
    assert losses.std(axis=0).min() > 100 * LOSS, "the masks would not matter"


def test_what_is_found_is_told_rightly(lmm: sav_jax.LMM) -> None:
    values = random_values(lmm)
    found = find_heads(lmm, EXAMPLES, ANSWERS, TARGETS, values, SMALL, progress=False)
    assert found.mask.shape == lmm.heads_shape[:2]
    assert found.mask.any()
    assert found.passes == 4 * 2 + 5, "two per step, and all five at the end"
    for mask, loss in ((found.mask, found.loss), (np.zeros_like(found.mask), found.loss_before)):
        expected = losses_of_whole_prompts(lmm, values, mask).mean()
        np.testing.assert_allclose(loss, expected, rtol=0, atol=LOSS)


def test_a_search_is_its_seed_s(lmm: sav_jax.LMM) -> None:
    def search(seed: int) -> Search:
        return find_heads(lmm, EXAMPLES, ANSWERS, TARGETS, random_values(lmm), SMALL, seed, progress=False)

    first, second, other = search(0), search(0), search(1)
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.loss == second.loss
    assert (first.mask != other.mask).any()


def test_searching_is_better_than_drawing(lmm: sav_jax.LMM) -> None:
    """Against as many masks as the search looks at in its last two steps, drawn from where it began."""
    values = random_values(lmm)
    recipe = Recipe(steps=40, examples=4, masks=16)
    found = find_heads(lmm, EXAMPLES, ANSWERS, TARGETS, values, recipe, progress=False)
    drawn = find_heads(
        lmm, EXAMPLES, ANSWERS, TARGETS, values, dataclasses.replace(recipe, steps=0, draws=32), progress=False
    )
    print(found.loss, drawn.loss, found.loss_before)
    assert found.loss < drawn.loss


def test_fewer_examples_than_a_step_takes(lmm: sav_jax.LMM) -> None:
    recipe = dataclasses.replace(SMALL, examples=4, steps=1, validation=1)
    found = find_heads(lmm, EXAMPLES[:2], ANSWERS, TARGETS[:2], random_values(lmm), recipe, progress=False)
    assert found.passes == 2 + 1
