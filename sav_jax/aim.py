"""AIM (arXiv 2406.07588): demonstrations become a few virtual tokens, made by the frozen model itself.

The model reads each demonstration (images and text) by itself. What it puts out at the text, where it has seen the
images, passes through a small trained projection (``models/fusion.py``) and stands in later prompts in place of the
demonstration: as many vectors as the demonstration has tokens of text, none for its images. So a prompt holds only the
images of its own question, demonstrations are read once, whatever the number of queries, and can be kept in a bank.

The paper's published text leaves things open (which layer, which tokens exactly, what stands between demonstrations);
here they are fields of :class:`Layout`. Training is in ``sav_jax/train/aim.py``.

Axes: B batch, T tokens, W virtual tokens of one demonstration, M of one prompt, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sav_jax._files import write_folder
from sav_jax._storage import AnyPath, Location, location, storage_errors
from sav_jax.batching import plan_batches, round_tokens
from sav_jax.errors import UserError
from sav_jax.examples import IMAGE_MARK, VIRTUAL_MARK, Example, VirtualTokens
from sav_jax.extract import content_key, run_batches
from sav_jax.lmm import LMM
from sav_jax.models.batch import Batch
from sav_jax.models.decoder import read_at
from sav_jax.models.fusion import Fusion, FusionConfig
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.processor import Processor, Prompt
from sav_jax.sharding import data_size, own_rows, put_own_rows

TOKENS = ("text", "answer", "all")
_VERSION = 1
_SETTINGS, _WEIGHTS = "aim.json", "projection.safetensors"
_SOMETHING = "QUESTION"
_BANK, _VECTORS = "bank.json", "demonstrations.safetensors"


@dataclass(frozen=True)
class Layout:
    """How demonstrations are read and where their virtual tokens stand.

    Attributes:
        tokens: whose hidden states are taken: of the question and the answer ("text"), of the answer alone ("answer")
            or of all tokens but the images' ("all": with those of the chat template before the answer).
        layer: after how many layers (and the final norm); 0 for all.
        separator: text behind each demonstration's virtual tokens.
        answer_lead: what the model writes between its prompt and an answer's own text (a space, in some templates).
    """

    tokens: str = "text"
    layer: int = 0
    separator: str = "\n"
    answer_lead: str = ""

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise UserError(f"tokens {self.tokens!r} is not known (known: {', '.join(TOKENS)})")
        if self.layer < 0:
            raise UserError(f"layer must be at least 0, not {self.layer}")


@dataclass(frozen=True, eq=False)
class Aim:
    """A trained projection and what it was trained for.

    Attributes:
        layout: how demonstrations are read.
        config: sizes.
        params: path -> float32 array.
        model: fingerprint of the model whose hidden states it projects.
        name: what that model was loaded by.
    """

    layout: Layout
    config: FusionConfig
    params: Mapping[str, np.ndarray]
    model: str
    name: str

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of everything that decides the virtual tokens, in hexadecimal."""
        digest = hashlib.sha256(repr((_VERSION, self.layout, self.config, self.model)).encode())
        for path in sorted(self.params):
            digest.update(path.encode() + np.ascontiguousarray(self.params[path], np.float32).tobytes())
        return digest.hexdigest()

    def check(self, lmm: LMM) -> None:
        """Raise UserError unless it was trained for this model."""
        if lmm.fingerprint != self.model:
            raise UserError(f"the projection was trained for {self.name}, whose weights or settings {lmm.name} has not")

    def save(self, directory: AnyPath) -> None:
        """Write ``aim.json`` and ``projection.safetensors``, complete or not at all."""
        settings = {
            "version": _VERSION,
            "layout": dataclasses.asdict(self.layout),
            "projection": dataclasses.asdict(self.config),
            "model": {"name": self.name, "fingerprint": self.model},
        }
        files = {_WEIGHTS: save({path: np.ascontiguousarray(value) for path, value in self.params.items()})}
        write_folder(directory, files | {_SETTINGS: (json.dumps(settings, indent=2) + "\n").encode()})


