"""EuroSAT and Oxford-IIIT Pet through tensorflow-datasets' own builders, on small archives in the authors' layout.

Preparing runs in a process of its own, as TensorFlow does not bear this one's strictness, and reading in another in
which TensorFlow cannot be imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sav_jax.errors import UserError
from sav_jax.eval.tasks import TASKS, find_task

LAND = [
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
]
# Breed, its number in the authors' lists (from 1, cats and dogs together), 1 for cats and 2 for dogs.
PETS = (("Abyssinian", 1, 1), ("american_bulldog", 2, 2), ("yorkshire_terrier", 37, 2))

PREPARE = """
    import os
    import sys
    from pathlib import Path
    import tensorflow_datasets as tfds

    archives, data_dir = Path(sys.argv[1]), sys.argv[2]

    def given(manager, urls):
        # In the place of the network; extracting is tensorflow-datasets' own.
        return manager.extract(
            {key: archives / os.path.basename(url) for key, url in urls.items()}
            if isinstance(urls, dict) else archives / os.path.basename(urls)
        )

    tfds.download.DownloadManager.download_and_extract = given
    for name in ("eurosat", "oxford_iiit_pet"):
        tfds.builder(name, data_dir=data_dir, file_format="array_record").download_and_prepare()
"""
READ = """
    import json
    import sys
    from pathlib import Path

    from importlib.machinery import PathFinder

    find = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "tensorflow" else find(name, *rest)
    from sav_jax.eval.tasks import find_tasks

    data_dir = Path(sys.argv[1])
    found = {}
    for task in find_tasks(sys.argv[2]):
        data = task.load(data_dir / task.name)
        found[task.name] = [
            None if part is None else [
                {
                    "question": item.example.question, "label": item.label, "offered": item.offered,
                    "group": item.group, "source": item.example.source, "id": item.example.id,
                    "size": item.example.image_sizes(), "digest": item.example.image_digests(),
                    "mean": [float(sum(image.resize((1, 1)).getpixel((0, 0)))) for image in item.example.load_images()],
                }
                for item in part
            ]
            for part in (data.pool, data.queries)
        ]
    assert "tensorflow" not in sys.modules
    print(json.dumps(found))
