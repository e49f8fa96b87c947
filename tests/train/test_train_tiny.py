"""Training of the bundled model, at sizes that take seconds: it learns, and a killed run ends as an undisturbed one."""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sav_jax.models.processor import load_processor
from sav_jax.models.registry import architecture, read_config
from sav_jax.models.weights import load_params
from sav_jax.train import tiny_data
from sav_jax.train.tiny import Trainer, answer_logits, device_batch
from sav_jax.train.tiny_data import BUCKETS, Chats
from sav_jax.train.tiny_recipe import PRESETS, muon_axes
from sav_jax.world.questions import ask
from sav_jax.world.scene import draw, sample_scene

DEBUG = PRESETS["debug"]


def in_process(directory, stage, steps, batch_size, ahead=12):
    """``prefetched`` without a process of its own: starting one costs more than all the batches of these tests."""
    chats = Chats(directory)
    for step in steps:
        if stage == 1:
            yield tiny_data.label_batch(tiny_data.label_scenes(step, batch_size))
        else:
            yield chats.training_batch(step, batch_size)


@pytest.fixture(autouse=True)
def draw_here(monkeypatch):
    monkeypatch.setattr("sav_jax.train.tiny.prefetched", in_process)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its trainer and final parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sav_jax.train.tiny.prefetched", in_process)
        trainer = Trainer(DEBUG, tmp_path_factory.mktemp("run"))
        return trainer, trainer.run()


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def rows(trainer):
    return [json.loads(line) for line in (trainer.directory / "log.jsonl").read_text().splitlines()]


def test_the_log_has_losses_and_held_out_accuracies(finished):
    trainer, _ = finished
    logged = rows(trainer)
    assert {row["stage"] for row in logged if "loss" in row} == {1, 2}
    held_out = [row["held_out"] for row in logged if "held_out" in row]
    assert "digit (scan digit)" in held_out[0]
    assert all(0.0 <= value <= 1.0 for result in held_out for value in result.values())


def test_the_loss_falls_when_the_same_batch_is_seen_again(finished):
    trainer, _ = finished
    initial = trainer.initial_params()
    for stage in (1, 2):
        step = trainer._label_step if stage == 1 else trainer._question_step
        size = DEBUG.label_batch_size if stage == 1 else DEBUG.question_batch_size
        (batch,) = in_process(trainer.directory, stage, range(1), size)
        state = trainer._fresh(stage, jax.tree.map(jnp.copy, initial))  # a step donates what it is given
        params, optimizer, losses = state.params, state.optimizer, []
        for _ in range(12):
            params, optimizer, loss = step(params, optimizer, batch)
            losses.append(float(loss))
        assert losses[-1] < losses[0] - 0.3


def test_a_run_killed_in_both_stages_ends_with_the_same_weights(finished, tmp_path):
    """Killed in stage 1, two steps after a checkpoint, and again three steps into stage 2."""
    trainer, wanted = finished
    # Nothing but the folder carries over from run to run; the copies share only compiled functions.
    folder = shutil.copytree(trainer.directory, tmp_path / "run", ignore=shutil.ignore_patterns("state*"))
    again = copy(trainer)
    again.directory = folder
    again.run(stop_after=6)
    (folder / "state.partial").write_bytes(b"half a state")
    again.run(stop_after=DEBUG.label_steps - 4 + 3)
    assert again.restore().stage == 2
    assert equal(wanted, again.run())


def test_another_process_draws_the_same_batches(tmp_path):
    Trainer(DEBUG, tmp_path)
    from sav_jax.train.tiny_data import prefetched

    here = list(in_process(tmp_path, 2, range(3, 6), 4))
    for mine, theirs in zip(here, prefetched(tmp_path, 2, range(3, 6), 4), strict=True):
        assert equal(vars(mine), vars(theirs))


def test_muon_takes_the_matrices_and_leaves_the_layer_axis(finished):
    _, params = finished
    flat = traverse_util.flatten_dict(params, sep="/")
    axes = traverse_util.flatten_dict(muon_axes(params), sep="/")
    assert set(axes) == set(flat)
    for name, numbers in axes.items():
        assert (numbers is not None) == name.endswith("/kernel"), name
        if numbers is not None:
            used = (*numbers.reduction_axis, *numbers.output_axis)
            assert used == tuple(range("layers" in name, flat[name].ndim)), name
    assert axes["language_model/layers/self_attn/o_proj/kernel"].reduction_axis == (1, 2)
    assert axes["language_model/layers/self_attn/q_proj/kernel"].output_axis == (2, 3)


def test_one_tile_stands_for_base_view_and_grid(finished):
    """The shortcut of training (one tile used twice) gives the logits that the processor's own two tiles give."""
    trainer, params = finished
    scene = sample_scene(3, "glyph")
    (qa,) = ask(scene, 3, 1)
    batch = trainer.chats.batch([([scene], [qa])], BUCKETS["square"])
    read = jax.jit(partial(answer_logits, model=trainer.model))
    logits = read(params, device_batch(batch))

    processor = load_processor(trainer.directory)
    prompt = processor.plan(qa.question, [(32, 32)]).extended([*processor.encode(qa.answer), trainer.chats.end])
    length = len(prompt.token_ids)
    assert length == batch.lengths[0]
    assert np.array_equal(prompt.token_ids, batch.token_ids[0, :length])
    full = replace(
        batch,
        token_ids=prompt.token_ids[None],
        tiles=processor.pixels([draw(scene)])[None],
        visual_index=prompt.visual_index[None],
        visual_weight=prompt.visual_weight[None],
    )
    assert full.tiles.shape[1] == 2
    reference = read(params, device_batch(full))
    np.testing.assert_allclose(logits, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("step", [0, 5, 13])
def test_targets_are_the_tokens_after_the_positions_read(finished, step):
    trainer, _ = finished
    batch = trainer.chats.training_batch(step, 8)
    used = batch.weights > 0
    following = np.take_along_axis(
        batch.token_ids, np.minimum(batch.read_positions + 1, batch.token_ids.shape[1] - 1), 1
    )
    assert np.array_equal(following[used], batch.targets[used])
    assert used.any(axis=1).all()
    tokenizer = trainer.chats.processor.tokenizer
    for row in range(len(batch.lengths)):
        text = tokenizer.decode(batch.token_ids[row, : batch.lengths[row]])
        assert text.startswith("<|im_start|>user ")
        assert text.endswith("<|im_end|>")
    images = (batch.visual_index[..., 0] >= 0) == (batch.token_ids == trainer.config["image_token_index"])
    inside = np.arange(batch.token_ids.shape[1])[None] < batch.lengths[:, None]
    assert images[inside].all()


def test_export_writes_a_loadable_checkpoint_with_its_card(finished, tmp_path):
    trainer, params = finished
    trainer.export(params, tmp_path / "tiny")
    arch = architecture(read_config(tmp_path / "tiny"))
    loaded = load_params(tmp_path / "tiny", arch.table, jax.eval_shape(trainer.initial_params), jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(rounded), strict=True):
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    evaluation = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())
    card = (tmp_path / "tiny" / "README.md").read_text()
    for name, value in evaluation["questions"].items():
        assert f"| {name} | {value:.3f} | {evaluation['guess'][name]:.3f} |" in card
