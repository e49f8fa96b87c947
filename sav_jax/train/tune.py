"""A model, conversations and a recipe -> a tuned model in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sav_jax import adapters
from sav_jax._processes import by_the_first, gathered
from sav_jax._storage import BucketPath
from sav_jax.errors import UserError
from sav_jax.lmm import LMM, find_model
from sav_jax.models.weights import INDEX_FILE, save_checkpoint
from sav_jax.train import loop, supervised
from sav_jax.train.chats import Chat, ChatFormat, format_called
from sav_jax.train.data import ChatData, padding_of
from sav_jax.train.recipes import Recipe

_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def form_of(lmm: LMM, recipe: Recipe) -> ChatFormat:
    """How the recipe writes conversations."""
    return format_called(recipe.conversation, lmm.processor, lmm.stop_token_ids)


def digest(chats: Sequence[Chat]) -> str:
    """sha256 of what is said and which images are shown, by path if they are files, in hexadecimal."""
    whole = hashlib.sha256()
    for chat in chats:
        shown = [str(image) for image in chat.media.images if isinstance(image, Path | BucketPath)]
        if len(shown) < len(chat.media.images):
            shown = chat.media.image_digests()
        whole.update(repr(([(turn.role, turn.text) for turn in chat.turns], shown)).encode())
    return whole.hexdigest()


def tune(lmm: LMM, chats: Sequence[Chat], recipe: Recipe, directory: Path, progress: bool = True) -> LMM:
    """Tune a model; a run that was killed goes on.

    Args:
        lmm: the base model.
        chats: what it learns from.
        recipe: how.
        directory: of the run (checkpoints and log).
        progress: show a bar and the padding's share on stderr.

    Returns:
        The tuned model, updates merged in.

    Raises:
        UserError: bad rows, a recipe that does not fit the model, or a folder of another run.
    """
    return tuned_with_updates(lmm, chats, recipe, directory, progress)[0]


def tuned_with_updates(
    lmm: LMM, chats: Sequence[Chat], recipe: Recipe, directory: Path, progress: bool = True
) -> tuple[LMM, loop.Trainable]:
    """As :func:`tune`, and what was trained."""
    trainable, facts = trained(lmm, chats, recipe, directory, progress)
    params = supervised.tuned(lmm, recipe.targets, trainable)
    mark = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    tuned = dataclasses.replace(
        lmm,
        name=f"{lmm.name} tuned in {directory}",
        params=params,
        fingerprint=hashlib.sha256(f"{lmm.fingerprint} {mark}".encode()).hexdigest(),
    )
    return tuned, trainable


def trained(
    lmm: LMM, chats: Sequence[Chat], recipe: Recipe, directory: Path | None, progress: bool = True
) -> tuple[loop.Trainable, dict[str, Any]]:
    """What :func:`tune` trains, before it is merged into the model, and what decided it; without a directory nothing is
    written.
    """
    recipe = recipe.resolved(len(chats))
    settings = recipe.optimization
    facts = {"recipe": recipe.facts(), "model": lmm.fingerprint, "dtype": str(lmm.dtype), "data": digest(chats)}
    problem = supervised.problem(lmm, recipe.targets, recipe.groups, settings.seed, settings.remat, facts)
    loop.check(problem, settings, directory)
    data = ChatData(
        lmm,
        chats,
        form_of(lmm, recipe),
        batch_size=settings.batch_size,
        steps=settings.steps,
        seed=settings.seed,
        sq_ratio=recipe.sq_ratio,
        max_tokens=recipe.max_tokens or None,
        group_by_modality=recipe.group_by_modality,
        progress=progress and jax.process_index() == 0,
    )
    if progress and jax.process_index() == 0:
        number = sum(value.size for value in problem.initial.values())
        print(
            f"{len(chats)} conversations, {data.cut} of them cut; {settings.steps} steps of {settings.batch_size}, "
            f"padding {padding_of(data):.1%} of the tokens; {number:,} parameters train",
            file=sys.stderr,
        )
        warn_of_endless_answers(lmm, data.form)
    return loop.train(problem, data, settings, directory, progress), facts


def warn_of_endless_answers(lmm: LMM, form: ChatFormat) -> None:
    """One line on stderr if what ends an answer in training does not end one of the model's."""
    stops = [str(lmm.processor.tokenizer.convert_ids_to_tokens(token)) for token in lmm.stop_token_ids]
    if form.assistant_end.strip() not in stops:
        print(
            f"warning: answers are taught to end with {form.assistant_end!r}, which does not stop {lmm.name} "
            f"({', '.join(stops) or 'nothing'} does): what it writes will run on (--conversation template avoids this)",
            file=sys.stderr,
        )


def export(base: LMM, tuned: LMM, recipe: Recipe, trainable: Any, output: Path, source: str) -> list[str]:
    """Write ``model/``, an ordinary checkpoint, and, if nothing but low-rank updates trained, ``adapter/`` in PEFT's
    format.

    Args:
        base: the model that was tuned.
        tuned: the result.
        recipe: what it was tuned with.
        trainable: what was trained.
        output: folder for both.
        source: what the base model was loaded by.

    Returns:
        Names of what was written.
    """
    names = ["model"]
    tuned = dataclasses.replace(tuned, params=gathered(tuned.params))
    trainable = gathered(trainable)

    def write() -> None:
        write_checkpoint(tuned, find_model(source), output / "model")
        if any(path.startswith("params/") for path in trainable):
            return
        matrices = {path.removeprefix("lora/"): value for path, value in trainable.items()}
        try:
            adapters.save(output / "adapter", base.architecture, recipe.targets, matrices, source)
            names.append("adapter")
        except UserError as error:  # a module that PEFT's format cannot hold; the merged model has it all
            print(f"warning: no adapter written: {error}", file=sys.stderr)

    by_the_first(write)
    return names


def write_checkpoint(lmm: LMM, settings: Path, directory: Path) -> None:
    """Write a model as an ordinary checkpoint folder, complete or not at all.

    Args:
        lmm: the model.
        settings: the folder whose tokenizer and processor files go with it.
        directory: replaced if it is there.
    """
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for pattern in _SETTINGS:
        for file in settings.glob(pattern):
            if file.name not in (INDEX_FILE, "config.json", "adapter_config.json", "evaluation.json"):
                shutil.copy(file, temporary / file.name)
    params = jax.device_get(lmm.params)
    save_checkpoint(temporary, lmm.hf_config, params, str(lmm.dtype), lmm.architecture.table)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.replace(directory)
