"""Tuning: PEFT's loss and gradients, what changes nothing, settings, plans of steps, messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tyro
from checkpoints import Reference, picture
from debug_runs import chats
from flax import traverse_util
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

import sav_jax
from sav_jax import adapters
from sav_jax._training_options import Train
from sav_jax.errors import UserError
from sav_jax.models import lora
from sav_jax.train import loop, supervised
from sav_jax.train.aim import AIM_PRESETS
from sav_jax.train.chats import VICUNA_SQ, Chat, Turn, chat_format
from sav_jax.train.data import ChatData, LessonBatch, Sizes, padding_of, plan_steps
from sav_jax.train.optimizer import Group, Optimization, Pace, trainable_groups
from sav_jax.train.recipes import LORA_PRESETS, SQ_PRESETS, Recipe, overridden
from sav_jax.train.tune import export, tune, tuned_with_updates, warn_of_endless_answers

# PEFT asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def debug(**options: Any) -> Recipe:
    """SQ-LLaVA's debug preset: low-rank updates of language model and tower, and the projector."""
    return dataclasses.replace(SQ_PRESETS["debug"], **options)


BAD: list[dict[str, Any]] = [
    {name: value}
    for value, names in (
        (0, "learning_rate vision_learning_rate alpha vision_alpha epochs steps batch_size micro_batches keep "
            "log_every checkpoint_every epsilon"),
        (-1, "rank vision_rank learning_rate projector_learning_rate weight_decay epochs steps batch_size max_tokens "
             "clip warmup dropout vision_dropout sq_ratio seed layer"),
        (1, "warmup dropout vision_dropout beta1 beta2"),
        (float("nan"), "learning_rate weight_decay epochs warmup clip"),
        ("most", "remat conversation initial projection tokens"),
    )
    for name in names.split()
]  # fmt: skip


def test_what_is_exported_is_what_was_tuned(lmm: sav_jax.LMM, reference: Reference, tmp_path: Path) -> None:
    tuned, trainable = tuned_with_updates(lmm, chats(), debug(), tmp_path / "run", progress=False)
    assert export(lmm, tuned, debug(), trainable, tmp_path / "run", str(reference.directory)) == ["model"]
    example = sav_jax.Example("What is it?", (picture(30, 30, 1),))
    heads = [
        sav_jax.extract_heads(m, [example], progress=False)
        for m in (tuned, sav_jax.load(tmp_path / "run" / "model"), lmm)
    ]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 1e-3


def test_loss_and_gradients_are_pefts(reference: Reference, lmm: sav_jax.LMM, tmp_path: Path) -> None:
    """At step one, with B not zero so that A has a gradient too; tower and language model."""
    chat = chats()[1]
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*(language_model|vision_tower).*(q_proj|o_proj|up_proj|fc1)"
    )
    model = get_peft_model(reference.model, config)
    try:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(str(tmp_path / "adapter"))
        targets, weights = adapters.load(tmp_path / "adapter", lmm.architecture)
        data = ChatData(lmm, [chat], chat_format(lmm.processor, lmm.stop_token_ids), batch_size=1, steps=1, seed=0)
        made = data._lesson(0, 0)
        images = chat.media.load_images()
        inputs = {
            k: v for k, v in reference.inputs("<image>", images).items() if k != "input_ids" and k != "attention_mask"
        }
        ids = torch.tensor(made.prompt.token_ids.astype(np.int64))[None]
        labels = torch.tensor(np.where(made.targets >= 0, made.targets, -100).astype(np.int64))[None]
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **inputs).loss
        loss.backward()
        theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.unload()
    function = supervised.supervised_loss(lmm.module, targets)
    frozen = traverse_util.flatten_dict(lmm.params, sep="/")
    trainable = {f"lora/{path}": jnp.asarray(value) for path, value in weights.items()}

    @jax.jit
    def ours(trainable: Any, frozen: Any, batch: Any) -> Any:
        def mean(trainable: Any) -> Any:
            total, weight = function(trainable, frozen, batch, jax.random.key(0))
            return total / weight

        return jax.value_and_grad(mean)(trainable)

    value, gradients = ours(trainable, frozen, data[0])
    # A loss of order ten, summed in another order: ten units of 2^-24 per operation and some tens of operations.
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    # Gradients are laid out like the matrices themselves, so PEFT's names are had by writing them as an adapter.
    adapters.save(
        tmp_path / "gradients",
        lmm.architecture,
        targets,
        {p.removeprefix("lora/"): np.asarray(g) for p, g in gradients.items()},
    )
    stored = load_file(tmp_path / "gradients" / adapters.WEIGHTS_FILE)
    compared = 0
    for name, gradient in theirs.items():
        key = name.replace(".default", "")
        if key not in stored:  # layers behind the one the tower is read at
            assert not gradient.any()
            continue
        # Relative to the largest entry of each matrix: 1e-4 is what parity of outputs of order one is held to.
        np.testing.assert_allclose(stored[key], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max())
        compared += 1
    assert compared == len(stored)
    assert all(np.abs(value).max() > 0 for value in stored.values())


