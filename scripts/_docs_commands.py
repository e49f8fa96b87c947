"""What ``check_docs.py`` must know of the documentation's commands: sizes, data, and what cannot be run and why."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

INSTEAD = {
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "tiny",
    "llava-hf/llava-1.5-7b-hf": "tiny",
    "PATH": "tiny",
}
"""Words that stand for what is not here: everything runs unchanged with the bundled model."""

_TRAINING = {"--steps": "1", "--batch-size": "2"}
SIZES: dict[str, dict[str, str]] = {
    "sav-jax fit": {"--num-heads": "5"},
    "sav-jax eval": {
        "--shots": "2",
        "--seeds": "0",
        "--limit": "4",
        "--demonstrations": "2",
        "--mtv-prompts": "2",
        "--mtv-steps": "1",
        "--lora-steps": "1",
    },
    "sav-jax ask": {"--max-new-tokens": "4", "--description-tokens": "4", "--num-questions": "2"},
    "sav-jax train aim": {**_TRAINING, "--documents": "20", "--pairs": "3", "--shots": "1,2"},
    "sav-jax train": {**_TRAINING, "--rank": "2"},
    "sav-jax plan": {"--batch-size": "16", "--max-tokens": "64", "--image-rows": "2"},
    "python scripts/measure_lora.py": {
        "--shots": "4",
        "--seeds": "0",
        "--limit": "4",
        "--rates": "1e-3",
        "--steps": "1",
        "--methods": "zero-shot-likelihood lora",
    },
    "python scripts/bench_pytorch.py": {"--quick": ""},
    "python tests/families.py": {"": "llava"},
    "python tests/families_video.py": {"": "qwen2_vl"},
    "python scripts/same_heads.py": {"--models": "tiny", "--number": "2"},
    "bash scripts/reproduce.sh": {
        "--quick": "",
        "--models": "tiny",
        "--output": "{here}/results/reproduced",
    },
}
"""Options that replace those printed, or are added, of commands that begin so; the first that fits. What stands behind
no option is added as it is; ``{here}`` is the folder in which commands run.
"""

ALONE = r"^(sav-jax plan|bash|python tests/|python scripts/(bench_pytorch|same_heads)\.py)"
"""Commands that need a process of their own: libtpu, which "plan" loads, ends one that has flags it does not know;
others have several devices, or PyTorch's threads.
"""

NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"^bash scripts/(quickstart|test)\.sh", "they make an environment; what the quickstart then runs is run"),
    (r"^(source|git clone|cd|python3 -m venv) ?", "they make an environment, or go there"),
    (r"\bpip install\b", "they install from a package index; that the extras exist is looked at"),
    (r"^srun |^gcloud |--distributed", "they need several hosts; tests/test_processes.py runs two processes"),
    (r"--coordinator", "of several processes one waits for the others; tests/test_processes.py runs two"),
    (r"^sav-jax plan .*--largest", "compiles several programs, in minutes; tests/test_plan.py looks at the search"),
    (r"^sav-jax plan .*--task train-lora", "compiling a step of training takes minutes; tests/test_plan.py does it"),
    (r"^python -c .*download_and_prepare", "fetches a data set"),
    (r"scripts/bench_gpu\.py", "needs a GPU; tests/test_bench_gpu.py runs it at small sizes"),
    (r"scripts/train_tiny_gpu\.sh|train_tiny\.py --preset tiny", "takes hours; the debug presets are run"),
)
"""Commands that are not run (a pattern, and why): their options must be ones that the command has."""

HANDED = {
    "scripts/quickstart.sh": "sav-jax eval",
    "scripts/reproduce.sh": "python scripts/reproduction/__main__.py",
    "scripts/train_tiny_gpu.sh": "python scripts/train_tiny.py",
}
"""What gets the words that a shell script is given."""

OTHERS = ("cmp",)
"""Other programs that are run as they are."""

OF_OTHERS = ("--kill-on-bad-exit", "--nodes", "--editable", "--help", "--ntasks-per-node", "--worker")
"""Options of other programs that the text speaks of."""

GIVEN = {
    "docs/aim.md": """
import sav_jax
from pathlib import Path
from sav_jax.eval.tasks import TASKS

lmm = sav_jax.load("tiny")
examples = [item.example for item in TASKS["digits"].load(Path()).pool[:4]]
demonstrations, queries = examples[:2], examples[2:]
""",
    "docs/sq-llava.md": """
import sav_jax
from pathlib import Path
from checkpoints_llava import build_llava
from checkpoints_sq_llava import released_state
from torch import ones

build_llava(Path("llava-1.5-7b"))
state, features = released_state(16, 12), ones(1, 256, 16).numpy()
""",
}
"""What a page's examples take as given."""


def make_files(work: Path, rows: Sequence[str]) -> None:
    """The data that the commands read, in the shape of the README's example rows.

    Args:
      work: the folder in which commands run.
      rows: the README's blocks of rows: pictures, then videos.
    """
    import numpy as np
    from checkpoints import picture
    from videos import write_video

    pictures, videos = ([json.loads(line) for line in text.splitlines()] for text in rows)
    pictures = [_again(row, i) for i in range(4) for row in pictures]
    for number, row in enumerate([*pictures, *videos]):
        for place, name in enumerate([*_names(row, "image"), *_names(row, "video")]):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            seed = 10 * number + place
            if name.endswith(".mp4"):
                write_video(work / name, [np.asarray(picture(32, 32, seed + i)) for i in range(8)])
            else:
                picture(30, 40, seed).save(work / name)
    for name in ("train.jsonl", "rows.jsonl"):
        _write(work / name, pictures)
    _write(work / "test.jsonl", pictures[:3])
    _write(work / "clips.jsonl", videos)
    for name in ("photo.jpg", "other.jpg"):
        picture(30, 40, len(name)).save(work / name)

    (work / "images").mkdir()
    talks = []
    for i in range(8):
        picture(32, 32, i).save(work / "images" / f"{i}.jpg")
        said = [
            ("human", "<image>\nwhat is it?"),
            ("gpt", "a red star"),
            ("human", "what color is it?"),
            ("gpt", "red"),
        ]
        talk = [{"from": who, "value": text} for who, text in said]
        talks.append({"id": str(i), "image": f"{i}.jpg", "conversations": talk})
    for name in ("llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json"):
        (work / name).write_text(json.dumps(talks))
    from sav_jax.lmm import BUNDLED

    shutil.copy(BUNDLED["tiny"] / "config.json", work)


def _again(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row once more, with other pictures or, if it has none, in other words."""
    if not number:
        return row
    names = [f"{number}/{name}" for name in _names(row, "image")]
    question = row["question"] if names else f"{row['question']} {number}"
    return row | {"image": names, "question": question}


def _names(row: dict[str, Any], field: str) -> list[str]:
    value = row.get(field, [])
    return [value] if isinstance(value, str) else value


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def buckets(work: Path) -> Iterator[None]:
    """A small Google Cloud Storage in the place of Google's, with the files of a folder in it."""
    from buckets import TOKEN, served

    with served() as (stored, address):
        os.environ.update(TENSORSTORE_GCS_HTTP_URL=address, GOOGLE_AUTH_TOKEN_FOR_TESTING=TOKEN)
        stored.objects["bucket"] = {}
        for path in work.rglob("*.*"):
            if path.suffix in (".jsonl", ".jpg", ".png"):
                stored.put("bucket", str(path.relative_to(work)), path.read_bytes())
        yield
