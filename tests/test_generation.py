"""Generation and option scoring against transformers, and against themselves in another company."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import Reference, picture
from families import case_example, mesh_of, run, together

import sav_jax
from sav_jax import generation
from sav_jax.batching import assemble, plan_batches
from sav_jax.examples import Example
from sav_jax.extract import plan_prompts
from sav_jax.generation import extend, prefill, sample

# Log-probabilities of order ten, at most seven summed; measured deviations are some 1e-5.
PARITY = 1e-4

EXAMPLES = [
    Example("What is it?", (picture(37, 53),)),
    Example("What is the capital of France?"),
    Example("Is <image> left of <image>?", (picture(40, 30), picture(20, 60, 1))),
    Example("Describe. " * 30, (picture(200, 150, 2),)),
]


def without_stops(lmm: sav_jax.LMM) -> sav_jax.LMM:
    """A random model would rarely stop, and never where one wants."""
    return dataclasses.replace(lmm, stop_token_ids=())


def test_greedy_tokens_equal_transformers(reference: Reference, lmm: sav_jax.LMM) -> None:
    ours = sav_jax.generate(without_stops(lmm), EXAMPLES, max_new_tokens=16, batch_size=2, progress=False)
    for example, made in zip(EXAMPLES, ours, strict=True):
        text = lmm.processor.text(example.question, len(example.images))
        theirs = reference.greedy(reference.inputs(text, example.load_images()), 16)
        assert list(made.token_ids) == theirs
        assert made.text == lmm.processor.tokenizer.decode(theirs, skip_special_tokens=True)


def test_stops_at_the_stop_token(lmm: sav_jax.LMM) -> None:
    full = sav_jax.generate(without_stops(lmm), EXAMPLES[:2], max_new_tokens=12, progress=False)
    stop = full[0].token_ids[5]
    expected = [g.token_ids[: g.token_ids.index(stop)] if stop in g.token_ids else g.token_ids for g in full]
    stopping = dataclasses.replace(lmm, stop_token_ids=(stop, 10**6))
    ours = sav_jax.generate(stopping, EXAMPLES[:2], max_new_tokens=12, progress=False)
    assert [g.token_ids for g in ours] == expected
    assert len(ours[0].token_ids) <= 5


def test_fewer_new_tokens_are_the_first_of_more(lmm: sav_jax.LMM) -> None:
    many = sav_jax.generate(without_stops(lmm), EXAMPLES[:2], max_new_tokens=9, progress=False)
    few = sav_jax.generate(without_stops(lmm), EXAMPLES[:2], max_new_tokens=4, progress=False)
    assert [g.token_ids for g in few] == [g.token_ids[:4] for g in many]


def test_nothing_is_compiled_anew_within_a_bucket(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a step, a prompt's length, the number of new tokens, temperature, nucleus or seed."""
    traced: list[tuple[int, ...]] = []

    def counted(module: Any, params: Any, prefix: Any, token_ids: Any, *rest: Any) -> Any:
        traced.append(token_ids.shape)
        return extend(module, params, prefix, token_ids, *rest)

    monkeypatch.setattr(generation, "extend", counted)
    examples = [Example("x" * count, (picture(37, 53),)) for count in (10, 17)]
    prompts = plan_prompts(lmm, examples)
    assert len({len(prompt.token_ids) for prompt in prompts}) == 2
    assert len({plan_batches([prompt], 1)[0].bucket for prompt in prompts}) == 1

    def run(row: int, tokens: int, **options: Any) -> None:
        sav_jax.generate(without_stops(lmm), [examples[row]], tokens, top_k=9, progress=False, **options)

    run(0, 4, temperature=0.5, top_p=0.9)
    once = len(traced)
    assert 1 <= once <= 3, "the body of a loop is traced, not each of its steps"
    assert set(traced) == {(1, 1)}
    run(0, 32, temperature=0.5, top_p=0.9)
    run(1, 7, temperature=1.5, top_p=0.3, seed=5)
    assert len(traced) == once


def test_images_of_other_sizes_in_a_bucket_compile_nothing_new(lmm: sav_jax.LMM) -> None:
    """Where visual tokens go is data, not shape."""
    step: Any = generation._generate_step(lmm.module, 32, (), False, 8, False)  # top_k: a program of this test alone
    options = np.zeros(2, np.uint32), np.uint32(0), np.int32(3), np.float32(1), np.float32(1)
    for names in (("wide", "two"), ("tall", "text only"), ("two, marked", "odd")):
        step(lmm.params, together(lmm, [case_example(name) for name in names], tokens=320, rows=8, taps=4), *options)
    assert step._cache_size() == 1


