"""Sparse Attention Vectors (arXiv 2412.00142): a few-shot classifier from the best attention heads of a frozen model.

Every head classifies by the nearest class centroid, by cosine; a head's score is the number of labelled examples it
gets right; the best k heads vote. Axes: N examples, L layers, A heads per layer, H head width, k selected heads, C
classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from sav_jax._files import write_folder
from sav_jax._scoring import local_mesh, nearest_classes, score_heads
from sav_jax._storage import AnyPath, location
from sav_jax.errors import UserError

Vote = Literal["majority", "confidence"]

CONFIDENCE_TEMPERATURE = 0.1
"""Divides cosines before the softmax of a confidence-weighted vote."""

_JSON, _TENSORS = "classifier.json", "classifier.safetensors"
_FORMAT, _VERSION = "sav_jax sparse attention vectors", 1
_FINITE_ROWS = 256  # examples checked at a time, to keep the mask small


@dataclass(frozen=True, eq=False)
class SparseAttentionVectors:
    """The selected heads and their class centroids. Made by :meth:`fit` or :func:`load_classifier`.

    Attributes:
      heads: (layer, head) of the k selected heads, both from 0, best first.
      scores: int32 [L, A], support examples that each head of the model gets right.
      labels: class names, in the order of the columns of votes and probabilities.
      centroids: float32 [k, C, H], the mean head vector of each class on each selected head.
      support: number of support examples of each class.
      vote: how the heads' answers become one (see :meth:`fit`).
      leave_one_out, shots_per_class, max_layer, seed: what :meth:`fit` was asked for.
      temperature: of the softmax over cosines behind confidence-weighted votes.
      metadata: anything that is to be stored with it, such as the model's fingerprint and the question asked.
    """

    heads: tuple[tuple[int, int], ...]
    scores: np.ndarray
    labels: tuple[str, ...]
    centroids: np.ndarray
    support: tuple[int, ...]
    vote: Vote = "majority"
    leave_one_out: bool = False
    shots_per_class: int | None = None
    max_layer: int | None = None
    seed: int = 0
    temperature: float = CONFIDENCE_TEMPERATURE
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        heads: np.ndarray | jax.Array,
        labels: Sequence[str],
        num_heads: int = 20,
        *,
        leave_one_out: bool = False,
        vote: Vote = "majority",
        shots_per_class: int | None = None,
        max_layer: int | None = None,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SparseAttentionVectors:
        """Rank all heads on labelled examples and keep the best.

        Centroids are means of the raw vectors. A vector of zeros has cosine 0 with everything; of equally near classes
        the first is taken; of heads with equal scores the one in the lower layer is better, in one layer the one with
        the lower number. Statistics are float32 whatever the dtype of ``heads``.

        Args:
          heads: [N, L, A, H], what :func:`sav_jax.extract_heads` returns; any float dtype.
          labels: N class names.
          num_heads: k, how many heads vote.
          leave_one_out: score every example against its class's centroid without it, which removes the advantage that
            an example has by being part of its own centroid; the stored centroids are of all examples. An example alone
            in its class counts as wrong. Default: as published, every example is part of its centroid.
          vote: "majority": each head has one vote, and of equally many votes the class wins that the best-ranked head
            voting for any of them voted for. "confidence": each head spreads its vote over the classes by a softmax of
            its cosines divided by ``temperature``; the class with most wins, of equals the first.
          shots_per_class: use only so many examples of each class, drawn by ``seed`` (see :func:`choose_shots`).
          max_layer: select only among the heads of the first ``max_layer`` layers, so that queries need no deeper ones.
          seed: of the draw for ``shots_per_class``.
          class_names: the classes in the order of the columns; by default sorted.
          mesh: devices to shard the examples over; by default all devices of this process. Which and how many there are
            changes nothing but the rounding of sums in float32.
          metadata: stored with the classifier.

        Raises:
          UserError: if shapes, labels or options do not fit together, there are fewer than two classes, or a head
            vector holds NaN or infinity; it names the example.

        Example:
          >>> import numpy as np
          >>> import sav_jax
          >>> rng = np.random.default_rng(0)
          >>> heads = rng.normal(size=(12, 2, 4, 8)).astype(np.float32)  # 12 examples, 2 layers of 4 heads, 8 wide
          >>> labels = ["cat", "dog"] * 6
          >>> heads[:, 1, 2] += 3 * np.tile([1, -1], 6)[:, None]  # one head tells them apart
          >>> sav = sav_jax.SparseAttentionVectors.fit(heads, labels, num_heads=1)
          >>> sav.heads, int(sav.scores[1, 2]), sav.labels
          (((1, 2),), 12, ('cat', 'dog'))
        """
        heads = _checked_heads(heads)
        if len(labels) != len(heads):
            raise UserError(f"there are {len(labels)} labels for {len(heads)} examples")
        names = _class_names(labels, class_names)
        layers, per_layer, width = heads.shape[1:]
        if vote not in get_args(Vote):
            raise UserError(f"vote must be one of {', '.join(get_args(Vote))}, not {vote!r}")
        if max_layer is not None and not 1 <= max_layer <= layers:
            raise UserError(f"max_layer is {max_layer}; the heads have 1 to {layers} layers")
        eligible = (max_layer or layers) * per_layer
        if not 1 <= num_heads <= eligible:
            raise UserError(f"num_heads is {num_heads}; there are {eligible} heads to choose from")
        _check_finite(heads)
        if shots_per_class is not None:
            chosen = choose_shots(labels, shots_per_class, seed)
            heads, labels = heads[chosen], [labels[i] for i in chosen]
        number = {name: i for i, name in enumerate(names)}
        classes = np.array([number[label] for label in labels], np.int32)
        support = np.bincount(classes, minlength=len(names))
        if leave_one_out and support.max() < 2:
            raise UserError("leave_one_out needs a class with at least two examples")

        flat = heads.reshape(len(heads), layers * per_layer, width)
        sums, right = score_heads(flat, classes, len(names), leave_one_out=leave_one_out, mesh=mesh or local_mesh())
        # Stable, so that equal scores stay in the order (layer, head).
        best = np.argsort(-right[:eligible], kind="stable")[:num_heads]
        centroids = np.asarray(jnp.take(sums, best, axis=0)) / support[None, :, None].astype(np.float32)
        return cls(
            heads=tuple((int(i) // per_layer, int(i) % per_layer) for i in best),
            scores=right.reshape(layers, per_layer),
            labels=names,
            centroids=centroids,
            support=tuple(int(n) for n in support),
            vote=vote,
            leave_one_out=leave_one_out,
            shots_per_class=shots_per_class,
            max_layer=max_layer,
            seed=seed,
            metadata=dict(metadata or {}),
        )

    @property
    def num_heads(self) -> int:
        """Number of heads that vote, k."""
        return len(self.heads)

    @property
    def num_layers(self) -> int:
        """Number of layers that a query must run through: one more than the deepest selected head's."""
        return 1 + max(layer for layer, _ in self.heads)

    def predict(self, heads: np.ndarray | jax.Array, *, mesh: jax.sharding.Mesh | None = None) -> list[str]:
        """Name the class of each query.

        Args:
          heads: [N, L', A, H] with ``num_layers`` <= L' <= L: layers above the deepest selected head may be left out.
          mesh: devices to shard the queries over; by default all devices of this process.

        Returns:
          N class names.

        Raises:
          UserError: if the shape does not fit or a selected head vector holds NaN or infinity.

        Example:
          >>> import numpy as np
          >>> import sav_jax
          >>> heads = np.ones((4, 1, 2, 3), np.float32) * np.array([1, -1, 1, -1], np.float32)[:, None, None, None]
          >>> sav = sav_jax.SparseAttentionVectors.fit(heads, ["up", "down", "up", "down"], num_heads=2)
          >>> sav.predict(heads[:2]), sav.votes(heads[:2]).tolist()  # columns: down, up
          (['up', 'down'], [[0, 2], [2, 0]])
        """
        return self._decide(*self._classify(heads, mesh))

    def head_votes(self, heads: np.ndarray | jax.Array, *, mesh: jax.sharding.Mesh | None = None) -> np.ndarray:
        """Say which class each selected head is nearest to: int32 [N, k], columns as ``heads``, best head first.
        Arguments as for predict.
        """
        return self._classify(heads, mesh)[0]

    def votes(self, heads: np.ndarray | jax.Array, *, mesh: jax.sharding.Mesh | None = None) -> np.ndarray:
        """Count the heads that are nearest to each class: int32 [N, C], rows sum to k. Arguments as for predict."""
        return self._count(self._classify(heads, mesh)[0])

    def predict_proba(self, heads: np.ndarray | jax.Array, *, mesh: jax.sharding.Mesh | None = None) -> np.ndarray:
        """Give each class its share: float32 [N, C], rows sum to 1. Arguments as for predict.

        With majority votes, the share of the heads; with confidence-weighted ones, the mean over the heads of
        softmax(cosine / temperature). Neither is calibrated.
        """
        return self._share(*self._classify(heads, mesh))

    def classify(
        self, heads: np.ndarray | jax.Array, *, mesh: jax.sharding.Mesh | None = None
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return what predict, votes and predict_proba do, from one computation. Arguments as for predict."""
        nearest, confidence = self._classify(heads, mesh)
        return self._decide(nearest, confidence), self._count(nearest), self._share(nearest, confidence)

    def save(self, directory: AnyPath, metadata: Mapping[str, Any] | None = None) -> None:
        """Write ``classifier.json`` (everything readable) and ``classifier.safetensors`` (centroids, scores).

        A new folder appears complete or not at all. Equal classifiers give equal bytes.

        Args:
          directory: the folder; made if there is none.
          metadata: added to what :meth:`fit` was given; must be storable as JSON.

        Raises:
          UserError: if the folder cannot be written.

        Example:
          >>> import numpy as np
          >>> import sav_jax
          >>> heads = np.ones((4, 1, 2, 3), np.float32) * np.array([1, -1, 1, -1], np.float32)[:, None, None, None]
          >>> sav = sav_jax.SparseAttentionVectors.fit(heads, ["up", "down", "up", "down"], num_heads=2)
          >>> sav.save("up-or-down", metadata={"question": "Which way?"})
          >>> again = sav_jax.load_classifier("up-or-down")
          >>> again.predict(heads[:2]), again.metadata["question"]
          (['up', 'down'], 'Which way?')
        """
        from safetensors.numpy import save

        tensors = save({"centroids": self.centroids, "scores": self.scores.astype(np.int32)})
        layers, per_layer = self.scores.shape
        description = {
            "format": _FORMAT,
            "version": _VERSION,
            "labels": list(self.labels),
            "support": list(self.support),
            "heads": self.heads,
            "head_scores": [int(self.scores[head]) for head in self.heads],
            "shape": {"layers": layers, "heads_per_layer": per_layer, "head_dim": self.centroids.shape[2]},
            "settings": {name: getattr(self, name) for name in _SETTINGS},
            "metadata": {**self.metadata, **(metadata or {})},
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
        }
        fields = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in description.items())
        text = "{\n" + ",\n".join(fields) + "\n}\n"
        # The description last: it holds the other file's checksum, so that a mixture of old and new is recognised.
        write_folder(directory, {_TENSORS: tensors, _JSON: text.encode()})

    def _classify(self, heads: np.ndarray | jax.Array, mesh: jax.sharding.Mesh | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest class of each selected head, int32 [N, k], and the mean softmax, float32 [N, C]."""
        heads = _checked_heads(heads)
        (layers, per_layer), width = self.scores.shape, self.centroids.shape[2]
        if heads.shape[2:] != (per_layer, width) or not self.num_layers <= heads.shape[1] <= layers:
            raise UserError(
                f"heads have shape {list(heads.shape)}; this classifier needs "
                f"[examples, {self.num_layers} to {layers} layers, {per_layer} heads, {width} wide]"
            )
        layer, head = np.array(self.heads).T
        selected = heads[:, layer, head]
        _check_finite(selected, self.heads)
        return nearest_classes(selected, self.centroids, self.temperature, mesh=mesh or local_mesh())

    def _count(self, nearest: np.ndarray) -> np.ndarray:
        return count_votes(nearest, len(self.labels))

    def _share(self, nearest: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        if self.vote == "confidence":
            return confidence
        return self._count(nearest).astype(np.float32) / np.float32(self.num_heads)

    def _decide(self, nearest: np.ndarray, confidence: np.ndarray) -> list[str]:
        if self.vote == "confidence":
            winners = confidence.argmax(axis=1)
        else:
            winners = majority(nearest, len(self.labels))
        return [self.labels[winner] for winner in winners]


def count_votes(votes: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the heads for each class: int [N, k] class numbers -> int32 [N, C]."""
    counts = np.zeros((len(votes), num_classes), np.int32)
    np.add.at(counts, (np.arange(len(votes))[:, None], votes), 1)
    return counts


def majority(votes: np.ndarray, num_classes: int) -> np.ndarray:
    """The class with most votes; of equally many, the one that the best-ranked head voting for any of them voted for.

    Args:
      votes: int [N, k], the class number each head votes for, best head first.
      num_classes: C.

    Returns:
      int [N].
    """
    counts = count_votes(votes, num_classes)
    has_most = np.take_along_axis(counts, votes, axis=1) == counts.max(axis=1, keepdims=True)
    return np.take_along_axis(votes, has_most.argmax(axis=1)[:, None], axis=1)[:, 0]


_SETTINGS = ("vote", "leave_one_out", "shots_per_class", "max_layer", "seed", "temperature")


def choose_shots(labels: Sequence[str], shots: int, seed: int) -> list[int]:
    """Draw ``shots`` examples of each class, all of a class that has fewer.

    A class's draw depends on the seed, the class's name and its own examples alone: other classes, and their order,
    change nothing, and a draw of fewer shots is part of a draw of more.

    Args:
      labels: one class name per example.
      shots: how many of each class, at least 1.
      seed: at least 0.

    Returns:
      Indices into ``labels``, ascending.

    Raises:
      UserError: if ``shots`` or ``seed`` is out of range.
    """
    if shots < 1:
        raise UserError(f"shots per class must be at least 1, not {shots}")
    if seed < 0:
        raise UserError(f"seed must not be negative, and is {seed}")
    members: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen: list[int] = []
    for label, indices in members.items():
        order = np.random.default_rng([seed, zlib.crc32(label.encode())]).permutation(len(indices))
        chosen += [indices[i] for i in order[:shots]]
    return sorted(chosen)


def load_classifier(directory: AnyPath) -> SparseAttentionVectors:
    """Load what :meth:`SparseAttentionVectors.save` wrote.

    Raises:
      UserError: if a file is missing, damaged, of another format, or the two files do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    folder = location(directory)
    path = folder / _JSON
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        content = (folder / _TENSORS).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{folder}: holds no classifier: {Path(error.filename).name} is missing") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise UserError(f'{path}: not a classifier of sav_jax (field "format")')
    if described.get("version") != _VERSION:
        raise UserError(
            f'{path}: field "version" is {described.get("version")!r}; this sav_jax reads version {_VERSION}'
        )
    try:
        if hashlib.sha256(content).hexdigest() != described["tensors_sha256"]:
            raise UserError(f"{folder / _TENSORS}: damaged, or not the file that {_JSON} describes")
        tensors = load(content)
        settings = described["settings"]
        loaded = SparseAttentionVectors(
            heads=tuple((int(layer), int(head)) for layer, head in described["heads"]),
            scores=tensors["scores"],
            labels=tuple(str(label) for label in described["labels"]),
            centroids=tensors["centroids"],
            support=tuple(int(count) for count in described["support"]),
            metadata=dict(described["metadata"]),
            **{name: settings[name] for name in _SETTINGS},
        )
        expected = (len(loaded.heads), len(loaded.labels), int(described["shape"]["head_dim"]))
        if loaded.centroids.shape != expected or any(
            not (0 <= layer < loaded.scores.shape[0] and 0 <= head < loaded.scores.shape[1])
            for layer, head in loaded.heads
        ):
            raise ValueError("heads, labels and tensors do not fit together")
    except (KeyError, TypeError, ValueError, IndexError, SafetensorError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: damaged: {reason}") from None
    return loaded


def _checked_heads(heads: np.ndarray | jax.Array) -> np.ndarray:
    array = np.asarray(heads)
    if array.ndim != 4:
        raise UserError(f"heads have shape {list(array.shape)}; [examples, layers, heads, head_dim] is expected")
    if not jnp.issubdtype(array.dtype, jnp.floating):  # NumPy alone does not count bfloat16 among the floats
        raise UserError(f"heads have dtype {array.dtype}; a float dtype is expected")
    # JAX has no float64 unless it is switched on; the statistics are float32 anyway.
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _class_names(labels: Sequence[str], class_names: Sequence[str] | None) -> tuple[str, ...]:
    used = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise UserError(f"label of example {index} is {label!r}; a string is expected")
        used.add(str(label))  # NumPy's strings become Python's
    names = tuple(sorted(used)) if class_names is None else tuple(str(name) for name in class_names)
    if len(set(names)) != len(names):
        raise UserError("class_names holds a name twice")
    if unknown := sorted(used.difference(names)):
        raise UserError(f"label {unknown[0]!r} is not among class_names")
    if unused := [name for name in names if name not in used]:
        raise UserError(f"class {unused[0]!r} has no example")
    if len(names) < 2:
        found = f"all {len(labels)} examples are {names[0]!r}" if names else "there are no examples"
        raise UserError(f"a classifier needs examples of at least two classes; {found}")
    return names


def _check_finite(heads: np.ndarray, selected: Sequence[tuple[int, int]] | None = None) -> None:
    """Raise UserError naming the first vector that is not finite: [N, L, A, H], or [N, k, H] of the selected heads."""
    for start in range(0, len(heads), _FINITE_ROWS):
        finite = np.isfinite(heads[start : start + _FINITE_ROWS]).all(axis=-1)
        if not finite.all():
            example, *where = (int(i) for i in np.argwhere(~finite)[0])
            layer, head = selected[where[0]] if selected is not None else where
            raise UserError(f"head vectors are not finite: example {start + example}, layer {layer}, head {head}")
