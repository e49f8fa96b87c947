"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of images of any size in one row, told apart by
segment ids (arXiv 2409.12191, 2502.13923, 2511.21631).

Axes: B batch, P patches of all images of a prompt (padded), C values of a patch, D width of the tower, F feed-forward
width, N heads, H head width, L layers, M visual tokens (P over the patches of one), U width of a token's patches
together, E width of the decoder, J layers whose features go to the decoder as well, S taps.

What is given per patch besides its pixels is planned on the host (``models/qwen_plan.py``):

- ``segments`` ``[B, P]``: the image or frame it belongs to; patches of different ones do not see each other;
- ``places`` ``[B, P, 2]``: its row and column there, for rotary positions of two axes;
- ``order`` and ``windows`` ``[B, P]`` (Qwen2.5-VL): the order of patches in which windows are contiguous, and the
  window each belongs to. ``segments`` and ``places`` are in that order already, and so is what comes out;
- ``taps`` and ``tap_weights`` ``[B, P, S]`` (Qwen3-VL): its place in the table of learned positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from flax import struct

from sav_jax.errors import UserError
from sav_jax.models import projectors
from sav_jax.models.attention import segment_attention
from sav_jax.models.batch import Array
from sav_jax.models.decoder import read_at
from sav_jax.models.layers import ACTIVATIONS, LayerNorm, Projection, RMSNorm, rotary_angles, rotate, scanned
from sav_jax.models.projectors import PackedPrototypes, PrototypeConfig
from sav_jax.models.vit import linear_entries, norm_entries
from sav_jax.models.weights import Entry

EPS = 1e-6


@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of a tower and which of the family's three forms it has.

    Attributes:
        merge_size: patches along a side of a visual token.
        out_size: width of visual tokens, the decoder's.
        gated: RMSNorm and a gated feed-forward (Qwen2.5-VL) instead of LayerNorm and a plain one.
        window_side: visual tokens along a side of an attention window (Qwen2.5-VL).
        full_layers: with windows, the layers that attend to whole frames nevertheless.
        position_side: side of the table of learned positions (Qwen3-VL).
        deepstack_layers: layers whose outputs go to the decoder as well, first decoder layer first (Qwen3-VL).
        remat: what a layer keeps for its backward pass, a name in ``layers.REMAT_POLICIES``.
        prototypes: of SQ-LLaVA's prototype extractor, between the last layer and the merger; None: there is none.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    hidden_size: int
    intermediate_size: int
    out_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    rope_theta: float
    gated: bool = False
    window_side: int | None = None
    full_layers: tuple[int, ...] = ()
    position_side: int | None = None
    deepstack_layers: tuple[int, ...] = ()
    remat: str = "none"
    prototypes: PrototypeConfig | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> QwenVisionConfig:
        """From the ``vision_config`` of a ``config.json`` whose defaults have been filled in.

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        c = config
        if c["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"vision_config.hidden_act {c['hidden_act']!r} is not known (known: {', '.join(ACTIVATIONS)})"
            )
        if c["in_channels"] != 3:
            raise UserError(f"vision_config: {c['in_channels']} channels are not supported (known: 3)")
        for name in ("patch_size", "temporal_patch_size"):
            if not isinstance(c[name], int):
                raise UserError(f"vision_config.{name} {c[name]!r}: only one number is supported")
        if c["spatial_merge_size"] != 2:
            # Batches are padded to multiples of four patches (sav_jax/batching.py).
            raise UserError(f"vision_config.spatial_merge_size {c['spatial_merge_size']} is not supported (known: 2)")
        common = {
            "patch_size": c["patch_size"],
            "temporal_patch_size": c["temporal_patch_size"],
            "merge_size": c["spatial_merge_size"],
            "num_layers": c["depth"],
            "num_heads": c["num_heads"],
            "hidden_act": c["hidden_act"],
            "rope_theta": float(c["rope_parameters"]["rope_theta"]),
        }
        if c["model_type"] == "qwen2_vl_vision":
            # The width of the tower has a name of its own here, and "hidden_size" means the decoder's.
            width = c["embed_dim"]
            return cls(
                **common, hidden_size=width, intermediate_size=int(width * c["mlp_ratio"]), out_size=c["hidden_size"]
            )
        common |= {
            "hidden_size": c["hidden_size"],
            "intermediate_size": c["intermediate_size"],
            "out_size": c["out_hidden_size"],
        }
        if c["model_type"] == "qwen2_5_vl_vision":
            if c["window_size"] < c["spatial_merge_size"] * c["patch_size"]:
                raise UserError(f"vision_config.window_size {c['window_size']} is smaller than a visual token")
            return cls(
                **common,
                gated=True,
                window_side=c["window_size"] // c["spatial_merge_size"] // c["patch_size"],
                full_layers=tuple(c["fullatt_block_indexes"]),
            )
        if c["model_type"] == "qwen3_vl_vision":
            layers = tuple(c["deepstack_visual_indexes"])
            if list(layers) != sorted({*layers} & {*range(c["depth"])}):
                raise UserError(f"vision_config.deepstack_visual_indexes {list(layers)} are not ascending layers")
            return cls(**common, position_side=int(c["num_position_embeddings"] ** 0.5), deepstack_layers=layers)
        raise UserError(
            f"vision_config.model_type {c['model_type']!r} is not known (known: qwen2_vl_vision, qwen2_5_vl_vision, "
            "qwen3_vl_vision)"
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """C, numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """U, width of all patches of a visual token."""
        return self.hidden_size * self.merge_size**2


