"""The table of results as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from sav_jax.eval.report.table import Column, Row, Table
from sav_jax.eval.report.words import (
    cell_text,
    chunks,
    column_name,
    in_short,
    interval_or_why,
    legend,
    mean_and_sd,
    metric_name,
    most_shots,
    one_line,
    row_groups,
)

_BEST = "Bold: best, or not clearly worse than the best (test against the best, Holm-corrected p of at least 0.05)."


def markdown(table: Table, title: str, figures: Sequence[tuple[str, str, str]]) -> str:
    """A short report: who is best, the table, and links to the pictures.

    Args:
      table: the results.
      title: its first line.
      figures: file name, alternative text and caption of each picture.
    """
    lines = [f"# {_md(title)}", "", *(f"- {_md(in_short(table, column))}" for column in most_shots(table)), ""]
    lines += ["## Results", "", _md(f"{legend(table)} {_BEST}"), ""]
    for columns in chunks(table.columns, 6):
        head = ["method", "labelled examples", *(_md(column_name(column, table)) for column in columns)]
        lines += [_md_row(head), _md_row(["---", "---", *(["---:"] * len(columns))])]
        for row in table.rows:
            cells = [_md_cell(table, row, column) for column in columns]
            lines.append(_md_row([_md(table.name(row)), "yes" if row.uses_support else "no", *cells]))
        lines.append("")
    for name, alternative, caption in figures:
        lines += [f"![{_md(alternative)}]({name})", "", _md(caption), ""]
    return "\n".join(lines)


def latex(table: Table) -> str:
    """Tables for a paper, of the package booktabs."""
    lines = ["% Needs \\usepackage{booktabs}."]
    for columns in chunks(table.columns, 3):
        lines += ["\\begin{table}", "\\centering\\small", f"\\begin{{tabular}}{{l{'r' * len(columns)}}}", "\\toprule"]
        heads = [_tex(column_name(column, table)) for column in columns]
        lines += [" & ".join(["Method", *heads]) + r" \\", "\\midrule"]
        for place, (group, rows) in enumerate(row_groups(table)):
            lines += ["\\addlinespace"] * (place > 0)
            lines.append(f"\\multicolumn{{{len(columns) + 1}}}{{l}}{{\\emph{{{_tex(group)}}}}} \\\\")
            for row in rows:
                cells = [_tex_cell(table, row, column) for column in columns]
                lines.append(" & ".join([_tex(table.name(row)), *cells]) + r" \\")
        caption = _tex(f"{legend(table)} {_BEST}")
        lines += ["\\bottomrule", "\\end{tabular}", f"\\caption{{{caption}}}", "\\end{table}", ""]
    return "\n".join(lines)


def comma_separated(table: Table) -> str:
    """Every number, one per line: shares and not percent, empty where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ["results", "task", "shots", "method", "labelled examples", "metric", "mean", "sd over seeds", "stderr"]
    writer.writerow([*head, "interval low", "interval high", "seeds", "best or tied"])
    for column in table.columns:
        for row in table.rows:
            cell = table.cells[row, column]
            if cell is None:
                continue
            run = cell.run
            for name, value in run.metrics.items():
                tied = ("yes" if cell.tied else "no") if name == column.metric else ""
                low, high = value.ci or (None, None)
                fixed = [table.sources[row.source], run.task, run.shots, run.method]
                fixed += ["yes" if row.uses_support else "no", name, value.mean, value.sd, value.stderr, low, high]
                writer.writerow([*fixed, len(run.seeds), tied])
    return buffer.getvalue()


def _md_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md_cell(table: Table, row: Row, column: Column) -> str:
    cell = table.cells[row, column]
    if cell is None:
        return ""
    text = _md(cell_text(cell, column))
    return f"**{text}**" if cell.tied else text


def _md(text: str) -> str:
    """Text that Markdown takes as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", one_line(text))


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "\u00a0": "~",
    "±": r"$\pm$",
    "–": "--",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in one_line(text))


def _tex_cell(table: Table, row: Row, column: Column) -> str:
    cell = table.cells[row, column]
    if cell is None:
        return "--"
    text = _tex(mean_and_sd(cell.run.primary)) + ("" if cell.ranked else f" {_tex(metric_name(cell.run.metric))}")
    found = interval_or_why(cell.run.primary)
    text = f"\\textbf{{{text}}}" if cell.tied else text
    return text + (f" {{\\scriptsize ({_tex(found)})}}" if found else "")
