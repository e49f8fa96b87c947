"""The vision tower of the first Qwen-VL (arXiv 2308.12966): OpenCLIP's ViT-bigG on a larger grid, then a resampler, one
layer of cross-attention that sums an image of any number of patches up in a fixed number of visual tokens.

Axes: X images, n patches of one (g to a side), Q queries (visual tokens), D width of the tower, F feed-forward width, E
width of the decoder, N heads, H head width, A = 3 for query, key and value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models.attention import attention
from sav_jax.models.layers import LayerNorm, Projection, scanned
from sav_jax.models.vit import feed_forward, linear_entries, norm_entries
from sav_jax.models.weights import Entry

EPS = 1e-6
POSITION_SIDE = 16
"""Learnt positions of the tower, to a side, whatever its grid is."""
RESAMPLER_HEAD_DIM = 128


@dataclass(frozen=True)
class Qwen1VisionConfig:
    """Sizes of the tower; field by field the ``visual`` part of a ``config.json``."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_size: int
    num_queries: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = EPS
    remat: str = "none"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen1VisionConfig:
        """From the ``visual`` part of a ``config.json``.

        Raises:
            UserError: a size is missing, or sizes do not fit each other.
        """
        names = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim")
        if missing := [name for name in names if name not in config]:
            raise UserError(f"config.json: visual has no {', '.join(missing)}")
        queries = config.get("n_queries", 256)
        if math.isqrt(queries) ** 2 != queries:
            raise UserError(f"config.json: visual.n_queries {queries} is not a square")
        if config["output_dim"] % RESAMPLER_HEAD_DIM or config["width"] % config["heads"]:
            raise UserError(
                f"config.json: visual.output_dim must be a multiple of {RESAMPLER_HEAD_DIM} and visual.width of "
                "visual.heads"
            )
        return cls(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            hidden_size=config["width"],
            intermediate_size=int(config["width"] * config["mlp_ratio"]),
            num_layers=config["layers"],
            num_heads=config["heads"],
            out_size=config["output_dim"],
            num_queries=queries,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def resampler_heads(self) -> int:
        return self.out_size // RESAMPLER_HEAD_DIM


def bicubic_matrix(before: int, after: int) -> np.ndarray:
    """What PyTorch's bicubic resizing of a line of ``before`` points to ``after`` multiplies by (half-pixel centres,
    Keys' kernel with a = -3/4, edges repeated, no smoothing when the line gets shorter).

    Returns:
        float32 ``[after, before]``, rows summing to 1.
    """
    a = -0.75
    places = (np.arange(after) + 0.5) * before / after - 0.5
    taps = np.floor(places).astype(int)[:, None] + np.arange(-1, 3)
    distance = np.abs(places[:, None] - taps)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    matrix = np.zeros((after, before))
    np.add.at(matrix, (np.arange(after)[:, None], taps.clip(0, before - 1)), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def resized(table: jax.Array, side: int) -> jax.Array:
    """A table of positions for a square grid, ``[p * p, D] -> [side * side, D]``; as it is if it has that size."""
    before = math.isqrt(table.shape[0])
    if before == side:
        return table
    matrix = jnp.asarray(bicubic_matrix(before, side))
    grid = rearrange(table.astype(jnp.float32), "(p q) d -> p q d", p=before)
    # Full precision also where float32 products are not: a few sums that every patch depends on.
    grid = jnp.einsum("ip,jq,pqd->ijd", matrix, matrix, grid, precision="highest")
    return rearrange(grid, "i j d -> (i j) d").astype(table.dtype)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """Sines and cosines of the column, then of the row, of each place of a square grid (as in MAE, arXiv 2111.06377).

    Returns:
        float32 ``[side * side, width]``.
    """
    frequencies = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float32) / np.float32(width / 4))
    angles = np.arange(side, dtype=np.float32)[:, None] * frequencies[None, :]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


class VisionBlock(nn.Module):
    """Pre-norm transformer block with full attention: ``[X, n, D] -> [X, n, D]``; shaped for ``nn.scan``."""

    config: Qwen1VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        y = LayerNorm(EPS, name="layer_norm1")(x)
        qkv = Projection("XnD,ANHD->XnANH", (3, c.num_heads, c.head_dim, c.hidden_size), 3, name="qkv")(y)
        y = attention(*(qkv[:, :, i] for i in range(3)), causal=False)
        x = x + Projection("XnNH,DNH->XnD", (c.hidden_size, c.num_heads, c.head_dim), 1, name="out_proj")(y)
        return x + feed_forward(c, LayerNorm(EPS, name="layer_norm2")(x)), None


class StackedProjections(nn.Module):
    """One matrix for queries, keys and values of different origin: three ``[X, ., E] -> [X, ., N, H]``."""

    num_heads: int

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> list[jax.Array]:
        width = inputs[0].shape[-1]
        shape = len(inputs), self.num_heads, width // self.num_heads, width
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=3, out_axis=(0, 1, 2)), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape[:-1])
        kernel, bias = kernel.astype(inputs[0].dtype), bias.astype(inputs[0].dtype)
        outputs = (jnp.einsum("XnE,NHE->XnNH", x, kernel[i]) for i, x in enumerate(inputs))
        return [y + jnp.broadcast_to(bias[i], y.shape) for i, y in enumerate(outputs)]


