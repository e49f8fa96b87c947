"""``scripts/reproduction/sq.py``: what it teaches and asks, its losses, and the part at its quick size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sav_jax
from sav_jax.world.scene import sample_scene
from sav_jax.world.shapes import SHAPES
from scripts.reproduction import sq
from scripts.reproduction.study import Study


@pytest.fixture(scope="module")
def tiny() -> sav_jax.LMM:
    return sav_jax.load("tiny")


def test_new_names_are_answers_in_the_named_conversations_alone() -> None:
    chats = sq.training_chats(40, seed=3)
    assert len(chats) == 40 + 16
    for i, chat in enumerate(chats):
        assert chat.media.id is not None
        old = sample_scene(int(chat.media.id), "shape").thing.name
        new = SHAPES[(SHAPES.index(old) + 1) % len(SHAPES)]
        said = [turn.text for turn in chat.turns]
        if i < 40:
            assert not {*said[1::2]} & {*SHAPES}
            words = said[2].removesuffix("?").split()
            assert (words[-1], old in words) == (new, False)
        else:
            assert said[1:] == [new]
    asked, (question,) = sq.scene_of(sq.HELD_OUT, True, named=True)
    assert question.answer in SHAPES
    assert {asked.id} & {chat.media.id for chat in chats} == set()


def test_losses_of_answers_are_those_of_the_options(tiny: sav_jax.LMM) -> None:
    units = sq.turn_losses(tiny, 16, asks=False)
    chats = [sq.conversation(sq.HELD_OUT + i, True) for i in range(16)]
    assert len(units) == sum(len(chat.turns) // 2 for chat in chats)
    asked = sq.turn_losses(tiny, 16, asks=True)
    assert len(asked) == len(units) - len(chats)  # of all but the first
    for chat in chats[:3]:
        prompt = sav_jax.Example(chat.turns[0].text, chat.media.images)
        (log_p,) = sav_jax.score_options(tiny, [prompt], [chat.turns[1].text + "<|im_end|>"], progress=False)[0]
        first = next(value for scene, value in units if scene == chat.media.id)
        # Two tokens; another shape of batch sums in another order (some 2^-20 of a logit).
        np.testing.assert_allclose(first, -log_p / 2, rtol=1e-4, atol=1e-5)


def cells(shift: float) -> sq.Cells:
    """Every arm, of which those with questions, with prototypes, without updates are ahead by ``shift``; captions of
    all parts are behind.
    """
    rng = np.random.default_rng(0)

    def cell(arm: sq.Arm | None, *more: str) -> dict[str, sq.Units]:
        ahead = 0.0 if arm is None else shift * (arm.questions + arm.prototypes - arm.vision)
        right = rng.random(200) < 0.5 + ahead
        found = {what: [(str(i), float(x)) for i, x in enumerate(right)] for what in sq.MEASURES}
        return found | {
            name: [(str(i), float(x)) for i, x in enumerate(rng.random(200) < 0.5 - ahead)] for name in more
        }

    told: tuple[sq.Arm | None, ...] = (None, sq.Arm(prototypes=True), sq.Arm(), sq.PLAIN)
    untold: tuple[sq.Arm | None, ...] = (sq.Arm(questions=False), sq.Arm(vision=False))
    return sq.Cells(
        {arm: [cell(arm) for _ in range(3)] for arm in untold}
        | {arm: [cell(arm, "captions") for _ in range(3)] for arm in told},
    )


def test_rows_are_oriented_as_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(tmp_path)
    verdicts = [row.verdict for row in sq.rows_of(study, "tiny", cells(0.3))]
    assert verdicts == ["holds", "does not hold", "holds", "holds", "does not hold"]
    found = cells(0.3)
    assert found.whole == sq.Arm(prototypes=True)
    without = sq.Cells({arm: of for arm, of in found.arms.items() if arm is None or not arm.prototypes})
    assert without.whole == sq.Arm()
    rows = sq.rows_of(study, "tiny-qwen", without)
    assert [row.verdict for row in rows] == ["holds", "does not hold", "not testable", "undecided", "undecided"]
    assert "no place" in rows[2].note
    assert "prototypes" not in rows[3].note
    monkeypatch.setattr(sq, "cells", lambda *_: found)
    (table,) = sq.tables(Study(tmp_path, models=("tiny",)))
    assert {len(line) for line in table.rows} == {len(table.head)}
    assert len(table.rows) == 6  # four arms, none of the parts, and no training
    assert [line[-1] != "" for line in table.rows].count(True) == 4


def test_a_cell_is_trained_once(tiny: sav_jax.LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sq, "QUICK", sq.Size(rows=16, steps=2, scenes=16))
    study = Study(tmp_path, models=("tiny",), seeds=(0,), quick=True, say=lambda _: None)
    arm = sq.Arm(prototypes=True, vision=False)
    found = sq.cell(study, lambda: tiny, "tiny", arm, 0)
    assert {len({scene for scene, _ in found[what]}) for what in sq.MEASURES} == {16}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(sq, "tune", never)
    assert sq.cell(study, lambda: tiny, "tiny", arm, 0) == found
    with pytest.raises(AssertionError, match="again"):
        sq.cell(study, lambda: tiny, "tiny", sq.Arm(vision=False), 0)
    with pytest.raises(AssertionError, match="again"):
        sq.cell(study, lambda: tiny, "tiny", arm, 0, captioned=True)


def test_captions_are_those_of_the_task(tiny: sav_jax.LMM, tmp_path: Path) -> None:
    """A model that was trained on captions has some; every query is scored once."""
    study = Study(tmp_path, models=("tiny",), seeds=(0,), quick=True, say=lambda _: None)
    (units,) = sq.captions(study, tiny).values()
    assert len(units) == len({name for name, _ in units}) == 16
    assert np.mean([value for _, value in units]) > 1
