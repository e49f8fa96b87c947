"""Prompts that share their images, read together, give what each gives by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Reference, picture

import sav_jax
from sav_jax import extract, reading
from sav_jax.batching import plan_batches
from sav_jax.examples import Example
from sav_jax.extract import content_key, extract_heads, media_digests, plan_prompts
from sav_jax.headstore import HeadStore
from sav_jax.packing import MAX_READS, pack, shared_length

ONE, OTHER = picture(37, 53), picture(30, 60, seed=1)
QUESTIONS = ["What is it?", "Is it a cat or is it a dog?", "Where?", "Is the sky blue?"]
EXAMPLES = [
    *(Example(question, (ONE,)) for question in QUESTIONS[:3]),
    Example("What is it?", (OTHER,)),
    Example("What is the capital of France?"),
    *(Example(f"Is <image> left of <image>? {question}", (ONE, OTHER)) for question in QUESTIONS[:2]),
    Example(f"Is <image> above <image>? {QUESTIONS[0]}", (ONE, OTHER)),
    Example(QUESTIONS[3], (ONE,)),
]
ALIKE = {(0, 1, 2, 8), (5, 6)}
# The same sums in another order: rounding of float32 values of order one.
ROUNDING = 1e-5


@pytest.fixture(params=["llava_onevision", "qwen2_vl"], scope="module")
def family(request: pytest.FixtureRequest, make_reference: Callable[..., Reference], lmm: sav_jax.LMM) -> sav_jax.LMM:
    return lmm if request.param == "llava_onevision" else sav_jax.load(make_reference(request.param).directory)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every batch that is run."""
    found: list[Any] = []
    original = extract.run_batches

    def spy(lmm: Any, step: Any, *rest: Any, **options: Any) -> Any:
        def spied(params: Any, batch: Any, *further: Any) -> Any:
            found.append(batch)
            return step(params, batch, *further)

        return original(lmm, spied, *rest, **options)

    monkeypatch.setattr(extract, "run_batches", spy)
    return found


def packs_of(lmm: sav_jax.LMM, examples: list[Example]) -> list[Any]:
    return pack(plan_prompts(lmm, examples), [media_digests(example) for example in examples])


def test_only_what_shares_images_and_the_text_before_them_is_packed(family: sav_jax.LMM) -> None:
    packs = packs_of(family, EXAMPLES)
    assert {one.members for one in packs if len(one.members) > 1} == ALIKE
    assert sorted(i for one in packs for i in one.members) == list(range(len(EXAMPLES)))
    prompts = plan_prompts(family, EXAMPLES)
    for one in packs:
        shared = shared_length(prompts[one.members[0]])
        rests = [len(prompts[i].token_ids) - shared for i in one.members]
        assert len(one.prompt.token_ids) == shared + sum(rests)


