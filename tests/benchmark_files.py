"""Small files with the schemas in which MLLMU-Bench, CLEAR and FIUBench are published, with drawn pictures."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

Rows = list[dict[str, Any]]


def png(seed: int, side: int = 48) -> bytes:
    """Noise, the same for the same seed."""
    stream = BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side)).save(stream, "PNG")
    return stream.getvalue()


def image(seed: int) -> dict[str, Any]:
    """A picture as a parquet file of the hub holds it."""
    return {"bytes": png(seed), "path": None}


def write_parquet(folder: Path, sets: Mapping[str, Rows]) -> Path:
    import pyarrow
    from pyarrow import parquet

    for name, rows in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        half = (len(rows) + 1) // 2
        for shard, part in enumerate((rows[:half], rows[half:])):
            if part:
                file = folder / name / f"train-{shard:05d}-of-00002.parquet"
                parquet.write_table(pyarrow.Table.from_pylist(part), file)
    return folder


def write_json(folder: Path, sets: Mapping[str, Rows], *, lines: bool = False) -> Path:
    """The same as JSON: pictures become files beside it."""
    folder.mkdir(parents=True, exist_ok=True)

    def plain(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"bytes", "path"}:
            name = f"picture-{len(list(folder.iterdir()))}.png"
            (folder / name).write_bytes(value["bytes"])
            return name
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    for name, rows in sets.items():
        texts = [json.dumps(plain(row)) for row in rows]
        body = "\n".join(texts) if lines else f"[{', '.join(texts)}]"
        (folder / f"{name}.{'jsonl' if lines else 'json'}").write_text(body, encoding="utf-8")
    return folder


TOWNS = ("Cairo", "Oslo", "Quito", "Prague", "Lisbon", "Kyoto")


def choice(question: str, at: int) -> dict[str, Any]:
    options = {letter: TOWNS[(at + turn) % len(TOWNS)] for turn, letter in enumerate("ABCD")}
    return {"Question": question, "Options": options, "Correct_Answer": "A"}


def tasks(who: str, at: int) -> dict[str, Any]:
    """The three tasks of a profile, each with and without a photo."""
    town = TOWNS[at % len(TOWNS)]
    kinds = (("Image_Textual", "this person"), ("Pure_Text", who))
    return {
        "Classification_Task": {
            "Image_Textual_Questions": [choice("Where does this person live?", at)],
            "Pure_Text_Questions": [choice(f"Where does {who} live?", at)],
        },
        "Generation_Task": [
            {"Type": kind, "Question": f"In which town does {name} live?", "Ground_Truth": f"In {town}."}
            for kind, name in kinds
        ],
        "Mask_Task": [
            {"Type": kind, "Question": f"The home of {name} is __.", "Ground_Truth": town} for kind, name in kinds
        ],
    }


def mllmu(people: int = 6, forget: int = 2) -> dict[str, Rows]:
    """Profiles `000` to `005`; their photos are drawn with seeds 0 to 5, those of the test set with 10 and more."""
    profiles = [
        {"image": image(at), "ID": f"{at:03d}", "biography": "", **tasks(f"Person {at}", at)} for at in range(people)
    ]
    facts = [
        {"Question": "Where is this person at home?", "Answer": f"At home in {TOWNS[at]}."} for at in range(people)
    ]
    trained = [
        {"image": image(at), "ID": f"{at:03d}", "metadata": json.dumps([facts[at], facts[at]])} for at in range(people)
    ]
    test = [
        {"images": [image(10 + 2 * at), image(11 + 2 * at)], "ID": f"{at:03d}", **tasks(f"Person {at}", at)}
        for at in range(people)
    ]
    stars = [{"image": image(30 + at), "ID": f"c{at}", **tasks(f"Star {at}", at)} for at in range(3)]
    return {
        "forget_5": profiles[:forget],
        "retain_95": profiles[forget:],
        "ft_Data": trained,
        "Test_Set": test,
        "Retain_Set": stars,
    }


NAMES = ("Mara Velin", "Toren Halvik", "Ilsa Dremond", "Bram Tamsel", "Neva Orlund", "Jorin Quenby")


def clear(photos: int = 4) -> dict[str, Rows]:
    """Six authors with some photos each; the first two are forgotten."""
    shots = [
        [{"image": image(10 * at + i), "caption": f"{name} sits in {TOWNS[i]}.", "name": name} for i in range(photos)]
        for at, name in enumerate(NAMES)
    ]
    gone, kept = ([row for rows in part for row in rows] for part in (shots[:2], shots[2:]))
    wrong = {"perturbed_captions": ["A dog sits in Rome.", "A cat."], "perturbed_names": ["Ada Nym", "Bo Nym"]}

    def texts(names: Sequence[str]) -> Rows:
        asked = [(f"What did {name} write?", f"{name} wrote about {TOWNS[at]}.") for at, name in enumerate(names)]
        return [{"image": None, "caption": None, "question": q, "answer": a} for q, a in asked]

    def mixed(rows: Rows, names: Sequence[str]) -> Rows:
        with_photo = [{"image": r["image"], "caption": r["caption"], "question": None, "answer": None} for r in rows]
        return [*with_photo, *texts(names)]

    real = {"answer": "Oslo", "options": ["Rome", "Oslo", "Paris"]}
    return {
        "forget05": gone,
        "retain95": kept,
        "forget05_perturbed": [{**row, **wrong, "paraphrased_caption": "Somebody sits."} for row in gone],
        "retain_perturbed": [{**row, **wrong, "paraphrased_caption": "Somebody sits."} for row in kept[:2]],
        "forget05+tofu": mixed(gone, NAMES[:2]),
        "retain95+tofu": mixed(kept, NAMES[2:]),
        "real_world": [{"image": image(90 + at), "question": "Which town is this?", **real} for at in range(2)],
        "real_faces": [
            {"image": image(95 + at), "answer": name, "options": ["Ada Nym", name]} for at, name in enumerate(NAMES[:2])
        ],
    }


def fiubench(people: int = 6) -> Rows:
    """People `f0` to `f5` with two questions each."""
    return [
        {
            "unique_id": f"f{at}",
            "image_path": f"./dataset/SFHQ/f{at}.png",
            "name": NAMES[at],
            "qa_list": [
                {
                    "question": f"Where does this person {word}?",
                    "answer": f"This person is in {TOWNS[at]}.",
                    "paraphrased_question": [
                        f"In which town does the person {word}?",
                        f"Where does this person {word}?",
                    ],
                    "paraphrased_answer": f"It is {TOWNS[at]}.",
                    "perturbed_answer": [f"This person is in {TOWNS[at - turn]}." for turn in (1, 2)],
                    "keywords": [TOWNS[at]],
                }
                for word in ("live", "work")
            ],
        }
        for at in range(people)
    ]


def write_fiubench(folder: Path, rows: Rows, *, zipped: bool = True) -> Path:
    """`full.json`, `split.json` (who is forgotten grows from f0) and the faces."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "full.json").write_text(json.dumps(rows), encoding="utf-8")
    splits = {"forget1": ["f0"], "forget5": ["f0", "f1"], "forget10": ["f0", "f1", "f2"]}
    (folder / "split.json").write_text(json.dumps(splits), encoding="utf-8")
    faces = {f"SFHQ/f{at}.png": png(at) for at in range(len(rows))}
    if zipped:
        with zipfile.ZipFile(folder / "SFHQ.zip", "w") as archive:
            for name, content in faces.items():
                archive.writestr(name, content)
    else:
        (folder / "SFHQ").mkdir()
        for name, content in faces.items():
            (folder / name).write_bytes(content)
    return folder
