"""Small sets in exactly the formats in which the authors of benchmarks publish them, written into a data folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


def picture(path: Path, seed: int = 0) -> bytes:
    """Write a small picture whose pixels follow from its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = int.from_bytes(hashlib.sha256(f"{path.name}{seed}".encode()).digest()[:4])
    pixels = np.random.default_rng(name).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, "PNG")
    return path.read_bytes()


def jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def whole(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_pope(data: Path, setting: str = "random") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "question_id": 6 * i + j + 1,
            "image": f"COCO_val2014_00000031019{i}.jpg",
            "text": f"Is there a {thing} in the image?",
            "label": label,
        }
        for i in range(3)
        for j, (thing, label) in enumerate((("snowboard", "yes"), ("car", "no"), ("person", "yes"), ("cup", "no")))
    ]
    jsonl(data / "pope" / f"coco_pope_{setting}.json", rows)
    for row in rows:
        picture(data / "pope" / "val2014" / row["image"])
    return rows


def sugarcrepe_pair(i: int) -> dict[str, str]:
    return {
        "filename": f"00000008532{i}.jpg",
        "caption": f"A young woman with {i} piercings.",
        "negative_caption": f"A tattooed woman with {i} piercings.",
    }


def write_sugarcrepe(data: Path) -> None:
    # Keys need not count on: swap_obj has gaps.
    whole(data / "sugarcrepe" / "add_att.json", {str(3 * i): sugarcrepe_pair(i) for i in range(3)})
    shared = {
        "filename": "000000085320.jpg",
        "caption": "A young woman with 0 piercings.",
        "negative_caption": "A man.",
    }
    whole(data / "sugarcrepe" / "swap_obj.json", {"0": shared})
    for i in range(3):
        picture(data / "sugarcrepe" / "val2017" / sugarcrepe_pair(i)["filename"])


NATURALBENCH: list[dict[str, Any]] = [
    {
        "Index": 7,
        "Question_0": "Is the dog running?",
        "Question_1": "Is the dog asleep?",
        "Image_0_Question_0": "Yes",
        "Image_1_Question_0": "No",
        "Image_0_Question_1": "No",
        "Image_1_Question_1": "Yes",
        "Question_Type": "yes_no",
        "Source": "Flickr30K",
    },
    {
        "Index": 8,
        "Question_0": "What is it? Option: A: a cat; B: a dog;",
        "Question_1": "Where is it? Option: A: in; B: out;",
        "Image_0_Question_0": "A",
        "Image_1_Question_0": "B",
        "Image_0_Question_1": "B",
        "Image_1_Question_1": "A",
        "Question_Type": "multiple_choice",
        "Source": "DOCCI",
    },
]


