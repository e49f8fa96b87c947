"""Write a report: everything is made before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from sav_jax._files import write_folder
from sav_jax._storage import Location
from sav_jax.eval.report.curves import shots_figure, sweep_figures
from sav_jax.eval.report.page import render
from sav_jax.eval.report.sections import Section, make_section
from sav_jax.eval.report.table import make_table
from sav_jax.eval.report.text import comma_separated, latex, markdown
from sav_jax.eval.report.words import listed
from sav_jax.eval.stored import Results


def write_report(results: Sequence[Results], output: Location) -> list[str]:
    """Write ``report.html``, which needs no other file, and ``report.md``, ``report.tex``, ``report.csv`` and the
    pictures as ``figure_*.svg``.

    Args:
      results: one or several results folders.
      output: a folder; an earlier report in it is replaced.

    Returns:
      The names of the files.

    Raises:
      UserError: if the results are damaged; nothing is then written.
    """
    table = make_table(results)
    what = "evaluation" if any(column.generative for column in table.columns) else "classification"
    title = f"Few-shot {what} with {listed(list(dict.fromkeys(table.sources)))}"
    keys = _keys(results)
    overall = [figure for figure in (shots_figure(table), *sweep_figures(results, table, keys)) if figure is not None]
    sections: list[Section] = []
    for (source, task), key in keys.items():
        sections.append(make_section(results[source], table, source, task, key, number=len(sections)))
    pictures = [*overall, *(figure for section in sections for figure in section.figures)]
    facts = [(figure.name, figure.alternative, figure.caption) for figure in pictures]
    files = {
        "report.html": render(title, results, table, overall, sections),
        "report.md": markdown(table, title, facts),
        "report.tex": latex(table),
        "report.csv": comma_separated(table),
    }
    write_folder(output, {name: text.encode() for name, text in files.items()} | {of.name: of.svg for of in pictures})
    return [*files, *(figure.name for figure in pictures)]


def _keys(results: Sequence[Results]) -> dict[tuple[int, str], str]:
    """(Place of the folder, task) -> the key with the most shots, which pictures show."""
    keys: dict[tuple[int, str], tuple[int, str]] = {}
    for source, of in enumerate(results):
        for run in of.runs:
            keys[source, run.task] = max(keys.get((source, run.task), (-1, "")), (run.shots, run.key))
    return {name: key for name, (_, key) in keys.items()}
