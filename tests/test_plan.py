"""Programs compiled for TPU pods that are not there, with libtpu's compiler."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import sav_jax
from sav_jax import plan
from sav_jax.cli import main
from sav_jax.errors import UserError
from sav_jax.lmm import BUNDLED
from sav_jax.models.registry import architecture, read_config
from sav_jax.plan import GIB, Collective, Report, collectives, estimated_cycles, largest_batch, product_flops
from sav_jax.sharding import mesh_of
from sav_jax.train.plan import plan_training
from sav_jax.train.recipes import LORA_PRESETS, Recipe

PRINTED = """HloModule jit_step, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,2]) -> bf16[8,8] {
  %p = bf16[8,2]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={1}
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %kernel = f32[4]{0} custom-call(%x), backend_config={"a": {
"b": 1
}}
  %all-reduce.1 = f32[4,2]{1,0} all-reduce(%y), channel_id=3, to_apply=%add
  %started = (bf16[8,2]{1,0}, bf16[8,8]{1,0}) all-gather-start(%z), channel_id=7, dimensions={1}
  %fusion = bf16[8,8]{1,0} fusion(%z), kind=kOutput, calls=%fused
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%start), condition=%condition, body=%body
  %w2 = (s32[], f32[4]{0}) while(%start), condition=%other, body=%quiet, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %all-reduce.2 = (f32[], bf16[16]{0}) all-reduce(%p, %q), channel_id=4, to_apply=%add
}

%quiet (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %permuted = s8[10]{0} collective-permute(%x), channel_id=9
}
"""


@pytest.fixture(autouse=True)
def flags_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's flags are the CPU compiler's, read at its first program; libtpu would end the process over them."""
    jax.jit(lambda x: -x)(jnp.zeros(()))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_collectives_are_counted_as_often_as_they_run() -> None:
    """By hand: loops multiply, one channel is one collective wherever it is printed, kernels' lines end nothing."""
    assert collectives(PRINTED) == (
        Collective("all-gather", 12, 12 * 8 * 8 * 2),
        Collective("all-reduce", 12 + 1, 12 * 4 * 2 * 4 + (4 + 16 * 2)),
        Collective("collective-permute", 3, 3 * 10),
    )


def test_cycles_are_counted_as_often_as_they_run() -> None:
    """By hand: one in the entry, twelve times two in a loop's body."""
    lines = PRINTED.replace("all-reduce(%p, %q),", 'all-reduce(%p, %q), backend_config={"estimated_cycles":"5"},')
    lines = lines.replace("fusion(%z),", 'fusion(%z), backend_config={"estimated_cycles":"2"},')
    assert estimated_cycles(lines) == 5 + 12 * 2


