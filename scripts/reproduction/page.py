"""docs/reproduction.md and the summary in the README, from what was measured: no figure of them is typed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from sav_jax._files import write_file
from scripts.reproduction.rescoring import heads_of, tasks_of
from scripts.reproduction.study import FAILS, HOLDS, MODELS, ROOT, UNDECIDED, UNTESTED, Finding, Study, Table

PARTS = ("savs", "beyond", "aim", "sq")
TITLES = {
    "savs": "Sparse Attention Vectors (arXiv 2412.00142)",
    "beyond": "Beyond the papers",
    "aim": "AIM (arXiv 2406.07588)",
    "sq": "SQ-LLaVA (arXiv 2403.11299)",
}
CAPTIONS = {
    "reproduction-heads": "Accuracy against the number of heads that vote; dashed: the published twenty.",
    "reproduction-shots": "Accuracy of twenty heads against the number of labelled examples of each class.",
    "reproduction-transfer": "Accuracy (%) of the heads that one task chose (column) with the class means and "
    "queries of another (row); the darker, the better in its row.",
    "reproduction-depth": "Accuracy of twenty heads chosen among those of the first layers.",
    "reproduction-calibration": "How many of the answers that were given some probability were right; on the dashed "
    "line probabilities mean what they say.",
}
SHARED = "`compute`, `heads` and `tower`"
START, END = "<!-- reproduction: written by scripts/reproduce.sh -->", "<!-- end of reproduction -->"
PAGE = "reproduction.md"

INTRODUCTION = """\
# The papers' claims in miniature

Claims of the three papers that the bundled models can test, tested on both of them, on tasks drawn by a program
([world.md](world.md)) and on real handwritten digits, with seeds and intervals. This page is written by

```bash
bash scripts/reproduce.sh          # all of it, on a CPU: hours
bash scripts/reproduce.sh --quick  # fewer tasks, seeds, queries, steps, under 15 minutes; a page in results/ to try it
```

from what they measure; no measured figure is typed. What holds here holds for models of {size} on a
small world. It says that the method does what its authors say where everything can be checked, not that their
numbers are right; the same study of real checkpoints and data, whatever `sav-jax eval` reads and asks
([tasks.md](tasks.md)), is `bash scripts/reproduce.sh --models PATH_OR_HUB_ID --tasks NAMES --data-dir DIR`, whose page
stays in results/. Not here are figures on the papers' own benchmarks, comparisons with other published models, and what
changes with a model's size.
"""
OF_OTHERS = """\
# The papers' claims on other models or tasks

Claims of three papers, tested with seeds and intervals. This page is written by

```bash
bash scripts/reproduce.sh {options}
```

from what that measures. {models}

The first two parts ask {tasks}.
AIM's and SQ-LLaVA's have pictures and questions of their own, drawn by a program. All settings of LoRA's, AIM's and
SQ-LLaVA's trainings are those chosen for the models that come with the package, which have five million parameters:
where a trained side loses, another rate or another number of steps may win.
"""
READING = """
How to read a row: figures are in % unless they name a unit (CIDEr-D is times 100); the difference, in the same, is what
the claim is about, and is positive if it is as claimed; where a claim has a margin ("no more than one point below"),
it is added. In brackets the 95 % interval, at either end the wider of two: a bootstrap, in which queries, or groups of
queries that belong together, are resampled jointly for both sides and all seeds, every task counting alike; and
Student's over the seeds, each of which draws other labelled examples, and trains anew whatever is trained. With three
seeds it can reach beyond what a difference can be. A claim *holds* if the whole interval is above 0, *does not hold* if
it is below 0, and is *undecided* otherwise. "Queries" are those that one seed's figures rest on, of all tasks of the
row together. There are {seeds} seeds, and {number} rows without a correction for their number: an interval that ends a
hair's breadth above 0 is no law.
"""


def module(part: str) -> ModuleType | None:
    """The part's module, if there is one."""
    name = f"scripts.reproduction.{part}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def write(study: Study) -> Path:
    """Write the page, its pictures and, beside the docs, the README's summary; return the page's path.

    A part that was not measured is said to be missing, one that was stopped to be incomplete. Such a page goes to
    ``study.output``: the docs keep theirs.
    """
    found = {part: study.findings(part) for part in PARTS}
    measured = all(study.record(part, model).get("complete") for part in PARTS for model in study.listed)
    if study.special:
        study = replace(study, pages=study.output)
    elif study.pages == ROOT / "docs" and not measured:
        study = replace(study, pages=study.output)
        study.say("not all parts of both models are there: docs/ and README.md stay as they are")
    sections = [_introduction(study, found), _summary(study, found)]
    for part in PARTS:
        sections.append(_section(study, part, found[part]))
    sections.append(_colophon(study, found))
    path = study.pages / PAGE
    write_file(path, ("\n\n".join(section.strip() for section in sections) + "\n").encode())
    if study.pages == ROOT / "docs":
        readme = ROOT / "README.md"
        write_file(readme, with_summary(readme.read_text(encoding="utf-8"), found).encode())
    return path