"""


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """Every picture that the archives hold, by its name in them."""
    made = {f"{name}_{n}.jpg": jpeg(10 * i + n, (64, 64)) for i, name in enumerate(LAND) for n in (1, 2, 3)}
    made["Forest_3.jpg"] = made["Forest_1.jpg"]
    for name, number, _ in PETS:
        made |= {f"{name}_{n}.jpg": jpeg(1000 * number + n, (40 + n, 32)) for n in (100, 101, 102)}
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, pictures: dict[str, bytes]) -> Path:
    """A data folder in which both sets were prepared."""
    archives, data_dir = tmp_path_factory.mktemp("archives"), tmp_path_factory.mktemp("data")
    with zipfile.ZipFile(archives / "EuroSAT.zip", "w") as file:
        for name, content in pictures.items():
            if (land := name.partition("_")[0]) in LAND:
                file.writestr(f"2750/{land}/{name}", content)
    mask = io.BytesIO()
    PIL.Image.new("L", (40, 32), 2).save(mask, "PNG")
    box = "<annotation><size><width>40</width><height>32</height></size><object><bndbox><xmin>4</xmin><ymin>4</ymin>"
    box += "<xmax>20</xmax><ymax>16</ymax></bndbox></object></annotation>"
    annotations = {"annotations/trainval.txt": b"", "annotations/test.txt": b""}
    for name, number, species in PETS:
        for n, part in ((100, "trainval"), (101, "trainval"), (102, "test")):
            annotations[f"annotations/{part}.txt"] += f"{name}_{n} {number} {species} 1\n".encode()
            annotations[f"annotations/trimaps/{name}_{n}.png"] = mask.getvalue()
            annotations[f"annotations/xmls/{name}_{n}.xml"] = box.encode()
    pets = {f"images/{name}": content for name, content in pictures.items() if name.partition("_")[0] not in LAND}
    for archive, files in (("images.tar.gz", pets), ("annotations.tar.gz", annotations)):
        with tarfile.open(archives / archive, "w:gz") as file:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    run(PREPARE, archives, data_dir)
    return data_dir


@pytest.fixture(scope="module")
def read(prepared: Path) -> dict[str, Any]:
    names = "eurosat,eurosat-plain,oxford_iiit_pet,oxford_iiit_pet-plain,tfds:eurosat,tfds:oxford_iiit_pet"
    return json.loads(run(READ, prepared, names).stdout)


def test_eurosat(read: dict[str, Any], pictures: dict[str, bytes]) -> None:
    pool, queries = read["eurosat"]
    assert queries is None, "there is no official split"
    assert sorted(item["label"] for item in pool) == sorted(3 * LAND)
    # Pixels are those of the authors' files, each with its class.
    wanted = sorted((hashlib.sha256(pictures[f"{land}_{n}.jpg"]).hexdigest(), land) for land in LAND for n in (1, 2, 3))
    assert sorted((item["digest"][0], item["label"]) for item in pool) == wanted
    assert {tuple(item["size"][0]) for item in pool} == {(64, 64)}
    # Equal pictures are one group.
    groups = [item["group"] for item in pool if item["group"]]
    assert len(groups) == 2
    assert len(set(groups)) == 1
    assert [item["label"] for item in pool if item["group"]] == ["Forest", "Forest"]
    for item in pool:
        stem, listed = item["question"].removesuffix(" Answer with the class name.").rsplit("\n", 1)
        assert stem == "\nWhat type of remote sensing image does the given image belong to?"
        a, b, c, d = item["offered"]
        assert listed == f"A. {a} B. {b} C. {c} D. {d}"
        assert len({a, b, c, d}) == 4
        assert {item["label"]} <= {a, b, c, d} <= set(LAND)
    # The right one is at no fixed place.
    assert len({item["offered"].index(item["label"]) for item in pool}) > 2
    plain, _ = read["eurosat-plain"]
    assert {item["question"] for item in plain} == {
        "What type of remote sensing image does the given image belong to? Answer with the class name."
    }
    assert [item["digest"] for item in plain] == [item["digest"] for item in pool]
    assert not any(item["offered"] for item in plain)


def test_oxford_pets(read: dict[str, Any], pictures: dict[str, bytes]) -> None:
    pool, queries = read["oxford_iiit_pet"]
    labels = [name.replace("_", " ") for name, _, _ in PETS]
    assert sorted(item["label"] for item in pool) == sorted(2 * labels)
    assert sorted(item["label"] for item in queries) == sorted(labels)
    by_digest = {hashlib.sha256(content).hexdigest(): name for name, content in pictures.items()}
    for item in pool + queries:
        assert by_digest[item["digest"][0]].rpartition("_")[0].replace("_", " ") == item["label"]
        assert item["question"].startswith("\nWhat type of animal is in the image?\nA. ")
    assert {tuple(item["size"][0]) for item in queries} == {(32, 142)}


def test_any_classification_set(read: dict[str, Any]) -> None:
    pool, queries = read["tfds:oxford_iiit_pet"]
    assert (len(pool), len(queries)) == (6, 3)
    assert {item["question"] for item in pool} == {"What is in the image? Answer with the class name."}
    assert pool[0]["source"] == "tfds:oxford_iiit_pet train[0]"
    assert [item["digest"] for item in read["tfds:eurosat"][0]] == [item["digest"] for item in read["eurosat"][0]]


def test_what_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError) as caught:
        TASKS["eurosat-plain"].load(tmp_path / "eurosat-plain")
    command = (
        "python -c \"import tensorflow_datasets as tfds; tfds.builder('eurosat', "
        f"data_dir={str(tmp_path)!r}, file_format='array_record').download_and_prepare()\""
    )
    assert str(caught.value) == (
        f"set eurosat of tensorflow-datasets: nothing prepared in {tmp_path / 'eurosat'} or "
        f'{tmp_path / "elsewhere" / "eurosat"}; prepare it once: pip install "sav-jax[prepare]" && {command}'
    )


def test_a_set_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    (task,) = find_task("tfds:eurosatt")
    with pytest.raises(UserError, match=r"has no set of that name \(did you mean eurosat\?\)$"):
        task.load(tmp_path / "eurosatt")


def test_what_was_prepared_otherwise(tmp_path: Path) -> None:
    for config in ("rgb", "all"):
        folder = tmp_path / "eurosat" / config / "2.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    with pytest.raises(UserError, match=r"prepared in several forms; name one: tfds:eurosat/all:2.0.0, tfds:euro"):
        TASKS["eurosat"].load(tmp_path / "eurosat")
    (task,) = find_task("tfds:eurosat/rgb:2.0.0")
    assert task.name == "tfds:eurosat.rgb:2.0.0"
    with pytest.raises(UserError, match=r"eurosat/rgb/2.0.0 was prepared as tfrecord, which only TensorFlow reads"):
        task.load(tmp_path / task.name)