def one_step(lmm: sav_jax.LMM, recipe: Recipe, said: list[Chat], **options: Any) -> tuple[dict[str, Any], LessonBatch]:
    """Loss and norm of the gradient of the first step, and its batch."""
    settings = dataclasses.replace(recipe.optimization, batch_size=8, steps=1, **options)
    problem = supervised.problem(lmm, recipe.targets, recipe.groups, 0, settings.remat)
    noise = np.random.default_rng(0)  # B is zero at first, and what is in front of it has no gradient
    problem = dataclasses.replace(
        problem,
        initial={path: value + 0.02 * noise.standard_normal(value.shape) for path, value in problem.initial.items()},
    )
    data = ChatData(lmm, said, chat_format(lmm.processor, lmm.stop_token_ids), batch_size=8, steps=1, seed=0)
    transform = loop.transform_of(settings)
    step = loop.make_step(problem.loss, transform, settings.micro_batches)
    pace = Pace.of(settings, problem.groups)
    return step(loop.initial_state(problem, transform), problem.frozen, data[0], pace)[1], data[0]


WORDS = ("no", "a blue circle on a red ground", "four", "nothing that could be said in a few words")


def of_text(**options: Any) -> tuple[Recipe, list[Chat]]:
    """A recipe and conversations that never touch the tower: of these steps several can be compiled."""
    said = [
        Chat((Turn("user", "What is it?"), Turn("assistant", WORDS[i % 4])), sav_jax.Example("-", source=f"row {i}"))
        for i in range(8)
    ]
    return debug(vision_rank=0, projector_learning_rate=0.0, dropout=0.0, **options), said


def test_remat_changes_nothing(lmm: sav_jax.LMM) -> None:
    """With dropout in model and tower: what is computed again has the same masks."""
    for given, remat in (((debug(), chats()), "full"), (of_text(), "dots")):
        plain, again = (one_step(lmm, *given, remat=name)[0] for name in ("none", remat))
        for name, value in plain.items():
            np.testing.assert_allclose(again[name], value, rtol=1e-5)


def test_micro_batches_with_answers_of_different_lengths_change_nothing(lmm: sav_jax.LMM) -> None:
    """Every token counts alike, wherever it stands: the mean of micro-batches' means would be another number."""
    recipe, said = of_text()
    whole, batch = one_step(lmm, recipe, said)
    parts = one_step(lmm, recipe, said, micro_batches=4)[0]
    counts = np.asarray(batch.weights).reshape(2, 4, -1).sum(axis=(0, 2))  # every fourth row is of one micro-batch
    assert len({*counts.tolist()}) > 1
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5)


