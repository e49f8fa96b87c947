"""Reading rows and folders, and everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from sav_jax.errors import UserError
from sav_jax.examples import Example, read_examples

ORIENTATION = 0x0112


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def picture(path: Path, size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = (200, 30, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(path)
    return path


def complaint(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_examples(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read


def test_rows_as_the_savs_release_documents_them(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "b.jpg")
    path = write_rows(
        tmp_path / "train.jsonl",
        {"image": "images/a.png", "question": "What?", "label": "cat"},
        {
            "image": ["images/a.png", str(tmp_path / "b.jpg")],
            "question": "Same?",
            "label": "no",
            "id": "pair-1",
            "note": 3,
        },
        "",
        {"image": [], "question": "Is water wet?", "label": "yes", "id": 7},
        {"question": "Is fire cold?"},
    )
    rows = read_examples(path)
    assert [row.images for row in rows] == [
        (tmp_path / "images/a.png",),
        (tmp_path / "images/a.png", tmp_path / "b.jpg"),
        (),
        (),
    ]
    assert [row.question for row in rows] == ["What?", "Same?", "Is water wet?", "Is fire cold?"]
    assert [row.label for row in rows] == ["cat", "no", "yes", None]
    assert [row.id for row in rows] == ["0", "pair-1", "7", "3"]
    assert [row.source for row in rows] == [f"{path}:{line}" for line in (1, 2, 4, 5)]


def test_json_list_knows_its_lines(tmp_path: Path) -> None:
    rows = [{"question": "Üben [1, 2]?\u2028", "label": "ja"}, {"question": "Two?", "label": "b"}]
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    read = read_examples(path)
    assert [row.question for row in read] == ["Üben [1, 2]?\u2028", "Two?"]
    assert [row.source for row in read] == [f"{path}:3", f"{path}:7"]


def test_json_list_and_json_lines_give_the_same_examples(tmp_path: Path) -> None:
    rows = [{"question": f"Question {i}?\u2028", "label": "x" * (i + 1)} for i in range(5)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps(rows), encoding="utf-8")
    without_source = [[dataclasses.replace(row, source="") for row in read_examples(path)] for path in (lines, listed)]
    assert without_source[0] == without_source[1]


def test_folder_of_class_folders(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/10.PNG", "dog/more/1.jpg", "cat/x.webp"):
        picture(tmp_path / name)
    for hidden in ("dog/.hidden.png", ".git/y.png", "dog/.thumbs/z.png"):
        picture(tmp_path / hidden)
    (tmp_path / "dog/notes.txt").write_text("no picture")
    (tmp_path / "labels.csv").write_text("no picture")
    rows = read_examples(tmp_path, "What animal is this?", require_labels=True)
    assert [row.id for row in rows] == ["cat/x.webp", "dog/10.PNG", "dog/2.png", "dog/more/1.jpg"]
    assert [row.label for row in rows] == ["cat", "dog", "dog", "dog"]
    assert {row.question for row in rows} == {"What animal is this?"}
    assert rows[1].images == (tmp_path / "dog/10.PNG",)


def test_folder_without_classes_is_unlabelled(tmp_path: Path) -> None:
    picture(tmp_path / "b.png")
    picture(tmp_path / "a.png")
    assert [(row.id, row.label) for row in read_examples(tmp_path, "What?")] == [("a.png", None), ("b.png", None)]
    assert "no class folders" in complaint(tmp_path, question="What?", require_labels=True)


def test_default_question_fills_rows_without_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"question": "Own?"}, {"label": "a"})
    assert [row.question for row in read_examples(path, "Default?")] == ["Own?", "Default?"]


def test_image_marks_match_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    path = write_rows(tmp_path / "rows.jsonl", {"image": ["a.png", "a.png"], "question": "Is <image> like <image>?"})
    assert len(read_examples(path)[0].images) == 2


# What is refused


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"question": "What?"', ":2: malformed JSON: "),
        ("[1]", ":2: a JSON object is expected, not a list"),
        ("null", ":2: a JSON object is expected, not null"),
        ("{" * 3000 + "}" * 3000, ":2: malformed JSON: "),
        ("[" * 100_000, ":2: malformed JSON: nested too deeply"),
        (r'{"question": "What?", "label": "\ud83d"}', r":2: \ud83d is half of a character"),
        (r'{"question": "What?", "id": "\udcff"}', r":2: \udcff is half of a character"),
        ({"label": "a"}, ':2: field "question" is missing (--question'),
        ({"question": None}, ':2: field "question" is missing'),
        ({"question": " "}, ':2: field "question" is empty'),
        ({"question": 5}, ':2: field "question" must be a string, not a number'),
        ({"question": "What?", "label": ""}, ':2: field "label" is empty'),
        ({"question": "What?", "label": 3}, ':2: field "label" must be a string, not a number'),
        ({"question": "What?", "label": ["a"]}, ':2: field "label" must be a string, not a list'),
        ({"question": "What?", "id": True}, ':2: field "id" must be a string or an integer, not a boolean'),
        (
            {"question": "What?", "image": {"path": "a.png"}},
            ':2: field "image" must be a path or a list of paths, not an object',
        ),
        (
            {"question": "What?", "image": ["a.png", 1]},
            ':2: field "image" must be a path or a list of paths, not a number',
        ),
        ({"question": "What?", "image": ""}, ':2: field "image" holds an empty path'),
        ({"question": "What?", "image": "gone.png"}, "names 'gone.png', which does not exist"),
        ({"question": "What?", "image": "."}, "which is not a file"),
        (
            {"question": "What?", "image": "https://x.org/a.png"},
            "must be the path of a local file, or gs://bucket/name, not 'https://x.org/a.png'",
        ),
        ({"question": "What?", "image": "iVBORw0KGgo" * 999}, "...', which does not exist"),
        ({"question": "What?", "image": "a\0b"}, "must be the path of a local file"),
        ({"question": "What?", "images": "a.png"}, ':2: field "images" is not known'),
        (
            {"question": "What is in <image>?"},
            ':2: field "question" holds 1 <image> mark for 0 images in field "image"',
        ),
        (
            {"question": "<image><image>?", "image": "a.png"},
            ':2: field "question" holds 2 <image> marks for 1 image in',
        ),
    ],
)
def test_bad_row(tmp_path: Path, row: object, expected: str) -> None:
    picture(tmp_path / "a.png")
    path = write_rows(tmp_path / "rows.jsonl", {"question": "Fine?"}, row)
    message = complaint(path)
    assert message.startswith(f"{path}:2: ")
    assert expected in message
    assert len(message) < 700


def test_first_problem_and_how_many_more(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"question": "Fine?"}, {"question": 1}, {"question": "Fine?"}, "{", {})
    assert complaint(path) == f'{path}:2: field "question" must be a string, not a number (and 2 more bad rows)'
    path = write_rows(tmp_path / "rows.jsonl", {"question": 1}, {})
    assert complaint(path).endswith("not a number (and 1 more bad row)")


def test_labels_can_be_required(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", {"question": "What?", "label": "a"}, {"question": "What?", "label": None}
    )
    assert read_examples(path)[1].label is None
    assert complaint(path, require_labels=True) == f'{path}:2: field "label" is missing'


@pytest.mark.parametrize("content", ["", "\n \n", "[]", " [ ] "])
def test_no_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    assert complaint(path) == f"{path}: holds no rows"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"question": "a"},\n {"question": }]', ":2: malformed JSON: Expecting value"),
        ('[{"question": "a"},\n {"question": "b"}\n', ':3: malformed JSON: "," or "]" is missing'),
        ('[{"question": "a"}\n {"question": "b"}]', ':2: malformed JSON: "," or "]" is missing'),
        ('[{"question": "a"},\n {"question": "\\ud83d?"}]', r":2: \ud83d is half of a character"),
        ('[{"question": "a"}]\n\n{}', ":3: malformed JSON: something follows"),
        (
            '[{"question": "a"},\n{"question": 2},\n\n7]',
            ':2: field "question" must be a string, not a number (and 1 more bad row)',
        ),
        ("[" * 100_000, ":1: malformed JSON: nested too deeply"),
    ],
)
def test_bad_list(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert complaint(path).startswith(f"{path}{expected}")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert complaint(tmp_path / "gone.jsonl") == f"{tmp_path / 'gone.jsonl'}: no such file or folder"
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "a"}\n{"question": "\xe9t\xe9"}\n')
    assert complaint(path) == f"{path}:2: not UTF-8 text"


def test_bad_folders(tmp_path: Path) -> None:
    assert "neither class folders nor pictures" in complaint(tmp_path, question="What?")
    picture(tmp_path / "cat/a.png")
    assert "--question must say" in complaint(tmp_path)
    assert "--question) is empty" in complaint(tmp_path, question=" ")
    (tmp_path / "dog").mkdir()
    assert complaint(tmp_path, question="What?").startswith(f"{tmp_path / 'dog'}: class folder without pictures")
    picture(tmp_path / "dog/a.png")
    picture(tmp_path / "stray.png")
    assert "beside class folders (cat, ...)" in complaint(tmp_path, question="What?")


def test_example_checks_itself() -> None:
    with pytest.raises(UserError, match='example: field "question" is empty'):
        Example("")
    with pytest.raises(UserError, match="1 <image> mark for 0 images"):
        Example("<image>?")


# Pictures


def pixels(width: int = 5, height: int = 3) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3) * 5)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp"])
def test_sizes_agree_with_the_pixels_for_every_orientation(
    tmp_path: Path, suffix: str, orientation: int | None
) -> None:
    path = tmp_path / f"a{suffix}"
    exif = PIL.Image.Exif()
    if orientation:
        exif[ORIENTATION] = orientation
    pixels().save(path, exif=exif)
    example = Example("What?", (path,))
    (image,) = example.load_images()
    assert image.mode == "RGB"
    assert image.size == ((3, 5) if orientation and orientation > 4 else (5, 3))
    assert example.image_sizes() == [(image.height, image.width)]


def test_png_orientation_after_the_pixels(tmp_path: Path) -> None:
    """The eXIf chunk may follow the pixels; Pillow then reports it only once they are decoded."""
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "a.png"
    pixels().save(path)
    plain = path.read_bytes()
    chunks = PIL.PngImagePlugin
    late = tmp_path / "late.png"
    with late.open("wb") as file:
        file.write(plain[:-12])
        chunks.putchunk(file, b"eXIf", exif.tobytes()[6:])
        file.write(plain[-12:])
    example = Example("What?", (late,))
    assert example.image_sizes() == [(5, 3)]
    assert example.load_images()[0].size == (3, 5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = PIL.Image.new(mode, (4, 2), 0 if mode in {"1", "L", "P", "I;16"} else None)
    example = Example("What?", (image,))
    assert [(image.mode, image.size) for image in example.load_images()] == [("RGB", (4, 2))]
    assert example.image_sizes() == [(2, 4)]


def test_loads_what_transformers_loads(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 5
    path = tmp_path / "a.jpg"
    pixels(40, 30).save(path, exif=exif)
    ours = np.asarray(Example("What?", (path,)).load_images()[0])
    np.testing.assert_array_equal(ours, np.asarray(load_image(str(path))))


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    one, copy, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / "c.png", (7, 4))
    digests = Example("What?", (one, copy, other)).image_digests()
    assert digests[0] == digests[1] != digests[2]
    assert all(len(digest) == 64 for digest in digests)
    wide, tall = PIL.Image.new("RGB", (4, 2)), PIL.Image.new("RGB", (2, 4))
    digests = Example("What?", (wide, wide.copy(), tall)).image_digests()
    assert digests[0] == digests[1] != digests[2]


def test_truncated_picture_is_found_when_decoded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = PIL.Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for suffix in (".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"):
        path = tmp_path / f"a{suffix}"
        noise.save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        example = Example("What?", (path,), source="rows.jsonl:3")
        with pytest.raises(UserError, match=r'rows\.jsonl:3: field "image": .* cannot be read: ') as caught:
            example.load_images()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_file_that_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("not a picture")
    example = Example("What?", (path,), source="rows.jsonl:3")
    for read in (example.load_images, example.image_sizes):
        with pytest.raises(UserError, match=r'rows.jsonl:3: field "image": .*a.png cannot be read: not a picture'):
            read()
    path.unlink()
    for missing in (example.load_images, example.image_sizes, example.image_digests):
        with pytest.raises(UserError, match=r'rows.jsonl:3: field "image": .*a.png does not exist'):
            missing()
