"""``sav-jax report``: what the page says and shows, that it is sound HTML, what becomes of missing or damaged parts."""

from __future__ import annotations

import base64
import csv
import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results_folders import Made, write_results

from sav_jax.cli import main
from sav_jax.eval.report.confidence import calibration_bins, risk_curve, sureness
from sav_jax.eval.report.drawing import line_style, line_styles, short
from sav_jax.eval.report.heatmaps import confusion_counts, confusions
from sav_jax.eval.report.table import make_table
from sav_jax.eval.report.words import chunks, in_short
from sav_jax.eval.stored import Answered, Query, Results

SMALL = Made({"zero-shot": 0.4, "sav": 0.85, "hec": 0.87})
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a page consists of; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self, kind: str) -> list[bytes]:
        start = f"data:{kind};base64,"
        return [
            base64.b64decode(str(image["src"])[len(start) :], validate=True)
            for image in self.all("img")
            if str(image["src"]).startswith(start)
        ]


def report(folders: list[Path] | Path, output: Path) -> Page:
    folders = [folders] if isinstance(folders, Path) else folders
    assert main(["report", *map(str, folders), "--output", str(output)]) == 0
    page = Page((output / "report.html").read_text(encoding="utf-8"))
    check_sound(page, output)
    return page


def check_sound(page: Page, output: Path) -> None:
    """What is true of every report."""
    ids = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    # It needs nothing from outside, and every link leads somewhere.
    assert page.all("script") == page.all("link") == []
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    assert all(str(link["href"])[0] == "#" and str(link["href"])[1:] in ids for link in page.all("a"))
    assert "url(" not in (output / "report.html").read_text()
    assert not any(b"<!DOCTYPE" in picture for picture in page.pictures("image/svg+xml"))  # it would name an address
    # It can be read by ear.
    assert page.all("html") == [{"lang": "en"}]
    assert all(str(image["alt"]).strip() for image in page.all("img"))
    assert all(head.get("scope") in ("col", "row", "rowgroup") for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("figcaption")) == len(page.all("figure"))
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    # Pictures are whole, and stand beside the page, too.
    files = {file.read_bytes() for file in output.glob("figure_*.svg")}
    drawn = page.pictures("image/svg+xml")
    assert set(drawn) == files
    for picture in drawn:
        assert ElementTree.fromstring(picture).tag.endswith("svg")
    markdown = (output / "report.md").read_text(encoding="utf-8")
    linked = re.findall(r"^!\[.+\]\((figure_\w+\.svg)\)$", markdown, flags=re.MULTILINE)
    assert sorted(linked) == sorted(file.name for file in output.glob("figure_*.svg"))


def words_in(picture: bytes) -> str:
    return " ".join(
        "".join(node.itertext()) for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("text")
    )


# A whole report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Page]:
    """Two tasks, two numbers of shots, three seeds: the folder, the report, its page."""
    tasks = {"colours": ("red", "green", "blue"), "shapes": ("disc", "square")}
    folder = tmp_path_factory.mktemp("whole")
    made = dataclasses.replace(
        SMALL, tasks=tasks, shots=(5, 10), seeds=(0, 1, 2), methods={**SMALL.methods, "knn": 0.6}
    )
    results = write_results(folder / "results", made)
    return results, folder / "report", report(results, folder / "report")


def test_every_part_is_there(whole: tuple[Path, Path, Page]) -> None:
    _, output, page = whole
    assert sorted(file.name for file in output.iterdir() if file.suffix != ".svg") == [
        "report.csv",
        "report.html",
        "report.md",
        "report.tex",
    ]
    parts = [
        "shots",
        "heads",
        "depth",
        *(f"{i}_{x}" for i in (0, 1) for x in ("heads_0", "confusion", "reliability", "risk")),
    ]
    assert {file.name for file in output.glob("*.svg")} == {f"figure_{part}.svg" for part in parts}
    assert page.text.startswith(
        "Few-shot classification with tiny Few-shot classification with tiny 4 methods on 2 tasks, "
    )
    assert "with 5 and 10 labelled examples per class and 3 seeds" in page.text
    for said in (
        "Where the heads disagree most",
        "All metrics, 10 shots per class",
        "made-up shapes",
        "Source: drawn at random",
        "Which is it?",
        "distinct prompts 75 forward passes",
        "started 2026-11-24T10:00:00+00:00",
        "jax 0.10.2",
    ):
        assert said in page.text, said
    assert len(page.pictures("image/png")) == 6


