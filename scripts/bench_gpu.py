#!/usr/bin/env python
"""7B-shaped models of random weights on one GPU: this library against transformers (PyTorch), same values, same run.

    python scripts/bench_gpu.py --output gpu.json             # every section, about six minutes on an H100
    python scripts/bench_gpu.py --sections onevision parity   # these only, in this order
    python scripts/bench_gpu.py --small                       # tiny sizes, on a CPU, too: does the script itself work?

Sections, each in a process of its own that is stopped after its time:

- ``smoke``: cuDNN's attention against the reference in float32, at the shapes of the models, and its speed;
- ``onevision``, ``qwen2vl``: prefill in bfloat16. LLaVA-OneVision 7B (Qwen2 7B, SigLIP so400m at 384 pixels; a prompt
  is an image in five tiles and a question, about 3,800 tokens) and Qwen2-VL 7B (about 1,600 tokens). Both sides hold
  the same weights and read the same batch, already on the device, in turns. Theirs: PyTorch's fused attention
  ("sdpa"), no cache, logits at the last position, heads by forward pre-hooks on ``o_proj``. Then ours alone: attention
  with the whole score matrix, half the layers, and ``extract_heads`` from pictures in memory;
- ``parity``: heads of both families at four layers and full width through ``sav_jax.load``, against transformers in
  float32;
- ``scoring``: 784 heads x 128 for 200 examples and 10 classes, against the released loop over heads in PyTorch.

Tokens are counted without padding. FLOPs are the model's: 2 x parameters x tokens and half of a causal score matrix,
whatever a side really computes. "Share" is of the card's rate at a product of two 8192 x 8192 matrices in bfloat16,
measured in the same process by whichever framework is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The three files beside this one.
# mypy: disable-error-code="import-not-found"
from _gpu_checks import parity, smoke
from _gpu_models import (
    Prompts,
    make_examples,
    model_flops,
    prepare,
    shared_lmm,
    torch_heads,
    torch_model,
    write_skeleton,
)
from _gpu_run import (
    FAILURES,
    GIB,
    Run,
    alternate,
    attempt,
    blocking,
    compiled_step,
    needs,
    ratio,
    relative,
    spread,
    synchronized,
)

SECONDS = {"smoke": 75, "onevision": 200, "parity": 180, "qwen2vl": 120, "scoring": 60}
"""Section -> when it is stopped; in the order they run."""


# Sections


def matrix_rate(run: Run) -> float:
    """FLOP/s of a product of two square bfloat16 matrices: the better of the two frameworks."""
    import jax
    import jax.numpy as jnp
    import torch

    side, times = (256, 5) if run.small else (8192, 20)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)
    product = jax.jit(lambda a, b: a @ b)
    x, y = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))

    def ours() -> None:
        results = [product(a, b) for _ in range(times)]
        jax.block_until_ready(results[-1])

    def theirs() -> None:
        for _ in range(times):
            torch.matmul(x, y)

    measured = alternate({"jax": ours, "torch": synchronized(run.device, theirs)}, 5)
    rates = {name: times * 2.0 * side**3 / statistics.median(values) for name, values in measured.items()}
    run.report("rate", f"{side}^3 bfloat16", **{f"{name}_tflops": rate / 1e12 for name, rate in rates.items()})
    return max(rates.values())


def prefill(run: Run, section: str) -> None:
    """Ours against theirs; then ours alone: with the whole score matrix, at half depth, from images to heads."""
    import jax
    import torch

    rate = matrix_rate(run)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model = torch_model(write_skeleton(directory, section, run.small), run.device)
        lmm = shared_lmm(directory, model)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(lmm.params)) / GIB
    run.report(section, "model", layers=lmm.num_layers, weights_gib=weights)
    done: list[tuple[Any, Prompts]] = []
    for size in run.batch_sizes:
        with attempt():
            done.append(one_batch(run, section, lmm, model, size, rate))
    del model
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()
    if section == "onevision" and done:
        with attempt():
            score_matrix(run, section, lmm, *done[0])
        with attempt():
            half_depth(run, section, lmm, *done[0])
    with attempt():
        end_to_end(run, section, lmm)


def one_batch(run: Run, section: str, lmm: Any, model: Any, size: int, rate: float) -> tuple[Any, Prompts]:
    """Both sides in turns; returns our program and what it was given."""
    import torch

    prompts = prepare(lmm, make_examples(section, run.small, size), run.device)
    flops = model_flops(lmm, prompts.tokens, prompts.rows, size)
    compiled, compile_seconds = compiled_step(lmm, prompts.batch)
    run.report(section, f"batch {size}: ours, compiled", seconds=compile_seconds, besides_weights_gib=needs(compiled))
    theirs = synchronized(run.device, lambda: torch_heads(model, prompts.inputs))
    before = 0
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    their_heads = theirs().float().cpu().numpy()
    peak = torch.cuda.max_memory_allocated() - before if run.device == "cuda" else 0
    run.report(section, f"batch {size}: theirs, once", besides_weights_gib=peak / GIB)
    our_heads = np.asarray(compiled(lmm.params, prompts.batch)).reshape(their_heads.shape)
    times = alternate({"ours": blocking(compiled, lmm.params, prompts.batch), "theirs": theirs}, run.repeats)
    for name, values in times.items():
        seconds = statistics.median(values)
        run.report(
            section,
            f"batch {size}: {name}",
            tokens=prompts.tokens,
            padded=int(np.prod(prompts.batch.token_ids.shape)),
            tokens_per_s=prompts.tokens / seconds,
            tflops=flops / seconds / 1e12,
            share=flops / seconds / rate,
            **spread(values),
        )
    run.report(
        section,
        f"batch {size}: theirs / ours",
        **ratio(times["theirs"], times["ours"]),
        relative_difference_of_heads=relative(our_heads, their_heads),
    )
    return compiled, prompts


def score_matrix(run: Run, section: str, lmm: Any, default: Any, prompts: Prompts) -> None:
    """The platform's attention against the plain one."""
    other, seconds = compiled_step(lmm, prompts.batch, "xla")
    programs = {"xla": other, "default": default}
    times = alternate(
        {name: blocking(program, lmm.params, prompts.batch) for name, program in programs.items()}, run.repeats, 5.0
    )
    heads = [np.asarray(program(lmm.params, prompts.batch)) for program in programs.values()]
    run.report(
        section,
        f"batch {run.batch_sizes[0]}: attention xla / default",
        **ratio(times["xla"], times["default"]),
        compile_s=seconds,
        besides_weights_gib=needs(other),
        default_besides_weights_gib=needs(default),
        relative_difference_of_heads=relative(*heads),
    )


