"""The loop that all recipes share: one jitted step, Orbax checkpoints, a log.

What trains is a flat dict from path to float32 array; everything else is frozen, in the model's dtype, and takes part
in no gradient. Every batch, dropout mask and shuffle is a function of the seed and the step, so that a killed run goes
on where it was and ends with the same bits.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from sav_jax._files import write_file
from sav_jax._processes import by_the_first
from sav_jax.errors import UserError
from sav_jax.sharding import data_size, on, put_own_rows
from sav_jax.train.data import batches
from sav_jax.train.optimizer import Group, Optimization, Pace, preconditioner, updated

_SHOWN = 8  # settings that differ, in a message

Trainable = dict[str, jax.Array]
"""Path -> float32 array."""
Loss = Callable[[Mapping[str, jax.Array], Any, Any, jax.Array], tuple[jax.Array, jax.Array]]
"""(trainable, frozen, batch, key) -> (sum of losses, sum of weights); their quotient over a whole step is minimised."""


class Data(Protocol):
    """A run's batches by number of step."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> Any: ...
    def names(self, step: int) -> str:
        """What the batch of a step is made of, for error messages."""
        ...

    def tokens(self, step: int) -> tuple[int, int]:
        """Tokens of a step's whole batch: real ones, and those computed, which have the padding, too."""
        ...


@dataclass(frozen=True)
class Problem:
    """What is to be minimised.

    Attributes:
        loss: see :data:`Loss`.
        initial: what trains, at the start; float32.
        groups: path -> group, for the same paths.
        frozen: passed to the loss as it is.
        mesh: devices, or None for one.
        shardings: path -> where a leaf that trains lives (and its optimiser state), on a mesh.
        facts: what the run was made with; a run is resumed only with equal facts.
    """

    loss: Loss
    initial: Mapping[str, Any]
    groups: Mapping[str, Group]
    frozen: Any
    mesh: Mesh | None = None
    shardings: Mapping[str, NamedSharding] | None = None
    facts: Mapping[str, Any] | None = None


@struct.dataclass
class State:
    """What a checkpoint holds.

    Attributes:
        step: int32, steps done.
        trainable: path -> float32 array.
        optimizer: optax's state, of the same leaves.
    """

    step: jax.Array
    trainable: Trainable
    optimizer: Any


def _build(transform: optax.GradientTransformation, trainable: Trainable) -> State:
    with jax.numpy_dtype_promotion("standard"):
        return State(jnp.zeros((), jnp.int32), trainable, transform.init(trainable))


def abstract_state(problem: Problem, transform: optax.GradientTransformation) -> State:
    """The shapes of :func:`initial_state`, and where on the problem's mesh they are to live."""
    leaves = {path: jax.ShapeDtypeStruct(value.shape, jnp.float32) for path, value in problem.initial.items()}
    shapes = jax.eval_shape(functools.partial(_build, transform), leaves)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        _state_shardings(problem, shapes),
    )


def initial_state(problem: Problem, transform: optax.GradientTransformation) -> State:
    """The state before the first step, where it is to live."""
    build = functools.partial(_build, transform)
    placed = {path: _placed(problem, path, value) for path, value in problem.initial.items()}
    if problem.mesh is None:
        return jax.jit(build)(placed)
    shapes = jax.eval_shape(build, placed)
    return jax.jit(build, out_shardings=_state_shardings(problem, shapes))(placed)


def _placed(problem: Problem, path: str, value: Any) -> jax.Array:
    if problem.mesh is None:
        # Put where a restored state is put, too: a resumed run then runs the very program of the first.
        return jax.device_put(jnp.asarray(value, jnp.float32), jax.local_devices()[0])
    assert problem.shardings is not None
    sharding = problem.shardings[path]
    if isinstance(value, jax.Array):
        return jax.device_put(value.astype(jnp.float32), sharding)
    value = np.asarray(value, np.float32)
    # Every process has all of it, and gives its own devices their parts.
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _state_shardings(problem: Problem, shapes: State) -> Any:
    """Moments live where their parameters do; counters everywhere."""
    assert problem.mesh is not None
    assert problem.shardings is not None
    everywhere, shardings = NamedSharding(problem.mesh, PartitionSpec()), problem.shardings

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
        return shardings[name] if name in shardings and leaf.ndim else everywhere

    return jax.tree_util.tree_map_with_path(place, shapes)