def load_aim(directory: AnyPath) -> Aim:
    """Read what :meth:`Aim.save` or ``sav-jax train aim`` has written.

    Args:
        directory: the folder, or the run's folder which has it as ``projection``.

    Raises:
        UserError: files are missing or damaged, or of another version.
    """
    folder = location(directory)
    with storage_errors(directory):
        if not (folder / _SETTINGS).is_file() and (folder / "projection" / _SETTINGS).is_file():
            folder = folder / "projection"
    settings = _read_json(folder / _SETTINGS, "'sav-jax train aim' writes such folders")
    try:
        layout, config = Layout(**settings["layout"]), FusionConfig(**settings["projection"])
        model, name = str(settings["model"]["fingerprint"]), str(settings["model"]["name"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / _SETTINGS}: a field is missing or not known ({error})") from None
    params = _read_arrays(folder / _WEIGHTS)
    expected = jax.eval_shape(
        lambda: Fusion(config).init(jax.random.key(0), jnp.zeros((1, 1, config.width), jnp.float32))
    )
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(expected["params"], sep="/").items()}
    if {path: value.shape for path, value in params.items()} != shapes:
        raise UserError(f"{folder / _WEIGHTS}: the arrays are not those that {_SETTINGS} describes")
    return Aim(layout, config, params, model, name)


def _read_json(file: Location, hint: str) -> Any:
    try:
        settings = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: missing ({hint})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error})") from None
    if not isinstance(settings, dict) or settings.get("version") != _VERSION:
        raise UserError(f"{file}: not of version {_VERSION}")
    return settings


def _read_arrays(file: Location) -> dict[str, np.ndarray]:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: unreadable ({error})") from None


def plan_demonstration(processor: Processor, example: Example, layout: Layout) -> tuple[Prompt, np.ndarray]:
    """A demonstration as the model reads it by itself: the question in the user's turn, the answer in its own.

    Args:
        processor: of the model.
        example: its label is the answer.
        layout: see :class:`Layout`.

    Returns:
        The prompt, up to the last token that is taken, and the places of those tokens, int32 ``[W]``.

    Raises:
        UserError: there is no label, or the chat template does not repeat the question.
    """
    source = example.source or f"example {example.id}"
    if example.label is None:
        raise UserError(f'{source}: field "label" is missing: a demonstration needs an answer')
    if example.videos or example.virtual:
        raise UserError(f"{source}: demonstrations with videos or virtual tokens are not supported")
    text = processor.text(example.question, len(example.images))
    start = len(text) + len(layout.answer_lead)
    spans = [(start, start + len(example.label))]
    if layout.tokens != "answer":
        marked = IMAGE_MARK in example.question
        head = processor.text(_SOMETHING, 0 if marked else len(example.images)).partition(_SOMETHING)[0]
        if not text.startswith(head + example.question.replace(IMAGE_MARK, processor.image_mark)):
            raise UserError(f"{source}: the chat template does not repeat the question as it is")
        at = len(head)
        for piece in example.question.split(IMAGE_MARK):
            if piece.strip():  # what is blank around an image says nothing
                spans.append((at + len(piece) - len(piece.lstrip()), at + len(piece.rstrip())))
            at += len(piece) + len(processor.image_mark)
    text += layout.answer_lead + example.label
    if layout.tokens == "all":
        spans = [(0, len(text))]
    ids, offsets = encoded(processor, text)
    prompt = processor.expand(ids, example.image_sizes())
    taken = np.array([any(a < stop and start < b for start, stop in spans) for a, b in offsets])
    places = np.flatnonzero(prompt.visual_index[:, 0] < 0)[taken[~processor.is_media(ids)]]
    if not len(places):
        raise UserError(f"{source}: the demonstration has no text")
    return prompt.cut(int(places[-1]) + 1), places.astype(np.int32)


