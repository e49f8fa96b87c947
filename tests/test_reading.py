"""One pass gives what three separate ones give, and is not made twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Reference, picture

import sav_jax
from sav_jax import extract
from sav_jax.examples import Example
from sav_jax.reading import read

OPTIONS = ["cat", "dog", "a", "giraffe"]
# Of two shapes: each costs a program for whatever is asked.
EXAMPLES = [
    Example("What is it?", (picture(30, 30),)),
    Example("What is the capital of France?"),
    Example("Is <image> left of <image>?", (picture(40, 30), picture(20, 60, 1))),
    Example("What is it?", (picture(30, 30),), label="the same prompt again"),
]
# The same sums in another program and other company: rounding of float32 values of order one; of log-probabilities of
# order ten, up to seven of them summed.
HEADS, SCORES = 1e-5, 1e-4


def test_one_pass_gives_heads_likelihoods_and_the_answer(lmm: sav_jax.LMM, passes: list[int]) -> None:
    readings = read(lmm, EXAMPLES, OPTIONS, 6, batch_size=2, progress=False)
    assert sum(passes) == readings.passes == 3
    assert len(set(readings.keys)) == 3
    heads = sav_jax.extract_heads(lmm, EXAMPLES, batch_size=2, progress=False)
    np.testing.assert_allclose(readings.heads, heads, rtol=0, atol=HEADS)
    scores = sav_jax.score_options(lmm, EXAMPLES, OPTIONS, batch_size=2, progress=False)
    np.testing.assert_allclose(readings.scores, scores, rtol=0, atol=SCORES)
    written = sav_jax.generate(lmm, EXAMPLES, max_new_tokens=6, batch_size=2, progress=False)
    assert list(readings.generations) == written


def test_prompts_that_repeat_copy_nothing_else() -> None:
    values = np.arange(12.0).reshape(6, 2)
    keys = ["a", "b", "a", "c", "b", "a"]
    filled = extract.repeated(values, keys, {"a": 0, "b": 1, "c": 3})
    assert filled is values
    assert filled.tolist() == [[0, 1], [2, 3], [0, 1], [6, 7], [2, 3], [0, 1]]


def test_parts_can_be_left_out(lmm: sav_jax.LMM) -> None:
    everything = read(lmm, EXAMPLES[:2], OPTIONS, 6, progress=False)
    scored = read(lmm, EXAMPLES[:2], OPTIONS, progress=False)
    np.testing.assert_allclose(scored.scores, everything.scores, rtol=0, atol=SCORES)
    assert [g.text for g in scored.generations] == ["", ""]
    written = read(lmm, EXAMPLES[:2], max_new_tokens=6, progress=False)
    assert written.generations == everything.generations
    assert written.scores.shape == (2, 0)
    heads = read(lmm, EXAMPLES[:2], progress=False)
    np.testing.assert_allclose(heads.heads, everything.heads, rtol=0, atol=HEADS)


def test_nothing_is_run_twice(lmm: sav_jax.LMM, tmp_path: Path, passes: list[int]) -> None:
    cache = str(tmp_path)
    first = read(lmm, EXAMPLES[:2], OPTIONS, 6, cache=cache, progress=False)
    assert first.passes == 2
    more = read(lmm, EXAMPLES, OPTIONS, 6, cache=cache, progress=False)
    assert more.passes == 1, "two were there, one is new, one is equal to another"
    again = read(lmm, list(reversed(EXAMPLES)), OPTIONS, 6, cache=cache, progress=False)
    assert again.passes == 0
    np.testing.assert_array_equal(again.heads[::-1], more.heads)
    np.testing.assert_array_equal(again.scores[::-1], more.scores)
    assert again.generations[::-1] == more.generations
    np.testing.assert_array_equal(more.heads[:2], first.heads)
    # Heads alone are shared with extraction, in both directions.
    np.testing.assert_array_equal(
        sav_jax.extract_heads(lmm, EXAMPLES, cache=tmp_path / "heads", progress=False), more.heads
    )
    assert read(lmm, EXAMPLES, cache=cache, progress=False).passes == 0
    # Other answers are other questions.
    assert read(lmm, EXAMPLES[:2], OPTIONS[:2], 6, cache=cache, progress=False).passes == 2
    assert read(lmm, EXAMPLES[:2], OPTIONS, 7, cache=cache, progress=False).passes == 2
    assert sum(passes) == 7


def test_bad_options(lmm: sav_jax.LMM) -> None:
    with pytest.raises(sav_jax.UserError, match="given twice"):
        read(lmm, EXAMPLES[:1], ["a", "a"], progress=False)


SCRIPT = """
import sys
from pathlib import Path
import sav_jax
from checkpoints import picture
from sav_jax.reading import read
examples = [sav_jax.Example(f"Question {i}?", (picture(30, 30, seed=i),)) for i in range(40)]
readings = read(sav_jax.load(sys.argv[1]), examples, ["a", "b"], 4, batch_size=2, cache=sys.argv[2], progress=False)
print(readings.passes, flush=True)
"""


def test_a_killed_run_goes_on_where_it_was(reference: Reference, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(reference.directory), str(tmp_path)]
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *sys.path]), "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    answers = tmp_path / "answers"
    while not answers.exists() or sum(len(files) for _, _, files in os.walk(answers)) < 6:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = sum(len(files) for _, _, files in os.walk(answers))
    if done >= 40:
        pytest.fail("too quick to be killed")
    second = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    # A batch under way may have stored its heads and not its answers.
    assert 40 - done <= int(second.stdout) <= 40 - done + 2
