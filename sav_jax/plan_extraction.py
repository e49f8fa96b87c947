"""The reading of prompts (``sav-jax extract``, ``fit``, ``predict``), compiled for a pod that is not there
(:mod:`sav_jax.plan`).
"""

from __future__ import annotations

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
