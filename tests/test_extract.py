"""Extraction: order, duplicates, the cache, and a run that is killed."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference, picture

import sav_jax
from sav_jax import extract
from sav_jax.batching import plan_batches, round_rows, round_tokens
from sav_jax.examples import Example
from sav_jax.extract import content_key, extract_heads, plan_prompts
from sav_jax.headstore import HeadStore

SIZES = [(30, 30), (40, 90), (30, 30), (61, 75), (20, 20), (95, 31)]


def make_examples(count: int) -> list[Example]:
    return [Example(f"Question {i % 7}?", (picture(*SIZES[i % len(SIZES)], seed=i),), id=str(i)) for i in range(count)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of all forward passes made."""
    sizes: list[int] = []
    original = extract.heads_step

    def counting(*arguments: Any) -> Any:
        step = original(*arguments)

        def counted(params: Any, batch: Any) -> Any:
            sizes.append(len(batch.lengths))
            return step(params, batch)

        return counted

    monkeypatch.setattr(extract, "heads_step", counting)
    return sizes


def test_rows_come_back_in_order_and_equal_prompts_run_once(lmm: sav_jax.LMM, calls: list[int]) -> None:
    examples = make_examples(6)
    shuffled = [examples[i] for i in (3, 0, 3, 5, 1, 2, 0, 4)]
    heads = extract_heads(lmm, shuffled, batch_size=2, progress=False)
    assert heads.shape == (8, *lmm.heads_shape)
    assert heads.dtype == np.float32
    assert sum(calls) <= 2 * 6, "six distinct prompts, padded to whole batches at worst"
    np.testing.assert_array_equal(heads[0], heads[2])
    np.testing.assert_array_equal(heads[1], heads[6])
    alone = extract_heads(lmm, [examples[4]], batch_size=1, progress=False)
    np.testing.assert_allclose(heads[7], alone[0], rtol=0, atol=1e-5)


def test_cache_is_keyed_by_prompt_image_depth_and_dtype(
    reference: Reference, lmm: sav_jax.LMM, tmp_path: Path, calls: list[int]
) -> None:
    example = make_examples(1)[0]
    first = extract_heads(lmm, [example], cache=tmp_path, progress=False)
    assert len(calls) == 1
    np.testing.assert_array_equal(extract_heads(lmm, [example], cache=str(tmp_path), progress=False), first)
    same_picture = dataclasses.replace(example, images=(example.load_images()[0].copy(),), id="other", label="x")
    extract_heads(lmm, [same_picture], cache=tmp_path, progress=False)
    assert len(calls) == 1, "the same content under another id"
    others = [
        dataclasses.replace(example, question="Another question?"),
        dataclasses.replace(example, images=(picture(30, 30, seed=99),)),
        dataclasses.replace(example, images=()),
    ]
    for count, other in enumerate(others, 2):
        assert not np.array_equal(extract_heads(lmm, [other], cache=tmp_path, progress=False), first)
        assert len(calls) == count
    shallow = sav_jax.load(reference.directory, num_layers=2)
    assert extract_heads(shallow, [example], cache=tmp_path, progress=False).shape == (1, 2, 10, 4)
    half = sav_jax.load(reference.directory, dtype="bfloat16")
    assert not np.array_equal(extract_heads(half, [example], cache=tmp_path, progress=False), first)
    random = lmm.reinitialized(0)
    assert not np.array_equal(extract_heads(random, [example], cache=tmp_path, progress=False), first)
    assert len(calls) == 7


def test_images_of_a_file_are_keyed_by_content_not_by_name(lmm: sav_jax.LMM, tmp_path: Path, calls: list[int]) -> None:
    for name in ("a.png", "b.png"):
        picture(30, 30).save(tmp_path / name)
    examples = [Example("What?", (tmp_path / name,)) for name in ("a.png", "b.png")]
    extract_heads(lmm, examples, cache=tmp_path / "cache", progress=False)
    assert len(calls) == 1
    picture(30, 30, seed=5).save(tmp_path / "b.png")
    heads = extract_heads(lmm, examples, cache=tmp_path / "cache", progress=False)
    assert len(calls) == 2
    assert not np.array_equal(heads[0], heads[1])


