"""Options that several commands of ``sav-jax`` have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sav_jax._storage import BucketPath, location

Place = Annotated[
    Path | BucketPath,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: location(words[0]),
        is_instance=lambda value: isinstance(value, Path | BucketPath),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A file or folder on a local disk, or in a bucket: ``gs://bucket/name``."""


def optional(metavar: str, default: str) -> Any:
    """An option that may be left out: what its value looks like, and what happens without it."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Running:
    """How the model is run."""

    batch_size: int = 8
    """Examples per forward pass. Lower it if memory runs out."""

    frames: Annotated[int | None, optional("FRAMES", "16")] = None
    """How many frames of each video are shown, sampled uniformly; a shorter video is shown whole. 'predict' takes as
    many as the classifier was made with, and refuses another number."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, optional("{float32,bfloat16,float16}", "as described")
    ] = None
    """Number format of the model. Unless given, float32 on a CPU and bfloat16 on TPU and GPU; 'predict' takes the
    classifier's. Statistics are float32 in any case."""

    cache: Annotated[str | None, optional("DIR", "$SAV_JAX_CACHE or ~/.cache/sav_jax")] = None
    """Folder (or gs:// path) in which head vectors are kept: no example is run twice, and a killed run resumes.
    Compiled programs are kept in it, too, unless JAX_COMPILATION_CACHE_DIR says where."""

    no_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep no head vectors and no programs."""

    profile: Annotated[Path | None, optional("DIR", "none")] = None
    """Say how long the device was idle, and what for, and write a trace of the first 20 batches into this folder, for
    TensorBoard or Perfetto."""


@dataclass(frozen=True)
class Devices:
    """On what it runs."""

    mesh: Annotated[str | None, optional("AXIS=SIZE,...", "data, or fsdp if weights are large")] = None
    """How all devices, of all processes, are laid out: 'data' shares the batch, 'fsdp' the batch and the storage of the
    weights, 'model' the work of every layer; such as fsdp=4,model=4."""

    distributed: tyro.conf.FlagCreatePairsOff[bool] = False
    """One of several processes that run the same command over the same files. On a Cloud TPU pod, under SLURM and under
    Open MPI they find each other; elsewhere give the three options that follow."""

    coordinator: Annotated[str | None, optional("HOST:PORT", "found out")] = None
    """Where process 0 can be reached by all, a free port of it; implies --distributed."""

    num_processes: Annotated[int | None, optional("N", "found out")] = None
    """How many processes there are."""

    process_id: Annotated[int | None, optional("I", "found out")] = None
    """Which of them this is, from 0."""
