"""The reading of prompts (``sav-jax extract``, ``fit``, ``predict``), compiled for a pod that is not there
(:mod:`sav_jax.plan`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sav_jax.batching import round_rows, round_tokens
from sav_jax.errors import UserError
from sav_jax.extract import heads_step
from sav_jax.plan import Report, abstract_batch, abstract_lmm, plan, topology_devices
from sav_jax.sharding import data_size, mesh_of


def plan_extraction(
    model: str | Path, topology: str, mesh: str, batch_size: int, max_tokens: int = 2048, image_rows: int = 1
) -> Report:
    """Compile the program that reads a batch of prompts and keeps every head's output at the last token, in bfloat16.

    Args:
        model: a ``config.json``, a folder that has one, or a bundled model.
        topology: such as ``v5e:4x4``.
        mesh: such as ``fsdp=16`` or ``data=4,model=4``.
        batch_size: prompts of a batch, over all chips.
        max_tokens: of a prompt, with those of its images; rounded up to the bucket that such a prompt runs in.
        image_rows: rows of pixels of a prompt: tiles (LLaVA), patches (Qwen); 0 for text alone; rounded up likewise.

    Raises:
        UserError: bad input, or a batch that the mesh cannot share.
    """
    placed = mesh_of(topology_devices(topology), mesh)
    if batch_size < 1 or batch_size % data_size(placed):
        raise UserError(f"--batch-size {batch_size} is no multiple of the {data_size(placed)} chips that share a batch")
    lmm = abstract_lmm(model, placed, lm_head=False)  # as the commands load it
    rows, tokens = round_rows(image_rows), round_tokens(max_tokens)
    return plan(
        f"heads of {batch_size} prompts of {tokens} tokens, {rows} rows of pixels each",
        topology,
        placed,
        heads_step(lmm.module),
        (lmm.params, abstract_batch(lmm.module, placed, batch_size, tokens, 1, rows)),
        lambda path: path.startswith("[0]"),
    )


def largest_batch(compiled: Callable[[int], Report], multiple: int, known: Report, size: int, tries: int = 6) -> int:
    """The largest batch that the compiler finds room for, to within a twentieth.

    What a program takes grows nearly in proportion to its batch: two plans tell how fast, the compiler is asked about
    the batch that this predicts, and what it answers makes the next prediction better.

    Args:
        compiled: batch size -> plan.
        multiple: every batch size is a multiple of it.
        known: the plan of a batch of ``size``.
        size: see ``known``.
        tries: at most so many plans beside ``known``.

    Returns:
        A multiple of ``multiple`` that fits, checked; 0 if none was found.
    """
    plans = {size: known}
    while len(plans) <= tries:
        fit = max((batch for batch, plan in plans.items() if plan.fits), default=0)
        over = min((batch for batch, plan in plans.items() if not plan.fits), default=None)
        if over is not None and over - fit <= max(multiple, fit // 20):
            break
        if len(plans) == 1:
            guess = 2 * size if known.fits else multiple
        else:
            # Through the two plans nearest to what there is.
            (a, first), (b, second) = sorted(plans.items(), key=lambda item: abs(item[1].total - item[1].memory))[:2]
            slope = (second.total - first.total) / (b - a)
            guess = 16 * fit if slope <= 0 else a + int((first.memory - first.total) / slope)
        guess = min(guess, 16 * fit) if fit else guess  # far away, the proportion may be another
        guess = guess // multiple * multiple
        low, high = fit + multiple, guess if over is None else over - multiple
        guess = max(low, min(guess, high))
        if guess in plans:
            break
        plans[guess] = compiled(guess)
    return max((batch for batch, plan in plans.items() if plan.fits), default=0)
