"""Changed head outputs against PyTorch with forward pre-hooks on the output projections, and against the arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import Reference, picture

import sav_jax
from sav_jax.batching import assemble, plan_batches
from sav_jax.examples import Example
from sav_jax.extract import heads_step, plan_prompts
from sav_jax.generation import extend, prefill, prefill_with_heads
from sav_jax.models import decoder
from sav_jax.models.batch import Batch
from sav_jax.models.intervention import HeadEdit
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.reading import read

# What the families' own parity is held to: float32 values of order one to ten through a few layers.
PARITY = 1e-4
# The same program with other operands.
SAME = 1e-5

EXAMPLES = [Example("What is it?", (picture(37, 53),)), Example("What is the capital of France, or of Spain?")]
FAMILIES = ("llava_onevision", "qwen3_vl")
"""The Qwen2 decoder; M-RoPE, norms of queries and keys, and deepstack. All families share one attention."""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_reference: Callable[..., Reference]) -> tuple[Reference, sav_jax.LMM]:
    reference = make_reference(request.param)
    return reference, sav_jax.load(reference.directory)


def random_edit(lmm: sav_jax.LMM, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values ``[L, N, H]`` of the size of head outputs, and a mask ``[L, N]`` of about half of the heads."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(lmm.heads_shape).astype(np.float32)
    return values, rng.random(lmm.heads_shape[:2]) < 0.5


@contextlib.contextmanager
def hooks(reference: Reference, change: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """``change(layer, heads [B, T, N, H])`` works in place on the inputs of the output projections."""
    number = reference.model.config.text_config.num_attention_heads

    def hook(layer: int) -> Callable[[Any, Any], Any]:
        def run(_: Any, args: Any) -> Any:
            heads = args[0].clone().unflatten(-1, (number, -1))
            change(layer, heads)
            return (heads.flatten(-2),)

        return run

    layers = reference.model.model.language_model.layers
    handles = [part.self_attn.o_proj.register_forward_pre_hook(hook(i)) for i, part in enumerate(layers)]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def replace_from(values: np.ndarray, mask: np.ndarray, first: int) -> Callable[[int, torch.Tensor], None]:
    """Overwrite the selected heads at all tokens from ``first`` on."""

    def change(layer: int, heads: torch.Tensor) -> None:
        selected = torch.tensor(mask[layer])
        heads[:, first:, selected] = torch.tensor(values[layer])[selected]

    return change


def inputs(reference: Reference, lmm: sav_jax.LMM, example: Example, more: str = "") -> dict[str, torch.Tensor]:
    text = lmm.processor.text(example.question, len(example.images))
    return reference.inputs(text + more, example.load_images())


def batch_of(lmm: sav_jax.LMM, examples: list[Example]) -> Batch:
    """All examples in one batch, in order."""
    prompts = plan_prompts(lmm, examples)
    plan = plan_batches(prompts, len(prompts))[0]
    widest = max(prompts, key=lambda prompt: prompt.num_rows)
    bucket = dataclasses.replace(
        plan.bucket, rows=widest.num_rows, taps=max(prompt.visual_index.shape[1] for prompt in prompts)
    )
    plan = dataclasses.replace(plan, bucket=bucket, rows=tuple(range(len(prompts))), size=len(prompts))
    return assemble(plan, prompts, [lmm.processor.pixels(example.load_images()) for example in examples])


def logits_and_heads(lmm: sav_jax.LMM, batch: Batch, edit: HeadEdit | None) -> tuple[np.ndarray, np.ndarray]:
    """``[B, V]`` and ``[L, B, N, H]``."""
    logits, heads = _step(lmm.module, lmm.architecture.heads_path)(lmm.params, batch, edit)
    return np.asarray(logits), np.asarray(heads)


@functools.cache
def _step(module: MultimodalModel, path: tuple[str, ...]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    @jax.jit
    def step(params: Any, batch: Batch, edit: HeadEdit | None) -> tuple[jax.Array, jax.Array]:
        prefix, heads = prefill_with_heads(module, params, batch, 0, path, edit)
        return prefix.logits, heads[:, :, 0]

    return step


def test_replaced_heads_are_those_of_a_pytorch_hook(pair: tuple[Reference, sav_jax.LMM]) -> None:
    reference, lmm = pair
    values, mask = random_edit(lmm)
    batch = batch_of(lmm, EXAMPLES)
    plain, _ = logits_and_heads(lmm, batch, None)
    ours, heads = logits_and_heads(lmm, batch, HeadEdit.replacing(values, mask))
    np.testing.assert_array_equal(heads[mask.nonzero()[0], :, mask.nonzero()[1]], values[mask][:, None].repeat(2, 1))
    for row, example in enumerate(EXAMPLES):
        with hooks(reference, replace_from(values, mask, -1)):
            theirs = reference.model(**inputs(reference, lmm, example)).logits[0, -1].numpy()
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=PARITY)
        assert np.abs(ours[row] - plain[row]).max() > 0.1, "the heads would not matter"


def test_added_and_scaled_heads_are_those_of_a_pytorch_hook(pair: tuple[Reference, sav_jax.LMM]) -> None:
    """Steering, at a token of one's choice."""
    reference, lmm = pair
    values, _ = random_edit(lmm, 1)
    keep = np.random.default_rng(2).uniform(0, 2, lmm.heads_shape[:2]).astype(np.float32)
    batch = batch_of(lmm, EXAMPLES)
    place = 3
    tokens = np.zeros(batch.token_ids.shape, bool)
    tokens[:, place] = True

    def change(layer: int, heads: torch.Tensor) -> None:
        heads[:, place] = heads[:, place] * torch.tensor(keep[layer])[:, None] + torch.tensor(values[layer])

    ours, _ = logits_and_heads(lmm, batch, HeadEdit(keep, values, tokens))
    for row, example in enumerate(EXAMPLES):
        with hooks(reference, change):
            theirs = reference.model(**inputs(reference, lmm, example)).logits[0, -1].numpy()
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=PARITY)


