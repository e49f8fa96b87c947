"""PEFT's adapter folders (``adapter_config.json``, ``adapter_model.safetensors``) <-> low-rank matrices.

Modules are named as transformers names them in memory, so that a folder written here is loaded by ``PeftModel`` beside
the same base checkpoint, and the other way round; older names are read too. An adapter may leave out layers and give
single modules other ranks and scales: what is absent is zero, ranks are filled up with zeros, and the ratio of scales
goes into b.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from sav_jax._files import write_folder
from sav_jax.errors import UserError
from sav_jax.models import lora
from sav_jax.models.lora import Target
from sav_jax.models.registry import Architecture
from sav_jax.models.weights import Entry, file_headers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What would change the numbers, and the only value that does not.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
}


def save(
    directory: str | Path,
    architecture: Architecture,
    targets: Sequence[Target],
    weights: lora.Weights,
    base_model: str = "",
) -> None:
    """Write an adapter folder.

    Args:
        directory: made if missing.
        architecture: of the base model.
        targets: what the weights were made for.
        weights: see :mod:`sav_jax.models.lora`.
        base_model: what ``base_model_name_or_path`` is to say.

    Raises:
        UserError: the weights do not fit the model, or the targets mix kinds of scaling.
    """
    from safetensors.numpy import save as serialized

    lora.check(architecture.module, targets, weights)
    if len({target.rank_stabilised for target in targets}) > 1:
        raise UserError("PEFT's format has one scaling for all modules; rank_stabilised differs between targets")
    entries = _kernels(architecture)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, Target] = {}
    for path, target in lora.assigned(architecture.module, targets).items():
        entry = _two_sided(entries, path)
        a, b = (np.asarray(weights[f"{path}/{name}"], np.float32) for name in "ab")
        into_a, into_b = _patterns(entry)
        for layer, key in enumerate(entry.stored_keys()):
            module = architecture.table.module_name(key).removesuffix(".weight")
            modules[module] = target
            part = (a, b) if entry.layers is None else (a[layer], b[layer])
            sides = rearrange(part[0], _backwards(into_a)), rearrange(part[1], _backwards(into_b))
            for name, value in zip("AB", sides, strict=True):
                tensors[f"{_PREFIX}{module}.lora_{name}.weight"] = np.ascontiguousarray(value)
    first = next(iter(modules.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilised,
        "bias": "none",
        "target_modules": sorted(modules),
        "rank_pattern": {_exactly(m): t.rank for m, t in modules.items() if t.rank != first.rank},
        "alpha_pattern": {_exactly(m): t.alpha for m, t in modules.items() if t.alpha != first.alpha},
    }
    stored = serialized(tensors, metadata={"format": "pt"})
    write_folder(directory, {WEIGHTS_FILE: stored, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()})


def load(directory: str | Path, architecture: Architecture) -> tuple[tuple[Target, ...], dict[str, np.ndarray]]:
    """Read an adapter folder.

    Args:
        directory: see :func:`save`.
        architecture: of the base model.

    Returns:
        Targets (one for each rank and scale), and float32 weights.

    Raises:
        UserError: unreadable files, a kind of adapter that is not supported, or keys that fit no module; names them.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    pairs, problems = _read_pairs(directory / WEIGHTS_FILE)
    entries = {key: entry for entry in _kernels(architecture).values() for key in entry.stored_keys()}
    idle = {
        key for entry in architecture.table.entries for key in entry.stored_keys() if "unread_layers" in entry.target
    }
    places: dict[str, dict[int, tuple[np.ndarray, np.ndarray, float]]] = {}
    for module, (a, b) in pairs.items():
        key = architecture.table.canonical(f"{module}.weight")
        entry = entries.get(key)
        if entry is None:
            # Layers that no forward pass of ours runs change nothing.
            ignored = key in idle or any(re.fullmatch(pattern, key) for pattern in architecture.table.ignored)
            problems += [] if ignored else [f"{module} is no module of the model"]
            continue
        rank, alpha = (_setting(config, name, module) for name in ("r", "lora_alpha"))
        if a.shape[0] != rank or b.shape[1] != rank:
            problems.append(f"{module} has rank {a.shape[0]}, not {rank:g}")
            continue
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layer = entry.stored_keys().index(key)
        places.setdefault(entry.target.removesuffix("/kernel"), {})[layer] = a, b, scale
    if problems:
        raise UserError(f"{directory / WEIGHTS_FILE}: {'; '.join(problems)}")
    if not places:
        raise UserError(f"{directory / WEIGHTS_FILE}: holds no LoRA matrices")
    weights: dict[str, np.ndarray] = {}
    kinds: dict[tuple[int, float], list[str]] = {}
    kernels = lora.projections(architecture.module)
    by_path = {entry.target.removesuffix("/kernel"): entry for entry in entries.values()}
    for path, layers in places.items():
        rank = max(a.shape[0] for a, _, _ in layers.values())
        scale = max(scale for _, _, scale in layers.values())
        shapes = kernels[path].shapes(rank)
        a_all, b_all = np.zeros(shapes["a"], np.float32), np.zeros(shapes["b"], np.float32)
        into_a, into_b = _patterns(by_path[path])
        sizes = by_path[path].sizes
        for layer, (a, b, own) in layers.items():
            at: Any = () if kernels[path].layers is None else layer
            wide_a = np.pad(a, ((0, rank - a.shape[0]), (0, 0)))
            wide_b = np.pad(b, ((0, 0), (0, rank - b.shape[1]))) * np.float32(own / scale)
            try:
                a_all[at] = rearrange(wide_a, into_a, **_used(into_a, sizes))
                b_all[at] = rearrange(wide_b, into_b, **_used(into_b, sizes))
            except Exception:  # einops raises its own type, NumPy another
                raise UserError(f"{directory / WEIGHTS_FILE}: {path} has matrices of another shape") from None
        weights[f"{path}/a"], weights[f"{path}/b"] = a_all, b_all
        kinds.setdefault((rank, scale), []).append(path)
    dropout = float(config.get("lora_dropout") or 0.0)
    targets = tuple(
        Target("|".join(map(re.escape, paths)), rank, scale * rank, dropout) for (rank, scale), paths in kinds.items()
    )
    return targets, weights


