"""Readers of benchmarks with free answers, each on a small set in exactly the format of its authors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import (
    vizwiz_rows,
    whole,
    write_flickr30k,
    write_gqa,
    write_okvqa,
    write_scienceqa,
    write_textvqa,
    write_vizwiz,
)

from sav_jax.errors import UserError
from sav_jax.eval.tasks import TASKS, Data, Item, split_task
from sav_jax.eval.tasks.scienceqa import parse_scienceqa
from sav_jax.examples import Example

SHORT = "\nAnswer the question using a single word or phrase."


def load(task: str, data_dir: Path) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    data = TASKS[task].load(data_dir / task)
    assert data.queries is not None
    return data.pool, data.queries


def test_flickr30k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_flickr30k(tmp_path)
    pool, queries = load("flickr30k", tmp_path)
    assert [item.example.id for item in pool] == ["1000092790.jpg", "1000092793.jpg"]
    assert [item.example.id for item in queries] == ["1000092792.jpg", "1000092794.jpg"]
    item = queries[0]
    assert item.example.question == "Provide a one-sentence caption for the provided image."
    assert item.label == "A man rides horse number 2."
    assert item.references == (item.label, "Someone is riding 2.", "A horse", "A rider .", "A man on a horse.")
    assert item.example.images == (tmp_path / "flickr30k" / "flickr30k-images" / "1000092792.jpg",)
    assert item.example.source == f"{tmp_path}/flickr30k/dataset_flickr30k.json: images[2]"
    assert "has 5 rows where the release has 31,014" in capsys.readouterr().err


def test_okvqa(tmp_path: Path) -> None:
    write_okvqa(tmp_path)
    pool, queries = load("okvqa", tmp_path)
    assert (len(pool), len(queries)) == (3, 4)
    item = queries[3]
    assert (item.example.question, item.label, item.example.id) == (
        f"What sport is 3?{SHORT}",
        "race 2971473",
        "2971473",
    )
    assert item.references == ("motocross",) * 4 + ("race 2971473",) * 6
    assert item.example.images == (tmp_path / "okvqa" / "val2014" / "COCO_val2014_000000297141.jpg",)
    # Without train, support is drawn from val, and the other question about its picture is not asked.
    (tmp_path / "okvqa" / "mscoco_train2014_annotations.json").unlink()
    data = TASKS["okvqa"].load(tmp_path / "okvqa")
    assert data.queries is None
    split = split_task(TASKS["okvqa"], data, 1, 0)
    assert (len(split.support), len(split.queries)) == (1, 2)
    assert not {item.group for item in split.support} & {item.group for item in split.queries}


def test_textvqa(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    pool, queries = load("textvqa", tmp_path)
    assert (len(pool), len(queries)) == (3, 4)
    item = queries[2]
    assert (item.example.question, item.label) == (f"what is the brand of camera 2?{SHORT}", "dakota")
    assert item.references == ("dakota", "dakota digital") * 5
    assert item.group == "val003a8ae2ef43b901"
    assert item.example.images == (tmp_path / "textvqa" / "train_images" / "val003a8ae2ef43b901.jpg",)
    (tmp_path / "textvqa" / "TextVQA_0.5.1_train.json").unlink()
    assert TASKS["textvqa"].load(tmp_path / "textvqa").queries is None


def test_vizwiz(tmp_path: Path) -> None:
    write_vizwiz(tmp_path)
    rows = vizwiz_rows("val", 4)
    rows[1]["answers"][:4] = [{"answer": "blue", "answer_confidence": "maybe"}] * 4
    whole(tmp_path / "vizwiz" / "val.json", rows)
    pool, queries = load("vizwiz", tmp_path)
    assert (len(pool), len(queries)) == (6, 4)
    item = queries[1]
    assert item.example.question == (
        f"What is number 1?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
    )
    assert (item.label, item.subset) == ("unanswerable", "unanswerable")
    assert item.references == ("blue",) * 4 + ("unanswerable",) * 6
    (tmp_path / "vizwiz" / "train.json").unlink()
    assert TASKS["vizwiz"].load(tmp_path / "vizwiz").queries is None


def test_gqa(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    pool, queries = load("gqa", tmp_path)
    assert (len(pool), len(queries)) == (3, 4)
    item = queries[3]
    assert (item.example.question, item.label, item.example.id) == (f"Is it overcast in 3?{SHORT}", "no", "201307253")
    assert (item.references, item.group) == (("no",), "t161311")
    assert item.example.source == f'{tmp_path}/gqa/testdev_balanced_questions.json: row "201307253"'
    (tmp_path / "gqa" / "val_balanced_questions.json").unlink()
    assert TASKS["gqa"].load(tmp_path / "gqa").queries is None


def test_scienceqa(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    pool, queries = load("scienceqa", tmp_path)
    assert [item.example.id for item in pool] == ["1", "2"]
    assert [item.example.id for item in queries] == ["11", "22", "33"]
    first, second, third = queries
    ending = "Answer with the option's letter from the given choices directly."
    assert first.example.question == (
        "Context: A hint.\nWhich of these states is farthest north in 11?\nA. West Virginia\nB. Louisiana\n" + ending
    )
    assert second.example.question.startswith("Which of these"), "there is no context"
    assert [item.label for item in queries] == ["B", "A", "B"]
    assert [item.offered for item in queries[:2]] == [("A", "B"), ("A", "B", "C")]
    assert [item.subset for item in queries] == ["with picture", "with picture", "without picture"]
    assert first.example.images == (tmp_path / "scienceqa" / "images" / "test" / "11" / "image.png",)
    assert third.example.images == ()
    # Only those with a picture; both tasks share a folder.
    pool, queries = load("scienceqa-image", tmp_path)
    assert [item.example.id for item in (*pool, *queries)] == ["1", "11", "22"]
    path = tmp_path / "scienceqa" / "pid_splits.json"
    splits = json.loads(path.read_text())
    whole(path, splits | {"test": [*splits["test"], "44"]})
    with pytest.raises(UserError, match=r"pid_splits.json: names problem '44', which problems.json has not$"):
        load("scienceqa", tmp_path)
    whole(path, splits | {"test": {"11": True}})
    with pytest.raises(UserError, match=r'pid_splits.json: field "test" must be a list of strings$'):
        load("scienceqa", tmp_path)
    path.write_text('{"train": ["1"')
    with pytest.raises(UserError, match=r"pid_splits.json:1: malformed JSON: "):
        load("scienceqa", tmp_path)


@pytest.mark.parametrize(
    ("text", "letter"),
    # What LLaVA's eval_science_qa.py reads in these texts.
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. Louisiana", "B"),
        ("B\nbecause it is", "B"),
        ("The answer is A.", "A"),
        ("It is far away. The answer is A", "A"),
        ("The answer is B. Not: The answer is A.", "B"),
        ("(B)", None),
        ("b", None),
        ("D", None),
        ("Louisiana", None),
        ("", None),
    ],
)
def test_scienceqa_reads_letters_as_llava(text: str, letter: str | None) -> None:
    assert parse_scienceqa(text, Item(Example("Which?"), offered=("A", "B", "C"))) == letter


# Malformed rows: the file, where its rows are, what is changed in the second one, what is said of it

Change = Callable[[dict[str, Any]], Any]


def put(**fields: Any) -> Change:
    return lambda row: row.update(fields)


FILES: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "flickr": ("flickr30k", write_flickr30k, "flickr30k/dataset_flickr30k.json", "images"),
    "questions": ("okvqa", write_okvqa, "okvqa/OpenEnded_mscoco_val2014_questions.json", "questions"),
    "answers": ("okvqa", write_okvqa, "okvqa/mscoco_val2014_annotations.json", "annotations"),
    "train": ("okvqa", write_okvqa, "okvqa/OpenEnded_mscoco_train2014_questions.json", "questions"),
    "text": ("textvqa", write_textvqa, "textvqa/TextVQA_0.5.1_val.json", "data"),
    "gqa": ("gqa", write_gqa, "gqa/testdev_balanced_questions.json", ""),
    "science": ("scienceqa", write_scienceqa, "scienceqa/problems.json", ""),
}
BAD = [
    ("flickr", put(split="dev"), '"split" is "dev", not one of "train", "val", "test"'),
    ("flickr", put(sentences=[]), '"sentences" is an empty list'),
    ("flickr", put(sentences=[{"raw": " "}]), '"raw" is empty'),
    ("flickr", put(split="test", filename="no.jpg"), '"filename" names \'no.jpg\': there is no no.jpg in'),
    ("questions", put(question_id="7"), '"question_id" must be an integer, not a string'),
    ("questions", put(question_id=7), '"question_id" is 7, to which mscoco_val2014_annotations.json has no answers'),
    ("questions", put(image_id=7), '"image_id" names \'COCO_val2014_000000000007.jpg\''),
    ("questions", put(question=None), '"question" is missing'),
    ("answers", put(answers=["race"]), '"answers" must be a list of objects; it holds a string'),
    ("answers", put(answers=[{"raw_answer": "race"}]), '"answer" is missing'),
    ("answers", put(answers=[{"answer": 4}]), '"answer" must be a string, not a number'),
    ("answers", put(question_id=True), '"question_id" must be an integer, not a boolean'),
    ("train", put(image_id=None), '"image_id" is missing'),
    ("text", put(image_id="x"), '"image_id" names \'x.jpg\': there is no x.jpg in'),
    ("text", put(answers=[{"answer": "x"}]), '"answers" must be a list of strings; it holds an object'),
    ("text", put(question_id=[]), '"question_id" must be a string or an integer'),
    ("gqa", put(imageId=3), '"imageId" must be a string, not a number'),
    ("gqa", put(answer=""), '"answer" is empty'),
    ("science", put(answer=5), '"answer" is 5, the place of none of the 3 choices'),
    ("science", put(answer=-1), '"answer" is -1, the place of none'),
    ("science", put(choices=["x"] * 6), '"choices" holds 6 choices; there are 5 at most'),
    ("science", put(hint=3), '"hint" must be a string'),
    ("science", put(image="no.png"), '"image" names \'train/2/no.png\''),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "said"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, file: str, change: Change, said: str) -> None:
    task, write, name, field = FILES[file]
    write(tmp_path)
    path = tmp_path / name
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content[field] if field else content
    key = 1 if field else list(rows)[1]
    change(rows[key])
    whole(path, content)
    with pytest.raises(UserError) as caught:
        load(task, tmp_path)
    place = f"{field}[1]" if field else f'row "{key}"'
    assert str(caught.value).startswith(f"{path}: {place}: field {said}")
    assert "\n" not in str(caught.value)


def test_what_is_no_such_file(tmp_path: Path) -> None:
    write_textvqa(tmp_path)
    path = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    rows = json.loads(path.read_text())["data"]
    contents: tuple[Any, ...] = (rows, {"data": {}}, {"rows": rows})
    for content in contents:
        whole(path, content)
        with pytest.raises(UserError, match=r'val.json: an object with a list in field "data" is expected$'):
            load("textvqa", tmp_path)
    whole(path, {"data": [17, *rows, 18]})
    with pytest.raises(
        UserError, match=r"val.json: data\[0\]: a JSON object is expected, not a number \(and 1 more bad row\)$"
    ):
        load("textvqa", tmp_path)
    whole(path, {"data": []})
    with pytest.raises(UserError, match=r"val.json: holds no rows$"):
        load("textvqa", tmp_path)
    path.write_text('{"data": [')
    with pytest.raises(UserError, match=r"val.json:1: malformed JSON: "):
        load("textvqa", tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"val.json: not UTF-8 text$"):
        load("textvqa", tmp_path)


def test_pool_and_queries_have_references(tmp_path: Path) -> None:
    """The shown answer is one of them, in every task with free answers."""
    for write in (write_flickr30k, write_okvqa, write_textvqa, write_vizwiz, write_gqa, write_scienceqa):
        write(tmp_path)
    for name, task in TASKS.items():
        if task.generative:
            data: Data = task.load(tmp_path / name)
            for item in (*data.pool, *(data.queries or ())):
                assert item.label in item.references, (name, item.example.source)