def half_depth(run: Run, section: str, lmm: Any, full: Any, prompts: Prompts) -> None:
    """Half the layers, as a query takes whose selected heads lie there."""
    import jax

    from sav_jax.models.registry import architecture

    depth = lmm.num_layers // 2
    text = dict(lmm.params["language_model"])
    text["layers"] = jax.tree.map(lambda x: x[:depth], text["layers"])
    params = {**lmm.params, "language_model": text}
    half = dataclasses.replace(lmm, architecture=architecture(lmm.hf_config, depth), params=params)
    program, seconds = compiled_step(half, prompts.batch)
    sides = {
        "full": blocking(full, lmm.params, prompts.batch),
        "half": blocking(program, half.params, prompts.batch),
    }
    times = alternate(sides, run.repeats, 5.0)
    run.report(
        section,
        f"batch {run.batch_sizes[0]}: {lmm.num_layers} / {depth} layers",
        **ratio(times["full"], times["half"]),
        compile_s=seconds,
        **spread(times["half"]),
    )


def end_to_end(run: Run, section: str, lmm: Any) -> None:
    """``extract_heads`` from pictures in memory: the host resizes them and cuts them up meanwhile."""
    import sav_jax

    size = run.batch_sizes[-1]
    examples = make_examples(section, run.small, 4 * size, seed=1)
    sav_jax.extract_heads(lmm, examples[:size], size, progress=False)  # compiles
    start = time.perf_counter()
    sav_jax.extract_heads(lmm, examples, size, progress=False)
    passed = time.perf_counter() - start
    run.report(section, "extract_heads", examples=len(examples), examples_per_s=len(examples) / passed)