def _introduction(study: Study, found: Mapping[str, Sequence[Finding]]) -> str:
    everything = [finding for of in found.values() for finding in of]
    seeds = sorted({finding.seeds for finding in everything if finding.seeds}) or [0]
    told = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    text = _of_others(study) if study.special else INTRODUCTION.format(size="five million parameters")
    text += READING.format(seeds=told, number=len(everything))
    if study.quick:
        text += "\n**This is the quick form: few tasks, seeds and queries, wide intervals. Do not quote it.**\n"
    return text


def _of_others(study: Study) -> str:
    told = [
        f"`{other.name}` is {other.path}, of {' layers of '.join(map(str, heads_of(study, other.name)))} heads "
        f"(fingerprint {other.fingerprint[:12]})."
        for other in study.others
    ]
    tasks = tasks_of(study)
    return OF_OTHERS.format(
        options=study.options.strip(), models=" ".join(told), tasks=", ".join(f"`{task}`" for task in tasks)
    )


def _summary(study: Study, found: Mapping[str, Sequence[Finding]]) -> str:
    models = [model for model in study.listed if any(f.model == model for of in found.values() for f in of)]
    lines = ["## Summary", "", _row(["claim", *(f"`{model}`" for model in models)]), _rule(1 + len(models))]
    for part, of in found.items():
        lines.append(_row([f"**{TITLES[part]}**", *[""] * len(models)]))
        if not of:
            lines.append(_row(["(not measured yet)", *[""] * len(models)]))
        for claim in dict.fromkeys(finding.claim for finding in of):
            cells = [_verdicts([f for f in of if f.claim == claim and f.model == model]) for model in models]
            lines.append(_row([claim, *cells]))
    counts = {verdict: sum(f.verdict == verdict for of in found.values() for f in of) for verdict in VERDICTS}
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number or verdict != UNTESTED)
    return "\n".join([*lines, "", f"Of {sum(counts.values())} rows: {told}."])


VERDICTS = (HOLDS, FAILS, UNDECIDED, UNTESTED)


def _verdicts(of: Sequence[Finding]) -> str:
    """Of one claim and one model: usually one finding."""
    return "<br>".join(f"{_strong(finding.verdict)} {shown(finding)}".strip() for finding in of)


def _strong(verdict: str) -> str:
    return f"**{verdict}**" if verdict == FAILS else verdict


def shown(finding: Finding) -> str:
    """The difference with its interval: "+3.4 [1.2, 5.6]"; an end that is not 0 is not shown as 0."""
    if finding.difference is None:
        return ""
    low, high = finding.low, finding.high
    ends = "" if low is None or high is None else f" [{_not_zero(low)}, {_not_zero(high)}]"
    return f"{round(finding.difference, 1) + 0.0:+.1f}{ends}"  # never -0.0


def _not_zero(value: float) -> str:
    """With as many digits after the point as it takes, one to three."""
    return next((text for digits in (1, 2, 3) if float(text := f"{value:.{digits}f}")), "0.0")


