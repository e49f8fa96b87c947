"""A task of the user's own: two files or folders, or one to be split."""

from __future__ import annotations

from sav_jax._storage import AnyPath
from sav_jax.errors import UserError
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.examples import DEFAULT_FRAMES, Example, read_examples


def from_files(
    train: AnyPath,
    test: AnyPath | None = None,
    question: str | None = None,
    frames: int = DEFAULT_FRAMES,
) -> Task:
    """Make a task of files or folders as :func:`sav_jax.read_examples` takes them.

    Args:
      train: where support is drawn from.
      test: the queries; None for all of ``train`` that is not drawn.
      question: of pictures in a folder and of rows without one.
      frames: how many frames of each video are shown.

    Raises:
      UserError: if either cannot be read or lacks labels, or the queries have labels that the support has not.
    """
    pool = read_examples(train, question, require_labels=True, frames=frames)
    if test is None:
        data = Data(_items(pool))
        return Task("files", f"{train}, a part of it being the labelled examples", lambda _: data, source=str(train))
    queries = read_examples(test, question, require_labels=True, frames=frames)
    known = {example.label for example in pool}
    for query in queries:
        if query.label not in known:
            raise UserError(f'{query.source}: field "label" is {query.label!r}, which no row of {train} has')
    data = Data(_items(pool), _items(queries))
    return Task(
        "files",
        f"{test} with examples from {train}",
        lambda _: data,
        source=f"{train} and {test}",
        split=f"support from {train}",
    )


def _items(examples: list[Example]) -> tuple[Item, ...]:
    return tuple(Item(example) for example in examples)