def test_products_are_counted_as_often_as_they_run() -> None:
    def program(x: jax.Array, weights: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return jnp.einsum("bd,bd->b", y, y)

    x, weights = jnp.zeros((3, 8)), jnp.zeros((5, 8, 8))
    assert product_flops(jax.make_jaxpr(program)(x, weights).jaxpr) == 5 * 2 * 3 * 8 * 8 + 2 * 3 * 8


def test_a_step_of_training_for_a_pod(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model's config on four chips: what is where, by arithmetic."""
    recipe = dataclasses.replace(LORA_PRESETS["llava"], rank=8, dropout=0.0)
    recipe = dataclasses.replace(recipe, optimization=dataclasses.replace(recipe.optimization, batch_size=4))
    report = plan_training("tiny", "v5e:2x2", "data=2,model=2", recipe, 256)
    assert report.fits
    assert (report.device, dict(report.mesh), report.memory) == ("TPU v5 lite", {"data": 2, "model": 2}, 15.75 * GIB)
    assert report.parameters is not None
    assert report.arguments is not None
    assert report.temporaries is not None
    assert report.flops is not None
    assert report.outputs is not None
    lmm = sav_jax.load("tiny")
    count = sum(leaf.size for leaf in jax.tree.leaves(lmm.params))
    # bfloat16, but for the projector, which trains: float32. Halved where the model axis divides it.
    assert 2 * count / 2 < report.parameters < 2 * count
    assert report.parameters < report.arguments
    # What trains and its two moments are replaced in place; two metrics and a counter come out.
    assert report.outputs < 100_000
    assert report.temporaries > 0
    assert report.code is not None
    assert report.idle is not None
    assert report.idle < 10_000  # of the last norm
    assert report.total == report.arguments + report.outputs + report.temporaries + report.code + report.idle
    # Forward, again in the backward pass (remat), and the gradient of activations: 2 flops per parameter and token
    # each; weights that are frozen have no gradient. The tower's layers see other numbers of tokens.
    text = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
        lmm.params["language_model"]["layers"]
    )}  # fmt: skip
    decoder = sum(leaf.size for name, leaf in text.items() if name.endswith("kernel"))
    assert 6 * decoder * 4 * 256 / 4 < report.flops < 3 * 6 * count * 4 * 256 / 4
    # Kernels are used where they lie: nothing is gathered.
    assert report.collectives is not None
    assert {one.kind for one in report.collectives} == {"all-reduce"}
    # Two sums per layer over the model axis, forwards, again, and backwards (after attention, after feed-forward).
    (reduced,) = report.collectives
    assert reduced.count >= 8 * 2 * 2
    again = json.loads(report.json())
    assert again["total"] == report.total
    assert again["collectives"][0]["kind"] == "all-reduce"
    assert "of 15.75 GiB: fits" in report.text()


def test_reading_prompts_on_a_pod(capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model on four chips, weights in parts along both axes: every matrix of every layer is gathered."""
    words = ["plan", "--model", "tiny", "--topology", "v5e:2x2", "--mesh", "fsdp=2,model=2"]
    assert main([*words, "--batch-size", "4", "--max-tokens", "256", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    lmm = sav_jax.load("tiny")
    whole = 2 * sum(leaf.size for leaf in jax.tree.leaves(lmm.params))  # bfloat16
    assert whole / 4 < report["parameters"] < whole / 2
    layers, tower = lmm.config.text.num_layers, lmm.config.vision.num_layers
    counts = {one["kind"]: one["count"] for one in report["collectives"]}
    # Of q, k, v, o, gate, up, down and of q, k, v, out, fc1, fc2; some may be gathered together.
    assert counts["all-gather"] >= 4 * layers + 4 * tower
    # After attention and after feed-forward, over "model", but for the last layer, of which heads alone are computed;
    # the tower's five heads are not shared by two chips.
    assert counts["all-reduce"] >= 2 * (layers - 1) + tower
    roofline = report["roofline"]
    assert roofline["products"] == report["flops"] / 197e12
    assert roofline["memory"] == report["arguments"] / 819e9
    assert roofline["compiler"] > roofline["products"]
    assert report["fits"]


def test_patches_come_in_whole_visual_tokens() -> None:
    module = architecture(read_config(BUNDLED["tiny-qwen"])).module
    batch = plan.abstract_batch(module, mesh_of(jax.devices()[:1], "data=1"), 2, 64, 1, 5)
    assert {leaf.shape[1] for leaf in jax.tree.leaves(batch.vision)} == {8}, "2 x 2 patches a token"


@given(
    st.floats(0, 20e9),
    st.floats(1e5, 1e9),
    st.floats(0.8, 1.3),
    st.integers(1, 16),
    st.integers(1, 20),
)
def test_the_largest_batch(fixed: float, growth: float, power: float, multiple: int, asked: int) -> None:
    """Whatever a program's memory, growing: the answer fits, and what was tried beyond does not."""
    memory = int(15.75 * GIB)
    tried: dict[int, bool] = {}

    def compiled(batch: int) -> Report:
        assert batch % multiple == 0
        assert batch not in tried
        total = int(fixed + growth * batch**power)
        tried[batch] = total <= memory
        return Report("", "", "", {}, total <= memory, memory, total)

    found = largest_batch(compiled, multiple, compiled(asked * multiple), asked * multiple)
    assert found == max((batch for batch, fits in tried.items() if fits), default=0)
    assert all(batch > found for batch, fits in tried.items() if not fits)
    assert len(tried) <= 13
    over = min((batch for batch, fits in tried.items() if not fits), default=None)
    assert over is not None
    assert over - found <= max(multiple, found // 20), "to within a twentieth"
    if power == 1.0 and growth * multiple > 1e8:  # in proportion: exactly
        assert fixed + growth * (found + 2 * multiple) > memory


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("HLO temporaries (12.92T) exceeds available HBM (15.75G)", int(12.92 * 2**40)),
        ("Used 512.5M of 15.75G hbm", int(512.5 * 2**20)),
        ("gave up\nfor reasons of its own", None),
    ],
)
def test_what_the_compiler_says_of_memory(monkeypatch: pytest.MonkeyPatch, text: str, total: int | None) -> None:
    mesh = mesh_of(plan.topology_devices("v5e:2x2"), "data=4")
    shape = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def refused(self: Any) -> None:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {text}")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refused)
    words = "a sum", "v5e:2x2", mesh, jax.jit(lambda x: x + 1), (shape,), lambda path: True
    if total is None:
        with pytest.raises(
            UserError, match=r"^the compiler gives up: RESOURCE_EXHAUSTED: gave up for reasons of its own$"
        ):
            plan.plan(*words)
        return
    report = plan.plan(*words)
    assert (report.fits, report.total, report.memory) == (False, total, int(15.75 * GIB))