def test_not_finite_features_name_the_row(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    params = dict(lmm.params)
    params["image_newline"] = jnp.full_like(params["image_newline"], jnp.nan)
    broken = dataclasses.replace(lmm, params=params, fingerprint="broken")
    examples = [Example("Text.", source="rows.jsonl:1"), Example("What?", (picture(30, 30),), source="rows.jsonl:2")]
    with pytest.raises(sav_jax.UserError, match=r"rows\.jsonl:2: features are NaN"):
        extract_heads(broken, examples, batch_size=1, cache=tmp_path, progress=False)


def test_corrupt_image_names_the_row(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    picture(60, 60).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    example = Example("What?", (tmp_path / "cut.png",), source="rows.jsonl:7")
    with pytest.raises(sav_jax.UserError, match=r"rows\.jsonl:7.*cut\.png"):
        extract_heads(lmm, [example], progress=False)


def test_what_came_before_a_corrupt_image_is_kept(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    """Its header is whole, so that it shows only when its batch is prepared."""
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        picture(60, 60, seed=i).save(file)
    whole = files[3].read_bytes()
    files[3].write_bytes(whole[: len(whole) // 2])
    examples = [Example("What?", (file,), source=f"rows.jsonl:{i}") for i, file in enumerate(files)]
    store = HeadStore.open(tmp_path / "heads")
    with pytest.raises(sav_jax.UserError, match=r"rows\.jsonl:3.*3\.png"):
        extract_heads(lmm, examples, batch_size=1, cache=store, progress=False)
    keys = [content_key(lmm, *of) for of in zip(plan_prompts(lmm, examples), examples, strict=True)]
    assert store.missing(keys) == [3, 4]
    files[3].write_bytes(whole)
    heads = extract_heads(lmm, examples, batch_size=1, cache=store, progress=False)
    np.testing.assert_array_equal(heads, extract_heads(lmm, examples, batch_size=1, progress=False))


def test_no_examples(lmm: sav_jax.LMM) -> None:
    assert extract_heads(lmm, [], progress=False).shape == (0, *lmm.heads_shape)


def test_buckets_are_few_and_wide_enough() -> None:
    for length in range(1, 9000):
        assert length <= round_tokens(length) <= max(32, length * 1.15 + 32)
    assert len({round_tokens(length) for length in range(1, 8193)}) < 60
    for rows in range(5000):
        assert rows <= round_rows(rows) <= max(rows + 3, rows * 1.15)


def test_batches_cover_every_row_once(lmm: sav_jax.LMM) -> None:
    prompts = plan_prompts(lmm, make_examples(23))
    for batch_size, multiple in ((4, 1), (3, 2), (8, 4)):
        plans = plan_batches(prompts, batch_size, multiple)
        assert sorted(row for plan in plans for row in plan.rows) == list(range(23))
        assert all(plan.size % multiple == 0 and len(plan.rows) <= plan.size for plan in plans)
        for plan in plans:
            for prompt in (prompts[row] for row in plan.rows):
                assert len(prompt.token_ids) <= plan.bucket.tokens <= 2 * round_tokens(len(prompt.token_ids))
                assert prompt.num_rows <= plan.bucket.rows <= 2 * round_rows(prompt.num_rows)


def test_a_few_examples_of_many_sizes_compile_few_programs(lmm: sav_jax.LMM) -> None:
    examples = [Example("Which?", (picture(20 + 7 * i, 90 - 5 * i, seed=i),)) for i in range(12)]
    prompts = plan_prompts(lmm, examples)
    sizes = {(round_tokens(len(prompt.token_ids)), prompt.num_rows) for prompt in prompts}
    shapes = {(plan.bucket, plan.size) for plan in plan_batches(prompts, 8)}
    assert len(shapes) <= len(sizes) / 2


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import sav_jax
from test_extract import make_examples
lmm = sav_jax.load(sys.argv[2])
sav_jax.extract_heads(lmm, make_examples(60), batch_size=2, cache=sys.argv[3])
"""


def stored(cache: Path) -> dict[str, bytes]:
    """Values by name: what is being written has another one, and may be gone when it is looked at."""
    return {path.name: path.read_bytes() for path in sorted(cache.rglob("*")) if path.name.isalnum() and path.is_file()}


def test_killed_run_resumes_with_identical_bytes(
    reference: Reference, lmm: sav_jax.LMM, tmp_path: Path, calls: list[int]
) -> None:
    """kill -9 in the middle; the rerun computes only batches that were not stored, and every byte is the same."""
    examples = make_examples(60)
    whole = extract_heads(lmm, examples, batch_size=2, cache=tmp_path / "whole", progress=False)
    batches = len(calls)
    calls.clear()

    here = str(Path(__file__).parent)
    cache = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, here, str(reference.directory), str(cache)], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and (not cache.exists() or len(stored(cache)) < 10):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    survived = stored(cache)
    assert 10 <= len(survived) < 60, "it must have been killed in the middle"

    resumed = extract_heads(lmm, examples, batch_size=2, cache=cache, progress=False)
    np.testing.assert_array_equal(resumed, whole)
    assert stored(cache) == stored(tmp_path / "whole")
    # Rows survive in whole batches but for the one being written.
    assert len(calls) <= batches - len(survived) // 2 + 1


def test_features_do_not_depend_on_the_default_device_count(lmm: sav_jax.LMM) -> None:
    """On a mesh of all devices, with a batch no multiple of it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    examples = make_examples(5)
    plain = extract_heads(lmm, examples, batch_size=3, progress=False)
    sharded = extract_heads(dataclasses.replace(lmm, mesh=mesh), examples, batch_size=3, progress=False)
    np.testing.assert_allclose(sharded, plain, rtol=0, atol=1e-5)


def test_a_prompt_longer_than_the_model_reads_names_the_row(lmm: sav_jax.LMM) -> None:
    assert lmm.max_tokens == 4096
    example = Example("long " * 1000, source="rows.jsonl:3")
    with pytest.raises(sav_jax.UserError, match=r"rows\.jsonl:3: the prompt has \d+ tokens, .* reads at most 4096"):
        extract_heads(lmm, [example], progress=False)


def test_a_path_may_be_a_string(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    picture(30, 30).save(tmp_path / "a.png")
    heads = [extract_heads(lmm, [Example("q", (path,))], progress=False) for path in (tmp_path / "a.png",)]
    named: Any = str(tmp_path / "a.png")
    np.testing.assert_array_equal(extract_heads(lmm, [Example("q", (named,))], progress=False), heads[0])
    with pytest.raises(sav_jax.UserError, match=r"nope\.png"):
        Example("q", (str(tmp_path / "nope.png"),)).load_images()  # type: ignore[arg-type]
