"""Training of AIM's projection: targets token by token, the loss by hand, choices, documents, commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import picture
from debug_runs import LABELS as WORDS
from debug_runs import documents, losses

import sav_jax
from sav_jax import Example, UserError
from sav_jax.aim import Aim, DemonstrationBank, after_demonstrations, load_aim
from sav_jax.cli import main
from sav_jax.models.fusion import FusionConfig, initial_params
from sav_jax.train.aim import AIM_PRESETS, AimData, AimRecipe, aim_loss, query_lesson, train_aim
from sav_jax.train.chats import chat_format
from sav_jax.train.documents import ATTRIBUTES, drawn_documents, grouped, read_documents
from sav_jax.train.recipes import overridden

DEBUG = AIM_PRESETS["debug"]
ONE = dataclasses.replace(DEBUG, shots=(2,), steps=2)  # a single program


def test_the_loss_is_the_likelihood_of_the_answers(lmm: sav_jax.LMM) -> None:
    """Of the training's own batch, against the library's option scoring after a bank's virtual tokens."""
    recipe = dataclasses.replace(DEBUG, shots=(2,), steps=1).resolved(24)
    form = chat_format(lmm.processor, lmm.stop_token_ids)
    config = FusionConfig(lmm.config.text.hidden_size)
    params = initial_params(config, 3, "random", 0.5)
    made = documents()
    data = AimData(lmm, made, recipe, form)
    loss = jax.jit(aim_loss(lmm.module, config, 0, "none"))
    total, weight = loss(
        {path: jnp.asarray(v) for path, v in params.items()}, lmm.params, jax.device_put(data[0]), jax.random.key(0)
    )
    bank = DemonstrationBank(lmm, Aim(recipe.layout(form.answer_lead), config, params, lmm.fingerprint, ""))
    expected, count = 0.0, 0
    rows = [row for row, _ in data.plans[0].rows]
    assert any(len(made[row]) == 2 for row in rows), "a short document stands in the batch"
    for row in rows:
        *shown, last = made[row]
        answer = f"{form.answer_lead}{last.label}{form.assistant_end}"
        asked = after_demonstrations(last, bank.get(shown), bank.aim.layout)
        expected -= float(sav_jax.score_options(lmm, [asked], [answer], progress=False)[0, 0])
        count += len(lmm.processor.encode(answer))
    assert float(weight) == count
    # Sums of some hundred float32 numbers of order ten, made in another order.
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)


def test_what_is_learned_is_the_answer_and_its_end(lmm: sav_jax.LMM) -> None:
    form = chat_format(lmm.processor, lmm.stop_token_ids)
    pair = Example("What is it?", (picture(30, 30),), "a cat")
    lesson = query_lesson(lmm, pair, (3, 2), form, DEBUG.layout(form.answer_lead))
    learned = lesson.targets[lesson.targets >= 0]
    assert lmm.processor.tokenizer.decode(learned.tolist()) == f"{form.answer_lead}a cat{form.assistant_end}"
    assert (lesson.targets[-len(learned) :] >= 0).all(), "they stand at the end"
    assert lesson.prompt.num_virtual == 5
    np.testing.assert_array_equal(lesson.targets[-len(learned) :], lesson.prompt.token_ids[-len(learned) :])


def test_ways_to_train_that_change_nothing(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {"plain": {}, "full": {"remat": "full"}, "micro": {"micro_batches": 2}}
    for name, options in ways.items():
        recipe = dataclasses.replace(ONE, optimization=dataclasses.replace(ONE.optimization, **options))
        train_aim(lmm, documents(), recipe, tmp_path / name, progress=False)
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "plain"), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"tokens": "answer"}, {"layer": 1}, {"projection": "mlp", "initial": "random"}, {"norm": False}]
)
def test_choices_that_the_paper_leaves_open(lmm: sav_jax.LMM, tmp_path: Path, options: dict[str, Any]) -> None:
    aim = train_aim(lmm, documents(), dataclasses.replace(ONE, **options), tmp_path / "run", progress=False)
    assert all(np.isfinite(value).all() for value in aim.params.values())
    (tokens,) = DemonstrationBank(lmm, load_aim(tmp_path / "run")).get([documents(1)[0][0]])
    words = WORDS[0] if aim.layout.tokens == "answer" else f"What is it?{WORDS[0]}"
    assert tokens.values.shape == (len(words), lmm.config.text.hidden_size)