@functools.lru_cache(maxsize=16)
def make_step(
    loss: Loss, transform: optax.GradientTransformation, micro_batches: int
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """``(state, frozen, batch, pace) -> (state, {"loss", "gradient_norm"})``; the state given is donated.

    The loss is the mean over the whole batch's weights, whatever the micro-batches and processes hold of them.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Any, batch: Any, pace: Pace) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(pace.key), state.step)

        def part(trainable: Trainable, micro: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return loss(trainable, frozen, micro, key)

        gradient = jax.value_and_grad(part, has_aux=True)
        if micro_batches == 1:
            (total, weight), gradients = gradient(state.trainable, batch, key)
        else:
            # Every micro-batch takes each n-th row, so that it is spread over the devices as the batch was.
            micros = jax.tree.map(
                lambda x: x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
            )

            def add(carried: Any, given: Any) -> tuple[Any, None]:
                micro, key = given
                (total, weight), gradients = gradient(state.trainable, micro, key)
                return jax.tree.map(jnp.add, carried, (total, weight, gradients)), None

            zero = jnp.zeros((), jnp.float32)
            start = zero, zero, jax.tree.map(jnp.zeros_like, state.trainable)
            (total, weight, gradients), _ = jax.lax.scan(add, start, (micros, jax.random.split(key, micro_batches)))
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        with jax.numpy_dtype_promotion("standard"):
            norm = optax.tree.norm(gradients)
        trainable, optimizer = updated(transform, pace, state.step, state.trainable, state.optimizer, gradients)
        return State(state.step + 1, trainable, optimizer), {"loss": total / weight, "gradient_norm": norm}

    return step


@functools.lru_cache(maxsize=16)
def _transform(settings: Optimization) -> optax.GradientTransformation:
    return preconditioner(settings)


def transform_of(settings: Optimization) -> optax.GradientTransformation:
    """The optimiser, the same object for settings that only decide numbers otherwise: a step is compiled for it."""
    return _transform(
        Optimization(clip=settings.clip, beta1=settings.beta1, beta2=settings.beta2, epsilon=settings.epsilon)
    )


def train(
    problem: Problem, data: Data, settings: Optimization, directory: Path | None, progress: bool = True
) -> Trainable:
    """Train to the end, going on from the latest checkpoint in ``directory``, if there is one: without, nothing is
    written.

    The directory gets ``run.json`` (the facts), ``log.jsonl`` (a row per ``log_every`` steps), ``checkpoints/`` and
    ``tensorboard/``. A row has the mean loss and gradient norm of the ``steps`` up to its own ``step``, counted from 1
    (the first row of a resumed run may be of fewer), real tokens per second of all time but what compiling takes, and
    the share of padding in all tokens.

    Returns:
        What was trained.

    Raises:
        UserError: the directory holds a run of other facts, or the loss is not finite; names step and rows.
    """
    check(problem, settings, directory)
    if directory is not None:
        claimed = directory = directory.absolute()
        by_the_first(lambda: _claim(claimed, dict(problem.facts or {})))
    transform = transform_of(settings)
    pace = Pace.of(settings, problem.groups)
    state = initial_state(problem, transform)
    with _Checkpoints(None if directory is None else directory / "checkpoints", settings) as checkpoints:
        state = checkpoints.latest(state)
        first = int(state.step)
        if first and progress and jax.process_index() == 0:
            print(f"resuming from step {first} of {settings.steps}", file=sys.stderr)
        step_function = make_step(problem.loss, transform, settings.micro_batches)
        with _Log(directory, first, settings, progress) as log:
            waiting: list[tuple[int, dict[str, jax.Array]]] = []
            compiled: set[Any] = set()
            for step, batch in zip(range(first, len(data)), batches(data, first), strict=True):
                batch = put_own_rows(batch, problem.mesh)
                shapes = tuple(x.shape for x in jax.tree.leaves(batch))
                if new := shapes not in compiled:
                    compiled.add(shapes)
                    jax.block_until_ready(state)  # so that nothing is trained while it compiles
                started = time.perf_counter()
                with on(problem.mesh):
                    state, metrics = step_function(state, problem.frozen, batch, pace)
                if new:  # the call returns when it has compiled, and does not wait for what it computes
                    log.leave_out(time.perf_counter() - started)
                waiting.append((step, metrics))
                last = step + 1 == len(data)
                due = (step + 1) % settings.checkpoint_every == 0 or last
                # The device is one step ahead of what is looked at, but for checkpoints: a bad state is never kept.
                while len(waiting) > (0 if due else 1):
                    done, values = waiting.pop(0)
                    log.add(done, _finite(values, done, data), data)
                if due:
                    checkpoints.save(state)
    return state.trainable


def _finite(metrics: Mapping[str, jax.Array], step: int, data: Data) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        if not np.isfinite(value):
            raise UserError(f"step {step + 1}: {name.replace('_', ' ')} is {value}; its rows: {data.names(step)}")
    return values


def check_batch(settings: Optimization, mesh: Mesh | None) -> None:
    """Raise a UserError unless the devices can share the micro-batches."""
    multiple = data_size(mesh) * settings.micro_batches
    if settings.batch_size % multiple:
        raise UserError(
            f"batch_size {settings.batch_size} is no multiple of {multiple} (micro-batches times devices that share a "
            "batch)"
        )


def check(problem: Problem, settings: Optimization, directory: Path | None) -> None:
    """What can be refused before the data is planned, which may take minutes.

    Raises:
        UserError: the devices cannot share the batch, or the directory holds a run of other facts or other things.
    """
    check_batch(settings, problem.mesh)
    if directory is not None:
        by_the_first(lambda: _claim(directory, dict(problem.facts or {}), write=False))


def _claim(directory: Path, facts: dict[str, Any], write: bool = True) -> None:
    """Make the directory this run's, or refuse."""
    file = directory / "run.json"
    facts = json.loads(json.dumps(facts))
    if file.exists():
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file}: unreadable ({error})") from None
        there, here = _flat(old), _flat(facts)
        different = [
            f"{name}: {_short(there.get(name))} there, {_short(here.get(name))} asked for"
            for name in {**there, **here}
            if there.get(name) != here.get(name)
        ]
        if different:
            more = f"; and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
            raise UserError(
                f"{directory}: holds a run with other settings ({'; '.join(different[:_SHOWN])}{more}); resume it with "
                "the same, or choose another folder"
            )
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: holds other things (no run.json); choose another folder for the output")
    elif write:
        write_file(file, (json.dumps(facts, indent=2) + "\n").encode())


