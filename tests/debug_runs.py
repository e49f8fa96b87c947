"""The debug presets of all three recipes on small data that several tests share; as a program, killed while they train.

``python debug_runs.py MODEL FOLDER lora=2 aim=4`` trains each in its folder until it has logged so many steps, where it
is killed by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from checkpoints import picture

import sav_jax
from sav_jax.train import loop
from sav_jax.train.aim import AIM_PRESETS, Document, train_aim
from sav_jax.train.chats import Chat, Turn
from sav_jax.train.recipes import LORA_PRESETS, SQ_PRESETS
from sav_jax.train.tune import tuned_with_updates

PRESETS: Mapping[str, Any] = {
    "lora": LORA_PRESETS["debug"],
    "sq-llava": SQ_PRESETS["debug"],
    "aim": AIM_PRESETS["debug"],
}
# Of nearly one length, so that batches have few shapes: compiling is what these tests take their time for.
ANSWERS = ("red ring", "green grass", "a blue circle", "nothing is here")
LABELS = ("crimson red", "grass green", "a blue ring", "nothing here")


def chats(number: int = 24) -> list[Chat]:
    """Two rounds each, every sixth without an image; answers depend on the picture."""
    made = []
    for i in range(number):
        pictures = (picture(30, 30, i % 4),) if i % 6 else ()
        turns = ("user", "What is it?"), ("assistant", ANSWERS[i % 4]), ("user", "Why?"), ("assistant", "I see it.")
        made.append(
            Chat(tuple(Turn(*turn) for turn in turns), sav_jax.Example("-", pictures, id=str(i), source=f"row {i}"))
        )
    return made


def write_conversations(folder: Path) -> Path:
    """A file of :func:`chats` in LLaVA's format, beside its pictures."""
    rows: list[dict[str, Any]] = []
    for i, chat in enumerate(chats()):
        said = [{"from": turn.role, "value": turn.text} for turn in chat.turns]
        rows.append({"id": str(i), "conversations": said})
        for image in chat.media.load_images():
            rows[-1]["image"] = f"{i % 4}.png"
            image.save(folder / f"{i % 4}.png")
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def documents(number: int = 24) -> list[Document]:
    """Three pairs each, but every fifth has two; the words of a document are alike."""
    return [
        tuple(
            sav_jax.Example("What is it?", (picture(30, 30, i + j),), LABELS[i % 4], source=f"document {i}")
            for j in range(2 if i % 5 == 4 else 3)
        )
        for i in range(number)
    ]


def trained(name: str, lmm: sav_jax.LMM, directory: Path) -> dict[str, np.ndarray]:
    """What a preset trains, to its end; goes on where a run in the folder stopped."""
    if name == "aim":
        return dict(train_aim(lmm, documents(), PRESETS[name], directory, progress=False).params)
    return jax.device_get(tuned_with_updates(lmm, chats(), PRESETS[name], directory, progress=False)[1])


def losses(directory: Path) -> list[float]:
    """Of every row of the log."""
    return [json.loads(line)["loss"] for line in (directory / "log.jsonl").read_text().splitlines()]


def main(model: str, folder: str, *kills: str) -> None:
    """See the head of this file."""
    add = loop._Log.add
    for kill in kills:
        name, _, steps = kill.partition("=")
        child = os.fork()
        if not child:

            def dying(log: Any, step: int, *rest: Any, last: int = int(steps)) -> None:
                add(log, step, *rest)
                if step + 1 == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(loop._Log, "add", dying)  # noqa: B010
            trained(name, sav_jax.load(model), Path(folder) / name)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{name} ended before it was killed"
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    main(*sys.argv[1:])