def _section(study: Study, part: str, of: Sequence[Finding]) -> str:
    lines = [f"## {TITLES[part]}", ""]
    if not of:
        return "\n".join([*lines, f"Not measured yet: `bash scripts/reproduce.sh {study.options}--parts {part}`."])
    code = module(part)
    measured = replace(study, models=tuple(model for model in study.listed if study.record(part, model)))
    head = ["claim", "model", "setting", "figures", "difference", "seeds", "queries", "verdict"]
    lines += [_row(head), _rule(len(head))]
    last = ""
    for finding in of:
        figures = ", ".join(f"{name} {value:.1f}" for name, value in finding.values.items())
        claim = "" if finding.claim == last else f"{finding.claim} ({finding.source})"
        last = finding.claim
        cells = [claim, f"`{finding.model}`", finding.setting, figures, shown(finding), str(finding.seeds)]
        lines.append(_row([*cells, str(finding.queries or ""), _strong(finding.verdict)]))
    if unfinished := [model for model in study.listed if study.record(part, model).get("complete") is False]:
        lines += [
            "",
            f"Not all rows of {' and '.join(f'`{model}`' for model in unfinished)} are there: it was stopped.",
        ]
    lines += ["", *_remarks(study, code, of)]
    for table in getattr(code, "tables", _nothing)(measured):
        lines += ["", *_table(table)]
    for path in getattr(code, "plots", _nothing)(measured):
        caption = CAPTIONS.get(path.stem) or getattr(code, "CAPTIONS", {}).get(path.stem, path.stem)
        lines += ["", f"![{caption}]({path.name})", "", f"*{caption}*"]
    return "\n".join(lines)


def _nothing(_: Study) -> tuple[()]:
    """Of a part without tables or pictures."""
    return ()


def _remarks(study: Study, code: ModuleType | None, of: Sequence[Finding]) -> list[str]:
    """Notes of the findings, and what one thinks of claims that do not hold everywhere."""
    lines = []
    notes: dict[str, list[str]] = {}
    for finding in of:
        for note in filter(None, finding.note.split("\n")):
            notes.setdefault(f"{_stem(finding.claim)}: {note}", []).append(finding.model)
    for note, models in notes.items():
        everywhere = len(models) >= len(study.listed)
        lines.append(f"- {note}" if everywhere else f"- {' and '.join(f'`{model}`' for model in models)}. {note}")
    # They are about the bundled models, and the tasks that these are asked.
    reasons: Mapping[str, str] = {} if study.special else getattr(code, "REASONS", {})
    for claim in dict.fromkeys(finding.claim for finding in of):
        failed = [finding for finding in of if finding.claim == claim and finding.verdict != HOLDS]
        if failed and claim in reasons:
            where = " and ".join(f"`{finding.model}`" for finding in failed)
            lines.append(f"- Not shown on {where}: {_stem(claim)}. {reasons[claim]}")
    return ["What to know about these rows:", "", *lines] if lines else []


def _stem(claim: str) -> str:
    return claim.rstrip(".")


def _table(table: Table) -> list[str]:
    lines = [f"**{table.title}.**", "", _row(table.head), "|---|" + "--:|" * (len(table.head) - 1)]
    lines += [_row(row) for row in table.rows]
    return [*lines, "", table.note] if table.note else lines


def _colophon(study: Study, found: Mapping[str, Sequence[Finding]]) -> str:
    lines = ["## How it was measured", ""]
    records = [record for part in found for model in study.listed if (record := study.record(part, model))]
    for machine, versions in dict.fromkeys((record["machine"], record["versions"]) for record in records):
        lines += [f"On {machine} ({versions}), beside other work.", ""]
    if times := study.minutes():
        told = ", ".join(f"`{folder}` on `{model}` {minutes:.0f} min" for (folder, model), minutes in times.items())
        lines += [
            f"All that is kept took {study.hours():.1f} hours, one after the other, by folders: {told}. What lies in "
            f"{SHARED} serves the first two parts. What was stopped, and projections of `aim` trained before their "
            "tasks, took their time besides.",
            "",
        ]
    commands = study.commands()
    if commands:
        lines += [
            "Commands that it ran, besides what it computes and trains in `scripts/reproduction/`:",
            "",
            "```sh",
        ]
        lines += [command for command, _ in commands]
        lines += ["```"]
    return "\n".join(lines)


def with_summary(readme: str, found: Mapping[str, Sequence[Finding]]) -> str:
    """The README with its table of headlines made anew between its marks."""
    if START not in readme:
        return readme
    rows = []
    for part, of in found.items():
        wanted = getattr(module(part), "HEADLINES", None)
        claims = list(dict.fromkeys(finding.claim for finding in of))
        for claim in claims[:2] if wanted is None else [claim for claim in claims if claim in wanted]:
            cells = [_verdicts([f for f in of if f.claim == claim and f.model == model]) for model in MODELS]
            rows.append(_row([claim, *cells]))
    table = "\n".join([_row(["claim", *(f"`{model}`" for model in MODELS)]), _rule(1 + len(MODELS)), *rows])
    return re.sub(
        f"{re.escape(START)}.*?{re.escape(END)}", lambda _: f"{START}\n{table}\n{END}", readme, flags=re.DOTALL
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