def _flat(facts: Any, name: str = "") -> dict[str, Any]:
    """``{"recipe": {"rank": 4}}`` -> ``{"recipe.rank": 4}``."""
    if not isinstance(facts, dict):
        return {name: facts}
    return {
        path: value
        for key, inner in facts.items()
        for path, value in _flat(inner, f"{name}.{key}" if name else str(key)).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


class _Checkpoints:
    """Orbax's manager: written by a thread, complete or not there, the newest few kept; without a directory, none."""

    def __init__(self, directory: Path | None, settings: Optimization):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._directory = directory
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, create=True)
        self._manager = None if directory is None else ocp.CheckpointManager(directory, options=options)

    def __enter__(self) -> _Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()

    def latest(self, state: State) -> State:
        """The newest checkpoint, laid out as ``state``; ``state`` itself if there is none."""
        step = None if self._manager is None else self._manager.latest_step()
        if self._manager is None or self._directory is None or step is None:
            return state
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        try:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(target))
        except Exception as error:  # of several types, by what is damaged
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self._directory / str(step)}: the checkpoint cannot be read ({type(error).__name__}: {reason}); "
                "remove that folder to go on from the one before"
            ) from None

    def save(self, state: State) -> None:
        if self._manager is not None:
            self._manager.save(int(state.step), args=self._ocp.args.StandardSave(state))


class _Log:
    """``log.jsonl``, TensorBoard's events and a bar; a resumed run's rows follow those of the steps it keeps."""

    def __init__(self, directory: Path | None, first: int, settings: Optimization, progress: bool):
        self._settings = settings
        self._pending: list[dict[str, float]] = []
        self._tokens, self._computed, self._since = 0, 0, time.perf_counter()
        main = jax.process_index() == 0
        self._writer: Any = None
        if main and directory is not None:
            from tensorboardX import SummaryWriter

            self._file = directory / "log.jsonl"
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first or None)
            if self._file.exists():
                rows = self._file.read_text().splitlines()
                kept = [row for row in rows if 0 < _step_of(row) <= first]
                write_file(self._file, "".join(row + "\n" for row in kept).encode())
        self._bar = tqdm(
            total=settings.steps,
            initial=first,
            desc="training",
            unit=" steps",
            file=sys.stderr,
            disable=not progress or not main,
            mininterval=0.5,
        )

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def leave_out(self, seconds: float) -> None:
        """Take a time out of the rate of tokens."""
        self._since += seconds

    def add(self, step: int, values: dict[str, float], data: Data) -> None:
        self._bar.update()
        self._pending.append(values)
        real, computed = data.tokens(step)
        self._tokens += real
        self._computed += computed
        done = step + 1
        if done % self._settings.log_every and done != self._settings.steps:
            return
        seconds = time.perf_counter() - self._since
        means = {name: float(np.mean([row[name] for row in self._pending])) for name in values}
        rate = self._tokens / max(seconds, 1e-9)
        padding = 1 - self._tokens / self._computed
        self._bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:,.0f} tokens/s, {padding:.0%} padding")
        if self._writer is not None:
            with self._file.open("a") as file:
                more = {"tokens_per_second": round(rate, 1), "padding": round(padding, 4)}
                file.write(json.dumps({"step": done, "steps": len(self._pending), **means, **more}) + "\n")
            for name, value in {**means, "tokens_per_second": rate, "padding": padding}.items():
                self._writer.add_scalar(name, value, done)
        self._pending, self._tokens, self._computed, self._since = [], 0, 0, time.perf_counter()


def _step_of(row: str) -> int:
    """Of a row of the log; 0 if a kill has torn it."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