def test_the_numbers_are_those_of_the_files(whole: tuple[Path, Path, Page]) -> None:
    results, output, page = whole
    runs = json.loads((results / "results.json").read_text())["sav_jax"]["runs"]
    markdown = (output / "report.md").read_text()
    with (output / "report.csv").open(newline="") as file:
        rows = {(row["task"], row["shots"], row["method"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == sum(len(run["metrics"]) for run in runs)
    for run in runs:
        for name, values in run["metrics"].items():
            row = rows[run["task"], str(run["shots"]), run["method"], name]
            assert float(row["mean"]) == values["mean"]
            assert [float(row["interval low"]), float(row["interval high"])] == values["ci"]
            assert row["labelled examples"] == ("no" if run["method"] == "zero-shot" else "yes")
        acc = run["metrics"]["acc"]
        value = f"{100 * acc['mean']:.1f} ± {100 * acc['sd']:.1f}"
        ends = f"{100 * acc['ci'][0]:.1f}–{100 * acc['ci'][1]:.1f}"
        assert f"{value} {ends}" in page.text
        assert f"{value} ({ends})" in markdown


def test_the_best_and_what_ties_with_it_are_marked(whole: tuple[Path, Path, Page]) -> None:
    results, output, page = whole
    table = make_table([Results(results)])
    # By construction zero-shot and knn are far behind, and sav and hec are close.
    for column in table.columns:
        marked = {row.method: (cell.best, cell.tied) for row, cell in table.of_column(column)}
        assert marked["zero-shot"] == marked["knn"] == (False, False)
        assert sorted([marked["sav"], marked["hec"]]) == [(False, True), (True, True)]
    assert table.rows[0].method == "zero-shot", "methods without labelled examples come first"
    assert table.rows[-1].method == "knn", "the best come first"
    assert sum(cell.get("class") == "best" for cell in page.all("td")) == 8
    assert (output / "report.md").read_text().count("**") == 2 * 8
    assert (output / "report.tex").read_text().count(r"\textbf{") == 8
    best = max(("sav", "hec"), key=lambda m: Results(results).run("colours", 10, m).primary.mean)  # type: ignore[union-attr]
    assert f"colours, 10 shots per class: {best} is highest with accuracy " in page.text
    other = "hec" if best == "sav" else "sav"
    assert f", but not clearly above {other}. Without labelled examples zero-shot is highest with" in page.text


def test_pictures_show_the_methods_and_units(whole: tuple[Path, Path, Page]) -> None:
    _, output, _ = whole
    shots = words_in((output / "figure_shots.svg").read_bytes())
    for said in ("colours", "shapes", "labelled examples per class (shots)", "accuracy (%)", "sav", "hec", "knn"):
        assert said in shots
    assert "attention heads that vote" in words_in((output / "figure_heads.svg").read_bytes())
    assert "right labelled examples (%), chance 33" in words_in((output / "figure_0_heads_0.svg").read_bytes())
    confusion = words_in((output / "figure_0_confusion.svg").read_bytes())
    assert all(label in confusion for label in ("red", "green", "blue", "answer", "right label"))
    reliability = words_in((output / "figure_0_reliability.svg").read_bytes())
    assert "zero-shot" not in reliability, "it has no probabilities"
    assert len(re.findall(r"ECE 0\.\d{3}\b", reliability)) == 3
    assert "wrong answers among them (%)" in words_in((output / "figure_0_risk.svg").read_bytes())


def test_points_of_the_shots_figure_lie_side_by_side(whole: tuple[Path, Path, Page]) -> None:
    _, output, page = whole
    places = []
    for group in ElementTree.parse(output / "figure_shots.svg").iter():
        if group.tag.endswith("}g") and "clip-path" in group.attrib:
            places += [node.attrib["x"] for node in group if node.tag.endswith("}use")]
    # Two tasks, two numbers of shots; of the four methods zero-shot and knn may be too far behind.
    assert len(places) >= 2 * 2 * 2
    assert len(set(places)) == len(places)
    assert "side by side" in page.text
    assert "where its line is not level, the queries differ" in page.text


def test_risk_curves_begin_where_enough_answers_are_kept(whole: tuple[Path, Path, Page], tmp_path: Path) -> None:
    assert "Lines begin at the 30 surest answers of all seeds together" in whole[2].text
    # 75 - 5 x 3 examples are asked once: 60; of 24 the half.
    few = dataclasses.replace(SMALL, pool=39)
    page = report(write_results(tmp_path / "results", few), tmp_path / "report")
    assert "Lines begin at the 12 surest answers" in page.text


def test_the_map_of_random_weights_comes_last_in_the_same_colours(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", SMALL)

    def control(content: Any) -> None:
        heads = content["sav_jax"]["heads"]
        (key,) = heads
        entry = heads[key]["sav"]["0"]
        flat = entry | {"head_scores": [[5 for _ in row] for row in entry["head_scores"]]}
        heads[key] = {"sav-random": {"0": flat}, **heads[key]}

    rewrite(folder / "results.json", control)
    page = report(folder, tmp_path / "report")
    assert page.text.index("tells the classes apart (sav)") < page.text.index(
        "with random weights, before any training"
    )
    assert page.text.count("The maps of this task have one scale of colours.") == 2
    first, second = ((tmp_path / "report" / f"figure_0_heads_{i}.svg").read_bytes() for i in (0, 1))
    assert first != second
    # What is written are the axes, the ranks of the heads, and the numbers of the scale.
    assert words_in(first) == words_in(second)


def test_an_interval_without_width_is_not_shown(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", dataclasses.replace(SMALL, shots=(5, 10)))

    def constant(content: Any) -> None:
        for run in content["sav_jax"]["runs"]:
            if run["method"] == "hec":
                run["metrics"]["acc"] |= {"mean": 0.75, "ci": [0.75, 0.75]}

    assert "no spread" not in report(folder, tmp_path / "before").text.lower()
    rewrite(folder / "results.json", constant)
    page = report(folder, tmp_path / "report")
    assert "75.0–75.0" not in page.text
    assert page.text.count("75.0 no spread") == 2
    assert "“No spread” stands where all queries, or all groups of queries" in page.text
    assert (tmp_path / "report" / "report.md").read_text().count("75.0 (no spread)") == 2
    strokes = [
        (tmp_path / name / "figure_shots.svg").read_bytes().count(b'id="LineCollection')
        for name in ("before", "report")
    ]
    assert strokes[0] - strokes[1] == 1


def test_equally_good_methods_share_the_first_place(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", SMALL)

    def equal(content: Any) -> None:
        runs = {run["method"]: run for run in content["sav_jax"]["runs"]}
        runs["hec"]["metrics"]["acc"] = runs["sav"]["metrics"]["acc"]
        chance = {"mean": 0.7, "sd": None, "stderr": None, "ci": None, "per_seed": [0.7]}
        content["sav_jax"]["runs"].append(runs["zero-shot"] | {"method": "chance", "metrics": {"acc": chance}})

    rewrite(folder / "results.json", equal)
    table = make_table([Results(folder)])
    told = in_short(table, table.columns[0])
    assert re.search(r": (hec and sav|sav and hec) are highest with accuracy", told)
    assert told.endswith(
        "clearly above all 2 others. Without labelled examples nothing is above chance, which is 70.0\u00a0%."
    )


def test_latex_rows_have_as_many_cells_as_columns(whole: tuple[Path, Path, Page]) -> None:
    text = (whole[1] / "report.tex").read_text()
    for tabular in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
        assert len(rows) == 5
        assert {row.count(" & ") for row in rows} == {len(tabular[0]) - 1}


def test_the_same_results_give_the_same_bytes(whole: tuple[Path, Path, Page], tmp_path: Path) -> None:
    report(whole[0], tmp_path / "again")
    for file in sorted(whole[1].iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


# Odd results


def test_what_comes_from_data_is_escaped(tmp_path: Path) -> None:
    labels = (
        "<script>alert(1)</script>",
        "a & b \"c\" 'd'",
        "$x_1^2$ 50% \\frac{}",
        '<path d="1.23456">',
        "猫 | **d**",
        "A" * 300,
    )
    made = Made(
        {"zero-shot": 0.5, "sav": 0.8, "odd_<b>&method": 0.7},
        {"odd_<i>task": labels},
        pool=90,
        prompt='Is it <b>this</b> & "that"?\n{{ 7 * 7 }}',
        model="org/<u>model</u>",
    )
    page = report(write_results(tmp_path / "results", made), tmp_path / "report")
    assert not {"b", "i", "u"} & {tag for tag, _ in page.tags}
    for text in (*labels[:5], "odd_<b>&method", "odd_<i>task", 'Is it <b>this</b> & "that"? {{ 7 * 7 }}', "model</u>"):
        assert " ".join(text.split()) in page.text, text
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "odd\\_\\<b\\>\\&method" in markdown
    assert "<script" not in re.sub(r"\\<", "", markdown)
    latex = (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")
    assert r"odd\_\textless{}b\textgreater{}\&method" in latex
    drawn = words_in((tmp_path / "report" / "figure_0_confusion.svg").read_bytes())
    assert "$x_1^2$ 50% \\frac{}" in drawn
    assert '<path d="1.23456">' in drawn


def test_thirty_seven_classes_and_many_methods_stay_readable(tmp_path: Path) -> None:
    methods = {"zero-shot": 0.5, **{f"method-{i}": 0.6 + i / 60 for i in range(12)}}
    labels = tuple(f"a_rather_long_name_of_breed_{i}" for i in range(37))
    made = Made(methods, {"pets": labels}, shots=(1, 2), pool=200, heads=None)
    output = tmp_path / "report"
    page = report(write_results(tmp_path / "results", made), output)
    picture = (output / "figure_0_confusion.svg").read_bytes()
    sizes = [float(size) for size in re.findall(rb"font-size: ([\d.]+)px", picture)]
    # In 1/72 inch: no print smaller than 6 points, on a picture no wider than a page of letter paper is high.
    assert min(sizes) >= 6
    width = float(ElementTree.fromstring(picture).attrib["width"].removesuffix("pt"))
    assert width < 11 * 72
    assert picture.count(b"a_rather_long_\xe2\x80\xa6") == 74, "long names are cut in the middle"
    assert "share of the right label's queries (%)" in words_in(picture), "without numbers there is a scale"
    assert len(picture) < 200_000
    assert "Drawn are the 7 best of each task" in page.text
    assert "The 8 most accurate methods are shown" in page.text
    styles = {json.dumps(line_style(i), default=str) for i in range(32)}
    assert len(styles) == 32


def test_missing_pieces_leave_sections_out(tmp_path: Path) -> None:
    made = Made({"zero-shot": 0.6}, heads=None)
    page = report(write_results(tmp_path / "one", made), tmp_path / "report")
    assert {file.name for file in (tmp_path / "report").glob("*.svg")} == {"figure_0_confusion.svg"}
    for absent in (
        "What examples, heads and layers bring",
        "Which heads know",
        "Where the heads disagree",
        "Confidence",
    ):
        assert absent not in page.text
    assert "±" not in page.text.replace("± standard deviation", "")

    folder = write_results(tmp_path / "two", dataclasses.replace(SMALL, images=False))
    (folder / "samples_colours.jsonl").unlink()

    def thin(content: Any) -> None:
        ours = content["sav_jax"]
        expected = {"mean": 1 / 3, "sd": None, "stderr": None, "ci": None, "per_seed": [1 / 3]}
        ours["runs"].append(ours["runs"][0] | {"method": "chance", "metrics": {"acc": expected}})
        for name in ("curves", "passes", "versions"):
            del ours[name]
        del content["config"], content["higher_is_better"], content["model_name"]

    rewrite(folder / "results.json", thin)
    page = report(folder, tmp_path / "report2")
    assert "Single answers were not written (--log-samples)" in page.text
    assert "chance 33.3 " in page.text
    assert {file.name for file in (tmp_path / "report2").glob("*.svg")} == {"figure_0_heads_0.svg"}
    assert page.pictures("image/png") == []
    assert "query 0 of seed 0" in page.text


def test_leaks_and_limits_are_told_at_the_top(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results", SMALL)

    def leak(content: Any) -> None:
        content["sav_jax"]["splits"]["colours"]["0"]["leaked"] = 4
        content["config"]["limit"] = 60

    rewrite(folder / "results.json", leak)
    page = report(folder, tmp_path / "report")
    before = page.text.partition("In short")[0]
    assert "colours, 5 shots, seed 0: 4 queries also stand among the labelled examples" in before
    assert "Only a part of the queries was asked (--limit)" in before


def test_several_folders_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path / "a", SMALL)
    write_results(
        tmp_path / "b", dataclasses.replace(SMALL, model="org/large", methods={"sav": 0.99, "zero-shot": 0.5})
    )
    page = report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    assert "Few-shot classification with tiny and large" in page.text
    assert "colours, 5 shots per class: sav (large) is highest" in page.text
    assert ", clearly above all 4 others. Without labelled examples zero-shot (large) is highest" in page.text
    table = make_table([Results(tmp_path / "a"), Results(tmp_path / "b")])
    assert table.sources == ("tiny", "large")
    marked = {(row.source, row.method) for row, cell in table.of_column(table.columns[0]) if cell.tied}
    assert marked == {(1, "sav")}
    assert {"figure_0_heads_0.svg", "figure_1_heads_0.svg"} <= {f.name for f in (tmp_path / "report").iterdir()}
    # Of one model the folders' names tell them apart.
    write_results(tmp_path / "c", SMALL)
    assert make_table([Results(tmp_path / "a"), Results(tmp_path / "c")]).sources == ("a", "c")
    # By default the report lies in the first folder, and an earlier one is replaced.
    capsys.readouterr()
    for _ in range(2):
        assert main(["report", str(tmp_path / "c")]) == 0
        assert capsys.readouterr().out.startswith(f"written to {tmp_path}/c/report: report.html, report.md")


def test_a_metric_that_is_better_when_lower_and_has_no_single_answers(tmp_path: Path) -> None:
    folder = write_results(
        tmp_path / "results", dataclasses.replace(SMALL, methods={"a": 0.5, "b": 0.6, "c": 0.9, "zero-shot": 0.9})
    )

    def change(content: Any) -> None:
        ours = content["sav_jax"]
        ours["tasks"]["colours"]["metric"] = "brier"
        for run, mean in zip(ours["runs"], (0.40, 0.25, 0.20, None), strict=True):
            if mean is not None:
                run["metric"] = "brier"
                run["metrics"]["brier"] |= {"mean": mean, "stderr": 0.03, "ci": [mean - 0.06, mean + 0.06]}

    rewrite(folder / "results.json", change)
    (folder / f"samples_{Results(folder).runs[0].key}.jsonl").unlink()
    table = make_table([Results(folder)])
    (column,) = table.columns
    # 0.25 and 0.20 differ by 0.05 / (0.03 sqrt(2)) = 1.18 standard errors, p = 0.24; 0.40 and 0.20 by 4.7. The
    # method without probabilities has accuracy only, and cannot be ranked.
    assert [(row.method, cell.tied) for row, cell in table.of_column(column)] == [
        ("c", True),
        ("b", True),
        ("a", False),
        ("zero-shot", False),
    ]
    assert in_short(table, column).startswith("colours, 5 shots per class: c is lowest with Brier score 20.0\u00a0%")
    assert ", but not clearly below b." in in_short(table, column)
    page = report(folder, tmp_path / "report")
    assert "Brier score in %" in page.text
    assert re.search(r"zero-shot [\d.]+ accuracy [\d.]+–[\d.]+", page.text)


# Damaged results


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_damaged_parts_are_named_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "results", SMALL)
    file = folder / "results.json"
    good = file.read_text()
    (tmp_path / "secret.png").write_bytes(next((folder / "images").iterdir()).read_bytes())
    (folder / "images" / "text.png").write_text("no picture")
    heads, card = (
        (lambda c: c["sav_jax"]["heads"]["colours"]["sav"]["0"]),
        (lambda c: c["sav_jax"]["disagreements"]["colours"][1]),
    )
    damages: list[tuple[Callable[[Any], Any], str]] = [
        (lambda c: heads(c).pop("support"), 'field "sav_jax.heads.colours.sav.0" is not a table'),
        (lambda c: heads(c)["heads"].append([4, 0]), 'field "sav_jax.heads.colours.sav.0" is not a table'),
        (lambda c: heads(c).update(head_scores=[[1, 2], [3]]), 'field "sav_jax.heads.colours.sav.0" is not a table'),
        (
            lambda c: c["sav_jax"]["curves"]["colours"]["sav"]["heads"]["x"].pop(),
            'field "sav_jax.curves.colours.sav.heads" does not hold one number',
        ),
        (lambda c: card(c).pop("votes"), 'field "sav_jax.disagreements.colours[1]" lacks'),
        (lambda c: card(c).update(images=["../secret.png"]), "'../secret.png' is outside the results folder"),
        (lambda c: card(c).update(images=["images/no.png"]), "images/no.png: cannot be read (No such file"),
        (lambda c: card(c).update(images=["images/text.png"]), "images/text.png: is no PNG picture"),
        (lambda c: c["sav_jax"].pop("tasks"), 'field "sav_jax.tasks" is missing'),
    ]
    for damage, told in damages:
        file.write_text(good)
        rewrite(file, damage)
        assert main(["report", str(folder), "--output", str(tmp_path / "report")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert told in line
        assert not (tmp_path / "report").exists()
    file.write_text(good)
    samples = folder / "samples_colours.jsonl"
    samples.write_text(samples.read_text()[:-30])
    assert main(["report", str(folder), "--output", str(tmp_path / "report")]) == 2
    assert "samples_colours.jsonl row 180: is not JSON, perhaps cut short" in capsys.readouterr().err


def test_a_folder_with_other_things_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(tmp_path / "results", SMALL)
    assert main(["report", str(folder), "--output", str(folder)]) == 2
    assert "holds other things (no report.html)" in capsys.readouterr().err
    assert main(["report", "--output", str(tmp_path / "report")]) == 2
    assert "'report' takes one or more results folders" in capsys.readouterr().err


# What pictures are drawn from


def answered(predictions: list[str], targets: str, probabilities: np.ndarray | None = None) -> Answered:
    queries = tuple(Query(f"d{i}", f"i{i}", "", "", "?", target) for i, target in enumerate(targets))
    right = np.array([p == q.target for p, q in zip(predictions, queries, strict=True)])
    return Answered(queries, tuple(predictions), right, probabilities)


def test_confusions_by_hand() -> None:
    seeds = [answered(["a", "b", "", "b"], "aabb"), answered(["b", "b", "b"], "aab")]
    counts = confusion_counts(seeds, ["a", "b"])
    assert counts.tolist() == [[1, 3, 0], [0, 2, 1]]
    assert confusions(counts, ["a", "b"]) == [("a", "b", 3, 0.75)], "what happened once is no habit"


def test_calibration_bins_by_hand() -> None:
    sure = np.array([0.1, 0.15, 0.2, 0.9, 0.95, 0.0])
    mean, share, counts = calibration_bins(sure, np.array([True, False, True, True, True, False]))
    # (0, 0.1] with the 0, (0.1, 0.2], (0.8, 0.9], (0.9, 1].
    np.testing.assert_allclose(mean, [0.05, 0.175, 0.9, 0.95], rtol=1e-12)
    assert (share.tolist(), counts.tolist()) == ([0.5, 0.5, 1, 1], [2, 2, 1, 1])


def test_the_risk_curve_takes_equally_sure_answers_in_expectation() -> None:
    sure = np.array([0.9, 0.5, 0.5, 0.2])
    risk = risk_curve(sure, np.array([True, False, True, False]))
    np.testing.assert_allclose(risk, [0, 0.25, 1 / 3, 0.5], rtol=1e-12)
    order = np.array([2, 3, 1, 0])
    np.testing.assert_array_equal(risk_curve(sure[order], np.array([True, False, False, True])), risk)


def test_sureness_is_the_probability_of_the_answer_and_zero_without_one() -> None:
    shares = np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]])
    found = sureness([answered(["a", "b", ""], "aba", shares)], ["a", "b"])
    assert found is not None
    assert found[0].tolist() == [0.7, 0.6, 0.0]
    assert found[1].tolist() == [True, True, False]
    assert sureness([answered(["a"], "a")], ["a", "b"]) is None


def test_lines_of_a_panel_differ_in_colour_and_all_lines_in_style() -> None:
    panels = [["a", "b", "c", "d", "e", "f", "g"], ["h", "a", "i"], ["j", "k", "l", "m", "a", "b", "h"]]
    styles = line_styles(panels)
    assert list(styles) == list("abcdefghijklm")
    for panel in panels:
        assert len({styles[name]["color"] for name in panel}) == len(panel)
    assert len({json.dumps(style, default=str) for style in styles.values()}) == 13
    # More lines than colours: these come again, with other markers and dashes.
    assert len({json.dumps(style, default=str) for style in line_styles([[str(i) for i in range(12)]]).values()}) == 12


def test_long_names_are_cut_in_the_middle_and_lists_into_even_parts() -> None:
    assert short("plain") == "plain"
    assert short("two\nlines\tand a bell\x07") == "two lines and a bell"
    cut = short("staffordshire_bull_terrier_of_england", 20)
    assert len(cut) == 20
    assert cut.startswith("staffordshire")
    assert cut.endswith("ngland")
    assert [len(part) for part in chunks(list(range(7)), 6)] == [4, 3]
    assert chunks([], 6) == []
