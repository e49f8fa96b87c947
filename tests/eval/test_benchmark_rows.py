"""What readers of benchmarks say of malformed rows and of files that are not there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import (
    jsonl,
    whole,
    write_blink,
    write_memes,
    write_mhalubench,
    write_mhalubench_val,
    write_naturalbench,
    write_pope,
    write_retrieval,
    write_sugarcrepe,
    write_vizwiz,
    write_vlguard,
)

from sav_jax.errors import UserError
from sav_jax.eval.tasks import TASKS

# What all readers say of bad rows. Each: the file, what is changed in its second row, what is said of it.

Change = Callable[[dict[str, Any]], Any]


def put(**fields: Any) -> Change:
    return lambda row: row.update(fields)


def drop(field: str) -> Change:
    return lambda row: row.pop(field)


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "pope": ("pope-random", write_pope, "pope/coco_pope_random.json"),
    "naturalbench": ("naturalbench", write_naturalbench, "naturalbench/naturalbench.jsonl"),
    "retrieval": ("naturalbench-retrieval", write_retrieval, "naturalbench-retrieval/naturalbench_ret_test.jsonl"),
    "sugarcrepe": ("sugarcrepe", write_sugarcrepe, "sugarcrepe/add_att.json"),
    "vizwiz": ("vizwiz-answerable", write_vizwiz, "vizwiz/val.json"),
    "mhalubench": ("mhalubench", write_mhalubench, "mhalubench/MHaluBench_train.json"),
    "mhalubench val": ("mhalubench", write_mhalubench_val, "mhalubench/MHaluBench_val-v0.1.json"),
    "vlguard": ("vlguard", write_vlguard, "vlguard/test.json"),
    "vlguard train": ("vlguard", write_vlguard, "vlguard/train.json"),
    "memes": ("hateful-memes", write_memes, "hateful-memes/test_seen.jsonl"),
    "memes train": ("hateful-memes", write_memes, "hateful-memes/train.jsonl"),
    "blink": ("blink-art-style", write_blink, "blink/Art_Style.json"),
}
BAD = [
    ("pope", put(label="maybe"), '"label" is "maybe", not one of "yes"'),
    ("pope", put(label=None), '"label" is missing'),
    ("pope", drop("text"), '"text" is missing'),
    ("pope", put(text=3), '"text" must be a string, not a number'),
    ("pope", put(question_id=[]), '"question_id" must be a string or'),
    ("pope", put(image="x.jpg"), '"image" names \'x.jpg\': there is no x'),
    ("naturalbench", put(Image_1_Question_0="Yes"), '"Image_1_Question_0" is "Yes", not one of "A", "B"'),
    ("naturalbench", put(Question_Type="open"), '"Question_Type" is "open", not one of'),
    ("naturalbench", drop("Image_1"), '"Image_1" is missing'),
    ("retrieval", put(label="yes"), '"label" is "yes", not one of "Yes", "No"'),
    ("sugarcrepe", put(negative_caption=" "), '"negative_caption" is empty'),
    ("sugarcrepe", put(filename="no.jpg"), '"filename" names \'no.jpg\''),
    ("vizwiz", put(answerable=True), '"answerable" is true, not one of 1, 0'),
    ("vizwiz", put(answers=["can"]), '"answers" must be a list of objects; it holds a string'),
    ("vizwiz", put(answers=[]), '"answers" is an empty list'),
    ("vizwiz", put(answers=[{"answer": ""}]), '"answer" is empty'),
    ("mhalubench", put(claim_list=["One"]), '"ref_claim_label" has 2 labels for 1 claims in claim_list'),
    ("mhalubench", put(ref_claim_label=["true", "false"]), "\"ref_claim_label\" holds 'true', which is neither"),
    ("mhalubench", put(claim_list="One"), '"claim_list" must be a list, not a string'),
    ("mhalubench val", put(task_type="video"), '"task_type" is "video", not one of "image-to-text", "text-to-image"'),
    ("mhalubench val", drop("task_type"), '"task_type" is missing'),
    ("mhalubench val", put(image_path="v9.jpg"), '"image_path" names \'v9.jpg\': there is no v9.jpg'),
    ("mhalubench val", put(segments="A dog"), '"segments" must be a list, not a string'),
    ("mhalubench val", put(segments=[]), '"segments" is an empty list'),
    ("mhalubench val", put(segments=["A dog"]), '"segments" must be a list of objects; it holds a string'),
    ("vlguard", put(safe="yes"), '"safe" is "yes", not one of true, false'),
    ("vlguard", put(safe=False), '"instr-resp" has no "instruction"'),
    ("vlguard train", put(image="bad.png"), '"image" names \'bad.png\''),
    ("memes", drop("label"), '"label" is missing'),
    ("memes train", put(label=2), '"label" is 2, not one of 0, 1'),
    ("blink", put(label="(C)"), '"label" is "(C)", not one of "(A)", "(B)"'),
    ("blink", put(image_1=None, image_2=None, image_3=None), '"image_1" is missing'),
    ("blink", put(image_4="x.png"), '"image_4" names \'x.png\': there is'),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "said"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, file: str, change: Change, said: str) -> None:
    task, write, name = FILES[file]
    write(tmp_path)
    path = tmp_path / name
    text = path.read_text(encoding="utf-8")
    if name.endswith(".jsonl") or name.startswith("pope"):
        rows = [json.loads(line) for line in text.splitlines()]
        change(rows[1])
        jsonl(path, rows)
        place = ":2: "
    else:
        content = json.loads(text)
        keys = list(content) if isinstance(content, dict) else range(len(content))
        change(content[keys[1]])
        whole(path, content)
        lines = json.dumps(content[keys[0]], indent=1).count("\n") + 1
        place = f': row "{keys[1]}": ' if isinstance(content, dict) else f":{2 + lines}: "
    with pytest.raises(UserError) as caught:
        TASKS[task].load(tmp_path / task)
    assert str(caught.value).startswith(f"{path}{place}field {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("segment", "said"),
    [
        ({"segment": "A dog."}, 'segments[1]: field "claims" is missing'),
        ({"claims": "A dog"}, 'segments[1]: field "claims" must be a list, not a string'),
        ({"claims": ["A dog"]}, 'segments[1]: field "claims" must be a list of objects; it holds a string'),
        ({"claims": [{"claim": "A dog"}]}, 'segments[1].claims[0]: field "label" is missing'),
        ({"claims": [{"label": "hallucination"}]}, 'segments[1].claims[0]: field "claim" is missing'),
        (
            {"claims": [{"claim": "A dog", "label": "hallucination"}, {"claim": "A cat", "claim_label": "hallu"}]},
            'segments[1].claims[1]: field "claim_label" is "hallu", not one of "hallucination", "non-hallucination"',
        ),
    ],
)
def test_a_bad_claim_is_named(tmp_path: Path, segment: dict[str, Any], said: str) -> None:
    write_mhalubench_val(tmp_path)
    path = tmp_path / "mhalubench" / "MHaluBench_val-v0.1.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[2]["segments"][1] = segment
    jsonl(path, rows)  # a list or a row a line: the line is named
    with pytest.raises(UserError) as caught:
        TASKS["mhalubench"].load(tmp_path / "mhalubench")
    assert str(caught.value) == f"{path}:3: {said}"


def test_how_many_rows_are_bad(tmp_path: Path) -> None:
    rows = write_pope(tmp_path)
    path = tmp_path / "pope" / "coco_pope_random.json"
    bad = copy.deepcopy(rows)
    bad[2]["label"] = bad[5]["label"] = 1
    jsonl(path, [*bad, 17])
    with pytest.raises(
        UserError, match=r'.json:3: field "label" is 1, not one of "yes", "no" \(and 2 more bad rows\)$'
    ):
        TASKS["pope-random"].load(tmp_path / "pope-random")
    path.write_text(path.read_text() + '{"image": ')
    with pytest.raises(UserError, match=r"\(and 3 more bad rows\)$"):
        TASKS["pope-random"].load(tmp_path / "pope-random")
    path.write_text("")
    with pytest.raises(UserError, match=r"coco_pope_random.json: holds no rows$"):
        TASKS["pope-random"].load(tmp_path / "pope-random")
    jsonl(path, [17])
    with pytest.raises(UserError, match=r"random.json:1: a JSON object is expected, not a number$"):
        TASKS["pope-random"].load(tmp_path / "pope-random")
    write_sugarcrepe(tmp_path)
    cut = tmp_path / "sugarcrepe" / "add_att.json"
    cut.write_text(cut.read_text()[:-20])
    with pytest.raises(UserError, match=r"add_att.json:\d+: malformed JSON: "):
        TASKS["sugarcrepe"].load(tmp_path / "sugarcrepe")


@pytest.mark.parametrize(
    "name", [name for name, task in TASKS.items() if task.release and "dataset_info" not in str(task.release)]
)
def test_what_must_be_fetched(tmp_path: Path, name: str) -> None:
    release = TASKS[name].release
    assert release is not None
    with pytest.raises(UserError) as caught:
        TASKS[name].load(tmp_path / name)
    said = str(caught.value)
    assert said.startswith(f"task {name}: {tmp_path / release.folder} lacks {next(iter(release.files))}")
    assert "\n" not in said
    assert f"from {release.address}" in said
    assert release.address.startswith("https://")
    assert release.pictures in said
