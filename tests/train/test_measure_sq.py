"""``scripts/measure_sq.py``: what it teaches and asks, its losses, and the command at its quick size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scripts_loaded import loaded

import sav_jax
from sav_jax.errors import UserError
from sav_jax.world.scene import sample_scene
from sav_jax.world.shapes import SHAPES


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("measure_sq") as module:
        yield module


@pytest.fixture(scope="module")
def tiny() -> sav_jax.LMM:
    return sav_jax.load("tiny")


def test_new_names_are_answers_in_the_named_conversations_alone(script: ModuleType) -> None:
    setting = script.SETTINGS["new names"]
    chats = script.training_chats(setting, 40, seed=3)
    assert len(chats) == 40 + 16
    seen = 0
    for i, chat in enumerate(chats):
        old = sample_scene(int(chat.media.id), "shape").thing.name
        new = SHAPES[(SHAPES.index(old) + 1) % len(SHAPES)]
        said = [turn.text for turn in chat.turns]
        if i < 40:
            assert not {*said[1::2]} & {*SHAPES}
            words = said[2].removesuffix("?").split()
            assert (words[-1], old in words) == (new, False)
            seen += 1
        else:
            assert said[1:] == [new]
    assert seen == 40  # so that questions teach them
    asked, (question,) = script.questions(setting, script.HELD_OUT, True, named=True)
    assert question.answer in SHAPES
    assert {asked.id} & {chat.media.id for chat in chats} == set()


def test_losses_of_answers_are_those_of_the_options(script: ModuleType, tiny: sav_jax.LMM) -> None:
    setting = script.SETTINGS["several things"]
    units = script.turn_losses(tiny, setting, 16, asks=False)
    chats = [script.conversation(setting, script.HELD_OUT + i, True) for i in range(16)]
    assert len(units) == sum(len(chat.turns) // 2 for chat in chats)
    asked = script.turn_losses(tiny, setting, 16, asks=True)
    assert len(asked) == len(units) - len(chats)  # of all but the first
    for chat in chats[:3]:
        prompt = sav_jax.Example(chat.turns[0].text, chat.media.images)
        (log_p,) = sav_jax.score_options(tiny, [prompt], [chat.turns[1].text + "<|im_end|>"], progress=False)[0]
        first = next(value for scene, _, value in units if scene == chat.media.id)
        # Two tokens; another shape of batch sums in another order (some 2^-20 of a logit).
        np.testing.assert_allclose(first, -log_p / 2, rtol=1e-4, atol=1e-5)


def test_the_command_measures_what_is_missing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = script.Arguments(
        tmp_path, ("new names",), arms=("untrained", "answers", "questions"), seeds=(0,), quick=True
    )
    script.main(arguments)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    base, asks = (
        [float(row[4]) for row in rows if row[2] == arm and row[1] in script.MEASURES]
        for arm in ("answers", "questions")
    )
    (difference,) = [row[6] for row in rows if row[1:3] == ["question_loss", "questions"]]
    assert abs(float(difference.split()[0]) - (asks[2] - base[2])) < 0.0015  # all three are rounded to 0.001
    # Even two steps teach it something of how questions begin.
    assert asks[2] < base[2]
    cells = sorted(tmp_path.glob("*/*/*.json"))
    assert len(cells) == 3
    units = json.loads(cells[0].read_text())["units"]
    assert {len({scene for scene, *_ in units[name]}) for name in script.MEASURES} == {16}

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(script, "measure", never)
    script.main(arguments)
    assert (tmp_path / "table.md").read_text() == table
    with pytest.raises(UserError, match="measured with other settings"):
        script.main(script.replace(arguments, quick=False))
