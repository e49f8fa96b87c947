"""Training of the bundled models, at sizes that take seconds: it learns; a killed run ends as an undisturbed one."""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sav_jax.errors import UserError
from sav_jax.models.processor import load_processor
from sav_jax.models.registry import architecture, read_config
from sav_jax.models.weights import load_params
from sav_jax.train.tiny import Trainer, answer_logits
from sav_jax.train.tiny_data import BUCKETS, STAGE_SEEDS, Chats, Item, bucket_of, prefetched
from sav_jax.train.tiny_evaluation import evaluate
from sav_jax.train.tiny_recipe import PRESETS, factors, muon_axes
from sav_jax.world.questions import ask
from sav_jax.world.scene import draw, sample_scene
from sav_jax.world.several import ask_several, sample_images

DEBUG = PRESETS["debug"]


def in_process(directory, recipe, steps, workers=1):
    """``prefetched`` without a process of its own: starting one costs more than all the batches of these tests."""
    chats = Chats(directory)
    for step in steps:
        yield chats.training_batch(recipe, step)


@pytest.fixture(autouse=True)
def draw_here(monkeypatch):
    monkeypatch.setattr("sav_jax.train.tiny.prefetched", in_process)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its trainer and final parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sav_jax.train.tiny.prefetched", in_process)
        trainer = Trainer(DEBUG, tmp_path_factory.mktemp("run"))
        return trainer, trainer.run().params


@pytest.fixture(scope="module", params=["debug", "debug-qwen"])
def chats(request, tmp_path_factory, finished):
    """Of each layout, with the model and random weights."""
    trainer = finished[0] if request.param == "debug" else Trainer(PRESETS[request.param], tmp_path_factory.mktemp("q"))
    return trainer, trainer.initial_params()


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def rows(trainer):
    return [json.loads(line) for line in (trainer.directory / "log.jsonl").read_text().splitlines()]


def test_the_log_has_losses_and_held_out_accuracies(finished):
    trainer, _ = finished
    logged = rows(trainer)
    assert {row["stage"] for row in logged if "loss" in row} == {"seeing", "instructions"}
    assert not any(row.get("skipped") for row in logged)
    held_out = [row["held_out"] for row in logged if "held_out" in row]
    assert "digit (scan digit)" in held_out[0]
    assert "all" in held_out[-1]
    assert all(0.0 <= value <= 1.0 for result in held_out for value in result.values())


@pytest.mark.parametrize("step", [0, 8])
def test_the_loss_falls_when_the_same_batch_is_seen_again(finished, step):
    trainer, _ = finished
    (batch,) = in_process(trainer.directory, DEBUG, [step])
    program, update = trainer.gradients_of(batch.bucket, len(batch.images)).result(), trainer.update().result()
    state = trainer._fresh(trainer.initial_params())
    params, optimizer, losses = state.params, state.optimizer, []
    scale = np.asarray(factors(DEBUG, step), np.float32) / DEBUG.rate(step)
    for _ in range(12):
        (loss, _), gradients = program(params, np.float32(0.1), *batch.arrays())
        params, optimizer, finite = update(params, optimizer, gradients, scale)
        losses.append(float(loss))
        assert finite
    assert losses[-1] < losses[0] - 0.3


