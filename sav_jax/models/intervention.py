"""Changing what attention heads put out, where it enters the output projection: replacing (task vectors), adding
(steering), scaling and silencing.

Axes: L layers, B batch, T tokens, N heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sav_jax.models.batch import Array


@struct.dataclass
class HeadEdit:
    """``heads * keep + add`` at some tokens; all others stay as they are.

    Attributes:
        keep: float ``[L, N]``, or ``[L, B, N]`` for each row its own. 1 and an ``add`` of zeros leave a head alone.
        add: float ``[L, N, H]`` or ``[L, B, N, H]``.
        tokens: bool ``[B, T]`` which tokens; None means those at ``read_positions``.
    """

    keep: Array
    add: Array
    tokens: Array | None = None

    @classmethod
    def replacing(cls, values: Array, mask: Array) -> HeadEdit:
        """Put values in place of what some heads put out.

        Args:
            values: ``[L, N, H]`` or ``[L, B, N, H]``.
            mask: bool ``[L, N]`` or ``[L, B, N]``, True at heads that are replaced.
        """
        mask, values = jnp.asarray(mask, bool), jnp.asarray(values)
        return cls(1.0 - mask.astype(values.dtype), jnp.where(mask[..., None], values, 0))


@struct.dataclass
class LayerEdit:
    """One layer's part of a :class:`HeadEdit`.

    Attributes:
        keep: ``[N]`` or ``[B, N]``.
        add: ``[N, H]`` or ``[B, N, H]``.
    """

    keep: Array
    add: Array


def edited(heads: jax.Array, edit: LayerEdit, tokens: Array) -> jax.Array:
    """Heads ``[B, T, N, H]``, changed where ``tokens`` ``[B, T]`` is True."""
    number, width = heads.shape[2:]
    keep = jnp.asarray(edit.keep, heads.dtype).reshape(-1, 1, number, 1)
    add = jnp.asarray(edit.add, heads.dtype).reshape(-1, 1, number, width)
    return jnp.where(jnp.asarray(tokens)[:, :, None, None], heads * keep + add, heads)


def tokens_at(read_positions: Array, length: int) -> jax.Array:
    """int32 ``[B, R]`` -> bool ``[B, T]``, True at the positions."""
    return jnp.any(jnp.asarray(read_positions)[:, :, None] == jnp.arange(length)[None, None, :], axis=1)