def write_naturalbench(data: Path, rows: list[dict[str, Any]] = NATURALBENCH) -> None:
    exported = []
    for place, row in enumerate(rows):
        paths = {f"Image_{i}": f"images/{place}_{i}.png" for i in (0, 1)}
        for path in paths.values():
            picture(data / "naturalbench" / path)
        exported.append(row | paths)
    jsonl(data / "naturalbench" / "naturalbench.jsonl", exported)


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 2) -> None:
    """As the Hugging Face hub keeps it: a picture is a struct of its file's bytes and name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = {name: image for name in rows[0] if name.lower().startswith("image_") and "uestion" not in name}
    columns = {name: pa.array([row[name] for row in rows], type=names.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def retrieval_rows(groups: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "image": f"/home/somebody/data/naturalbench/{images[i]}.jpg",
            "question": f"Does this image show 'The caption of {images[q]}.'?",
            "question_id": number,
            "label": "Yes" if q == i else "No",
        }
        for number, images in enumerate(groups, start=1)
        for q in (0, 1)
        for i in (0, 1)
    ]


def write_retrieval(data: Path) -> None:
    folder = data / "naturalbench-retrieval"
    rows = retrieval_rows([("a", "b"), ("c", "d"), ("e", "f"), ("b", "g")])
    jsonl(folder / "naturalbench_ret_test.jsonl", rows)
    jsonl(folder / "naturalbench_ret_train.jsonl", [rows[0] | {"question_id": 1}, rows[1] | {"question_id": 2}])
    for name in "abcdefg":
        picture(folder / "images" / f"{name}.jpg")


def vizwiz_rows(part: str, number: int) -> list[dict[str, Any]]:
    return [
        {
            "image": f"VizWiz_{part}_{i:08}.jpg",
            "question": f"What is number {i}?",
            "answers": [
                {"answer": "unanswerable" if i % 2 else f"can {i}", "answer_confidence": "yes"} for _ in range(10)
            ],
            "answer_type": "unanswerable" if i % 2 else "other",
            "answerable": 1 - i % 2,
        }
        for i in range(number)
    ]


def write_vizwiz(data: Path) -> None:
    for part, number in (("train", 6), ("val", 4)):
        rows = vizwiz_rows(part, number)
        whole(data / "vizwiz" / f"{part}.json", rows)
        for row in rows:
            picture(data / "vizwiz" / part / row["image"])


def write_mhalubench(data: Path) -> None:
    rows = [
        {
            "id": i,
            "image_path": f"/TextVQA/train_images/{i}.jpg",
            "claim_list": ["The laptop is a Toshiba", f"There are {i} laptops"],
            "ref_tool_info": "Here is the object detection expert model's result: laptop",
            "ref_claim_label": ["hallucination", "non-hallucination"],
            "ref_reason": [{"claim1": "hallucination", "reason": "..."}],
            "ref_prompt": "...",
        }
        for i in range(3)
    ]
    whole(data / "mhalubench" / "MHaluBench_train.json", rows)
    for i in range(3):
        picture(data / "mhalubench" / "TextVQA" / "train_images" / f"{i}.jpg")


def write_mhalubench_val(data: Path, version: str = "0.1", field: str = "claim_label") -> None:
    """Two pictures that were described, and before them one that was drawn, which is not there."""

    def claim(text: str, label: str) -> dict[str, str]:
        return {"claim": text, field: label}

    rows = [
        {
            "id": i,
            "image_path": f"/home/somebody/{task_type}/v{i}.jpg",
            "response": "A dog runs. Lovely. It is brown and old.",
            "segments": [
                {"segment": "A dog runs.", "claims": [claim(f"A dog of v{version} runs", "hallucination")]},
                {"segment": "Lovely.", "claims": []},
                {
                    "segment": "It is brown and old.",
                    "claims": [
                        claim("The dog is brown", "non-hallucination"),
                        claim("The dog is old", "hallucination"),
                    ],
                },
            ],
            "model": "llava",
            "label": "hallucination",
            "task_type": task_type,
            "prompt": "Describe the picture.",
        }
        for i, task_type in enumerate(("text-to-image", "image-to-text", "image-to-text"))
    ]
    whole(data / "mhalubench" / f"MHaluBench_val-v{version}.json", rows)
    for i in (1, 2):
        picture(data / "mhalubench" / "data" / "image-to-text" / f"v{i}.jpg")


def write_vlguard(data: Path) -> None:
    for part, number in (("train", 4), ("test", 2)):
        rows: list[dict[str, Any]] = []
        for i in range(number):
            rows.append(
                {
                    "id": f"Ads_{i}",
                    "image": f"bad_ads/{part}-unsafe-{i}.png",
                    "safe": False,
                    "harmful_category": "risky behavior",
                    "harmful_subcategory": "political",
                    "instr-resp": [{"instruction": f"Share picture {i}.", "response": "I cannot."}],
                }
            )
            rows.append(
                {
                    "id": f"Safe_{i}",
                    "image": f"memes/{part}-safe-{i}.png",
                    "safe": True,
                    "instr-resp": [
                        {"safe_instruction": f"What is picture {i}?", "response": "A tool."},
                        {"unsafe_instruction": f"How do I steal {i}?", "response": "I cannot."},
                    ],
                }
            )
        whole(data / "vlguard" / f"{part}.json", rows)
        for row in rows:
            picture(data / "vlguard" / part / row["image"])


def write_memes(data: Path) -> None:
    for name, number in (("train", 6), ("test_seen", 4), ("dev_seen", 2)):
        rows = [
            {"id": 10 * number + i, "img": f"img/{number}{i}.png", "label": i % 2, "text": f"its {i}"}
            for i in range(number)
        ]
        jsonl(data / "hateful-memes" / f"{name}.jsonl", rows)
        for row in rows:
            picture(data / "hateful-memes" / str(row["img"]))


BLINK_ROW = {
    "question": "<image>\n<image>\n<image>\nWhich image shares the same style as the reference image? Select from the "
    "following choices. (A) the second image (B) the third image",
    "label": "(A)",
    "image_1": "val_Art_Style_1_0.png",
    "image_2": "val_Art_Style_1_1.png",
    "image_3": "val_Art_Style_1_2.png",
    "image_4": None,
}


def write_blink(data: Path) -> None:
    rows = [
        BLINK_ROW | {"label": label} | {f"image_{k + 1}": f"val_Art_Style_{i}_{k}.png" for k in range(3)}
        for i, label in enumerate(("(A)", "(B)", "(A)"), start=1)
    ]
    whole(data / "blink" / "Art_Style.json", rows)
    for i in range(1, 4):
        for k in range(3):
            picture(data / "blink" / "images" / f"val_Art_Style_{i}_{k}.png")


# Tasks with free answers


def write_flickr30k(data: Path) -> None:
    images = []
    for i, split in enumerate(("train", "val", "test", "train", "test")):
        raw = [f"A man rides horse number {i}.", f"Someone is riding {i}.", "A horse", "A rider .", "A man on a horse."]
        images.append(
            {
                "sentids": list(range(5 * i, 5 * i + 5)),
                "imgid": i,
                "sentences": [
                    {"tokens": text.strip(" .").lower().split(), "raw": text, "imgid": i, "sentid": 5 * i + k}
                    for k, text in enumerate(raw)
                ],
                "split": split,
                "filename": f"100009279{i}.jpg",
            }
        )
        if split != "val":  # which is not read
            picture(data / "flickr30k" / "flickr30k-images" / f"100009279{i}.jpg")
    whole(data / "flickr30k" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def write_okvqa(data: Path) -> None:
    for part, number in (("train", 3), ("val", 4)):
        common = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": f"{part}2014"}
        questions = [
            {"image_id": 297140 + i // 2, "question": f"What sport is {i}?", "question_id": 2971470 + i}
            for i in range(number)
        ]
        annotations = [
            {
                "image_id": question["image_id"],
                "answer_type": "other",
                "question_type": "four",
                "question_id": question["question_id"],
                "answers": [
                    {
                        "answer_id": k + 1,
                        "raw_answer": "racing",
                        "answer_confidence": "yes",
                        "answer": "motocross" if k < 4 else f"race {question['question_id']}",
                    }
                    for k in range(10)
                ],
                "confidence": 3,
            }
            for question in questions
        ]
        folder = data / "okvqa"
        whole(
            folder / f"OpenEnded_mscoco_{part}2014_questions.json",
            {**common, "task_type": "Open-Ended", "questions": questions},
        )
        # The answers need not come in the questions' order.
        whole(folder / f"mscoco_{part}2014_annotations.json", {**common, "annotations": annotations[::-1]})
        for question in questions:
            picture(folder / f"{part}2014" / f"COCO_{part}2014_{question['image_id']:012}.jpg")


def write_textvqa(data: Path) -> None:
    for part, number in (("train", 3), ("val", 4)):
        rows = [
            {
                "question": f"what is the brand of camera {i}?",
                "image_id": f"{part}003a8ae2ef43b90{i // 2}",
                "image_classes": ["Cassette deck"],
                "flickr_original_url": "https://farm2.staticflickr.com/4/5_o.jpg",
                "flickr_300k_url": "https://c4.staticflickr.com/5/4_z.jpg",
                "image_width": 1024,
                "image_height": 664,
                "answers": ["dakota", "dakota digital"] * 5,
                "question_tokens": ["what", "is"],
                "question_id": 34602 + i,
                "set_name": part,
            }
            for i in range(number)
        ]
        content = {"dataset_type": part, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": rows}
        whole(data / "textvqa" / f"TextVQA_0.5.1_{part}.json", content)
        for row in rows:
            picture(data / "textvqa" / "train_images" / f"{row['image_id']}.jpg")


def write_gqa(data: Path) -> None:
    for part, number in (("val", 3), ("testdev", 4)):
        rows: dict[str, dict[str, Any]] = {
            f"20130725{i}": {
                "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
                "entailed": [],
                "equivalent": [f"20130725{i}"],
                "question": f"Is it overcast in {i}?",
                "imageId": f"{part[0]}16131{i // 2}",
                "isBalanced": True,
                "groups": {"global": None, "local": "13-weather_overcast"},
                "answer": "no" if i % 2 else "yes",
                "semanticStr": "select: scene",
                "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
                "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
                "fullAnswer": "No, it is clear.",
            }
            for i in range(number)
        }
        whole(data / "gqa" / f"{part}_balanced_questions.json", rows)
        for row in rows.values():
            picture(data / "gqa" / "images" / f"{row['imageId']}.jpg")


def write_scienceqa(data: Path) -> None:
    splits = {"1": "train", "2": "train", "5": "val", "11": "test", "22": "test", "33": "test"}
    problems = {
        pid: {
            "question": f"Which of these states is farthest north in {pid}?",
            "choices": ["West Virginia", "Louisiana", "Arizona"][: 3 - int(pid) % 2],
            "answer": int(pid) % 2,
            "hint": "" if pid in ("1", "22") else "A hint.",
            "image": None if pid in ("2", "33") else "image.png",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "social science",
            "topic": "geography",
            "category": "Geography",
            "skill": "Read a map: cardinal directions",
            "lecture": "Maps have four cardinal directions.",
            "solution": "To find the answer, look at the compass rose.",
            "split": split,
        }
        for pid, split in splits.items()
    }
    whole(data / "scienceqa" / "problems.json", problems)
    parts = {name: [pid for pid, of in splits.items() if of == name] for name in ("train", "val", "test")}
    more = {"trainval": parts["train"] + parts["val"], "minitrain": [], "minival": [], "minitest": []}
    whole(data / "scienceqa" / "pid_splits.json", parts | more)
    for pid, problem in problems.items():
        if problem["image"] and splits[pid] != "val":
            picture(data / "scienceqa" / "images" / splits[pid] / pid / "image.png")