def test_answers_are_written_with_replaced_heads(pair: tuple[Reference, sav_jax.LMM], tmp_path: Path) -> None:
    """Prompt, decode loop and options: every last token is changed when it is read."""
    reference, lmm = pair
    lmm = dataclasses.replace(lmm, stop_token_ids=())
    values, mask = random_edit(lmm)
    edit = HeadEdit.replacing(values, mask)
    options = ["cat", "dog", "giraffe"]
    ours = read(lmm, EXAMPLES, options, 8, cache=str(tmp_path), progress=False, edit=edit, keep_heads=False)
    for row, example in enumerate(EXAMPLES):
        given = inputs(reference, lmm, example)
        length = given["input_ids"].shape[1]
        with hooks(reference, replace_from(values, mask, -1)):
            theirs = reference.model.generate(
                **given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert list(ours.generations[row].token_ids) == theirs[0, length:].tolist()
        for column, option in enumerate(options):
            longer = inputs(reference, lmm, example, option)
            ids = longer["input_ids"][0]
            with hooks(reference, replace_from(values, mask, length - 1)):
                log_p = reference.model(**longer).logits[0].log_softmax(-1)
            expected = sum(log_p[i - 1, ids[i]].item() for i in range(length, len(ids)))
            np.testing.assert_allclose(ours.scores[row, column], expected, rtol=0, atol=PARITY)
    plain = read(lmm, EXAMPLES, options, 8, cache=str(tmp_path), progress=False)
    assert plain.passes == 2, "unchanged prompts are other prompts"
    assert plain.generations != ours.generations
    other = HeadEdit.replacing(values, ~mask)
    assert read(lmm, EXAMPLES, options, 8, cache=str(tmp_path), progress=False, edit=other).passes == 2
    again = read(lmm, EXAMPLES, options, 8, cache=str(tmp_path), progress=False, edit=edit, keep_heads=False)
    assert again.passes == 0
    assert again.generations == ours.generations


def test_a_head_s_own_output_changes_nothing(lmm: sav_jax.LMM) -> None:
    batch = batch_of(lmm, EXAMPLES)
    logits, heads = logits_and_heads(lmm, batch, None)
    everything = np.ones(heads.shape[:3], bool)
    ours, same = logits_and_heads(lmm, batch, HeadEdit.replacing(heads, everything))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=SAME)
    np.testing.assert_array_equal(same, heads)
    # Rows are each their own: swapped, they are another's.
    swapped, _ = logits_and_heads(lmm, batch, HeadEdit.replacing(heads[:, ::-1], everything))
    assert np.abs(swapped - logits).max() > 0.1
    nothing = HeadEdit.replacing(np.full_like(heads[:, 0], 7), np.zeros(heads.shape[:1] + heads.shape[2:3], bool))
    np.testing.assert_allclose(logits_and_heads(lmm, batch, nothing)[0], logits, rtol=0, atol=SAME)