def encoded(processor: Processor, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Token ids of a whole prompt, int32 ``[T]``, and the characters that each of them covers."""
    bos = processor.tokenizer.bos_token
    tokens = processor.tokenizer(
        text,
        add_special_tokens=bos is None or not text.startswith(bos),
        return_offsets_mapping=True,
        verbose=False,
    )
    return np.asarray(tokens["input_ids"], np.int32), tokens["offset_mapping"]


def after_demonstrations(query: Example, demonstrations: Sequence[VirtualTokens], layout: Layout) -> Example:
    """The query as it is asked after demonstrations: their virtual tokens open the user's turn.

    Args:
        query: a question; without demonstrations it stays what it is.
        demonstrations: in order.
        layout: says what separates them.
    """
    if not demonstrations:
        return query
    return dataclasses.replace(
        query,
        question=f"{VIRTUAL_MARK}{layout.separator}" * len(demonstrations) + query.marked_question(),
        virtual=tuple(demonstrations),
        label=None,
        source=f"{query.source or query.id} after {len(demonstrations)} demonstrations",
    )


def shallower(module: MultimodalModel, params: Any, layers: int) -> tuple[MultimodalModel, Any]:
    """The same model with its first layers alone; all of them if ``layers`` is 0."""
    text = module.config.text
    if layers in (0, text.num_layers):
        return module, params
    if layers > text.num_layers:
        raise UserError(f"layer is {layers}; the model has {text.num_layers}")
    decoder = params["language_model"]
    cut = {**decoder, "layers": jax.tree.map(lambda x: x[:layers], decoder["layers"])}
    config = dataclasses.replace(module.config, text=dataclasses.replace(text, num_layers=layers))
    return type(module)(config), {**params, "language_model": cut}


def fused(
    module: MultimodalModel,
    params: Any,
    fusion: FusionConfig,
    fusion_params: Mapping[str, jax.Array],
    layer: int,
    batch: Batch,
    places: jax.Array,
    per_row: int = 1,
) -> jax.Array:
    """Virtual tokens of demonstrations.

    Args:
        module, params: the frozen model.
        fusion, fusion_params: the projection; path -> array.
        layer: see :class:`Layout`.
        batch: ``B * per_row`` demonstrations of T tokens.
        places: int32 ``[B, M]``, places among the ``per_row * T`` tokens of a row's demonstrations.
        per_row: demonstrations that share a row.

    Returns:
        ``[B, M, D]``.
    """
    reader, reading = shallower(module, params, layer)
    output: Any = reader.apply({"params": reading}, batch)
    hidden = output.hidden.reshape(places.shape[0], per_row * output.hidden.shape[1], -1)
    nested = traverse_util.unflatten_dict(dict(fusion_params), sep="/")
    made: Any = Fusion(fusion).apply({"params": nested}, read_at(hidden, places))
    return made


@functools.lru_cache(maxsize=8)
def _fuse_step(module: MultimodalModel, fusion: FusionConfig, layer: int) -> Callable[..., jax.Array]:
    """``(params, batch, projection, places [B, M]) -> float32 [B, M, D]``."""

    @jax.jit
    def step(params: Any, batch: Batch, projection: Any, places: jax.Array) -> jax.Array:
        return fused(module, params, fusion, projection, layer, batch, places).astype(jnp.float32)

    return step


class DemonstrationBank:
    """Virtual tokens of demonstrations, each made by one forward pass and kept by content.

    Attributes:
        passes: demonstrations that were run through the model.

    Example:
        >>> import numpy as np
        >>> import sav_jax
        >>> from PIL import Image
        >>> from sav_jax.aim import Aim, DemonstrationBank, Layout, after_demonstrations
        >>> from sav_jax.models.fusion import FusionConfig, initial_params
        >>> lmm = sav_jax.load("tiny")
        >>> config = FusionConfig(lmm.config.text.hidden_size)
        >>> params = initial_params(config, seed=0, initial="identity", length=1.0)  # or load_aim("runs/aim")
        >>> bank = DemonstrationBank(lmm, Aim(Layout(), config, params, lmm.fingerprint, lmm.name))
        >>> red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
        >>> (tokens,) = bank.get([sav_jax.Example("what is it?", (red,), label="red")])
        >>> tokens.values.shape[1], bank.passes  # as wide as the model's embeddings; one pass
        (192, 1)
        >>> asked = after_demonstrations(sav_jax.Example("what is it?", (blue,)), [tokens], bank.aim.layout)
        >>> asked.question.splitlines()
        ['<demonstration>', '<image>', 'what is it?']
    """

    def __init__(self, lmm: LMM, aim: Aim, batch_size: int = 8) -> None:
        """An empty bank.

        Args:
            lmm: the frozen model.
            aim: the projection trained for it.
            batch_size: demonstrations per forward pass.

        Raises:
            UserError: the projection was trained for another model.
        """
        aim.check(lmm)
        self.lmm, self.aim, self.batch_size = lmm, aim, batch_size
        self.passes = 0
        self._kept: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of all virtual tokens."""
        return sum(values.nbytes for values in self._kept.values())

    def get(self, demonstrations: Sequence[Example], progress: bool = False) -> tuple[VirtualTokens, ...]:
        """Virtual tokens of demonstrations; those not in the bank are made and kept.

        Args:
            demonstrations: their labels are the answers.
            progress: show a bar on stderr.

        Raises:
            UserError: a demonstration has no label or cannot be read, or its virtual tokens are not finite.
        """
        planned = [plan_demonstration(self.lmm.processor, example, self.aim.layout) for example in demonstrations]
        keys = []
        longest = self.lmm.max_tokens
        for (prompt, _), example in zip(planned, demonstrations, strict=True):
            if longest is not None and len(prompt.token_ids) > longest:
                name = example.source or f"example {example.id}"
                raise UserError(f"{name}: {len(prompt.token_ids)} tokens; {self.lmm.name} reads at most {longest}")
        for (prompt, places), example in zip(planned, demonstrations, strict=True):
            facts = content_key(self.lmm, prompt, example), places.tolist(), self.aim.digest
            keys.append(hashlib.sha256(repr(facts).encode()).hexdigest())
        new = list({key: row for row, key in enumerate(keys) if key not in self._kept}.values())
        self._make([keys[i] for i in new], [planned[i] for i in new], [demonstrations[i] for i in new], progress)
        return tuple(VirtualTokens(self._kept[key], key) for key in keys)

    def _make(
        self,
        keys: Sequence[str],
        planned: Sequence[tuple[Prompt, np.ndarray]],
        examples: Sequence[Example],
        progress: bool,
    ) -> None:
        lmm, aim = self.lmm, self.aim
        prompts, places = [prompt for prompt, _ in planned], [where for _, where in planned]
        projection = dict(aim.params)

        def further(plan: Any) -> tuple[Any, ...]:
            table = np.zeros((plan.size, round_tokens(max(len(places[row]) for row in plan.rows))), np.int32)
            for i, row in enumerate(plan.rows):
                table[i, : len(places[row])] = places[row]
            return projection, put_own_rows(table[own_rows(lmm.mesh, plan.size)], lmm.mesh)

        step = _fuse_step(lmm.module, aim.config, aim.layout.layer)
        plans = plan_batches(prompts, self.batch_size, data_size(lmm.mesh))
        for plan, values in run_batches(
            lmm, step, plans, prompts, examples, progress=progress, what="demonstrations", further=further
        ):
            for row, made in zip(plan.rows, values, strict=True):
                tokens = np.array(made[: len(places[row])])
                if not np.isfinite(tokens).all():
                    raise UserError(f"{examples[row].source or examples[row].id}: virtual tokens are not finite")
                self._kept[keys[row]] = tokens
            self.passes += len(plan.rows)

    def save(self, directory: AnyPath) -> None:
        """Write all of them, complete or not at all, to be read by :meth:`load`."""
        settings = {"version": _VERSION, "projection": self.aim.digest, "demonstrations": len(self)}
        files = {_VECTORS: save(self._kept), _BANK: (json.dumps(settings, indent=2) + "\n").encode()}
        write_folder(directory, files)

    def load(self, directory: AnyPath) -> None:
        """Take in what was saved.

        Raises:
            UserError: files are missing or damaged, or were made by another projection or model.
        """
        folder = location(directory)
        settings = _read_json(folder / _BANK, "a bank is written by DemonstrationBank.save")
        if settings.get("projection") != self.aim.digest:
            raise UserError(f"{folder}: the demonstrations were made by another projection or model")
        vectors = _read_arrays(folder / _VECTORS)
        if any(value.ndim != 2 or value.shape[1] != self.aim.config.width for value in vectors.values()):
            raise UserError(f"{folder / _VECTORS}: not virtual tokens of width {self.aim.config.width}")
        self._kept |= vectors


def cache_bytes_per_token(lmm: LMM) -> int:
    """Memory of a token's keys and values in all layers."""
    text = lmm.config.text
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * jnp.dtype(lmm.dtype).itemsize