def test_overridden() -> None:
    recipe = overridden(DEBUG, {"batch_size": 4, "shots": (3,), "epochs": 2.0, "layer": None, "output": "x"})
    assert (recipe.optimization.batch_size, recipe.shots, recipe.steps, recipe.layer) == (4, (3,), 0, 0)
    assert recipe.resolved(10).optimization.steps == 5


def test_rows_are_put_together_once_each() -> None:
    rows = [Example("?", id=str(i), label="x") for i in range(20)]
    made = grouped(rows, 3, 1)
    assert [len(document) for document in made] == [3] * 6
    used = [pair.id for document in made for pair in document]
    assert len(set(used)) == 18
    assert made == grouped(rows, 3, 1) != grouped(rows, 3, 2)


def test_documents_from_files(tmp_path: Path) -> None:
    for i in range(4):
        picture(8, 8, i).save(tmp_path / f"{i}.png")
    captions = [
        {"id": i, "image": f"{i}.png", "conversations": [{"from": "human", "value": "Describe.\n<image>"},
                                                         {"from": "gpt", "value": f"caption {i}"}]}
        for i in range(4)
    ]  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    labelled = [{"image": f"{i}.png", "question": "What?", "label": str(i)} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    segments = [{"image": "0.png", "text": "one"}, {"image": "1.png", "text": "two", "question": "Which?"}]
    (tmp_path / "documents.jsonl").write_text(json.dumps({"segments": segments}) + "\n")
    for name, question, label in (("captions.json", "Describe.\n<image>", "caption "), ("rows.jsonl", "What?", "")):
        made = read_documents(tmp_path / name, pairs=2)
        assert sorted(str(pair.label) for document in made for pair in document) == [f"{label}{i}" for i in range(4)]
        assert all(pair.question == question for document in made for pair in document)
        for pair in made[0]:
            assert pair.images == (tmp_path / f"{str(pair.label)[-1]}.png",)
    (document,) = read_documents(tmp_path / "documents.jsonl")
    assert [(pair.question, pair.label, pair.images) for pair in document] == [
        ("<image>", "one", (tmp_path / "0.png",)),
        ("Which?", "two", (tmp_path / "1.png",)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"segments": [{"image": "0.png", "text": "x"}]}, 'd.jsonl:1: field "segments" must be a list of at least two'),
        ({"segments": [1, 2]}, "item 0: must be an object, not a number"),
        ({"segments": [{"image": "0.png", "text": " "}] * 2}, 'item 0: field "text" must be a text'),
        ({"segments": [{"image": "0.png", "text": "x", "question": 1}] * 2}, 'item 0: field "question" must be a text'),
        ({"segments": [{"text": "x"}] * 2}, 'item 0: field "image" must be a path'),
        ({"segments": [{"image": "9.png", "text": "x"}] * 2}, "names '9.png', which does not exist"),
        ({"segments": [{"image": "0.png", "text": "x", "question": ""}] * 2}, 'item 0: field "question" is empty'),
    ],
)
def test_malformed_documents(tmp_path: Path, row: Any, message: str) -> None:
    picture(8, 8).save(tmp_path / "0.png")
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"segments": 5}) + "\n")
    with pytest.raises(UserError) as caught:
        read_documents(tmp_path / "d.jsonl")
    assert message in str(caught.value)
    assert "(and 1 more bad row)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_recipes_and_data(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    for options, message in (
        ({"shots": ()}, "shots must name"),
        ({"shots": (0, 1)}, "shots must name"),
        ({"pairs": 1}, "pairs must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            AimRecipe(**options)
    with pytest.raises(UserError, match="nothing to train on"):
        train_aim(lmm, [], DEBUG, tmp_path / "a", progress=False)
    with pytest.raises(UserError, match="document 0: a document needs at least two pairs"):
        train_aim(lmm, [documents(1)[0][:1]], DEBUG, tmp_path / "b", progress=False)
    with pytest.raises(UserError, match="layer is 9"):
        train_aim(lmm, documents(), dataclasses.replace(DEBUG, layer=9), tmp_path / "c", progress=False)
    with pytest.raises(UserError, match="projection 'cube' is not known"):
        train_aim(lmm, documents(), dataclasses.replace(DEBUG, projection="cube"), tmp_path / "d", progress=False)
    short = dataclasses.replace(lmm, max_tokens=20)
    with pytest.raises(UserError, match=r"document \d+ after \d demonstrations: \d+ tokens; .* reads at most 20"):
        train_aim(short, documents(), DEBUG, tmp_path / "e", progress=False)
    assert not any((tmp_path / name).exists() and any((tmp_path / name).iterdir()) for name in "abcde")


def test_drawn_documents_say_one_kind_of_thing_and_show_no_digits() -> None:
    made = drawn_documents(40, 5, 0)
    meant = set()
    for document in made:
        assert len({pair.question for pair in document}) == 1
        assert len({pair.id for pair in document}) == 5
        labels = {str(pair.label) for pair in document}
        assert not any(label.isdigit() or label == "digit" for label in labels)
        meant.add(document[0].question)
    assert len(meant) > 1
    again = drawn_documents(40, 5, 0)
    assert [[pair.label for pair in document] for document in again] == [
        [pair.label for pair in document] for document in made
    ]
    np.testing.assert_array_equal(np.asarray(made[3][2].images[0]), np.asarray(again[3][2].images[0]))
    assert [d[0].label for d in drawn_documents(40, 5, 1)] != [d[0].label for d in made]
    assert len(ATTRIBUTES) == 7


@pytest.mark.usefixtures("elsewhere")
def test_the_commands(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(8):
        picture(30, 30, i).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i % 8}.png", "question": f"Is it {i // 8}?", "label": WORDS[i % 2]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ["train", "aim", "--model", model, "--output", "run", "--preset", "debug", "--steps", "1"]
    assert main(train) == 2
    assert "--data FILE is missing; only bundled models learn from drawn scenes" in capsys.readouterr().err
    train += ["--data", str(tmp_path / "rows.jsonl")]
    assert main([*train, "--shots", "1,99"]) == 2
    assert (
        "error: 99 demonstrations are asked for (--shots); no document has more than 2 before"
        in capsys.readouterr().err
    )
    assert main([*train, "--shots", "1,2"]) == 0
    assert "written to run: projection" in capsys.readouterr().out
    asked = ["eval", "--model", model, "--train", str(tmp_path / "rows.jsonl"), "--shots", "3", "--max-new-tokens", "2"]
    asked += ["--methods", "icl,aim,aim-likelihood", "--demonstrations", "4", "--output-path", "results"]
    assert main(asked) == 2
    assert "methods aim and aim-likelihood need a projection: --aim DIR" in capsys.readouterr().err
    assert main([*asked, "--aim", "run"]) == 0
    printed = capsys.readouterr().out
    assert "and 4 over demonstrations by themselves (aim)" in printed
    content = json.loads(Path("results/results.json").read_text())["sav_jax"]
    assert content["passes"]["demonstrations"] == 4
    icl, aim, likely = (row["facts"]["0"] for row in content["runs"])
    assert icl["demonstrations"] == aim["demonstrations"] == likely["demonstrations"]
    assert aim["prompt_tokens"] == likely["prompt_tokens"] < icl["prompt_tokens"]
    assert aim["cache_bytes"] / aim["prompt_tokens"] == pytest.approx(
        icl["cache_bytes"] / icl["prompt_tokens"], rel=1e-3
    )
    assert aim["query_passes"] == icl["query_passes"] == 18
    assert "query_passes" not in likely, "both methods look at one reading"
