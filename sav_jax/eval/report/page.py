"""The page: everything that was gathered, put into the template. jinja2 escapes all that comes from data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sav_jax.eval.report.drawing import Figure
from sav_jax.eval.report.sections import Section, data_address
from sav_jax.eval.report.table import Row, Table
from sav_jax.eval.report.words import (
    chunks,
    column_name,
    counted,
    in_short,
    interval_or_why,
    legend,
    listed,
    mean_and_sd,
    metric_name,
    most_shots,
    row_groups,
    shots,
)
from sav_jax.eval.stored import Results, Stored

_COLUMNS = 6  # of a table, so that it fits on a page


def render(
    title: str, results: Sequence[Results], table: Table, overall: Sequence[Figure], sections: Sequence[Section]
) -> str:
    """The whole page as HTML.

    Args:
      title: its heading.
      results: the folders.
      table: their results.
      overall: pictures of all tasks.
      sections: one per task and folder.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        lead=_lead(results, table),
        warnings=_warnings(results, table),
        sentences=[in_short(table, column) for column in most_shots(table)],
        legend=legend(table),
        parts=_parts(table),
        overall=overall,
        sections=sections,
        methods=_methods(table),
        facts=[_facts(of, label) for of, label in zip(results, table.sources, strict=True)],
        splits=_splits(results, table),
        svg=lambda figure: data_address(figure.svg, "image/svg+xml"),
        percent=lambda share: f"{100 * share:.0f}",
    )


def _lead(results: Sequence[Results], table: Table) -> str:
    tasks = len({column.task for column in table.columns})
    methods = len({row.method for row in table.rows})
    counts = sorted({column.shots for column in table.columns})
    seeds = max(len(run.seeds) for of in results for run in of.runs)
    return (
        f"{methods} method{'s' * (methods != 1)} on {tasks} task{'s' * (tasks != 1)}, with "
        f"{listed([str(count) for count in counts])} labelled example{'s' * (counts != [1])}{counted(table)} and "
        f"{seeds} seed{'s' * (seeds != 1)}. "
        f"{'In each folder all' if _torn(results) else 'All'} methods see the same labelled examples and answer "
        "the same queries."
    )


def _torn(results: Sequence[Results]) -> list[tuple[str, str]]:
    """Tasks and seeds of which different folders hold different splits."""
    digests: dict[tuple[str, str], set[str]] = {}
    for of in results:
        for key, seeds in _object(_object(of.content, "sav_jax"), "splits").items():
            for seed, split in seeds.items():
                digests.setdefault((key, seed), set()).add(str(split.get("digest")))
    return [name for name, found in digests.items() if len(found) > 1]


def _warnings(results: Sequence[Results], table: Table) -> list[str]:
    found = []
    for row in _splits(results, table):
        if row["leaked"]:
            found.append(
                f"{row['name']}, {row['shots']}, seed {row['seed']}: {row['leaked']} queries also stand among the "
                "labelled examples, same question and images; these results flatter methods that see them."
            )
    for key, seed in _torn(results):
        found.append(
            f"{key}, seed {seed}: the folders do not hold the same labelled examples and queries, so that their "
            "numbers cannot be compared with each other (sav-jax compare refuses to)."
        )
    if any(_object(of.content, "config").get("limit") for of in results):
        found.append("Only a part of the queries was asked (--limit): intervals are wide.")
    return found


def _parts(table: Table) -> list[dict[str, Any]]:
    """The table of results, in parts that fit on a page."""
    parts = []
    for columns in chunks(table.columns, _COLUMNS):
        groups = []
        for group, rows in row_groups(table):
            lines = [(table.name(row), [_cell(table, row, column) for column in columns]) for row in rows]
            groups.append((group, lines))
        parts.append({"heads": [column_name(column, table) for column in columns], "groups": groups})
    return parts


def _cell(table: Table, row: Row, column: Any) -> dict[str, Any] | None:
    cell = table.cells[row, column]
    if cell is None:
        return None
    return {
        "value": mean_and_sd(cell.run.primary),
        "interval": interval_or_why(cell.run.primary),
        "tied": cell.tied,
        "metric": "" if cell.ranked else metric_name(cell.run.metric),
    }


def _methods(table: Table) -> list[tuple[str, str]]:
    """What is known about the methods by their names."""
    from sav_jax.eval.methods import METHODS

    names = dict.fromkeys(row.method for row in table.rows)
    return [(name, METHODS[name].description) for name in names if name in METHODS]


def _facts(results: Results, label: str) -> dict[str, Any]:
    """What was run, by which versions."""
    content, ours = results.content, results.ours
    config, passes, versions = _object(content, "config"), _object(ours, "passes"), _object(ours, "versions")
    arguments = _object(config, "model_args")
    seconds = content.get("total_evaluation_time_seconds")
    rows = [
        ("results", results.folder.name),
        ("model", results.model),
        ("fingerprint of the weights", str(arguments.get("fingerprint") or "")[:16]),
        ("number format", arguments.get("dtype")),
        ("started", content.get("start_time")),
        ("took", f"{seconds:.0f} s" if isinstance(seconds, int | float) else None),
        ("distinct prompts", passes.get("prompts")),
        ("forward passes (the others were in the cache)", passes.get("forward")),
        ("heads that vote", config.get("num_heads")),
        ("batch size", config.get("batch_size")),
        ("limit of queries", config.get("limit")),
        *sorted(versions.items()),
    ]
    return {"label": label, "rows": [(name, value) for name, value in rows if value not in (None, "")]}


def _object(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    value = mapping.get(name)
    return value if isinstance(value, dict) else {}


def _splits(results: Sequence[Results], table: Table) -> list[dict[str, Any]]:
    """Every split: equal digests mean the same labelled examples and queries."""
    rows = []
    for source, of in enumerate(results):
        first: dict[str, Stored] = {}
        for run in of.runs:
            first.setdefault(run.key, run)
        for key, run in first.items():
            for seed, split in dict(of.part("splits", key)).items():
                name = run.task if len(results) == 1 else f"{run.task} ({table.sources[source]})"
                rows.append(
                    {
                        "name": name,
                        "version": of.tasks[run.task].get("version", ""),
                        "shots": shots(run.shots),
                        "seed": seed,
                        "support": split.get("support", ""),
                        "queries": split.get("queries", ""),
                        "leaked": split.get("leaked", 0),
                        "digest": str(split.get("digest", ""))[:12],
                    }
                )
    return rows
