"""The signature all LMMs share: a :class:`Batch` in, an :class:`Output` out, heads in the ``intermediates`` collection.

Axes: B batch, T tokens, R positions read, P rows of pixels of one prompt, M rows of a prompt's visual table (or of its
virtual tokens), S taps of a visual token, D width of the decoder, V vocabulary.

Which visual token stands where (anyres tiles, unpadding, newline tokens, window orders, reduction of large images) is
decided on the host; the device only gathers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from sav_jax.models.batch import Batch
from sav_jax.models.decoder import Decoder, KVCache, read_at
from sav_jax.models.intervention import HeadEdit

HEADS_PATH = ("language_model", "layers", "self_attn", "head_outputs")
"""Where the heads ``[L, B, R, N, H]`` stand in the ``intermediates`` collection."""


@struct.dataclass
class Output:
    """What a forward pass returns besides the sown heads.

    Attributes:
        hidden: ``[B, T, D]`` after the final norm.
        logits: float32 ``[B, R, V]`` ("read"), ``[B, T, V]`` ("all") or None ("none").
        cache: the keys and values with this batch appended, when a cache was given.
    """

    hidden: jax.Array
    logits: jax.Array | None = None
    cache: KVCache | None = None


class MultimodalModel(nn.Module):
    """A vision tower and a :class:`Decoder`; a family defines ``setup`` and ``encode_images``.

    The config has ``text``, a :class:`DecoderConfig`; ``setup`` makes ``self.language_model`` from it.
    """

    config: Any

    def setup(self) -> None:
        self.language_model = Decoder(self.config.text)

    def encode_images(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Pixels -> the visual tables ``[B, M, D]`` of the prompts, row 0 being the newline vector.

        Returns:
            The table, and the deepstack tables ``[J, B, M, D]`` of families that add visual features in J layers.
        """
        raise NotImplementedError

    def dummy_vision(self) -> dict[str, Any]:
        """``pixels`` and ``vision`` of the smallest batch the tower takes: only shapes matter, to create parameters."""
        raise NotImplementedError

    def embed(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Token embeddings with visual and virtual tokens in their places ``[B, T, D]``, and the visual tokens of the
        deepstack.
        """
        x = self.language_model.embed(batch.token_ids)
        if batch.virtual_tokens is not None and batch.virtual_index is not None:
            rows = read_at(jnp.asarray(batch.virtual_tokens), jnp.maximum(jnp.asarray(batch.virtual_index), 0))
            x = jnp.where((jnp.asarray(batch.virtual_index) >= 0)[:, :, None], rows.astype(x.dtype), x)
        if batch.visual_index is None or (batch.pixels is None and batch.visual_pool is None):
            return x, None
        tables = self.visual_tables(batch) if batch.visual_pool is None else jnp.asarray(batch.visual_pool)
        visual = [gather_visual(table.astype(x.dtype), batch) for table in tables]
        x = jnp.where(batch.visual_index[:, :, :1] >= 0, visual[0], x)
        return x, jnp.stack(visual[1:]) if len(visual) > 1 else None

    def visual_tables(self, batch: Batch) -> jax.Array:
        """``[1 + J, B, M, D]``: the visual tables of the prompts, and those of the deepstack."""
        table, deepstack = self.encode_images(batch)
        return table[None] if deepstack is None else jnp.concatenate([table[None], deepstack])

    def __call__(
        self, batch: Batch, logits: str = "none", cache: KVCache | None = None, edit: HeadEdit | None = None
    ) -> Output:
        """Forward pass.

        Args:
            batch: prompts of one bucket, or what follows the prompts in ``cache``.
            logits: "none", "read" (at ``batch.read_positions``) or "all".
            cache: keys and values of what came before; returned with this batch appended.
            edit: a change of head outputs; the heads sown are the changed ones.
        """
        x, deepstack = self.embed(batch)
        hidden, cache = self.language_model(
            x, batch.lengths, batch.read_positions, batch.positions, cache, deepstack, edit, batch.segments
        )
        if logits == "none" and not self.is_initializing():
            return Output(hidden, cache=cache)
        at = hidden if logits == "all" else read_at(hidden, batch.read_positions)
        return Output(hidden, self.language_model.logits(at), cache)

    def heads(self, batch: Batch, cache: KVCache | None = None, edit: HeadEdit | None = None) -> jax.Array:
        """Head outputs ``[L, B, R, N, H]`` at ``batch.read_positions``, and nothing that they do not need
        (:meth:`sav_jax.models.decoder.Decoder.heads`).

        Args:
            batch, cache, edit: as for a call.
        """
        x, deepstack = self.embed(batch)
        return self.language_model.heads(
            x, batch.lengths, batch.read_positions, batch.positions, cache, deepstack, edit, batch.segments
        )


def gather_visual(table: jax.Array, batch: Batch) -> jax.Array:
    """Weighted sums of the rows of each prompt's table ``[B, M, D]``, or of one for all ``[X, D]``, at its visual
    tokens, zero at text: ``[B, T, D]``.
    """
    assert batch.visual_index is not None
    assert batch.visual_weight is not None
    visual = jnp.zeros((*batch.visual_index.shape[:2], table.shape[-1]), table.dtype)
    for tap in range(batch.visual_index.shape[2]):
        index = jnp.maximum(batch.visual_index[:, :, tap], 0)
        rows = jnp.take(table, index, axis=0) if table.ndim == 2 else read_at(table, index)
        # Weights are zero at text positions.
        visual = visual + rows * batch.visual_weight[:, :, tap, None].astype(table.dtype)
    return visual


def init_params(module: MultimodalModel, key: jax.Array) -> Any:
    """Fresh parameters; the dummy prompt is as small as the code allows and decides nothing."""
    batch = Batch(
        token_ids=jnp.zeros((1, 1), jnp.int32),
        lengths=jnp.ones((1,), jnp.int32),
        read_positions=jnp.zeros((1, 1), jnp.int32),
        **module.dummy_vision(),
        visual_index=jnp.zeros((1, 1, 1), jnp.int32),
        visual_weight=jnp.zeros((1, 1, 1), jnp.float32),
    )
    return module.init(key, batch)["params"]


def rematerialized(module: MultimodalModel, policy: str) -> MultimodalModel:
    """The same model with layers that keep less for their backward pass.

    Args:
        module: the model.
        policy: a name in ``layers.REMAT_POLICIES``.
    """
    config = module.config
    vision, text = replace(config.vision, remat=policy), replace(config.text, remat=policy)
    return type(module)(replace(config, vision=vision, text=text))