@pytest.mark.parametrize("axes", [{"data": 2, "model": 4}], ids=str)
def test_a_mesh_continues_and_scores_alike(reference: Reference, lmm: sav_jax.LMM, axes: dict[str, int]) -> None:
    sharded = sav_jax.load(reference.directory, mesh=mesh_of(axes))
    ours, theirs = (
        sav_jax.generate(without_stops(model), EXAMPLES[:2], 8, batch_size=2, progress=False)
        for model in (sharded, lmm)
    )
    assert ours == theirs
    ours_scores, scores = (
        sav_jax.score_options(model, EXAMPLES[:1], ["cat", "a"], batch_size=2, progress=False)
        for model in (sharded, lmm)
    )
    np.testing.assert_allclose(ours_scores, scores, rtol=0, atol=PARITY)


def test_bfloat16_generates(reference: Reference) -> None:
    """Strict promotion would raise where the cache, or what is written into it, had another dtype."""
    half = sav_jax.load(reference.directory, dtype="bfloat16")
    (made,) = sav_jax.generate(without_stops(half), EXAMPLES[1:2], 4, progress=False)
    assert len(made.token_ids) == 4


def test_draws_depend_on_seed_and_place_not_on_the_batch(lmm: sav_jax.LMM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "progress": False}
    examples = [EXAMPLES[1]] * 3 + [Example("What is the capital of Spain?")]  # of one shape: fewer programs
    together = sav_jax.generate(without_stops(lmm), examples, seed=3, batch_size=4, **options)
    apart = sav_jax.generate(without_stops(lmm), examples, seed=3, batch_size=1, **options)
    assert together == apart
    assert len({g.token_ids for g in together[:3]}) > 1, "the same prompt at other places draws otherwise"
    assert sav_jax.generate(without_stops(lmm), examples, seed=4, batch_size=4, **options) != together
    likeliest = sav_jax.generate(without_stops(lmm), examples, top_k=1, batch_size=4, **options)
    greedy = sav_jax.generate(without_stops(lmm), examples, max_new_tokens=6, batch_size=4, progress=False)
    assert likeliest == greedy