def scoring(run: Run) -> None:
    """Scores of all heads on the support set: ours, and the released loop over examples and heads on the device."""
    import torch

    import sav_jax

    examples, classes, layers, heads, width = (20, 4, 2, 3, 8) if run.small else (200, 10, 28, 28, 128)
    rng = np.random.default_rng(0)
    labels = np.arange(examples) % classes
    centres = rng.standard_normal((classes, layers, heads, width), np.float32)
    values = centres[labels] * 0.3 + rng.standard_normal((examples, layers, heads, width), np.float32)
    names = [f"{label:02d}" for label in labels]

    def ours() -> np.ndarray:
        return sav_jax.SparseAttentionVectors.fit(values, names, num_heads=min(20, layers * heads)).scores

    flat = torch.tensor(values.reshape(examples, layers * heads, width), device=run.device)
    wanted = torch.tensor(labels, device=run.device)

    def theirs() -> list[int]:
        """As released: for each example and head, cosines to the class means, the nearest, one more if it is right."""
        means = torch.stack([flat[wanted == label].mean(dim=0) for label in range(classes)])
        right = [0] * (layers * heads)
        for example in range(examples):
            for head in range(layers * heads):
                cosines = torch.nn.functional.cosine_similarity(means[:, head], flat[example, head], dim=-1)
                right[head] += int(cosines.argmax(dim=0).item() == labels[example])
        return right

    start = time.perf_counter()
    scores = theirs()
    loop = time.perf_counter() - start
    same = int((np.array(scores) == ours().reshape(-1)).sum())
    times = alternate({"ours": ours}, 10)["ours"]
    run.report(
        "scoring",
        f"{layers * heads} heads x {width}, {examples} examples, {classes} classes",
        loop_s=loop,
        ratio=loop / statistics.median(times),
        heads_with_equal_score=f"{same}/{layers * heads}",
        **spread(times),
    )


# The command line


def run_section(name: str, run: Run) -> bool:
    """Runs a section in this process; says whether it went through."""
    sections = {"smoke": smoke, "parity": parity, "scoring": scoring}
    failed_before = len(FAILURES)
    with attempt():
        if run.device == "cpu" and not run.small and name != "scoring":
            raise RuntimeError("JAX sees no GPU; --small runs on a CPU")
        sections[name](run) if name in sections else prefill(run, name)
    return len(FAILURES) == failed_before


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the sections; returns 1 if one failed or ran out of time."""
    options = parse(arguments)
    if options.xla_flags:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {options.xla_flags}".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room, too
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    run = Run(
        options.small,
        options.repeats or (3 if options.small else 15),
        tuple(options.batch_sizes or ((1, 2) if options.small else (1, 8))),
    )
    if options.one or options.small:
        run.output = options.output
        return int(sum(not run_section(name, run) for name in options.sections) > 0)
    rows: list[dict[str, Any]] = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        # What one section has compiled, the others need not.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        begin = time.perf_counter()
        for name in options.sections:
            part = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, "--one", "--sections", name, "--output", str(part)]
            command += ["--batch-sizes", *map(str, run.batch_sizes), "--repeats", str(run.repeats)]
            left = options.total_seconds - (time.perf_counter() - begin)
            start = time.perf_counter()
            try:
                code: int | str = subprocess.run(command, timeout=min(SECONDS[name], left), check=False).returncode
            except subprocess.TimeoutExpired:
                code = "out of time"
            passed = time.perf_counter() - start
            print(f"[{name}] {'done' if code == 0 else f'FAILED ({code})'} in {passed:.0f} s", flush=True)
            failed += [name] * (code != 0)
            rows += json.loads(part.read_text()) if part.exists() else []
            if options.output is not None:
                options.output.write_text(json.dumps(rows, indent=1))
    return int(bool(failed))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECONDS, default=list(SECONDS), help="which, in this order")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="prompts per forward pass (1 8)")
    parser.add_argument("--repeats", type=int, help="how often each side is timed (15; fewer of what takes long)")
    parser.add_argument(
        "--total-seconds", type=float, default=600.0, help="of all sections; those not reached count as failed"
    )
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    parser.add_argument(
        "--xla-flags", help="added to XLA_FLAGS, such as --xla-flags=--xla_gpu_enable_triton_gemm=false"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, all in this process")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