def test_heads_are_those_of_every_prompt_alone(
    family: sav_jax.LMM, batches: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    apart = extract_heads(family, EXAMPLES, batch_size=4, progress=False, reuse_images=False)
    assert all(batch.segments is None for batch in batches)
    batches.clear()
    together = extract_heads(family, EXAMPLES, batch_size=4)
    assert sum(batch.segments is not None for batch in batches) >= 1
    assert "6 prompts share their images; 2 passes read them" in capsys.readouterr().err
    np.testing.assert_allclose(together, apart, rtol=0, atol=ROUNDING)
    for row in (0, 3, 5):
        assert np.abs(together[row] - together[row + 1]).max() > 1e-2, "they would be equal if nothing was asked"


def test_questions_do_not_see_each_other(lmm: sav_jax.LMM) -> None:
    """Whatever else is asked, in as many tokens, the bits are the same."""
    asked = [Example(question, (ONE,)) for question in ("What?", "Where?", "Who's it?")]
    others = [asked[0], Example("Which?", (ONE,)), Example("How many?", (ONE,))]
    assert len(packs_of(lmm, asked)) == len(packs_of(lmm, others)) == 1
    first, second = (extract_heads(lmm, examples, progress=False) for examples in (asked, others))
    np.testing.assert_array_equal(first[0], second[0])
    assert np.abs(first[1] - second[1]).max() > 1e-2


def test_packs_are_bounded_and_images_are_compared_by_content(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        ONE.save(tmp_path / name)
    examples = [Example(f"Question {i}?", (tmp_path / f"{'ab'[i % 2]}.png",)) for i in range(MAX_READS + 3)]
    assert [len(one.members) for one in packs_of(lmm, examples)] == [MAX_READS, 3]


def test_a_long_text_after_a_small_image_is_run_alone(lmm: sav_jax.LMM) -> None:
    examples = [Example(f"{i} " + "long " * 400, (picture(13, 11),)) for i in range(2)]
    assert [one.members for one in packs_of(lmm, examples)] == [(0,), (1,)]


def test_a_resumed_run_gives_the_same_bits(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    whole = extract_heads(lmm, EXAMPLES, 2, tmp_path / "whole", progress=False)
    store = HeadStore.open(tmp_path / "cut")
    keys = [content_key(lmm, *of) for of in zip(plan_prompts(lmm, EXAMPLES), EXAMPLES, strict=True)]
    store.write([keys[i] for i in (0, 3, 6)], whole[[0, 3, 6]])
    np.testing.assert_array_equal(extract_heads(lmm, EXAMPLES, 2, store, progress=False), whole)
    stored = [
        {p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()} for name in ("whole", "cut")
    ]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_first_layers_alone_give_their_heads(
    reference: Reference, lmm: sav_jax.LMM, num_layers: int, tmp_path: Path
) -> None:
    """Of parameters of all layers; and as if only those had been loaded, under the same keys."""
    examples = EXAMPLES[2:5]
    full = extract_heads(lmm, examples, progress=False)
    shallow = extract_heads(lmm, examples, cache=tmp_path, progress=False, num_layers=num_layers)
    np.testing.assert_allclose(shallow, full[:, :num_layers], rtol=0, atol=ROUNDING)
    loaded = sav_jax.load(reference.directory, num_layers=num_layers)
    np.testing.assert_array_equal(extract_heads(loaded, examples, cache=tmp_path, progress=False), shallow)
    assert len(list(tmp_path.rglob("*"))) == len({path.name for path in tmp_path.rglob("*")})
    with pytest.raises(sav_jax.UserError, match="has 1 to 4 layers, not 5"):
        extract_heads(lmm, examples, num_layers=5)


def test_few_rows_at_a_time_give_the_same_heads(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU does with a large model."""
    examples = [dataclasses.replace(example, label="x") for example in EXAMPLES]
    whole = extract_heads(lmm, examples, 4, progress=False)
    monkeypatch.setattr(extract, "_CACHED_BYTES", 1)
    monkeypatch.setattr(extract, "heads_step", extract.heads_step.__wrapped__)
    np.testing.assert_allclose(extract_heads(lmm, examples, 4, progress=False), whole, rtol=0, atol=ROUNDING)


def test_answers_are_those_of_every_prompt_alone(
    family: sav_jax.LMM, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads, likelihoods of options and what is written: all of one pass over what prompts share."""
    options = ["yes", "no", "maybe not"]
    together = reading.read(family, EXAMPLES, options, max_new_tokens=6, batch_size=4)
    assert "6 prompts share their images; 2 passes read them" in capsys.readouterr().err
    assert sum(passes) == together.passes == len(EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        alone = reading.read(family, [example], options, max_new_tokens=6, progress=False)
        np.testing.assert_allclose(together.heads[row], alone.heads[0], rtol=0, atol=ROUNDING)
        # A log-likelihood of up to three tokens, each a sum over the vocabulary of logits of order one.
        np.testing.assert_allclose(together.scores[row], alone.scores[0], rtol=0, atol=3 * ROUNDING)
        assert together.generations[row] == alone.generations[0]
        assert together.keys[row] == alone.keys[0]
    assert len({generation.token_ids for generation in together.generations}) > 1


def test_a_batch_of_packs_holds_as_many_prompts_as_any_other(lmm: sav_jax.LMM) -> None:
    """Every prompt of a pack gets a cache of its own."""
    examples = [Example(f"Question {i}?", (picture(30, 30, seed=i // 4),)) for i in range(16)]
    packs = [one.prompt for one in packs_of(lmm, examples)]
    assert [len(plan.rows) for plan in plan_batches(packs, 8, count_reads=True)] == [2, 2]
    assert [len(plan.rows) for plan in plan_batches(packs, 2, count_reads=True)] == [1, 1, 1, 1]
    assert [plan.size for plan in plan_batches(packs, 8, 4, count_reads=True)] == [4]
