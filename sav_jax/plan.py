"""Programs compiled for TPU pods that are not there: what they take of each chip, and what the chips tell each other.

Nothing is allocated and nothing runs: parameters are shapes, devices are a description of a pod (a *topology*, such as
``v5e:4x4``), and the compiler is libtpu's, which needs no TPU. Whatever program is planned is the one that would run:
:mod:`sav_jax.plan_extraction` plans the reading of prompts, :mod:`sav_jax.train.plan` steps of training.

Axes: B batch, T tokens, R positions read, P rows of pixels of one prompt.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sav_jax._tpu import CHIPS, leave_tpus_alone
from sav_jax.errors import UserError
from sav_jax.lmm import BUNDLED, LMM, is_lm_head
from sav_jax.models.attention import compiling_for
from sav_jax.models.batch import Batch
from sav_jax.models.multimodal import MultimodalModel, init_params
from sav_jax.models.registry import architecture, read_config
from sav_jax.sharding import batch_sharding, on, parameter_sharding

GIB = 2**30


@dataclass(frozen=True)
class Collective:
    """What chips tell each other.

    Attributes:
        kind: all-gather, all-reduce, reduce-scatter, all-to-all or collective-permute.
        count: how often, over all layers.
        bytes: of the arrays that come out on one chip, all of them together.
    """

    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """A compiled program; every number is of one chip.

    Attributes:
        program: what it does.
        topology: the pod.
        device: kind of its chips.
        mesh: axis -> size.
        fits: the compiler found room for it.
        memory: bytes it has to give away.
        total: bytes that the program takes: arguments, outputs that are not written over arguments, temporaries, code
            and idle parameters. If it does not fit: as much as the compiler said.
        parameters: bytes of the model's parameters, frozen or not (a part of the arguments); None if it does not fit,
            like all that follows.
        arguments, outputs, temporaries, code: bytes; ``outputs`` are those not written over arguments, ``code`` is the
            program itself.
        idle: bytes of parameters that are in memory beside the program, which does not read them.
        flops: of matrix products, everything that is computed twice counted twice, shared evenly among the chips.
        collectives: by kind; None where the compiler cannot print its program.
        cycles: what the compiler estimates for all instructions, one after the other, without kernels of our own (the
            attention); None where it cannot print its program.
        seconds: that tracing and compiling took.
    """

    program: str
    topology: str
    device: str
    mesh: Mapping[str, int]
    fits: bool
    memory: int
    total: int
    parameters: int | None = None
    arguments: int | None = None
    outputs: int | None = None
    temporaries: int | None = None
    code: int | None = None
    idle: int | None = None
    flops: float | None = None
    collectives: tuple[Collective, ...] | None = None
    cycles: int | None = None
    seconds: float | None = None

    def roofline(self) -> dict[str, float]:
        """Seconds that no program can beat on such a chip, by what it waits for: its matrix units at their peak, its
        memory (every argument read once), its links (every collective's bytes brought once, half of a chip's two-way
        bandwidth); and the compiler's own estimate. What is not known is left out.
        """
        chip = CHIPS.get(self.device)
        if chip is None:
            return {}
        found: dict[str, float] = {}
        if self.flops is not None:
            found["products"] = self.flops / chip.flops
        if self.arguments is not None:
            found["memory"] = self.arguments / chip.memory_bandwidth
        if self.collectives is not None:
            found["links"] = sum(one.bytes for one in self.collectives) / (chip.link_bandwidth / 2)
        if self.cycles is not None:
            found["compiler"] = self.cycles / chip.clock
        return found

    def json(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self) | {"roofline": self.roofline()})

    def text(self) -> str:
        """As lines for people."""
        chips = math.prod(self.mesh.values())
        axes = ",".join(f"{axis}={size}" for axis, size in self.mesh.items())
        lines = [f"{self.program}", f"{self.topology}: {chips} x {self.device}, mesh {axes}", "each chip:"]
        sizes = {"parameters": self.parameters, "arguments": self.arguments, "outputs": self.outputs}
        sizes |= {"temporaries": self.temporaries, "code": self.code}
        notes = {
            "arguments": "with the parameters that it reads and the optimiser's state",
            "outputs": "beyond what they replace",
        }
        notes |= {"code": "the program", "idle": "parameters that the program does not read"}
        if self.idle and self.idle > 2**20:
            sizes["idle"] = self.idle
        for name, size in sizes.items():
            if size is not None:
                lines.append(f"  {name:<12}{_readable(size)}  {notes.get(name, '')}".rstrip())
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(f"  {'total':<12}{_readable(self.total)}  of {self.memory / GIB:.2f} GiB: {verdict}")
        if self.flops is not None:
            lines.append(f"  {'products':<12}{self.flops / 1e12:>8.2f} TFLOP")
        if self.collectives is None and self.fits:
            lines.append("  collectives and the compiler's estimate: not known, it cannot print this program")
        for one in self.collectives or ():
            lines.append(f"  {one.kind:<20}{one.count:>6} x  {_readable(one.bytes).strip()} in all")
        notes = {
            "products": "matrix units at their peak",
            "memory": "arguments read once",
            "links": "collectives, not hidden behind products",
            "compiler": "its own estimate, attention kernels left out",
        }
        for name, bound in self.roofline().items():
            lines.append(f"  {name:<12}{1e3 * bound:>8.1f} ms   {notes[name]}")
        if self.seconds is not None:
            lines.append(f"  compiled in {self.seconds:.0f} s")
        return "\n".join(lines)


def topology_devices(topology: str) -> list[Any]:
    """The devices of a pod, such as ``v5e:4x4``.

    Raises:
        UserError: no such topology, or libtpu is not installed.
    """
    from jax.experimental import topologies

    leave_tpus_alone()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody holds a chip
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("planning needs libtpu, TPU's compiler: pip install 'sav-jax[plan]'")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # of several types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no topology {topology!r} (such as v5e:4x4, v5p:2x2x2, v6e:8x8): {reason}") from None


def abstract_lmm(path: str | Path, mesh: Mesh, dtype: Any = "bfloat16", lm_head: bool = True) -> LMM:
    """A model of shapes alone, from its ``config.json``: it has no weights, no processor and no text.

    Args:
        path: a file, a folder with a ``config.json``, or a bundled model's name.
        mesh: where it is to live.
        dtype: of its parameters.
        lm_head: see :func:`sav_jax.load`.

    Raises:
        UserError: no such file, or a config that is not understood.
    """
    place = BUNDLED.get(str(path), Path(path).expanduser())
    raw = read_config(place)
    try:
        arch = architecture(raw)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    of = parameter_sharding(mesh)
    shapes = jax.eval_shape(lambda: init_params(arch.module, jax.random.key(0)))
    flat = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=of(name, leaf.shape))
        for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items()
        if lm_head or not is_lm_head(name)
    }
    params = traverse_util.unflatten_dict(flat, sep="/")
    nothing = cast(Any, None)
    return LMM(str(path), arch, params, nothing, "", jnp.dtype(dtype), mesh, raw, ())


def abstract_batch(module: MultimodalModel, mesh: Mesh, rows: int, tokens: int, read: int, image_rows: int) -> Batch:
    """Shapes of a batch of prompts with images.

    Args:
        module: the model.
        mesh: over which the batch is split.
        rows, tokens, read: B, T, R.
        image_rows: P, rounded up to whole visual tokens; 0 for prompts without images.
    """
    split = batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    vision: dict[str, Any] = {}
    if image_rows:
        smallest = jax.eval_shape(module.dummy_vision)
        token = jax.tree.leaves(smallest)[0].shape[1]  # the patches that a Qwen merges, or a tile
        image_rows = -(-image_rows // token) * token
        vision = jax.tree.map(lambda x: array((rows, image_rows, *x.shape[2:]), x.dtype), smallest)
        vision |= {
            "visual_index": array((rows, tokens, 1), np.int32),
            "visual_weight": array((rows, tokens, 1), np.float32),
        }
    rotary = getattr(module.config.text, "rope_axes", None)
    return Batch(
        token_ids=array((rows, tokens), np.int32),
        lengths=array((rows,), np.int32),
        read_positions=array((rows, read), np.int32),
        positions=None if rotary is None else array((rows, tokens, 3), np.int32),
        **vision,
    )


def on_every_chip(tree: Any, mesh: Mesh) -> Any:
    """Arrays -> shapes that live whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=whole), tree)