class Resampler(nn.Module):
    """Learnt queries look at the patches of an image: ``[X, n, D] -> [X, Q, E]``. Positions are added to queries and
    keys, not to values.
    """

    config: Qwen1VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        side, width, heads = math.isqrt(c.num_queries), c.out_size, c.resampler_heads
        query = self.param("query", nn.initializers.normal(0.02), (c.num_queries, width))
        positions = self.param(
            "position_embedding", lambda _, *shape: jnp.asarray(sincos_positions(*shape)), side, width
        )
        if c.hidden_size != width:
            x = Projection("XnD,ED->XnE", (width, c.hidden_size), name="input_proj")(x)
        x = LayerNorm(EPS, name="ln_kv")(x)
        keys = x + jnp.broadcast_to(resized(positions, c.patches_per_side).astype(x.dtype), x.shape)
        queries = LayerNorm(EPS, name="ln_q")(query.astype(x.dtype)) + positions.astype(x.dtype)
        q, k, v = StackedProjections(heads, name="qkv")(queries[None], keys, x)
        y = attention(jnp.broadcast_to(q, (x.shape[0], *q.shape[1:])), k, v, causal=False)
        return Projection("XQNH,ENH->XQE", (width, heads, RESAMPLER_HEAD_DIM), 1, name="out_proj")(y)


class Qwen1VisionTower(nn.Module):
    """Pixels ``[X, height, width, 3]`` -> visual tokens ``[X, Q, E]``."""

    config: Qwen1VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        p, side = c.patch_size, c.patches_per_side
        # A stride-p convolution of width p is one matrix product per patch; what is left at the edge no patch sees.
        pixels = pixels[:, : side * p, : side * p]
        patches = rearrange(pixels, "x (i p) (j q) c -> x (i j) (p q c)", p=p, q=p)
        x = Projection("XnC,DC->XnD", (c.hidden_size, p * p * 3), name="patch_embedding")(patches)
        positions = self.param("position_embedding", nn.initializers.normal(0.02), (POSITION_SIDE**2, c.hidden_size))
        x = x + jnp.broadcast_to(resized(positions, side).astype(x.dtype), x.shape)
        x = LayerNorm(EPS, name="pre_layernorm")(x)
        blocks = scanned(VisionBlock, c.num_layers, c.remat, in_axes=())
        x, _ = blocks(c, name="layers")(x)
        x = LayerNorm(EPS, name="post_layernorm")(Resampler(c, name="resampler")(x))
        return Projection("XQC,CE->XQE", (c.out_size, c.out_size), name="proj")(x)


def checkpoint_entries(config: Qwen1VisionConfig, source: str, target: str) -> list[Entry]:
    """Where each parameter under ``target`` lives in a checkpoint whose tower is called ``source``."""
    c = config
    heads, resampler_heads = {"n": c.num_heads, "h": c.head_dim}, {"h": RESAMPLER_HEAD_DIM}
    patch = {"p": c.patch_size, "q": c.patch_size, "c": 3}
    layers, block, count = f"{target}/layers", f"{source}.transformer.resblocks.{{layer}}", c.num_layers
    resampler, pool = f"{target}/resampler", f"{source}.attn_pool"
    entries = [
        Entry(f"{target}/patch_embedding/kernel", f"{source}.conv1.weight", "d c p q -> d (p q c)", patch),
        Entry(f"{target}/position_embedding", f"{source}.positional_embedding", "n d -> n d"),
        *norm_entries(f"{target}/pre_layernorm", f"{source}.ln_pre"),
        *norm_entries(f"{layers}/layer_norm1", f"{block}.ln_1", count),
        *norm_entries(f"{layers}/layer_norm2", f"{block}.ln_2", count),
        # Every head's query, key and value stand together.
        Entry(f"{layers}/qkv/kernel", f"{block}.attn.in_proj.weight", "(n a h) d -> a n h d", heads, count),
        Entry(f"{layers}/qkv/bias", f"{block}.attn.in_proj.bias", "(n a h) -> a n h", heads, count),
        Entry(f"{layers}/out_proj/kernel", f"{block}.attn.out_proj.weight", "d (n h) -> d n h", heads, count),
        Entry(f"{layers}/out_proj/bias", f"{block}.attn.out_proj.bias", "d -> d", {}, count),
        *linear_entries(f"{layers}/fc1", f"{block}.mlp.c_fc", count),
        *linear_entries(f"{layers}/fc2", f"{block}.mlp.c_proj", count),
        Entry(f"{resampler}/query", f"{pool}.query", "q e -> q e"),
        Entry(f"{resampler}/position_embedding", f"{pool}.pos_embed", "q e -> q e"),
        *norm_entries(f"{resampler}/ln_q", f"{pool}.ln_q"),
        *norm_entries(f"{resampler}/ln_kv", f"{pool}.ln_kv"),
        # All queries, then all keys, then all values.
        Entry(
            f"{resampler}/qkv/kernel",
            f"{pool}.attn.in_proj_weight",
            "(a n h) e -> a n h e",
            {"a": 3, **resampler_heads},
        ),
        Entry(f"{resampler}/qkv/bias", f"{pool}.attn.in_proj_bias", "(a n h) -> a n h", {"a": 3, **resampler_heads}),
        Entry(f"{resampler}/out_proj/kernel", f"{pool}.attn.out_proj.weight", "e (n h) -> e n h", resampler_heads),
        Entry(f"{resampler}/out_proj/bias", f"{pool}.attn.out_proj.bias", "e -> e"),
        *norm_entries(f"{target}/post_layernorm", f"{source}.ln_post"),
        # A plain matrix that stands to the right of the features.
        Entry(f"{target}/proj/kernel", f"{source}.proj", "i o -> i o"),
    ]
    if c.hidden_size != c.out_size:
        entries.append(Entry(f"{resampler}/input_proj/kernel", f"{pool}.kv_proj.weight", "e d -> e d"))
    return entries