def test_updates_whose_b_is_zero_change_nothing_exactly(lmm: sav_jax.LMM) -> None:
    """All heads of all layers and the logits, bit for bit, with updates of every projection there is."""
    recipe = debug(target=".*", vision_rank=0)
    batch = ChatData(lmm, chats(8), chat_format(lmm.processor, lmm.stop_token_ids), batch_size=8, steps=1, seed=0)[
        0
    ].batch

    @jax.jit
    def read(variables: Any, batch: Any) -> Any:
        output, sown = lmm.module.apply(variables, batch, mutable=["intermediates"])
        logits = lmm.module.apply(variables, output.hidden, method=lambda m, x: m.language_model.logits(x))
        return sown["intermediates"], logits

    weights = lora.init(lmm.module, recipe.targets, 3)
    assert len(weights) == 2 * len(lora.projections(lmm.module))
    updates = lora.variables(lmm.module, recipe.targets, weights)
    base = read({"params": lmm.params}, batch)
    same = read({"params": lmm.params, "lora": updates}, batch)
    assert len(jax.tree.leaves(base)) == 2
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(one, other)
    # And they are there: with B not zero everything moves.
    weights = {path: value + (0.1 if path.endswith("/b") else 0) for path, value in weights.items()}
    moved = read({"params": lmm.params, "lora": lora.variables(lmm.module, recipe.targets, weights)}, batch)
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(moved), strict=True):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-3