def plan(
    program: str, topology: str, mesh: Mesh, function: Any, arguments: Sequence[Any], parameters: Callable[[str], bool]
) -> Report:
    """Compile a program.

    Args:
        program: what it does, for the report.
        topology: what the mesh's devices were made from.
        mesh: its devices.
        function: jitted.
        arguments: shapes with shardings.
        parameters: whether the argument at a path (``jax.tree_util.keystr``) is a parameter of the model.
    """
    devices = list(mesh.devices.flat)
    kind = devices[0].device_kind
    memory = int(CHIPS[kind].memory) if kind in CHIPS else 0
    common = {"program": program, "topology": topology, "device": kind, "mesh": dict(mesh.shape)}
    start = time.perf_counter()
    with compiling_for(devices[0].platform), on(mesh):
        traced = function.trace(*arguments)
        lowered = traced.lower()
    leaves = jax.tree_util.tree_leaves_with_path(list(arguments))
    jaxpr = traced.jaxpr.jaxpr
    read = {id(x) for x in itertools.chain(jaxpr.outvars, *(equation.invars for equation in jaxpr.eqns))}
    # What no operation reads is no argument of the compiled program.
    idle = sum(_bytes_of(leaf) for (_, leaf), x in zip(leaves, jaxpr.invars, strict=True) if id(x) not in read)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"\(([\d.]+)([KMGTP])\) exceeds available HBM \(([\d.]+)G\)", str(error))
        found = found or re.search(r"Used ([\d.]+)([KMGTP]) of ([\d.]+)G hbm", str(error))
        if found is None:
            raise UserError(f"the compiler gives up: {' '.join(str(error).split())[:300]}") from error
        used = int(float(found[1]) * 2 ** (10 + 10 * "KMGTP".index(found[2])))
        return Report(**common, fits=False, memory=int(float(found[3]) * GIB), total=used + idle)
    seconds = time.perf_counter() - start
    sizes = compiled.memory_analysis()
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    total = sizes.argument_size_in_bytes + outputs + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    total += idle
    printed = _printed(compiled)
    return Report(
        **common,
        fits=not memory or total <= memory,
        memory=memory,
        total=total,
        parameters=sum(_bytes_of(leaf) for path, leaf in leaves if parameters(jax.tree_util.keystr(path))),
        arguments=sizes.argument_size_in_bytes,
        outputs=outputs,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        idle=idle,
        flops=product_flops(jaxpr) / len(devices),
        collectives=None if printed is None else collectives(printed),
        cycles=None if printed is None else estimated_cycles(printed),
        seconds=seconds,
    )