def _norm(config: QwenVisionConfig, name: str) -> nn.Module:
    return RMSNorm(EPS, name=name) if config.gated else LayerNorm(EPS, name=name)


@struct.dataclass
class Layer:
    """What differs between the layers, each ``[L]`` before the scan.

    Attributes:
        full: bool, attend to whole frames rather than windows.
        slot: int32, where the output is kept for the decoder; J keeps it nowhere.
    """

    full: Array
    slot: Array


@struct.dataclass
class Context:
    """What every layer is given alike.

    Attributes:
        angles: cosine and sine of the rotary positions, ``[B, P, H / 2]`` each.
        segments: int32 ``[B, P]``.
        windows: int32 ``[B, P]``, contiguous; None in towers without.
    """

    angles: tuple[jax.Array, jax.Array]
    segments: Array
    windows: Array | None


class VisionBlock(nn.Module):
    """Pre-norm transformer block: ``[B, P, D] -> [B, P, D]``; shaped for ``nn.scan``.

    The carry holds besides ``x`` what has been kept for the decoder so far, ``[J + 1, B, P, D]``.
    """

    config: QwenVisionConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array | None], layer: Layer, context: Context
    ) -> tuple[tuple[jax.Array, jax.Array | None], None]:
        c = self.config
        x, kept = carry
        y = _norm(c, "norm1")(x)
        qkv = Projection("BPD,ANHD->BPANH", (3, c.num_heads, c.head_dim, c.hidden_size), 3, name="qkv")(y)
        x = x + Projection("BPNH,DNH->BPD", (c.hidden_size, c.num_heads, c.head_dim), 1, name="o_proj")(
            self._attend(qkv, layer, context)
        )
        y = _norm(c, "norm2")(x)
        up, down = (c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)
        if c.gated:
            gate = ACTIVATIONS[c.hidden_act](Projection("BPD,FD->BPF", up, 1, name="gate_proj")(y))
            y = gate * Projection("BPD,FD->BPF", up, 1, name="up_proj")(y)
            x = x + Projection("BPF,DF->BPD", down, 1, name="down_proj")(y)
        else:
            y = ACTIVATIONS[c.hidden_act](Projection("BPD,FD->BPF", up, 1, name="fc1")(y))
            x = x + Projection("BPF,DF->BPD", down, 1, name="fc2")(y)
        if kept is not None:
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, layer.slot, 0)
        return (x, kept), None

    def _attend(self, qkv: jax.Array, layer: Layer, context: Context) -> jax.Array:
        c = self.config
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rotate(q, context.angles), rotate(k, context.angles)
        if context.windows is None or c.window_side is None:
            return segment_attention(q, k, v, context.segments)
        windows, longest = context.windows, (c.window_side * c.merge_size) ** 2
        return jax.lax.cond(
            layer.full,
            lambda q, k, v: segment_attention(q, k, v, context.segments),
            lambda q, k, v: segment_attention(q, k, v, windows, longest),
            q,
            k,
            v,
        )


