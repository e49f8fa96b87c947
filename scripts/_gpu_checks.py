"""Sections of ``bench_gpu.py`` that compare numbers: attention at the models' shapes, heads in float32."""

# mypy: disable-error-code="import-not-found"
from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _gpu_models import make_examples, prepare, torch_heads, torch_model, write_skeleton
from _gpu_run import GIB, Run, alternate, attempt, blocking, compiled_step, relative


def parity(run: Run) -> None:
    """Heads of both families at four layers, through a checkpoint on disk, against transformers in float32."""
    for family in ("qwen2vl", "onevision"):
        with attempt():
            family_parity(run, family)
        gc.collect()


def family_parity(run: Run, family: str) -> None:
    import jax
    import jax.numpy as jnp
    import torch

    import sav_jax

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as folder:
        directory = Path(folder)
        model = torch_model(write_skeleton(directory, family, run.small, layers=2 if run.small else 4), run.device)
        model.save_pretrained(directory)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / GIB
        start = time.perf_counter()
        lmm = sav_jax.load(directory, dtype="float32")
        jax.block_until_ready(lmm.params)
        passed = time.perf_counter() - start
        run.report("parity", f"{family}: loaded", gib=size, seconds=passed, gib_per_s=size / passed)
    examples = make_examples(family, run.small, 2, seed=2)
    prompts = prepare(lmm, examples, run.device)
    rows, layers = len(examples), lmm.num_layers
    theirs_half = torch_heads(model, prompts.inputs).float().cpu().numpy()
    model.float()
    exact = {**prompts.inputs, "pixel_values": prepare(lmm, examples, run.device, torch.float32).inputs["pixel_values"]}
    reference = torch_heads(model, exact).float().cpu().numpy()
    largest = float(np.abs(reference).max())

    def compare(what: str, heads: Any) -> None:
        heads = np.asarray(heads).reshape(rows, layers, -1)
        difference = float(np.abs(heads - reference).max())
        run.report(
            "parity",
            f"{family}: {what}",
            largest_difference=difference,
            of_largest_head=difference / largest,
            relative=relative(heads, reference),
        )

    with lmm.running():
        compare("ours, float32", compiled_step(lmm, prompts.batch)[0](lmm.params, prompts.batch))
    half = dataclasses.replace(
        lmm, dtype=jnp.dtype("bfloat16"), params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), lmm.params)
    )
    compare("ours, bfloat16", compiled_step(half, prompts.batch)[0](half.params, prompts.batch))
    compare("theirs, bfloat16", theirs_half)
    compare("ours, float32 at JAX's default precision", compiled_step(lmm, prompts.batch)[0](lmm.params, prompts.batch))


def smoke(run: Run) -> None:
    """Versions; the attention that the platform gets by default, where it runs, against the reference in float32."""
    import jax
    import jax.numpy as jnp

    from sav_jax.models.attention import attention, segment_attention

    run.report("smoke", "versions", device=str(jax.devices()[0].device_kind), **versions())

    def qkv(batch: int, length: int, heads: int, kv: int, width: int) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(length), 3)
        shapes = [(batch, length, n, width) for n in (heads, kv, kv)]
        return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

    def exactly(function: Callable[..., jax.Array], *arrays: Any) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(function)(*(x.astype(jnp.float32) if x.ndim == 4 else x for x in arrays)))

    # (what, rows, tokens, heads, key/value heads, width, causal)
    shapes = [
        ("decoder", 2, 3840, 28, 4, 128, True),
        ("decoder, odd", 2, 1001, 28, 4, 128, True),
        ("SigLIP", 10, 729, 16, 16, 72, False),
        ("CLIP", 4, 577, 16, 16, 64, False),
    ]
    if run.small:
        shapes = [(what, 1, min(length, 65), 4, 2, 16, causal) for what, _, length, _, _, _, causal in shapes]
    for what, batch, length, heads, kv, width, causal in shapes:
        with attempt():
            arrays = qkv(batch, length, heads, kv, width)
            lengths = np.linspace(length, length // 2, batch).astype(np.int32) if causal else None
            real = np.arange(length)[None] < (np.full(batch, length) if lengths is None else lengths)[:, None]

            def default(q: Any, k: Any, v: Any, causal: bool = causal, lengths: Any = lengths) -> jax.Array:
                return attention(q, k, v, causal=causal, lengths=lengths)

            ours = jax.jit(default)
            y = np.asarray(ours(*arrays).astype(jnp.float32))
            exact = exactly(functools.partial(attention, causal=causal, lengths=lengths, backend="chunked"), *arrays)
            dirty = [jnp.where(real[:, :, None, None], x, jnp.asarray(1e4, x.dtype)) for x in arrays]
            same = bool((np.asarray(ours(*dirty).astype(jnp.float32))[real] == y[real]).all())
            run.report(
                "smoke",
                what,
                fused="__cudnn$fmha" in ours.lower(*arrays).as_text(),
                relative=relative(y[real], exact[real]),
                finite=bool(np.isfinite(y).all()),
                padding_unseen=same,
            )
    with attempt():
        length, width, heads = (64, 16, 2) if run.small else (3072, 80, 16)
        arrays = qkv(2, length, heads, heads, width)
        one = np.ones((2, length), np.int32)
        one[1, length // 2 :] = 0
        several = 1 + np.arange(length, dtype=np.int32)[None].repeat(2, 0) // (length // 3 + 1)
        segmented = jax.jit(segment_attention)
        for what, ids in (("one image", one), ("three images", several)):
            y = np.asarray(segmented(*arrays, ids).astype(jnp.float32))
            exact = exactly(segment_attention, *arrays, ids)
            times = alternate(
                {"it": functools.partial(lambda ids: segmented(*arrays, ids).block_until_ready(), ids)}, 10
            )
            rate = 4.0 * 2 * length**2 * width * heads / statistics.median(times["it"]) / 1e12
            run.report("smoke", f"Qwen's tower, {what}", relative=relative(y[ids > 0], exact[ids > 0]), tflops=rate)
    with attempt():
        arrays = qkv(1, 77 if run.small else 501, 4, 2, 16 if run.small else 128)

        def total(q: Any, k: Any, v: Any) -> jax.Array:
            return jnp.sum(jnp.square(attention(q, k, v, causal=True).astype(jnp.float32)))

        gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        with jax.default_matmul_precision("highest"):
            exacts = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*(x.astype(jnp.float32) for x in arrays))
        errors = [relative(a.astype(jnp.float32), b) for a, b in zip(gradient(*arrays), exacts, strict=True)]
        run.report("smoke", "gradients", q=errors[0], k=errors[1], v=errors[2])
    if not run.small:
        for what, batch, length, heads, kv, width, causal in (
            ("decoder", 8, 3840, 28, 4, 128, True),
            ("SigLIP", 40, 729, 16, 16, 72, False),
        ):
            with attempt():
                arrays = qkv(batch, length, heads, kv, width)
                kernel = jax.jit(functools.partial(attention, causal=causal))
                times = alternate({"it": blocking(kernel, *arrays)}, 10)
                flops = (2.0 if causal else 4.0) * batch * length**2 * heads * width
                seconds = statistics.median(times["it"])
                run.report("smoke", f"{what}: speed", ms=1e3 * seconds, tflops=flops / seconds / 1e12)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "flax", "torch", "transformers")}