def likely_largest(known: Report, size: int, multiple: int) -> int:
    """About the largest batch that fits, from one plan: all but parameters in proportion to the batch.

    Args:
        known: the plan of a batch of ``size``.
        size: see ``known``.
        multiple: every batch size is a multiple of it.

    Returns:
        A multiple of ``multiple``; 0 if the plan did not fit, or does not say enough.
    """
    if not known.fits or not known.memory or known.parameters is None:
        return 0
    fixed = known.parameters + (known.idle or 0)
    return int(size * (known.memory - fixed) / max(known.total - fixed, 1)) // multiple * multiple


def largest_batch(compiled: Callable[[int], Report], multiple: int, known: Report, size: int, tries: int = 12) -> int:
    """The largest batch that the compiler finds room for, to within a twentieth.

    What a program takes grows nearly in proportion to its batch: two plans tell how fast, the compiler is asked about
    the batch that this predicts, and what it answers makes the next prediction better.

    Args:
        compiled: batch size -> plan.
        multiple: every batch size is a multiple of it.
        known: the plan of a batch of ``size``.
        size: see ``known``.
        tries: at most so many plans beside ``known``.

    Returns:
        A multiple of ``multiple`` that fits, checked; 0 if none was found.
    """
    plans = {size: known}
    while len(plans) <= tries:
        fit = max((batch for batch, plan in plans.items() if plan.fits), default=0)
        over = min((batch for batch, plan in plans.items() if not plan.fits), default=None)
        if over is not None and over - fit <= max(multiple, fit // 20):
            break
        if len(plans) == 1:
            guess = 2 * size if known.fits else multiple
        else:
            # Through the two plans nearest to what there is.
            (a, first), (b, second) = sorted(plans.items(), key=lambda item: abs(item[1].total - item[1].memory))[:2]
            slope = (second.total - first.total) / (b - a)
            guess = 16 * fit if slope <= 0 else a + int((first.memory - first.total) / slope)
        guess = min(guess, 16 * fit) if fit else guess  # far away, the proportion may be another
        guess = guess // multiple * multiple
        low, high = fit + multiple, guess if over is None else over - multiple
        guess = max(low, min(guess, high))
        if guess in plans:
            break
        plans[guess] = compiled(guess)
    return max((batch for batch, plan in plans.items() if plan.fits), default=0)


def _readable(size: float) -> str:
    """Bytes in GiB, or MiB where that would be next to none."""
    return f"{size / GIB:>8.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:>8.2f} MiB"


def _bytes_of(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def product_flops(jaxpr: Any) -> float:
    """Of all matrix products of a jaxpr, two for each multiplication; the bodies of scans as often as they run, those
    of while loops once, kernels for every block of their grid (with those that a causal one skips).
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
            continue
        times = 1
        if equation.primitive.name == "scan":
            times = equation.params["length"]
        elif equation.primitive.name == "shard_map":  # its body is of one device
            times = equation.params["mesh"].size
        elif equation.primitive.name == "pallas_call":
            times = math.prod(equation.params["grid_mapping"].grid)
        total += times * sum(product_flops(inner) for inner in _inner(equation.params))
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns"):
                yield one
            elif hasattr(one, "jaxpr") and hasattr(one.jaxpr, "eqns"):
                yield one.jaxpr


def _printed(compiled: Any) -> str | None:
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:  # jax 0.10's compiler cannot print some of its programs for v5p and v6e
        return None


_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%\S+ = (.*?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?([%\w.\-, ]+)")
_LOOP = re.compile(r"while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CYCLES = re.compile(r'"?estimated_cycles"?:\s*"?(\d+)')
_TRIPS = re.compile(r"known_trip_count[^\d]{1,12}(\d+)")


def collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, from how XLA prints it, by kind.

    A loop's body counts as often as the loop runs: what its condition compares the counter with. An asynchronous
    collective is printed in several places; its channel tells that they are one.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for place, line, times in _instructions(text):
        if (match := _COLLECTIVE.match(line)) is not None:
            channel = re.search(r"channel_id=(\d+)", line)
            key = match[2], channel[1] if channel else place
            count, size = found.get(key, (0, 0))
            found[key] = max(count, times), max(size, _result_bytes(match[1], bool(match[3])))
    kinds: dict[str, tuple[int, int]] = {}
    for (kind, _), (times, size) in found.items():
        count, total = kinds.get(kind, (0, 0))
        kinds[kind] = count + times, total + times * size
    return tuple(Collective(kind, *kinds[kind]) for kind in sorted(kinds))


def estimated_cycles(text: str) -> int:
    """What the compiler for TPU writes beside its instructions, all of them together; loops as often as they run."""
    return sum(
        times * int(match[1]) for _, line, times in _instructions(text) if (match := _CYCLES.search(line)) is not None
    )


def _instructions(text: str) -> Iterator[tuple[str, str, int]]:
    """Every instruction that runs: where it stands, as printed, and how often it runs."""
    bodies = _computations(text)

    def visit(name: str, times: int) -> Iterator[tuple[str, str, int]]:
        for number, line in enumerate(bodies.get(name, ())):
            yield f"{name} {number}", line, times
            if (loop := _LOOP.search(line)) is not None:
                yield from visit(loop[2], times * _trips(line, bodies.get(loop[1], ()), bodies))
                continue
            for called in _CALLED.findall(line):
                for one in called.split(","):
                    yield from visit(one.strip().lstrip("%"), times)

    yield from visit("ENTRY", 1)


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation by name; the entry's is "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if lines is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head is not None:
                lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        elif line == "}":  # a kernel's configuration may have lines that begin with "}}"
            lines = None
        else:
            lines.append(line)
    return bodies


def _trips(line: str, condition: Sequence[str], bodies: Mapping[str, Sequence[str]]) -> int:
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    numbers = [int(n) for row in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", row)]
    return max(numbers, default=1)


def _result_bytes(result: str, started: bool) -> int:
    """Of an instruction's result; what starts an asynchronous one puts out its operands, too, before the result."""
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) * _item_bytes(dtype) for dtype, shape in _ARRAY.findall(result)
    ]
    return max(sizes, default=0) if started else sum(sizes)


def _item_bytes(dtype: str) -> int:
    if dtype == "pred" or dtype.startswith("f8"):
        return 1
    return 2 if dtype == "bf16" else max(1, int(dtype[1:]) // 8)