def test_a_gradient_of_no_size_changes_nothing(finished):
    trainer, params = finished
    state = trainer._fresh(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    gradients["language_model"]["norm"]["scale"] = gradients["language_model"]["norm"]["scale"].at[0].set(jnp.nan)
    wanted = jax.device_get((state.params, state.optimizer))
    given = jax.tree.map(jnp.copy, (state.params, state.optimizer))  # a step donates what it is given
    *after, finite = trainer.update().result()(*given, gradients, np.ones(3, np.float32))
    assert not finite
    assert equal(after, wanted)


def test_the_first_stage_leaves_the_decoder_alone(finished):
    trainer, _ = finished
    (batch,) = in_process(trainer.directory, DEBUG, [0])
    state = trainer._fresh(trainer.initial_params())
    before = traverse_util.flatten_dict(jax.device_get(state.params), sep="/")
    (_, _), gradients = trainer.gradients_of("image", len(batch.images)).result()(
        state.params, np.float32(0), *batch.arrays()
    )
    scale = np.asarray(factors(DEBUG, 0), np.float32)
    params, _, _ = trainer.update().result()(state.params, state.optimizer, gradients, scale)
    moved = {n for n, v in traverse_util.flatten_dict(params, sep="/").items() if not np.array_equal(v, before[n])}
    assert "language_model/embed_tokens" in moved
    assert any(name.startswith("vision_tower") for name in moved)
    assert not any(name.startswith(("language_model/layers", "language_model/norm")) for name in moved)


def test_rates_warm_up_and_fall_within_each_stage():
    recipe = PRESETS["tiny"]
    assert recipe.rate(0) == pytest.approx(recipe.stages[0].first / recipe.warmup)
    start = 0
    for stage in recipe.stages:
        assert recipe.place(start) == (stage, 0)
        start += stage.steps
        assert recipe.rate(start - 1) == pytest.approx(stage.last, rel=0.02)
    with pytest.raises(ValueError, match="behind"):
        recipe.place(start)
    half = recipe.scaled(0.5)
    assert [s.steps for s in half.stages] == [s.steps // 2 for s in recipe.stages]


def test_a_run_killed_in_two_stages_ends_with_the_same_weights(finished, tmp_path):
    """Killed after a checkpoint and two more steps in the first stage, and again in the last one."""
    trainer, wanted = finished
    # Nothing but the folder carries over from run to run; the copies share only compiled functions.
    folder = shutil.copytree(trainer.directory, tmp_path / "run", ignore=shutil.ignore_patterns("state*"))
    again = copy(trainer)
    again.directory = folder
    assert again.run(max_seconds=0.0).step == 1, "a run out of time stops after the step at hand"
    assert again.restore().step == 1
    again.run(stop_after=3)
    (folder / "state.partial").write_bytes(b"half a state")
    again.save(again.run(stop_after=10))
    assert again.restore().step == 11
    assert equal(wanted, again.run().params)


@pytest.mark.parametrize("name", ["debug", "debug-qwen"])
def test_the_same_run_twice_has_the_same_losses_and_weights_bit_for_bit(name, tmp_path):
    """Of both layouts; and so has one that was killed and goes on."""
    stage = replace(DEBUG.stages[1], steps=8, batch_size=4)
    recipe = replace(PRESETS[name], stages=(stage,), log_every=1, evaluate_every=100)
    once, twice = (Trainer(recipe, tmp_path / folder) for folder in ("once", "twice"))
    killed = copy(once)  # which shares compiled functions alone
    killed.directory = shutil.copytree(once.directory, tmp_path / "killed")
    wanted = once.run(stop_after=4).params
    assert equal(wanted, twice.run(stop_step=4).params)
    assert twice.restore().step == 4, "the state is kept"
    assert equal(wanted, twice.run(stop_step=4).params), "nothing is left to do"
    killed.save(killed.run(stop_after=2))
    assert equal(wanted, killed.run(stop_after=2).params)
    other: Any = killed.restore()
    turned = jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2) if jnp.ndim(x) > 1 else x, other.params)
    killed.save(other.replace(params=turned))
    with pytest.raises(UserError, match=r"state\.msgpack: of a model of other shapes"):
        killed.restore()
    losses = [{row["step"]: row["loss"] for row in rows(trainer)} for trainer in (once, twice, killed)]
    assert losses[0] == losses[1] == losses[2]
    assert sorted(losses[0]) == [1, 2, 3, 4]


