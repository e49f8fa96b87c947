"""Examples -> arrays: head outputs and next-token logits, in batches of static shapes.

Axes: E examples, L decoder layers, N heads, H head width, V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from tqdm import tqdm

from sav_jax._processes import check_same, gathered, known_by_all, share, shared_out, wait_for_all
from sav_jax._profiling import Stopwatch
from sav_jax._storage import BucketPath
from sav_jax._visual_pool import pool_for
from sav_jax.batching import BatchPlan, assemble, plan_batches
from sav_jax.errors import UserError
from sav_jax.examples import Example
from sav_jax.headstore import HeadStore
from sav_jax.lmm import LMM
from sav_jax.models.aligned import aligned_zeros
from sav_jax.models.batch import Batch
from sav_jax.models.intervention import HeadEdit
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.processor import Prompt
from sav_jax.models.video import VideoShape
from sav_jax.packing import Pack, pack
from sav_jax.sharding import data_size, own_rows, put_own_rows

_DECODERS = min(16, os.cpu_count() or 1)  # threads that decode and resize; Pillow and NumPy run beside each other

_FEATURE_VERSION = "heads 1"
"""Part of every cache key; raised when the meaning or the numbers of the features change."""


def extract_heads(
    lmm: LMM,
    examples: Sequence[Example],
    batch_size: int = 8,
    cache: HeadStore | str | Path | None = None,
    progress: bool = True,
    *,
    num_layers: int | None = None,
    reuse_images: bool = True,
) -> np.ndarray:
    """What every attention head puts out at the last prompt token, before the output projection (SAVs, arXiv
    2412.00142, section 3).

    Equal prompts (text, images, videos) are run once; of prompts that differ only behind their last image, what comes
    before is run once (:mod:`sav_jax.packing`). With a cache, finished examples are read from it and new ones are
    stored batch by batch: a killed run resumes, repeats at most the batches under way, and ends with the same bytes.

    Args:
        lmm: the frozen model.
        examples: E examples; labels are not used.
        batch_size: prompts per forward pass.
        cache: a :class:`HeadStore` or the path of one (local folder or ``gs://``).
        progress: show a bar with examples/s and ETA on stderr.
        num_layers: L, run only the first so many layers of the model; by default all that are loaded.
        reuse_images: False runs every prompt by itself: the same numbers up to rounding.

    Returns:
        float32 ``[E, L, N, H]``.

    Raises:
        UserError: no such number of layers; an image or video cannot be read, or features are not finite: names the
            row.

    Example:
        >>> import sav_jax
        >>> from PIL import Image
        >>> lmm = sav_jax.load("tiny")
        >>> pictures = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
        >>> examples = [sav_jax.Example("what color is the background?", (picture,)) for picture in pictures]
        >>> heads = sav_jax.extract_heads(lmm, examples, progress=False)
        >>> heads.shape, heads.dtype
        ((2, 12, 8, 24), dtype('float32'))
    """
    if num_layers is not None:
        lmm = lmm.truncated(num_layers)
    prompts = plan_prompts(lmm, examples)
    media = digests_of_all(examples)
    keys = [content_key(lmm, *of) for of in zip(prompts, examples, media, strict=True)]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = sorted(first.values())
    store = HeadStore.open(cache) if isinstance(cache, (str, Path)) else cache
    absent = set(range(len(rows)))
    if store is not None:
        absent = set(known_by_all(store.missing([keys[row] for row in rows]), len(rows)))
    heads = aligned_zeros((len(keys), *lmm.heads_shape))
    shown = [media[row] for row in rows] if reuse_images else None
    unique = [examples[row] for row in rows]
    # Batches are planned over all examples and run whole when any of theirs is missing: a resumed run computes each of
    # them in the same company as the first one did, and so to the same bits.
    for index, values in run_heads(
        lmm, [prompts[row] for row in rows], unique, batch_size, absent, shown, progress=progress, what="heads"
    ):
        new = [i for i, row in enumerate(index) if row in absent]
        index = [index[i] for i in new]
        heads[[rows[i] for i in index]] = values[new]
        if store is not None:
            own = share(len(new))
            store.write([keys[rows[i]] for i in index[own]], values[new][own])
    if store is not None:
        wait_for_all("heads are stored")
        present = [i for i in range(len(rows)) if i not in absent]
        store.read_into(heads, [rows[i] for i in present], [keys[rows[i]] for i in present])
    return repeated(heads, keys, first)


def run_heads(
    lmm: LMM,
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    batch_size: int,
    wanted: Container[int],
    media: Sequence[Sequence[str]] | None = None,
    *,
    progress: bool,
    what: str,
    edit: HeadEdit | None = None,
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Heads of the batches that hold any prompt that is wanted.

    Args:
        lmm: the frozen model.
        prompts, examples: E distinct prompts, and what they were made from.
        batch_size: prompts, or packs of them, per forward pass.
        wanted: places in ``prompts``.
        media: digests of each prompt's images and videos: what those that share them have in common is run once. None:
            every prompt by itself.
        progress, what: a bar on stderr and its title.
        edit: a change of head outputs.

    Yields:
        Places in ``prompts``, and their heads, float32 ``[., L, N, H]``.

    Raises:
        UserError: an image or video cannot be read, or features are not finite; names the row.
    """
    packs = packed(lmm, prompts, media if edit is None else None)
    plans = plan_batches([one.prompt for one in packs], batch_size, data_size(lmm.mesh))
    run = [n for n, plan in enumerate(plans) if any(i in wanted for row in plan.rows for i in packs[row].members)]
    if progress:
        say_shared([packs[row] for number in run for row in plans[number].rows], what)
    for plan, values in run_batches(
        lmm,
        heads_step(lmm.module, on_one_cpu(lmm)),
        plans,
        [one.prompt for one in packs],
        [examples[one.members[0]] for one in packs],
        progress=progress,
        what=what,
        further=lambda _: () if edit is None else (edit,),
        media=None if media is None else [media[one.members[0]] for one in packs],
        run=run,
    ):
        index, heads = apart(packs, plan, values)
        check_finite(heads, [examples[i] for i in index])
        yield index, heads


def packed(lmm: LMM, prompts: Sequence[Prompt], media: Sequence[Sequence[str]] | None) -> list[Pack]:
    """Which prompts are read in one sequence; without ``media``, and in models that read a token in another way if more
    follow, every prompt by itself.
    """
    if media is None or getattr(lmm.config.text, "dynamic_ntk", False):
        return [Pack(prompt, (i,)) for i, prompt in enumerate(prompts)]
    return pack(prompts, media)


def say_shared(packs: Sequence[Pack], what: str) -> None:
    """Say on stderr how many prompts share their images, and how many passes read them; nothing if none do."""
    sharing = [len(one.members) for one in packs if len(one.members) > 1]
    if sharing and jax.process_index() == 0:
        print(f"{what}: {sum(sharing)} prompts share their images; {len(sharing)} passes read them", file=sys.stderr)


def apart(packs: Sequence[Pack], plan: BatchPlan, values: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The places of the prompts in a batch of packs, and ``values`` ``[rows, R, ...]`` of each of them."""
    members = [packs[row].members for row in plan.rows]
    taken = [values[i, : len(places)] for i, places in enumerate(members)]
    return [i for places in members for i in places], np.concatenate(taken)


def repeated(values: np.ndarray, keys: Sequence[str], first: Mapping[str, int]) -> np.ndarray:
    """Fill in the rows of prompts that were seen before, in place; nothing else is copied.

    Args:
        values: ``[E, ...]``, of which the rows where a key stands first are there.
        keys: E keys.
        first: where each key stands first.

    Returns:
        ``values``.
    """
    again = [row for row, key in enumerate(keys) if first[key] != row]
    if again:
        values[again] = values[[first[keys[row]] for row in again]]
    return values


def next_token_logits(lmm: LMM, examples: Sequence[Example], batch_size: int = 8, progress: bool = True) -> np.ndarray:
    """Logits of the token after the prompt.

    Args:
        lmm, examples, batch_size, progress: as for :func:`extract_heads`.

    Returns:
        float32 ``[E, V]``.

    Example:
        >>> import sav_jax
        >>> from PIL import Image
        >>> lmm = sav_jax.load("tiny")
        >>> asked = [sav_jax.Example("what color is the background?", (Image.new("RGB", (32, 32), "blue"),))]
        >>> logits = sav_jax.next_token_logits(lmm, asked, progress=False)
        >>> logits.shape, lmm.processor.tokenizer.decode(logits[0].argmax())
        ((1, 827), 'blue')
    """
    prompts = plan_prompts(lmm, examples)
    plans = plan_batches(prompts, batch_size, data_size(lmm.mesh))
    logits = np.zeros((len(prompts), lmm.config.text.vocab_size), np.float32)
    for plan, values in run_batches(
        lmm, _logits_step(lmm.module), plans, prompts, examples, progress=progress, what="logits"
    ):
        logits[list(plan.rows)] = values[:, 0]
    return logits


def plan_prompts(lmm: LMM, examples: Sequence[Example]) -> list[Prompt]:
    """Tokens and visual plans of all examples; reads headers of images and packets of videos, no pixels. Where the
    model is spread over several processes all of them call this, and each reads its share of the files.
    """
    # A model of this process alone may be asked by this process alone.
    together = jax.process_count() > 1 and lmm.mesh is not None and lmm.mesh.is_multi_process
    if together:  # rows are shared out by their places: unlike lists would mix without a word
        rows = json.dumps([_told_apart(example) for example in examples])
        check_same({"another model": lmm.fingerprint, "other rows": rows})
    shapes = _told_shapes(lmm, examples) if together else functools.partial(_media_shapes, lmm)
    prompts = []
    for example in examples:
        try:
            virtual = [len(tokens.values) for tokens in example.virtual]
            prompt = lmm.processor.plan(example.question, *shapes(example), virtual, example.history)
            if lmm.max_tokens is not None and len(prompt.token_ids) > lmm.max_tokens:
                raise UserError(
                    f"{example.source or f'example {example.id}'}: the prompt has {len(prompt.token_ids)} tokens, "
                    f"{lmm.name} reads at most {lmm.max_tokens}"
                )
            prompts.append(prompt)
        except UserError as error:
            if example.source and example.source not in str(error):
                raise UserError(f"{example.source}: {error}") from None
            raise
    return prompts


_Shapes = tuple[list[tuple[int, int]], list[VideoShape]]


def _media_shapes(lmm: LMM, example: Example) -> _Shapes:
    """Sizes of an example's images, and what is shown of its videos."""
    lmm.processor.check_videos(len(example.videos))  # before they are opened
    return example.image_sizes(), example.video_shapes()


def _told_shapes(lmm: LMM, examples: Sequence[Example]) -> Callable[[Example], _Shapes]:
    """:func:`_media_shapes`, of which each process has read a share and told the others.

    What a process could not read is told, too, and raised where it is asked for: the first bad example in order is
    named, by all, as if each had read everything.
    """

    def read(example: Example) -> str | list[Any]:
        try:
            sizes, videos = _media_shapes(lmm, example)
        except UserError as error:
            return str(error)
        return [sizes, [asdict(video) for video in videos]]

    told = _once_for_all(examples, read)

    def shapes(example: Example) -> _Shapes:
        found = told[_shown(example)]
        if isinstance(found, str):
            raise UserError(found)
        sizes, videos = found
        return (
            [(height, width) for height, width in sizes],
            [VideoShape(**video | {"frames": tuple(video["frames"])}) for video in videos],
        )

    return shapes


def media_digests(example: Example) -> list[str]:
    """What an example shows: digests of its images, and of its videos with how many of their frames."""
    return [*example.image_digests(), *(f"video {digest} {example.frames}" for digest in example.video_digests())]


def digests_of_all(examples: Sequence[Example]) -> list[list[str]]:
    """Of each, its :func:`media_digests`; files that several show are read once, by one of the processes."""
    found = _once_for_all(examples, media_digests)
    return [found[_shown(example)] for example in examples]


def _told_apart(example: Example) -> list[Any]:
    """What tells an example from others without opening a file. Folders may have other names on other hosts."""
    media = [str(of).rpartition("/")[2] if isinstance(of, Path | BucketPath) else "" for of in example.images]
    return [example.id, example.question, example.label, media, len(example.videos), len(example.history)]


def _once_for_all(examples: Sequence[Example], work: Callable[[Example], Any]) -> dict[tuple[Any, ...], Any]:
    """What ``work`` finds in the images and videos of examples, by :func:`_shown`: of those that show the same it is
    asked about the first, in one of the processes.
    """
    first = {_shown(example): example for example in reversed(examples)}
    unique = list(first.values())
    return dict(zip(first, shared_out(len(unique), lambda i: work(unique[i])), strict=True))


def _shown(example: Example) -> tuple[Any, ...]:
    """Equal for examples that show the same files, or objects in memory, in the same way."""
    media = (*example.images, *example.videos)
    names = (str(of) if isinstance(of, Path | BucketPath) else id(of) for of in media)
    return (*names, len(example.images), example.frames)


def content_key(lmm: LMM, prompt: Prompt, example: Example, media: Sequence[str] | None = None) -> str:
    """sha256 of everything the features depend on: weights and processor, depth, dtype, tokens, images, videos and how
    many of their frames are shown. ``media`` are the example's :func:`media_digests`, if they are known.
    """
    media = media_digests(example) if media is None else media
    facts = [_FEATURE_VERSION, lmm.fingerprint, str(lmm.num_layers), str(lmm.dtype), *media]
    facts += [f"virtual {tokens.key}" for tokens in example.virtual]
    digest = hashlib.sha256("\n".join(facts).encode())
    digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()


_CACHED_BYTES = 8 << 20  # of the widest activations: what the caches of a CPU's cores hold, or some of it


@functools.lru_cache(maxsize=32)
def heads_step(module: MultimodalModel, in_parts: bool = False) -> Callable[..., jax.Array]:
    """``(params, batch, edit=None) -> heads [B, R, L, N, H]`` at the R positions read.

    Args:
        module: the model.
        in_parts: run as few rows after the others as caches hold, for a CPU: a whole batch of a large model runs
            through memory in every operation (measured: an eighth slower).
    """

    def run(params: Any, batch: Batch, edit: HeadEdit | None) -> jax.Array:
        heads: Any = module.apply({"params": params}, batch, edit=edit, method="heads")
        return rearrange(heads, "l b r n h -> b r l n h").astype(jnp.float32)

    @jax.jit
    def step(params: Any, batch: Batch, edit: HeadEdit | None = None) -> jax.Array:
        size, tokens = batch.token_ids.shape
        rows = max(1, _CACHED_BYTES // (4 * tokens * module.config.text.intermediate_size))
        rows = math.gcd(size, 1 << (rows.bit_length() - 1))
        if not in_parts or rows == size or edit is not None:
            return run(params, batch, edit)
        pool, batch = batch.visual_pool, replace(batch, visual_pool=None)
        parts = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, rows, *x.shape[1:]), batch)
        heads = jax.lax.map(lambda part: run(params, replace(part, visual_pool=pool), None), parts)
        return heads.reshape(size, *heads.shape[2:])

    return step


def on_one_cpu(lmm: LMM) -> bool:
    """Whether the model runs on a single CPU device."""
    return jax.default_backend() == "cpu" and (lmm.mesh is None or lmm.mesh.size == 1)


@functools.lru_cache(maxsize=32)
def _logits_step(module: MultimodalModel) -> Callable[[Any, Batch], jax.Array]:
    @jax.jit
    def step(params: Any, batch: Batch) -> jax.Array:
        output: Any = module.apply({"params": params}, batch, logits="read")
        return output.logits

    return step


def run_batches(
    lmm: LMM,
    step: Callable[..., Any],
    plans: Sequence[BatchPlan],
    prompts: Sequence[Prompt],
    examples: Sequence[Example],
    *,
    progress: bool,
    what: str,
    further: Callable[[BatchPlan], tuple[Any, ...]] = lambda _: (),
    media: Sequence[Sequence[str]] | None = None,
    run: Sequence[int] | None = None,
) -> Iterator[tuple[BatchPlan, Any]]:
    """Run ``step(params, batch, *further(plan))`` on every plan, or on those with the numbers in ``run``.

    With ``media``, digests of each prompt's images and videos, those that are shown again are not encoded again, on one
    device (:mod:`sav_jax._visual_pool`).

    Images and videos of the next batches are decoded and resized by threads while the device computes, and a result is
    taken only after the next batch has been dispatched. Of several processes each decodes the rows of its own devices;
    all take the same steps and get every result whole.

    Yields:
        Each plan, in order, with the step's result for its real rows: arrays of the same structure, on the host.

    Raises:
        UserError: an image or video cannot be read; after the batches before have been yielded.
    """

    run = range(len(plans)) if run is None else run
    pool = pool_for(lmm, plans, run, prompts, media)

    def rows_of(plan: BatchPlan) -> BatchPlan:
        """The plan of this process's rows."""
        if jax.process_count() == 1:
            return plan
        filled = [*plan.rows, *[plan.rows[0]] * (plan.size - len(plan.rows))]
        own = tuple(filled[own_rows(lmm.mesh, plan.size)])
        return replace(plan, rows=own, size=len(own))

    def pixels_of(row: int) -> np.ndarray:
        return lmm.processor.pixels(examples[row].load_images(), examples[row].load_videos())

    def host_batch(number: int, own: BatchPlan, decoded: Mapping[int, Future[np.ndarray]]) -> tuple[Batch, list[Any]]:
        pixels = {row: value.result() for row, value in decoded.items()}
        virtual = [examples[row].virtual_tokens() for row in own.rows]
        if own.bucket.virtual:  # if none of these rows has any, those of another process do
            none = np.zeros((0, lmm.config.text.hidden_size), np.float32)
            virtual = [none if tokens is None else tokens for tokens in virtual]
        if pool is None:
            return assemble(own, prompts, [pixels[row] for row in own.rows], virtual), []
        return assemble(own, pool.prompts(number), None, virtual), pool.host(number, pixels)

    def prepare(number: int, plan: BatchPlan) -> tuple[BatchPlan, Future[tuple[Batch, list[Any]]]]:
        own = rows_of(plan)
        rows = dict.fromkeys(own.rows) if pool is None else pool.decoded(number)
        decoded = {row: decoding.submit(pixels_of, row) for row in rows}
        return plan, assembling.submit(host_batch, number, own, decoded)

    def number_of(plan: BatchPlan) -> int:
        return sum(max(1, len(prompts[row].reads)) for row in plan.rows)

    bar = tqdm(
        total=sum(number_of(plans[number]) for number in run),
        desc=what,
        unit=" examples",
        file=sys.stderr,
        disable=not progress or not run or jax.process_index() != 0,
        mininterval=0.5,
    )
    # Two pools, as a batch waits for its pictures: in one, waiting threads could leave none to decode.
    decoding, assembling = ThreadPoolExecutor(_DECODERS), ThreadPoolExecutor(1)
    watch = Stopwatch()
    unreadable: UserError | None = None
    try:
        upcoming = ((number, plans[number]) for number in run)
        prepared = deque(prepare(*following) for _, following in zip(range(2), upcoming, strict=False))
        running: deque[tuple[BatchPlan, Any]] = deque()
        while prepared or running:
            if prepared:
                plan, future = prepared.popleft()
                try:
                    with watch.taking("waiting"):
                        batch, images = future.result()
                except UserError as error:
                    unreadable = error
                    prepared.clear()
                else:
                    with watch.taking("dispatching"), lmm.running():
                        batch = put_own_rows(batch, lmm.mesh)
                        if pool is not None:
                            for image in images:
                                pool.encode(lmm.params, image)
                            batch = pool.filled(batch)
                        result = step(lmm.params, batch, *further(plan))
                    for leaf in jax.tree.leaves(result):
                        leaf.copy_to_host_async()
                    watch.dispatched(result, number_of(plan), plan.size * plan.bucket.tokens)
                    running.append((plan, result))
                    if (following := next(upcoming, None)) is not None:
                        prepared.append(prepare(*following))
            if len(running) > 1 or (running and not prepared):
                plan, result = running.popleft()
                rows = len(plan.rows)
                yield plan, jax.tree.map(lambda x, rows=rows: x[:rows], gathered(result))
                bar.update(number_of(plan))
        if unreadable is not None:
            raise unreadable
    finally:
        watch.stop()
        bar.close()
        assembling.shutdown(cancel_futures=True)
        decoding.shutdown(cancel_futures=True)


def check_finite(heads: np.ndarray, examples: Sequence[Example]) -> None:
    """Refuse heads ``[E, L, N, H]`` that hold NaN or infinity.

    Raises:
        UserError: naming the example, layer and head.
    """
    bad = ~np.isfinite(heads).all(-1)
    if bad.any():
        row, layer, head = np.argwhere(bad)[0]
        source = examples[row].source or f"example {examples[row].id or row}"
        raise UserError(
            f"{source}: features are NaN or infinite from layer {layer}, head {head} on (weights or dtype overflow?)"
        )
