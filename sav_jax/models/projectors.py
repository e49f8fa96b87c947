"""SQ-LLaVA's prototype extractor (arXiv 2403.11299), which stands between a vision tower and a decoder.

It groups an image's visual tokens around K prototypes in a few rounds of expectation and maximisation, adds to every
token what its group has in common, and projects the tokens to the decoder's width. The released code
(github.com/heliossun/SQ-LLaVA, ``cluster.py``) and the paper's equations are two different computations; both are here.

Axes: X images (tiles), n visual tokens of one, B rows of patches, P patches in one (of several images), K prototypes, C
width of the vision tower, D width of the decoder, V width of any values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from sav_jax.errors import UserError
from sav_jax.models.attention import QUERY_BLOCK
from sav_jax.models.batch import Array
from sav_jax.models.layers import ACTIVATIONS, Projection
from sav_jax.models.vit import linear_entries
from sav_jax.models.weights import Entry

FORMS = ("released", "paper")
NORM_EPS = 1e-12
"""Vectors are divided by their length or by this, whichever is larger (the default of torch's ``normalize``)."""


@dataclass(frozen=True)
class PrototypeConfig:
    """The ``prototype_extractor`` of a ``config.json``, a field of this project beside Hugging Face's.

    Attributes:
        num_prototypes: K.
        num_iterations: rounds of expectation and maximisation, at least one.
        form: "released" or "paper".
        hidden_act: activation between the two layers of the MLP.
    """

    num_prototypes: int = 256
    num_iterations: int = 2
    form: str = "released"
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        for name in ("num_prototypes", "num_iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"prototype_extractor.{name} {value!r} is not a whole number of at least 1")
        for name, known in (("form", FORMS), ("hidden_act", tuple(ACTIVATIONS))):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"prototype_extractor.{name} {value!r} is not known (known: {', '.join(known)})")

    @classmethod
    def from_hf(cls, config: Any) -> PrototypeConfig:
        """From a ``config.json``'s object; fields left out have the released values.

        Raises:
            UserError: not an object, an unknown field or an impossible value.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"prototype_extractor {config!r} is not an object")
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in config if key not in known]
        if unknown:
            raise UserError(f"prototype_extractor.{unknown[0]} is not known (known: {', '.join(known)})")
        return cls(**config)

    def to_hf(self) -> dict[str, Any]:
        """The object that :meth:`from_hf` reads."""
        return asdict(self)


class PrototypeExtractor(nn.Module):
    """Visual tokens ``[X, n, C]`` -> tokens for the decoder ``[X, n, D]``, in the dtype of the input.

    Clustering is float32 whatever that dtype is: the tokens choose between prototypes that differ little.

    Attributes:
        prototypes: which computation, and its sizes.
        channels: C.
        width: D.
    """

    prototypes: PrototypeConfig
    channels: int
    width: int

    def setup(self) -> None:
        c, d = self.channels, self.width
        self.to_centers = Projection("XKC,EC->XKE", (c, c), 1)
        self.to_keys = Projection("XnC,EC->XnE", (c, c), 1)
        self.to_features = Projection("XnC,EC->XnE", (c, c), 1)
        if self.prototypes.form == "released":
            self.similarity_scale = self.param("similarity_scale", nn.initializers.ones_init(), ())
            self.similarity_offset = self.param("similarity_offset", nn.initializers.zeros_init(), ())
        else:
            # So small that q(C) k(Z), which nothing divides by sqrt(C), is of order one at first.
            init = nn.initializers.normal(0.02)
            self.centers = self.param("centers", init, (self.prototypes.num_prototypes, c))
            self.to_residual = Projection("XnC,EC->XnE", (c, c), 1)
        self.linear_1 = Projection("XnC,DC->XnD", (d, c), 1)
        self.linear_2 = Projection("XnD,ED->XnE", (d, d), 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        cluster = self.cluster_as_released if self.prototypes.form == "released" else self.cluster_as_written
        y = cluster(x.astype(jnp.float32)).astype(x.dtype)
        return self.linear_2(ACTIVATIONS[self.prototypes.hidden_act](self.linear_1(y)))

    def cluster_as_released(self, x: jax.Array) -> jax.Array:
        """The released ``Clustering`` up to its MLP: ``[X, n, C] -> [X, n, C]``, float32.

        Prototypes start as averages of neighbouring tokens. A round projects them and takes, for each, the sum of all
        tokens' features by their shares in it. In the end every token belongs to the prototype it is most like, alone;
        it gets the mean of its group, in which the prototype's first average counts as one member more, weighted by
        how like the two are. The gradient reaches the weights, not the choice.
        """
        count = self.prototypes.num_prototypes
        features = self.to_features(x)
        # Each channel is normalised over the tokens, not each token over its channels: no cosine, but as released.
        keys = normalized(self.to_keys(x), axis=1)
        pooling = jnp.asarray(adaptive_pooling(x.shape[1], count))
        centers = _einsum("Kn,XnC->XKC", pooling, x)
        first = _einsum("Kn,XnC->XKC", pooling, features)
        for _ in range(self.prototypes.num_iterations):
            centers = normalized(self.to_centers(centers), axis=2)
            shares = jax.nn.softmax(_einsum("XKC,XnC->XKn", centers, keys), axis=1)
            centers = _einsum("XKn,XnC->XKC", shares, features)
        scale, offset = (jnp.asarray(p, jnp.float32) for p in (self.similarity_scale, self.similarity_offset))
        similarity = jax.nn.sigmoid(offset + scale * cosines(centers, x))
        # Of the similarities, not the cosines: those that the sigmoid rounds to one number are a tie, and of a tie the
        # first is taken, here as in torch.
        members = jax.nn.one_hot(jnp.argmax(similarity, axis=1), count, axis=1, dtype=x.dtype)
        weights = similarity * members
        means = _einsum("XKn,XnC->XKC", weights, features) + first
        means = means / (jnp.sum(members, axis=2, keepdims=True) + 1.0)
        return x + _einsum("XKn,XKC->XnC", weights, means)

    def cluster_as_written(self, x: jax.Array) -> jax.Array:
        """The paper's equations: ``[X, n, C] -> [X, n, C]``, float32.

        E: ``M = softmax(q(C) k(Z)^T)``; M: ``C = M v(Z)``; at last ``Z_i + z((1/K) sum_j cos(C_j, Z_i) C_j)``, with q,
        k, v, z = ``to_centers``, ``to_keys``, ``to_features``, ``to_residual``. Where they leave it open: the softmax
        shares each token out among the prototypes (as released, and as an expectation step does), and the random
        first prototypes are a parameter.
        """
        keys, features = self.to_keys(x), self.to_features(x)
        centers = jnp.broadcast_to(self.centers.astype(jnp.float32), (x.shape[0], *self.centers.shape))
        for _ in range(self.prototypes.num_iterations):
            shares = jax.nn.softmax(_einsum("XKC,XnC->XKn", self.to_centers(centers), keys), axis=1)
            centers = _einsum("XKn,XnC->XKC", shares, features)
        mixed = _einsum("XKn,XKC->XnC", cosines(centers, x), centers) / self.prototypes.num_prototypes
        return x + self.to_residual(mixed)


class PackedPrototypes(nn.Module):
    """The paper's equations (:meth:`PrototypeExtractor.cluster_as_written`) for images of any size in one row, each
    with prototypes of its own: ``[B, P, C]`` -> ``[B, P, C]`` in the dtype of the input; computed in float32.

    How many images a row holds is no shape here, so that their prototypes cannot be an array. They are sums over an
    image's patches; every product with one is taken patch by patch and summed (:func:`within`), which costs what
    an attention layer without windows does.

    Attributes:
        prototypes: sizes; the form "paper".
        channels: C.
    """

    prototypes: PrototypeConfig
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, segments: Array) -> jax.Array:
        """``segments``, ``[B, P]``: the image or frame of each patch."""
        c, count = self.channels, self.prototypes.num_prototypes
        centers = self.param("centers", nn.initializers.normal(0.02), (count, c)).astype(jnp.float32)
        to_centers = Projection("BPC,EC->BPE", (c, c), 1, name="to_centers")
        y = x.astype(jnp.float32)
        keys = Projection("BPC,EC->BPE", (c, c), 1, name="to_keys")(y)
        features = Projection("BPC,EC->BPE", (c, c), 1, name="to_features")(y)
        shares = jax.nn.softmax(_einsum("KC,BPC->BPK", to_centers(centers[None])[0], keys), axis=2)
        # q of a prototype, which is a sum of shares times features: the same sum of q(features) - q(0), and q(0).
        offset = to_centers(jnp.zeros((1, 1, c), jnp.float32))
        turned, constant = to_centers(features) - offset, _einsum("KC,BPC->BPK", offset[0], keys)
        for _ in range(self.prototypes.num_iterations - 1):
            shares = jax.nn.softmax(within(keys, turned, shares, segments) + constant, axis=2)
        squares = within(None, None, shares * within(features, features, shares, segments), segments)
        cosine = within(normalized(y, axis=2), features, shares, segments) / _length(squares)
        mixed = within(cosine, shares, features, segments) / count
        return (y + Projection("BPC,EC->BPE", (c, c), 1, name="to_residual")(mixed)).astype(x.dtype)


def within(q: jax.Array | None, k: jax.Array | None, v: jax.Array, segments: Array) -> jax.Array:
    """At every patch the sum of ``(q . k) v`` over the patches of its segment: ``[B, P, C]`` twice and ``[B, P, V]`` ->
    ``[B, P, V]``; without q and k the sum of ``v``. As much is in memory at once as a block of queries needs.
    """
    segments = jnp.asarray(segments)
    blocks = []
    for start in range(0, v.shape[1], QUERY_BLOCK):
        stop = start + QUERY_BLOCK
        weights = (segments[:, start:stop, None] == segments[:, None, :]).astype(v.dtype)
        if q is not None and k is not None:
            weights = weights * _einsum("BqC,BPC->BqP", q[:, start:stop], k)
        blocks.append(_einsum("BqP,BPV->BqV", weights, v))
    return jnp.concatenate(blocks, axis=1)


def adaptive_pooling(length: int, count: int) -> np.ndarray:
    """Weights float32 ``[count, length]`` of torch's ``AdaptiveAvgPool1d``: row i is the mean over positions
    floor(i * length / count) to ceil((i + 1) * length / count), the last excluded. Rows overlap where ``count`` does
    not divide ``length``.
    """
    rows = np.arange(count)[:, None]
    places = np.arange(length)[None, :]
    inside = (places >= rows * length // count) & (places < -(-(rows + 1) * length // count))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def normalized(x: jax.Array, axis: int) -> jax.Array:
    """``x`` over its length along ``axis``, or over ``NORM_EPS``; the gradient is finite at zero too."""
    return x / _length(jnp.sum(jnp.square(x), axis=axis, keepdims=True))


def _length(squares: jax.Array) -> jax.Array:
    """The root of sums of squares, or ``NORM_EPS``."""
    # The derivative of the root at zero is infinite: it is taken of one instead, where its result is not used.
    some = squares > 0
    return jnp.maximum(jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0), NORM_EPS)


def cosines(centers: jax.Array, x: jax.Array) -> jax.Array:
    """Cosines of ``[X, K, C]`` with ``[X, n, C]``: ``[X, K, n]``."""
    return _einsum("XKC,XnC->XKn", normalized(centers, axis=2), normalized(x, axis=2))


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators would multiply float32 in fewer bits: similarities are float32 (see the class).
    return jnp.einsum(equation, a, b, precision="highest")


_RELEASED_LINEARS = {"to_centers": "c", "to_keys": "v", "to_features": "f", "linear_1": "mlp.0", "linear_2": "mlp.2"}
_RELEASED_SCALARS = {"similarity_scale": "sim_alpha", "similarity_offset": "sim_beta"}
_UNUSED = r"ln_1\.(weight|bias)"
"""A norm that the released module has and does not call."""
_PREFIX = r"^(?:module\.)?(?:base_model\.model\.)?(?:model\.)?mm_projector\."


def checkpoint_entries(config: PrototypeConfig, source: str, target: str, mlp: bool = True) -> list[Entry]:
    """Layout of an extractor stored under ``source`` and kept at parameter path ``target``; the names are those of
    the parameters, the two scalars of the released form are stored ``[1, 1, 1]`` as there. ``mlp``: with the two
    layers of its MLP.
    """
    linears = ["to_centers", "to_keys", "to_features", *(("linear_1", "linear_2") if mlp else ())]
    entries = []
    if config.form == "released":
        entries += [Entry(f"{target}/{name}", f"{source}.{name}", "1 1 1 -> ") for name in _RELEASED_SCALARS]
    else:
        entries.append(Entry(f"{target}/centers", f"{source}.centers", "k c -> k c"))
        linears.insert(3, "to_residual")
    for name in linears:
        entries += linear_entries(f"{target}/{name}", f"{source}.{name}")
    return entries


def released_renames(prefix: str, source: str) -> tuple[tuple[str, str], ...]:
    """Renames from the published names under the pattern ``prefix`` to those of :func:`checkpoint_entries`."""
    names = _RELEASED_LINEARS | _RELEASED_SCALARS
    return tuple((rf"{prefix}{re.escape(theirs)}(?=\.|$)", f"{source}.{ours}") for ours, theirs in names.items())


def released_ignored(prefix: str) -> str:
    """The pattern of published keys that take no part in the forward pass."""
    return prefix + _UNUSED


def prototype_extractor_from_torch(
    state: Mapping[str, Any], *, num_prototypes: int = 256, num_iterations: int = 2
) -> tuple[PrototypeExtractor, dict[str, Any]]:
    """The extractor that a published projector's state dict holds (SQ-LLaVA's ``mm_projector.bin``, or
    ``non_lora_trainables.bin`` beside an adapter).

    Args:
        state: names -> torch tensors or NumPy arrays; bare names of the projector, or with ``model.mm_projector.``,
            ``base_model.model.model.mm_projector.`` and the like before them. The unused ``ln_1`` may be there or not.
        num_prototypes, num_iterations: what the weights do not tell; the released values by default.

    Returns:
        The module and its float32 parameters: ``module.apply({"params": params}, x)``, ``[X, n, C] -> [X, n, D]``.

    Raises:
        UserError: keys missing, unknown, duplicated or misshapen; all of them.
    """
    config = PrototypeConfig(num_prototypes, num_iterations)
    values: dict[str, Any] = {}
    duplicated = []
    for key, value in state.items():
        name = re.sub(_PREFIX, "", str(key))
        if name in values:
            duplicated.append(str(key))
        values[name] = value
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in values.items()}
    channels, width = (_rows(shapes, names) for names in (("c", "v", "f"), ("mlp.2", "mlp.0")))
    module = PrototypeExtractor(config, channels, width)
    abstract = jax.eval_shape(lambda x: module.init(jax.random.key(0), x)["params"], jnp.zeros((1, 1, channels)))
    wanted = traverse_util.flatten_dict(abstract, sep="/")

    sources = {}
    for entry in checkpoint_entries(config, "", ""):
        ours, *kind = entry.source.removeprefix(".").split(".")
        sources[".".join([(_RELEASED_LINEARS | _RELEASED_SCALARS)[ours], *kind])] = entry
    expected = {
        name: entry.stored_shape(wanted[entry.target.removeprefix("/")].shape) for name, entry in sources.items()
    }
    expected |= {f"ln_1.{kind}": (channels,) for kind in ("weight", "bias") if f"ln_1.{kind}" in values}
    missing = [name for name in expected if name not in values]
    unknown = [name for name in values if name not in expected]
    misshapen = [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in values and shapes[name] != shape
    ]
    problems = {"missing": missing, "unknown": unknown, "wrong shape": misshapen, "duplicated": duplicated}
    if any(problems.values()):
        parts = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys]
        raise UserError(f"not the weights of a prototype extractor: {'; '.join(parts)}")
    flat = {
        entry.target.removeprefix("/"): jnp.asarray(entry.to_param(_float32(name, values[name])))
        for name, entry in sources.items()
    }
    return module, traverse_util.unflatten_dict(flat, sep="/")


def _rows(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> int:
    """Output width of the first of some linear layers that are there; 1 if none is, which is then an error anyway."""
    found = (shapes[f"{name}.weight"] for name in names if len(shapes.get(f"{name}.weight", ())) == 2)
    return max(next(found, (1,))[0], 1)


def _float32(name: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        # A torch tensor, known by its methods. NumPy has no bfloat16 to give it.
        value = value.detach().float().cpu().numpy()
    try:
        return np.asarray(value).astype(np.float32)
    except (TypeError, ValueError):
        raise UserError(f"not the weights of a prototype extractor: {name} holds no numbers") from None