def files_of(directory: str | Path) -> list[Path]:
    """Where its settings and its matrices are."""
    return [Path(directory) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]


def digest(directory: str | Path) -> str:
    """sha256 over both files, in hexadecimal."""
    whole = (hashlib.sha256(file.read_bytes()).digest() for file in files_of(directory))
    return hashlib.sha256(b"".join(whole)).hexdigest()


def _kernels(architecture: Architecture) -> dict[str, Entry]:
    """The table's entries of projections that take part in a forward pass, by path."""
    paths = lora.projections(architecture.module)
    return {
        path: entry
        for entry in architecture.table.entries
        if not entry.copy and (path := entry.target.removesuffix("/kernel")) in paths
    }


def _two_sided(entries: Mapping[str, Entry], path: str) -> Entry:
    entry = entries.get(path)
    if entry is None or len(_sides(entry)) != 2 or not entry.source.endswith(".weight"):
        raise UserError(f"PEFT's format cannot hold updates of {path}: it is not a linear layer in the checkpoint")
    return entry


def _sides(entry: Entry) -> list[str]:
    return re.findall(r"\(.*?\)|\S+", entry.pattern.split("->")[0])


def _patterns(entry: Entry) -> tuple[str, str]:
    """Einops patterns from lora_A ``[r, in]`` and lora_B ``[out, r]`` to a and b of one layer."""
    outputs, inputs = _sides(entry)
    kernel = entry.pattern.split("->")[1].replace("(", " ").replace(")", " ").split()
    ours = " ".join(axis for axis in kernel if axis in outputs.strip("()").split())
    return f"rank {inputs} -> {inputs.strip('()')} rank", f"{outputs} rank -> rank {ours}"


def _backwards(pattern: str) -> str:
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def _used(pattern: str, sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name in pattern.replace("(", " ").replace(")", " ").split()}


def _exactly(module: str) -> str:
    return "^" + re.escape(module)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no {CONFIG_FILE} in it; an adapter is a folder in PEFT's format") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{file}: not the configuration of a LoRA adapter")
    for name, harmless in _UNSUPPORTED.items():
        if config.get(name) not in harmless:
            raise UserError(f"{file}: {name} {config[name]!r} is not supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or config[name] <= 0:
            raise UserError(f"{file}: {name} is {config.get(name)!r}, not a positive number")
    return config


def _read_pairs(file: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """(A, B) of each module, float32, and what is wrong with the keys."""
    if not file.exists():
        raise UserError(f"{file.parent}: no {WEIGHTS_FILE} in it (pickled adapters are not read)")
    sides: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for tensor in file_headers(file):
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight", tensor.key)
        if found is None or len(tensor.shape) != 2:
            problems.append(f"{tensor.key} is not a LoRA matrix")
            continue
        sides.setdefault(found[1], {})[found[2]] = np.asarray(tensor.read()).astype(np.float32)
    for module, found_sides in sides.items():
        problems += [f"{module} has no lora_{side}" for side in "AB" if side not in found_sides]
    return {module: (s["A"], s["B"]) for module, s in sides.items() if len(s) == 2}, problems


def _setting(config: Mapping[str, Any], name: str, module: str) -> float:
    """``r`` or ``lora_alpha`` of a module, by the patterns PEFT has for exceptions."""
    patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[name]) or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[name])