def test_other_processes_draw_the_same_batches_in_order(finished, tmp_path):
    trainer, _ = finished
    here = list(in_process(trainer.directory, DEBUG, range(6, 12)))
    for mine, theirs in zip(here, prefetched(trainer.directory, DEBUG, range(6, 12), workers=2), strict=True):
        assert mine.bucket == theirs.bucket
        assert equal(mine.arrays(), theirs.arrays())


def test_stages_draw_from_seeds_of_their_own():
    firsts = list(STAGE_SEEDS.values())
    for recipe in (PRESETS["tiny"], PRESETS["tiny-qwen"]):
        for stage in recipe.stages:
            last = STAGE_SEEDS[stage.name] + 2 * stage.steps * stage.batch_size + 1
            assert not any(STAGE_SEEDS[stage.name] < first <= last for first in firsts)
        buckets = {bucket_of(recipe.stages[2], step) for step in range(300)}
        assert buckets == {"square", "large"} | ({"two"} if recipe.family == "tiny" else set())


def test_muon_takes_the_matrices_and_leaves_the_layer_axis(finished):
    _, params = finished
    flat = traverse_util.flatten_dict(params, sep="/")
    axes = traverse_util.flatten_dict(muon_axes(params), sep="/")
    assert set(axes) == set(flat)
    for name, numbers in axes.items():
        assert (numbers is not None) == name.endswith("/kernel"), name
        if numbers is not None:
            used = (*numbers.output_axis, *numbers.reduction_axis)
            assert used == tuple(range("layers" in name, flat[name].ndim)), name
    assert axes["language_model/layers/self_attn/o_proj/kernel"].reduction_axis == (2, 3)
    assert axes["language_model/layers/self_attn/q_proj/kernel"].output_axis == (1, 2)


def item_of(bucket: str, seed: int, turns: int) -> Item:
    if bucket == "two":
        both = sample_images(seed)
        return both, ask_several(both, seed, turns)
    scene = sample_scene(seed, "pair", side=BUCKETS[bucket].side)
    return (scene,), ask(scene, seed, turns)


@pytest.mark.parametrize("bucket", ["square", "large", "two"])
def test_a_chat_is_what_the_processor_makes_of_it(chats, bucket):
    """Tokens, pixels and plans are those of the checkpoint's own processor, of one turn; the logits, too."""
    trainer, params = chats
    shape, layout = BUCKETS[bucket], trainer.chats.layout
    scenes, (qa,) = item_of(bucket, 5, 1)
    batch = trainer.chats.batch([(scenes, [qa])], bucket)
    processor, images = load_processor(trainer.directory), [draw(scene) for scene in scenes]
    prompt = processor.plan(qa.question, [(shape.side, shape.side)] * shape.images)
    prompt = prompt.extended([*processor.encode(qa.answer), layout.end])
    length = len(prompt.token_ids)
    assert length == batch.lengths[0]
    assert np.array_equal(prompt.token_ids, batch.token_ids[0, :length])
    plan = layout.plan(shape.images, shape.side, shape.tokens)
    made = layout.batch(batch.token_ids, batch.lengths, batch.reads, batch.images, plan)
    pixels = processor.pixels(images)
    if trainer.recipe.family == "tiny-qwen" or bucket != "square":
        assert np.array_equal(made.visual_index[0, :length], prompt.visual_index)
        # Bytes over 127.5 less 1, against bytes over 255, less 0.5, over 0.5: some roundings of numbers up to 2.
        np.testing.assert_allclose(made.pixels[0], pixels, atol=5e-7, rtol=0)
    else:  # one tile stands for base view and grid
        assert pixels.shape[0] == 2
        np.testing.assert_allclose(made.pixels[0, 0], pixels[0], atol=5e-7, rtol=0)
        full = replace(
            made,
            pixels=jnp.asarray(pixels[None]),
            visual_index=made.visual_index.at[0, :length].set(prompt.visual_index),
        )
        read = jax.jit(partial(answer_logits, trainer.model))
        one, other = (read(params, given) for given in (made, full))
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)
    if prompt.positions is not None:
        assert np.array_equal(made.positions[0, :length], prompt.positions)
        for name, values in prompt.vision.items():
            assert np.array_equal(made.vision[name][0], values), name