def test_frozen_leaves_have_no_optimiser_state(lmm: sav_jax.LMM) -> None:
    problem = supervised.problem(lmm, debug().targets, debug().groups, 0)
    state = loop.initial_state(problem, loop._transform(Optimization()))
    trained = sum(value.size for value in problem.initial.values())
    sizes = [leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(sizes) == 2 * trained
    assert not any(path in problem.initial for path in (f"params/{p}" for p in problem.frozen))
    assert all(value.dtype == jnp.float32 for value in state.trainable.values())


def test_nan_stops_with_step_and_rows(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    recipe = debug(learning_rate=1e30, projector_learning_rate=1e30)
    wanted = r"^step [1-6]: (loss|gradient norm) is (nan|inf); its rows: row \d+(; row \d+){7}$"
    with pytest.raises(UserError, match=wanted) as caught:
        tune(lmm, chats(), recipe, tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)


def test_another_recipe_is_refused(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    tune(lmm, chats(), debug(steps=1), tmp_path / "run", progress=False)
    other = overridden(debug(steps=1), {"seed": 3, "learning_rate": 0.02})
    wanted = "recipe.learning_rate: 0.01 there, 0.02 asked for; recipe.optimization.seed: 0 there, 3 asked for"
    with pytest.raises(UserError, match=rf"holds a run with other settings \({wanted}\); resume"):
        tune(lmm, chats(), other, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r'settings \(data: "[0-9a-f]{64}" there, "[0-9a-f]{64}" asked for\); r'):
        tune(lmm, chats(20), debug(steps=1), tmp_path / "run", progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds other things"):
        tune(lmm, chats(), debug(steps=1), tmp_path / "other", progress=False)


@pytest.mark.parametrize("options", BAD, ids=str)
def test_settings_out_of_range_are_refused_where_they_are_made(options: dict[str, Any]) -> None:
    (name,) = options
    presets: list[Any] = [SQ_PRESETS["debug"], AIM_PRESETS["debug"]]
    for preset in presets:
        if hasattr(preset, name) or hasattr(preset.optimization, name):
            with pytest.raises(UserError, match=rf"^{name} (must be .*, not|.* is not known)"):
                overridden(preset, options)


@pytest.mark.parametrize(
    ("words", "preset", "elsewhere"),
    [
        ("lora --model m --data d", LORA_PRESETS["llava"], {"sq_ratio", "conversation"}),  # of the other recipe
        ("sq-llava --model m --data d", SQ_PRESETS["stage2"], set()),
        ("aim --model m", AIM_PRESETS["tiny"], set()),
    ],
)
def test_every_setting_is_an_option(words: str, preset: Any, elsewhere: set[str]) -> None:
    settings = {name for of in (preset, preset.optimization) for name in vars(of)} - {"optimization", *elsewhere}
    flags = {"group_by_modality": "False", "norm": "False", "beta1": "0.8", "weight_decay": "0.1", "log_every": "7"}
    given = [
        word for name, value in flags.items() if name in settings for word in (f"--{name.replace('_', '-')}", value)
    ]
    parsed: Any = tyro.cli(Train, args=[*words.split(), "--output", "o", *given], config=(tyro.conf.OmitArgPrefixes,))
    options = vars(parsed.recipe) | vars(parsed.recipe.run)
    assert settings <= set(options)
    recipe = overridden(preset, options)
    for name, value in flags.items():
        assert str(getattr(recipe, name, getattr(recipe.optimization, name, value))) == value


def test_every_leaf_belongs_to_a_group() -> None:
    leaves = ["lora/a", "params/b", "params/c"]
    groups = (Group("lora/.*", 1e-3), Group("params/b", 0.0))
    with pytest.raises(UserError, match="no learning rate is given for params/c"):
        trainable_groups(leaves, groups)
    with pytest.raises(UserError, match="'x' matches nothing"):
        trainable_groups(leaves, (*groups, Group("params/c", 0.0), Group("x", 1.0)))
    chosen = trainable_groups(leaves, (*groups, Group(".*", 1e-2)))
    assert {path: group.learning_rate for path, group in chosen.items()} == {"lora/a": 1e-3, "params/c": 1e-2}


def test_rates_rise_and_fall() -> None:
    pace = Pace.of(Optimization(steps=110, warmup=10 / 110), {})
    factors = [float(pace.factor(jnp.int32(step))) for step in range(110)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10, rtol=1e-6)
    wanted = [0.5 * (1 + np.cos(np.pi * i / 100)) for i in range(100)]
    np.testing.assert_allclose(factors[10:], wanted, atol=1e-6)


def test_tokens_of_a_step_are_those_of_its_rows(lmm: sav_jax.LMM) -> None:
    data = ChatData(lmm, chats(), chat_format(lmm.processor, lmm.stop_token_ids), batch_size=8, steps=3, seed=0)
    for step in range(3):
        batch = data[step].batch
        assert data.tokens(step) == (int(np.sum(batch.lengths)), batch.token_ids.size)
    assert 0 < padding_of(data) < 1


def test_a_process_whose_rows_are_text_alone(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arrays have the shapes of the others', which have images."""
    said = sorted(chats(8), key=lambda chat: not chat.has_image)[4:]  # two of eight are text
    data = ChatData(lmm, said, chat_format(lmm.processor, lmm.stop_token_ids), batch_size=4, steps=1, seed=0)
    whole = data[0]
    images = [said[row].has_image for row, _ in data.plans[0].rows]
    assert images == [True, True, False, False]
    monkeypatch.setattr("sav_jax.train.data.own_rows", lambda mesh, size: slice(2, 4))
    for mine, all_of_them in zip(jax.tree.leaves(data[0]), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(mine, all_of_them[2:])


def test_a_stop_token_that_does_not_stop_is_warned_of(lmm: sav_jax.LMM, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_endless_answers(lmm, VICUNA_SQ)
    said = capsys.readouterr().err
    assert said.startswith("warning: answers are taught to end with '</s>', which does not stop ")
    assert said.count("\n") == 1
    warn_of_endless_answers(lmm, chat_format(lmm.processor, lmm.stop_token_ids))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("grouped", [False, True])
def test_plans_visit_every_row_once_an_epoch(grouped: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = [Sizes(int(rng.integers(10, 300)), int(row % 3 > 0), 1, 5) for row in range(48)]
    plans = plan_steps(sizes, 4, 36, 1, grouped)
    seen = [item for plan in plans for item in plan.rows]
    assert len(seen) == 36 * 4 == len(set(seen)) == 3 * 48
    assert plans == plan_steps(sizes, 4, 36, 1, grouped)
    assert plans[:20] == plan_steps(sizes, 4, 20, 1, grouped)
    for plan in plans:
        assert all(sizes[row].tokens <= plan.bucket.tokens for row, _ in plan.rows)
        if grouped:
            assert len({sizes[row].rows for row, _ in plan.rows}) == 1
    # Rows of like length go together: less is padding than if they came as they are.
    padded = sum(4 * max(sizes[row].tokens for row, _ in plan.rows) for plan in plans)
    order = [row for _ in range(3) for row in rng.permutation(48)]
    mixed = sum(4 * max(sizes[row].tokens for row in order[i : i + 4]) for i in range(0, len(order), 4))
    assert padded < 0.8 * mixed
