"""The search for heads to replace: its gradient, its losses and what it finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from checkpoints import Reference, picture
from scipy.special import log_softmax, logsumexp

import sav_jax
from sav_jax import task_vectors
from sav_jax.batching import BatchPlan, Bucket, assemble
from sav_jax.examples import Example
from sav_jax.extract import plan_prompts
from sav_jax.models.batch import Batch
from sav_jax.models.intervention import HeadEdit
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.task_vectors import Recipe, Search, _Evaluation, find_heads, policy_gradient

# Log-likelihoods of order ten in another program and other company.
LOSS = 1e-4

ANSWERS = ["cat", "giraffe"]  # one of them longer, and so the end of the other not at the end of the table
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


@functools.cache
def _logits(module: MultimodalModel) -> Callable[..., jax.Array]:
    def logits(params: Any, batch: Batch, edit: HeadEdit) -> jax.Array:
        output: Any = module.apply({"params": params}, batch, logits="all", edit=edit)
        return output.logits

    return jax.jit(logits)


def losses_of_whole_prompts(lmm: sav_jax.LMM, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of every example's answer and of a stop token behind it, from one pass over the prompt
    with its answer and no cache; heads are replaced from the last token of the prompt on.
    """
    answers = [lmm.processor.encode(ANSWERS[target]) for target in TARGETS]
    prompts = plan_prompts(lmm, EXAMPLES)
    longer = [prompt.extended(ids) for prompt, ids in zip(prompts, answers, strict=True)]
    sizes = np.array([(len(p.token_ids), p.num_rows, p.visual_index.shape[1]) for p in longer])
    plan = BatchPlan(Bucket(*sizes.max(axis=0).tolist()), tuple(range(len(longer))), len(longer))
    batch: Batch = assemble(plan, longer, [lmm.processor.pixels(example.load_images()) for example in EXAMPLES])
    first = np.array([len(prompt.token_ids) - 1 for prompt in prompts])
    tokens = np.arange(batch.token_ids.shape[1])[None, :] >= first[:, None]
    edit = dataclasses.replace(HeadEdit.replacing(values, mask), tokens=tokens)
    log_p = log_softmax(np.asarray(_logits(lmm.module)(lmm.params, batch, edit), np.float64), axis=-1)
    losses = []
    for row, (start, ids) in enumerate(zip(first, answers, strict=True)):
        loss = -sum(log_p[row, start + i, token] for i, token in enumerate(ids))
        if lmm.stop_token_ids:
            loss -= logsumexp(log_p[row, start + len(ids), list(lmm.stop_token_ids)])
        losses.append(loss)
    return np.array(losses)


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


@pytest.mark.parametrize("stops", [(), (5, 9)])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_losses_are_those_of_whole_prompts(
    family: str, stops: tuple[int, ...], lmm: sav_jax.LMM, make_reference: Callable[..., Reference]
) -> None:
    """The last token on the cache of the others, for all masks, is as good as the whole prompt for each."""
    lmm = lmm if family == "llava_onevision" else sav_jax.load(make_reference(family).directory)
    lmm = dataclasses.replace(lmm, stop_token_ids=stops)
    values = random_values(lmm)
    # Named twice, or of another vocabulary: neither changes what stops.
    named = dataclasses.replace(lmm, stop_token_ids=(*stops, *stops[:1], 10**6))
    evaluate = _Evaluation(named, EXAMPLES, ANSWERS, TARGETS, values, 2)
    masks = np.random.default_rng(1).random((10, *lmm.heads_shape[:2])) < 0.3
    parts = [np.array([0, 2]), np.array([1, 3]), np.array([4])]
    losses = np.concatenate([evaluate(batch, masks) for batch in evaluate.batches(parts)], axis=1)
    assert evaluate.passes == 5
    order = np.concatenate(parts)
    for row in (0, 9):
        expected = losses_of_whole_prompts(lmm, values, masks[row])
        np.testing.assert_allclose(losses[row], expected[order], rtol=0, atol=LOSS)
    assert losses.std(axis=0).min() > 100 * LOSS, "the masks would not matter"


def test_going_on_behind_the_answer_is_penalised(lmm: sav_jax.LMM) -> None:
    """Whether a patched model stops is part of its loss: a search that looks at it finds heads with which it rather
    does, and with every token a stop nothing is left to lose.
    """
    values = random_values(lmm)
    mute, every = (
        dataclasses.replace(lmm, stop_token_ids=stops) for stops in ((), tuple(range(lmm.config.text.vocab_size)))
    )
    masks = np.random.default_rng(1).random((10, *lmm.heads_shape[:2])) < 0.3
    losses = []
    for model in (mute, every, lmm):
        evaluate = _Evaluation(model, EXAMPLES, ANSWERS, TARGETS, values, 2)
        (batch,) = evaluate.batches([np.array([0, 1])])
        losses.append(evaluate(batch, masks))
        assert evaluate.passes == 2, "the same prompts, with the end or without"
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=LOSS)
    assert (losses[2] > losses[0] + 1).all(), "of about 260 tokens one stops"

    def lost_by_not_stopping(searched: sav_jax.LMM) -> float:
        recipe = Recipe(steps=20, examples=2, masks=10, draws=9)  # shapes that are compiled already
        mask = find_heads(searched, EXAMPLES, ANSWERS, TARGETS, values, recipe, progress=False).mask
        return float((losses_of_whole_prompts(lmm, values, mask) - losses_of_whole_prompts(mute, values, mask)).mean())

    assert lost_by_not_stopping(lmm) < lost_by_not_stopping(mute) - 100 * LOSS


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


def test_each_process_reads_the_rows_of_its_own_devices(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if two processes held two rows each, of three that are filled up to four."""

    def parts(own: slice) -> list[Any]:
        monkeypatch.setattr(task_vectors, "own_rows", lambda mesh, number: own)
        evaluation = _Evaluation(lmm, EXAMPLES, ANSWERS, TARGETS, random_values(lmm), 4)
        [(rows, prompts, last)] = evaluation.batches([np.array([1, 2, 4])])
        assert rows == (1, 2, 4)
        return jax.tree.leaves((prompts, last))

    whole, first, second = (parts(slice(*ends)) for ends in ((0, 4), (0, 2), (2, 4)))
    assert len(whole) == len(first) == len(second)
    for all_rows, *halves in zip(whole, first, second, strict=True):
        np.testing.assert_array_equal(np.concatenate(halves), all_rows)