@pytest.mark.parametrize("bucket", ["square", "large", "two"])
def test_targets_are_the_tokens_after_the_positions_read(chats, bucket):
    trainer, _ = chats
    items = [item_of(bucket, 2 * seed, 4) for seed in range(6)]
    batch = trainer.chats.batch(items, bucket)
    used = batch.weights > 0
    following = np.take_along_axis(batch.token_ids, np.minimum(batch.reads + 1, batch.token_ids.shape[1] - 1), 1)
    assert np.array_equal(following[used], batch.targets[used])
    tokenizer = trainer.chats.layout.processor.tokenizer
    template = trainer.chats.layout.processor.chat_template
    for row, (asked, (scenes, _)) in enumerate(zip(batch.asked, items, strict=True)):
        text = tokenizer.decode(batch.token_ids[row, : batch.lengths[row]])
        messages = []
        for turn, qa in enumerate(asked):
            pictures = [{"type": "image"}] * len(scenes) if turn == 0 else []
            messages += [
                {"role": "user", "content": [*pictures, {"type": "text", "text": qa.question}]},
                {"role": "assistant", "content": [{"type": "text", "text": qa.answer}]},
            ]
        transcript = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False).rstrip("\n")
        token = trainer.chats.layout.processor.image_token
        assert text.replace(token, "") == transcript.replace(token, ""), "the template's own transcript"
        answers = [tokenizer.decode(batch.targets[row][batch.questions[row] == i]) for i in range(len(asked))]
        assert answers == [f"{qa.answer}<|im_end|>" for qa in asked]
        assert len(asked) >= 2


def test_export_writes_a_loadable_checkpoint_with_its_card(finished, tmp_path):
    trainer, params = finished
    trainer.export(params, tmp_path / "tiny", "Stopped at step 14, on a laptop.", ["--stop-step 14"])
    arch = architecture(read_config(tmp_path / "tiny"))
    loaded = load_params(tmp_path / "tiny", arch.table, jax.eval_shape(trainer.initial_params), jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(rounded), strict=True):
        assert np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    evaluation = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert "Stopped at step 14, on a laptop." in card
    for name, value in evaluation["questions"].items():
        if name != "all":
            number = evaluation["counts"][name]
            assert f"| {name} | {value:.3f} | {evaluation['guess'][name]:.3f} | {number} |" in card
            assert abs(value * number - round(value * number)) <= 0.5e-4 * number, "a share of so many, to four places"
    assert "--preset tiny --stop-step 14 --run-dir" in card
    assert "<svg" in (tmp_path / "tiny" / "curve.svg").read_text()

    other = copy(trainer)
    other.directory = tmp_path / "other"
    other.directory.mkdir()
    with pytest.raises(UserError, match="neither"):
        other.latest()
    shutil.copy(tmp_path / "tiny" / "model.safetensors", other.directory)
    assert equal(other.latest()[0], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_evaluation_counts_right_answers(finished, monkeypatch):
    """A model that always says what is right is right; one that never does is not."""
    trainer, params = finished
    monkeypatch.setattr(type(trainer), "likeliest", lambda self, params, batch: batch.targets)
    assert set(evaluate(trainer, params, 4).values()) == {1.0}
    monkeypatch.setattr(type(trainer), "likeliest", lambda self, params, batch: batch.targets + 1)
    assert set(evaluate(trainer, params, 4).values()) == {0.0}
    monkeypatch.setattr(type(trainer), "likeliest", lambda self, params, batch: batch.labels)
    assert set(evaluate(trainer, params, 4, labels=True, questions=False).values()) == {1.0}