def test_a_batch_is_suggested_from_one_plan() -> None:
    def report(fits: bool = True, total: int = 5 * GIB, parameters: int | None = GIB) -> Report:
        return Report("", "", "", {}, fits, 13 * GIB, total, parameters=parameters, idle=GIB)

    # Three GiB of 8 prompts beside two of parameters: eleven are left.
    assert plan.likely_largest(report(), 8, 4) == 28
    assert plan.likely_largest(report(total=3 * GIB), 8, 4) == 88
    assert plan.likely_largest(report(fits=False), 8, 4) == plan.likely_largest(report(parameters=None), 8, 4) == 0


def test_what_does_not_fit_is_said() -> None:
    mesh = mesh_of(plan.topology_devices("v5e:2x2"), "data=4")
    whole = NamedSharding(mesh, PartitionSpec())
    shape = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.float32, sharding=whole)  # 16 GiB
    report = plan.plan("a sum", "v5e:2x2", mesh, jax.jit(lambda x: x.T + x), (shape,), lambda path: True)
    assert not report.fits
    assert (report.memory, report.temporaries) == (int(15.75 * GIB), None)
    assert report.total >= 16 * GIB
    assert "DOES NOT FIT" in report.text()
    assert json.loads(report.json())["fits"] is False


def test_parameters_that_are_not_read_are_in_memory_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts of text alone: the tower is there. A head for logits of its own is not: no command that reads features
    loads it.
    """
    lmm = sav_jax.load("tiny")
    parameters = {"/".join(name): 2 * leaf.size for name, leaf in flatten_dict(lmm.params).items()}
    seen = sum(size for name, size in parameters.items() if not name.startswith("language_model/"))
    config = json.loads((BUNDLED["tiny"] / "config.json").read_text())
    assert config["tie_word_embeddings"]
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    for model, tokens in (("tiny", "64"), (str(tmp_path), "96")):
        words = [*PLAN, "--image-rows", "0", "--model", model, "--max-tokens", tokens, "--json"]
        assert main(words) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["parameters"] == sum(parameters.values())
        assert seen <= report["idle"] < 1.01 * seen + 10_000
        used = sum(report[name] for name in ("arguments", "outputs", "temporaries", "code"))
        assert report["total"] == used + report["idle"]


def test_what_a_compiler_does_not_print_is_said_to_be_unknown() -> None:
    known = Report("", "", "", {}, fits=True, memory=1, total=1, collectives=())
    assert "not known" not in known.text()
    assert "not known" in dataclasses.replace(known, collectives=None).text()


PLAN = ("plan", "--model", "tiny", "--topology", "v5e:2x2", "--mesh", "data=4")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--mesh", "data=3"], "--mesh data=3 is of 3 devices; there are 4"),
        (["--mesh", "rows=4"], "--mesh takes sizes of data, fsdp, model"),
        (["--topology", "v5e:3x5x7"], "no topology 'v5e:3x5x7'"),
        (["--batch-size", "6"], "--batch-size 6 is no multiple of the 4 chips that share a batch"),
        (["--batch-size", "6", "--task", "train-lora"], "batch_size 6 is no multiple of 4"),
        (["--preset", "stage2", "--task", "train-lora"], "no preset is called 'stage2'"),
        (["--preset", "stage2"], "--preset is for --task train-lora and train-sq"),
        (["--model", "nowhere"], "nowhere"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--batch-size", "-4", "--task", "train-lora"], "batch_size must be at least 1, not -4"),
    ],
)
def test_bad_plans_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], problem: str) -> None:
    kept = [word for pair in zip(PLAN[1::2], PLAN[2::2], strict=True) if pair[0] not in words for word in pair]
    assert main(["plan", *kept, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_the_command_prints_a_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sav_jax.train import plan as training

    seen: list[tuple[object, ...]] = []
    made = Report("a step", "v5e:2x2", "TPU v5 lite", {"data": 4}, True, int(15.75 * GIB), GIB, flops=1e12)

    def planned(*options: object) -> Report:
        seen.append(options)
        return made

    monkeypatch.setattr(training, "plan_training", planned)
    options = ["--task", "train-sq", "--batch-size", "32", "--max-tokens", "512", "--remat", "dots"]
    assert main([*PLAN, *options]) == 0
    assert capsys.readouterr().out == made.text() + "\n"
    (model, topology, mesh, recipe, tokens, rows), *_ = seen
    assert (model, topology, mesh, tokens, rows) == ("tiny", "v5e:2x2", "data=4", 512, 1)
    assert (recipe.sq_ratio, recipe.optimization.batch_size, recipe.optimization.remat) == (0.5, 32, "dots")  # type: ignore[attr-defined]
    assert main([*PLAN, "--task", "train-lora", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == GIB


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ([], [128, 256, 400, 408]),  # begins with the preset's
        (["--batch-size", "8"], [8, 16, 256, 400, 408]),
        (["--preset", "stage1", "--topology", "v5e:8x8", "--mesh", "data=64"], [256, 512, 384]),
        (["--topology", "v5e:16x16", "--mesh", "data=256"], [512]),  # which cannot share the preset's
    ],
)
def test_the_largest_batch_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], tried: list[int]
) -> None:
    """In steps of chips that share a batch times micro-batches; the recipe is otherwise its preset's."""
    from sav_jax.train import plan as training

    asked: list[tuple[int, int, str]] = []

    def planned(model: str, topology: str, mesh: str, recipe: Recipe, *lengths: int) -> Report:
        size = recipe.optimization.batch_size
        asked.append((size, recipe.optimization.micro_batches, recipe.conversation))
        total = 40 * size * 2**20  # 403 fill a chip
        return Report("a step", topology, "TPU v5 lite", {}, total <= 15.75 * GIB, int(15.75 * GIB), total)

    monkeypatch.setattr(training, "plan_training", planned)
    assert main([*PLAN, "--task", "train-sq", "--micro-batches", "2", "--largest", "--json", *options]) == 0
    captured = capsys.readouterr()
    assert asked == [(size, 2, "vicuna-sq") for size in tried]
    assert captured.err.splitlines() == [f"compiling for a batch of {size} ..." for size in tried]
    printed = json.loads(captured.out)
    assert printed["total"] == 40 * tried[0] * 2**20  # of the first
    fits = [size for size in tried if size <= 403]
    assert printed["largest_batch"] == max(fits, default=0)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert main([*PLAN]) == 2
    assert "planning needs libtpu" in capsys.readouterr().err
