"""What a study is about, where that is not the bundled models on tasks drawn here: other checkpoints, other tasks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from sav_jax.errors import UserError
from sav_jax.eval.tasks import find_task
from sav_jax.lmm import checkpoint_fingerprint, find_model, local_model
from sav_jax.models.registry import architecture, read_config
from scripts.reproduction.heads import HEADS, draws
from scripts.reproduction.rescoring import SHOTS
from scripts.reproduction.study import MODELS, Checkpoint, Study

LONGEST = 100
"""Characters of a folder's name."""


def find_models(words: str) -> tuple[tuple[str, ...], tuple[Checkpoint, ...]]:
    """Look up what ``--models`` names.

    Args:
      words: bundled models, directories or hub ids, separated by commas.

    Returns:
      Names of all of them, in order: of folders and on the page; and those that are not bundled.

    Raises:
      UserError: there is no such model, it cannot be read, has too few heads, or is named twice.
    """
    names: list[str] = []
    others: list[Checkpoint] = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        if word in MODELS:
            names.append(word)
        else:
            others.append(_checkpoint(word, [*MODELS, *names]))
            names.append(others[-1].name)
    if not names:
        raise UserError(f"--models names no model; bundled are: {', '.join(MODELS)}")
    prints = [next((of.fingerprint for of in others if of.name == name), name) for name in names]
    if len(set(prints)) < len(prints):
        twice = next(name for name, of in zip(names, prints, strict=True) if prints.count(of) > 1)
        raise UserError(f"--models names {twice} twice")
    return tuple(names), tuple(others)


def _checkpoint(word: str, taken: Sequence[str]) -> Checkpoint:
    there = local_model(word)
    directory = find_model(word)
    try:
        text = architecture(read_config(directory)).config.text
    except UserError as error:
        raise UserError(f"--models: {word}: {error}") from None
    if text.num_layers * text.num_heads <= HEADS:
        raise UserError(
            f"--models: {word} has {text.num_layers * text.num_heads} attention heads; the study chooses {HEADS}"
        )
    path = word if there is None else str(there.resolve())
    fingerprint = checkpoint_fingerprint(directory)
    name = safe_name(Path(path).name)
    if name.casefold() in {other.casefold() for other in taken}:  # some disks know no capitals
        name = f"{name}-{fingerprint[:8]}"
    return Checkpoint(name, path, fingerprint)


def safe_name(text: str) -> str:
    """``text`` as the name of a folder and on a page: letters, digits, points, dashes; never ".." or empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:LONGEST] or "model"


def find_tasks_called(words: str) -> dict[str, str]:
    """Look up what ``--tasks`` names.

    Args:
      words: tasks or groups of them, as ``sav-jax eval --tasks`` takes them.

    Returns:
      Name of each task -> what it is called by there.

    Raises:
      UserError: there is no such task, or its answers are no classes.
    """
    called: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in words.split(","))):
        found = find_task(word)
        for task in found:
            if task.generative:
                raise UserError(
                    f"--tasks: the answers to {task.name} are written freely; the study's tasks have classes to choose "
                    "among"
                )
            called[task.name] = word if len(found) == 1 else task.name
    if not called:
        raise UserError("--tasks names no task; 'sav-jax eval --tasks list' prints all")
    return called


def check_data(study: Study) -> None:
    """Draw what every task shows and asks: what is missing is found before anything is measured.

    Raises:
      UserError: files are missing or malformed, or a class has too few examples.
    """
    for task in study.tasks:
        study.say(f"looking at the data of {task}")
        draws(study, task, SHOTS)


def folder_name(models: Sequence[str], others: bool, tasks: Sequence[str], quick: bool) -> str:
    """Of the folder in ``results/`` for all that a study measures: it says what other models or tasks it is about."""
    words = ["reproduction", *["quick"] * quick]
    words += ["of", "+".join(models)] if others else []
    words += ["on", "+".join(map(safe_name, tasks))] if tasks else []
    name = "-".join(words)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