def test_sampling_follows_the_filtered_distribution() -> None:
    """Frequencies of 20,000 draws against probabilities filtered by hand."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32)
    draws = 20_000
    logits = jnp.broadcast_to(jnp.log(p), (draws, 5))
    keys = jax.random.split(jax.random.key(0), draws)

    def frequencies(temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
        nucleus = None if top_p is None else jnp.float32(top_p)
        tokens = sample(logits, keys, jnp.float32(temperature), top_k, nucleus)
        return np.bincount(tokens, minlength=5) / draws

    def check(frequency: np.ndarray, weights: np.ndarray) -> None:
        expected = weights / weights.sum()
        # five standard deviations of a binomial frequency
        assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()

    check(frequencies(1.0, None, None), p)
    check(frequencies(0.5, None, None), p**2)
    check(frequencies(1.0, 2, None), p * [1, 1, 0, 0, 0])
    check(frequencies(1.0, None, 0.8), p * [1, 1, 1, 0, 0])
    check(frequencies(1.0, None, 0.01), p * [1, 0, 0, 0, 0])
    check(frequencies(1.0, 4, 0.72), p * [1, 1, 0, 0, 0])


def test_what_may_be_drawn_is_what_the_definition_says() -> None:
    """SQ-LLaVA's released sampling, against temperature, top-k and nucleus written out in NumPy: over 4,000 draws no
    token is seen but those, and each of the likely ones is.
    """
    temperature, top_k, top_p, draws = 1.2, 300, 0.95, 4_000
    logits = np.random.default_rng(0).normal(size=1_000).astype(np.float32) * 3
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)[:top_k]
    p = np.exp(scaled[order] - scaled[order].max())
    p /= p.sum()
    kept = order[np.cumsum(p) - p < top_p]
    assert 10 < len(kept) < top_k  # both filters bite
    keys = jax.random.split(jax.random.key(1), draws)
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, 1_000))
    tokens = np.asarray(sample(rows, keys, jnp.float32(temperature), top_k, jnp.float32(top_p)))
    assert set(tokens) <= set(kept)
    # A token missing from 4,000 draws at twice ln(4,000)/4,000: a chance of one in 16 million.
    likely = order[p > 2 * np.log(draws) / draws]
    assert len(likely) > 5
    assert set(likely) <= set(tokens)


def test_no_options_and_no_examples(lmm: sav_jax.LMM) -> None:
    assert sav_jax.generate(lmm, [], progress=False) == []
    assert sav_jax.score_options(lmm, [], ["a"], progress=False).shape == (0, 1)


def test_a_kept_prefix_serves_many_continuations(lmm: sav_jax.LMM) -> None:
    """Reading text after a cached prefix equals reading it all at once, whatever else was read after the prefix."""
    prompts = plan_prompts(lmm, EXAMPLES[:2])
    tails = [[5, 9, 30], [7], [11, 12]]
    longer = [[prompt.extended(tail) for prompt in prompts] for tail in tails]

    def batch_of(rows: list[Any]) -> Any:
        plan = plan_batches(rows, 2)[0]
        bucket = dataclasses.replace(plan.bucket, tokens=256, rows=5)
        plan = dataclasses.replace(plan, bucket=bucket, rows=(0, 1), size=2)
        return assemble(plan, rows, [lmm.processor.pixels(example.load_images()) for example in EXAMPLES[:2]])

    further = jax.jit(partial(extend, lmm.module))  # one program for all
    prefix = jax.jit(partial(prefill, lmm.module), static_argnames="room")(lmm.params, batch_of(prompts), room=5)
    for tail, rows in zip(tails, longer, strict=True):
        _, whole = run(lmm, batch_of(rows))
        tokens = jnp.array([tail + [0] * (3 - len(tail))] * 2, jnp.int32)
        logits, after = further(lmm.params, prefix, tokens, jnp.full(2, len(tail), jnp.int32))
        assert logits.shape[:2] == (2, 3)
        np.testing.assert_allclose(after.logits, whole, rtol=0, atol=1e-5)
        assert after.cache.lengths.tolist() == [len(prompt.token_ids) + len(tail) for prompt in prompts]
    # And a continuation of a continuation, of different lengths in each row.
    tokens = jnp.array([[5, 9, 0], [7, 0, 0]], jnp.int32)
    _, middle = further(lmm.params, prefix, tokens, jnp.array([2, 1], jnp.int32))
    _, end = further(lmm.params, middle, jnp.array([[30, 0, 0], [8, 0, 0]], jnp.int32), jnp.ones(2, jnp.int32))
    rows = [prompts[0].extended([5, 9, 30]), prompts[1].extended([7, 8])]
    np.testing.assert_allclose(end.logits, run(lmm, batch_of(rows))[1], rtol=0, atol=1e-5)


def test_score_options_sums_token_log_probabilities(reference: Reference, lmm: sav_jax.LMM) -> None:
    options = ["cat", "dog", "a", "giraffe"]
    ours = sav_jax.score_options(lmm, EXAMPLES[:3], options, batch_size=2, progress=False)
    for row, example in enumerate(EXAMPLES[:3]):
        text = lmm.processor.text(example.question, len(example.images))
        for column, option in enumerate(options):
            inputs = reference.inputs(text + option, example.load_images())
            with torch.no_grad():
                log_p = reference.model(**inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            start = len(ids) - len(option)  # byte-level vocabulary: one token a letter
            expected = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
            np.testing.assert_allclose(ours[row, column], expected, rtol=0, atol=PARITY)
    single = sav_jax.score_options(lmm, EXAMPLES[:1], ["a", "b"], progress=False)
    np.testing.assert_allclose(single[0, 0], ours[0, 2], rtol=0, atol=PARITY)


@pytest.mark.parametrize("options", [["a", "a"], ["a", ""]])
def test_bad_options(lmm: sav_jax.LMM, options: list[str]) -> None:
    with pytest.raises(sav_jax.UserError, match=r"given twice|empty"):
        sav_jax.score_options(lmm, EXAMPLES[:1], options, progress=False)
    with pytest.raises(sav_jax.UserError, match="must be a list of strings, not the one string 'ab'"):
        sav_jax.score_options(lmm, EXAMPLES[:1], "ab", progress=False)


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}, {"seed": -1}, {"batch_size": 0}]
)
def test_bad_generation_options(lmm: sav_jax.LMM, bad: dict[str, Any]) -> None:
    with pytest.raises(sav_jax.UserError):
        sav_jax.generate(lmm, EXAMPLES[:1], **bad)


@pytest.mark.parametrize("bad", [{"max_new_tokens": 2.5}, {"top_k": 1.5}, {"seed": "x"}])
def test_numbers_must_be_whole(lmm: sav_jax.LMM, bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(sav_jax.UserError, match=f"{name} must be a whole number, not "):
        sav_jax.generate(lmm, EXAMPLES[:1], **bad)
