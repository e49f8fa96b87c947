"""A stricter process than a user's: what JAX would quietly convert, broadcast or warn about is an error here.

The settings are environment variables, set before JAX is first imported, so that command lines which a test starts are
as strict.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could configure it (a pytest plugin?)")

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",  # sharding is exercised without an accelerator
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    JAX_NUMPY_RANK_PROMOTION="raise",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="agg",
)
# Nearly every program of a test runs once: it is compiled in a quicker way (measured: about half of the CPU time). No
# optimisation at all, as scripts/test.sh asks for, is quicker still, but rounds more than the tests that are marked
# "rounding" allow. XLA_FLAGS="" tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Two workers on two cores: PyTorch's second threads would only wait for each other (measured: a fifth of all CPU time).
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one test has compiled serves the others: those of other workers and the commands that tests start, too, which
    # find the folder in their environment. It lives as long as the run: every run compiles what it tests.
    compiled = tempfile.mkdtemp(prefix="sav_jax_compiled_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ.update(
        JAX_COMPILATION_CACHE_DIR=compiled,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",  # less is not worth a file
    )

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from buckets import Buckets
    from checkpoints import Reference

    import sav_jax

# The same examples on every run, and no deadline: the first example of a property pays for compiling.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=25, print_blob=True)
settings.load_profile("suite")


_MAPS = Path("/proc/self/maps")  # of Linux
_MANY = 30_000


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Programs that this process has compiled are let go when they are many.

    Each is some pieces of mapped memory (a training step on eight devices: thousands), of which Linux allows a process
    65,530; one more, and the compiler crashes.
    """
    start = time.perf_counter()
    yield
    if time.perf_counter() - start > 1 and _MAPS.exists():  # counting takes some milliseconds, compiling far more
        with _MAPS.open() as lines:
            many = sum(1 for _ in lines) > _MANY
        if many:
            import jax

            jax.clear_caches()


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """Build a tiny random checkpoint of a family (default: LLaVA-OneVision) with options of its own."""
    from families import FAMILIES

    def make(family: str = "llava_onevision", **options: Any) -> Reference:
        return FAMILIES[family](tmp_path_factory.mktemp(family), **options)

    return make


@pytest.fixture(scope="session")
def reference(make_reference: Callable[..., Reference]) -> Reference:
    """The checkpoint most tests share."""
    return make_reference()


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[Buckets]:
    """A Google Cloud Storage that lives as long as the tests of this process."""
    from buckets import TOKEN, served

    with served() as (buckets, address):
        # TensorStore reads them once, when a bucket is first opened: in no test without this fixture.
        os.environ.update(TENSORSTORE_GCS_HTTP_URL=address, GOOGLE_AUTH_TOKEN_FOR_TESTING=TOKEN)
        yield buckets


@pytest.fixture
def buckets(bucket_server: Buckets) -> Iterator[Buckets]:
    """A Google Cloud Storage with an empty bucket, "bucket", and "locked", in which nothing may be stored."""
    bucket_server.objects.update(bucket={}, locked={})
    bucket_server.read_only = {"locked"}
    yield bucket_server
    bucket_server.writes.clear()


@pytest.fixture
def model(reference: Reference) -> str:
    """Its folder, for command lines."""
    return str(reference.directory)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs from a folder outside the repository, with a feature cache of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("SAV_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of every batch that is read (``sav_jax.reading``)."""
    from sav_jax import extract, reading

    rows: list[int] = []
    original = extract.run_batches

    def spy(lmm: Any, step: Any, plans: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        run = options.get("run")
        chosen = plans if run is None else [plans[number] for number in run]
        rows.extend(sum(max(1, len(prompts[row].reads)) for row in plan.rows) for plan in chosen)
        return original(lmm, step, plans, prompts, *rest, **options)

    for module in (extract, reading):
        monkeypatch.setattr(module, "run_batches", spy)
    return rows


@pytest.fixture(scope="session")
def lmm(reference: Reference) -> sav_jax.LMM:
    """The same checkpoint, loaded by this library in float32."""
    import sav_jax

    return sav_jax.load(reference.directory)