def test_all_heads_of_all_layers_by_hand(lmm: sav_jax.LMM) -> None:
    """Without attention the last token is a stack of projections and feed-forwards on its own embedding."""
    values, _ = random_edit(lmm, 3)
    batch = batch_of(lmm, EXAMPLES)
    edit = HeadEdit.replacing(values, np.ones(lmm.heads_shape[:2], bool))
    ours, _ = logits_and_heads(lmm, batch, edit)
    p: Any = jax.tree.map(lambda x: np.asarray(x, np.float64), lmm.params)["language_model"]
    eps = lmm.config.text.rms_norm_eps

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    last = np.asarray(batch.token_ids)[np.arange(2), np.asarray(batch.lengths) - 1]
    x, layers = p["embed_tokens"][last], p["layers"]
    for i in range(lmm.num_layers):
        x = x + np.einsum("NH,DNH->D", values[i].astype(np.float64), layers["self_attn"]["o_proj"]["kernel"][i])
        y = norm(x, layers["post_attention_layernorm"]["scale"][i])
        gate, up, down = (layers["mlp"][f"{name}_proj"]["kernel"][i].T for name in ("gate", "up", "down"))
        x = x + (y @ gate / (1 + np.exp(-(y @ gate))) * (y @ up)) @ down
    head = p["embed_tokens"] if lmm.config.text.tie_word_embeddings else p["lm_head"]["kernel"]
    np.testing.assert_allclose(ours, norm(x, p["norm"]["scale"]) @ head.T, rtol=0, atol=PARITY)


def test_after_a_prefix_every_token_is_changed(lmm: sav_jax.LMM) -> None:
    """The last prompt token read on its own after the others is the same as the whole prompt at once."""
    values, mask = random_edit(lmm)
    edit = HeadEdit.replacing(values, mask)
    batch = batch_of(lmm, EXAMPLES)
    whole, _ = logits_and_heads(lmm, batch, edit)
    lengths = jnp.asarray(batch.lengths)
    shorter = dataclasses.replace(batch, lengths=lengths - 1, read_positions=lengths[:, None] - 2)
    last = jnp.take_along_axis(jnp.asarray(batch.token_ids), lengths[:, None] - 1, axis=1)
    prefix = jax.jit(functools.partial(prefill, lmm.module), static_argnames="room")(lmm.params, shorter, room=1)
    logits, _ = jax.jit(functools.partial(extend, lmm.module))(lmm.params, prefix, last, jnp.ones(2, jnp.int32), edit)
    np.testing.assert_allclose(logits[:, 0], whole, rtol=0, atol=SAME)


def test_without_an_edit_nothing_of_it_is_compiled(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(lmm, EXAMPLES)
    step: Any = heads_step.__wrapped__(lmm.module)  # not the one that is compiled already

    def refuse(*_: Any) -> Any:
        raise AssertionError("edited")

    monkeypatch.setattr(decoder, "edited", refuse)
    monkeypatch.setattr(decoder, "tokens_at", refuse)
    step.lower(lmm.params, batch)
    with pytest.raises(AssertionError, match="edited"):
        step.lower(lmm.params, batch, HeadEdit.replacing(*random_edit(lmm)))