class PatchMerger(nn.Module):
    """The patches of a visual token, side by side, through two layers: ``[B, P, D] -> [B, M, E]``.

    Attributes:
        norm_after: normalise the token's patches together rather than one by one.
    """

    config: QwenVisionConfig
    norm_after: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        unit = c.merge_size**2
        if self.norm_after:
            x = _norm(c, "norm")(rearrange(x, "b (m u) d -> b m (u d)", u=unit))
        else:
            x = rearrange(_norm(c, "norm")(x), "b (m u) d -> b m (u d)", u=unit)
        x = ACTIVATIONS["gelu"](Projection("BMC,UC->BMU", (c.merged_size, c.merged_size), 1, name="fc1")(x))
        return Projection("BMU,EU->BME", (c.out_size, c.merged_size), 1, name="fc2")(x)


class QwenVision(nn.Module):
    """Patches ``[B, P, C]`` -> visual tokens ``[B, M, E]`` in the order of ``segments``, and deepstack features
    ``[J, B, M, E]`` or None.
    """

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, patches: jax.Array, vision: Mapping[str, Array]) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        if c.window_side is not None:
            patches = read_at(patches, vision["order"])
        # A convolution whose stride is its width is one matrix product per patch. Only Qwen3-VL's has a bias.
        bias_axes = int(c.position_side is not None)
        x = Projection("BPC,DC->BPD", (c.hidden_size, c.patch_values), bias_axes, name="patch_embedding")(patches)
        if c.position_side is not None:
            table = self.param(
                "position_embedding", nn.initializers.normal(0.02), (c.position_side**2, c.hidden_size)
            ).astype(jnp.float32)
            positions = jnp.zeros(x.shape, jnp.float32)
            for tap in range(vision["taps"].shape[2]):
                rows = jnp.take(table, vision["taps"][:, :, tap], axis=0)
                positions = positions + rows * jnp.asarray(vision["tap_weights"])[:, :, tap, None]
            x = x + positions.astype(x.dtype)
        places = jnp.asarray(vision["places"])
        # The first half of the wavelengths counts along rows, the second half the same wavelengths along columns.
        axes = [rotary_angles(places[:, :, axis], c.head_dim // 2, c.rope_theta) for axis in (0, 1)]
        context = Context(
            angles=(
                jnp.concatenate([axes[0][0], axes[1][0]], axis=-1),
                jnp.concatenate([axes[0][1], axes[1][1]], axis=-1),
            ),
            segments=vision["segments"],
            windows=vision.get("windows"),
        )
        count = len(c.deepstack_layers)
        slots = np.full(c.num_layers, count, np.int32)
        slots[list(c.deepstack_layers)] = np.arange(count, dtype=np.int32)
        layers = Layer(full=np.isin(np.arange(c.num_layers), c.full_layers), slot=slots)
        blocks = scanned(VisionBlock, c.num_layers, c.remat, (0, nn.broadcast))
        # The last place takes what no layer of the decoder wants.
        kept = jnp.zeros((count + 1, *x.shape), x.dtype) if count else None
        (x, kept), _ = blocks(c, name="layers")((x, kept), layers, context)
        if c.prototypes is not None:
            # Features for the deepstack, taken from earlier layers, stay as they are.
            x = PackedPrototypes(c.prototypes, c.hidden_size, name="prototypes")(x, context.segments)
        tokens = PatchMerger(c, name="merger")(x)
        if kept is None:
            return tokens, None
        mergers = nn.vmap(
            PatchMerger, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, axis_size=count
        )
        return tokens, mergers(c, norm_after=True, name="deepstack_mergers")(kept[:count])


@dataclass(frozen=True)
class _Names:
    """What a checkpoint calls the parts that differ in name from release to release."""

    fc1: str
    fc2: str
    merger_norm: str
    merger_fc1: str
    merger_fc2: str


_QWEN2 = _Names("fc1", "fc2", "ln_q", "mlp.0", "mlp.2")
_QWEN3 = _Names("linear_fc1", "linear_fc2", "norm", "linear_fc1", "linear_fc2")


def checkpoint_entries(config: QwenVisionConfig, source: str, target: str) -> list[Entry]:
    """Where each parameter under ``target`` lives in a Hugging Face checkpoint whose tower is called ``source``."""
    c = config
    names = _QWEN2 if c.position_side is None else _QWEN3
    layer, count = f"{source}.blocks.{{layer}}", c.num_layers
    blocks = f"{target}/layers"
    qkv, heads = {"a": 3, "h": c.head_dim}, {"h": c.head_dim}
    patch = {"c": 3, "t": c.temporal_patch_size, "p": c.patch_size, "q": c.patch_size}
    entries = [
        Entry(
            f"{target}/patch_embedding/kernel", f"{source}.patch_embed.proj.weight", "d c t p q -> d (c t p q)", patch
        ),
        Entry(f"{blocks}/qkv/kernel", f"{layer}.attn.qkv.weight", "(a n h) d -> a n h d", qkv, count),
        Entry(f"{blocks}/qkv/bias", f"{layer}.attn.qkv.bias", "(a n h) -> a n h", qkv, count),
        Entry(f"{blocks}/o_proj/kernel", f"{layer}.attn.proj.weight", "d (n h) -> d n h", heads, count),
        Entry(f"{blocks}/o_proj/bias", f"{layer}.attn.proj.bias", "d -> d", {}, count),
        *_norm_entries(c, f"{blocks}/norm1", f"{layer}.norm1", count),
        *_norm_entries(c, f"{blocks}/norm2", f"{layer}.norm2", count),
        *_merger_entries(c, names, f"{target}/merger", f"{source}.merger"),
    ]
    feed_forward = {"fc1": names.fc1, "fc2": names.fc2}
    if c.gated:
        feed_forward = {name: name for name in ("gate_proj", "up_proj", "down_proj")}
    for ours, theirs in feed_forward.items():
        entries += linear_entries(f"{blocks}/{ours}", f"{layer}.mlp.{theirs}", count)
    if c.position_side is not None:
        entries += [
            Entry(f"{target}/patch_embedding/bias", f"{source}.patch_embed.proj.bias", "d -> d"),
            Entry(f"{target}/position_embedding", f"{source}.pos_embed.weight", "n d -> n d"),
        ]
    if c.prototypes is not None:
        entries += projectors.checkpoint_entries(
            c.prototypes, f"{source}.prototypes", f"{target}/prototypes", mlp=False
        )
    if c.deepstack_layers:
        merger = f"{source}.deepstack_merger_list.{{layer}}"
        entries += _merger_entries(c, names, f"{target}/deepstack_mergers", merger, len(c.deepstack_layers))
    return entries


def _merger_entries(
    config: QwenVisionConfig, names: _Names, target: str, source: str, layers: int | None = None
) -> list[Entry]:
    return [
        *_norm_entries(config, f"{target}/norm", f"{source}.{names.merger_norm}", layers),
        *linear_entries(f"{target}/fc1", f"{source}.{names.merger_fc1}", layers),
        *linear_entries(f"{target}/fc2", f"{source}.{names.merger_fc2}", layers),
    ]


def _norm_entries(config: QwenVisionConfig, target: str, source: str, layers: int | None) -> list[Entry]:
    if config.gated:
        return [Entry(f"{target}/scale", f"{source}.weight", "d -> d", {}, layers)]
    return norm_entries(target, source, layers)
