"""Tables of figures with their intervals, as Markdown, CSV, LaTeX and PNG."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.charts import axes, to_png
from tiger.files import atomic_path


@dataclass(frozen=True)
class Cell:
    """One figure; what is None is not known, or not said."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    paper: Sequence[float] | None = None  # the published value, and its interval where there is one
    floor: float | None = None  # the same between real images
    extractor: str = ""  # of the features that it is of, where the paper's may be others

    def lines(self) -> list[str]:
        """What to print, from the figure itself down to the paper's."""
        found = []
        if self.value is not None:
            interval = f" [{short(self.low)}, {short(self.high)}]" if self.low is not None else ""
            found.append(f"{short(self.value)}{interval}")
        if self.extractor:
            found.append(f"features of {self.extractor}")
        if self.floor is not None:
            found.append(f"floor {short(self.floor)}")
        if self.p is not None:
            found.append("p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}")
        if self.paper is not None:
            interval = f" ({short(self.paper[1])}–{short(self.paper[2])})" if len(self.paper) == 3 else ""
            found.append(f"paper {short(self.paper[0])}{interval}")
        return found or ["–"]


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns that stand together in groups."""

    name: str  # of its files
    caption: str
    columns: list[tuple[str, str]]  # (group, column)
    rows: dict[str, list[Cell]]

    def heads(self) -> list[str]:
        """One line for each column."""
        return [": ".join(filter(None, column)) for column in self.columns]


def short(value: float | None) -> str:
    """0.8442 -> "0.844", 0.00068 -> "6.80e-04", 123.45 -> "123.5", 60 -> "60"; a dash for none."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return str(value)
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2e}"


def write(table: Table, folder: Path) -> None:
    """<name>.md, .csv, .tex and .png."""
    texts = {"md": markdown(table), "tex": latex(table)}
    for suffix, text in texts.items():
        with atomic_path(folder / f"{table.name}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    with (
        atomic_path(folder / f"{table.name}.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)  # one line a figure, to be read by programs
        figures = ("value", "low", "high", "p", "paper", "paper_low", "paper_high", "floor")
        writer.writerow(["row", "group", "column", *figures, "extractor"])
        for name, cells in table.rows.items():
            for (group, column), cell in zip(table.columns, cells, strict=True):
                paper = [*(cell.paper or ()), None, None, None][:3]
                numbers = (cell.value, cell.low, cell.high, cell.p, *paper, cell.floor)
                if any(number is not None for number in numbers):
                    shown = ("" if number is None else number for number in numbers)
                    writer.writerow([name, group, column, *shown, cell.extractor])
    with atomic_path(folder / f"{table.name}.png") as temporary:
        temporary.write_bytes(picture(table))


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown below its caption."""
    lines = ["| " + " | ".join(["", *table.heads()]) + " |", "|" + "---|" * (len(table.columns) + 1)]
    for name, cells in table.rows.items():
        lines.append("| " + " | ".join([name, *("<br>".join(cell.lines()) for cell in cells)]) + " |")
    return f"{table.caption}\n\n" + "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A table of LaTeX; it needs \\usepackage{booktabs,makecell}."""

    def stacked(lines: Sequence[str]) -> str:
        return r"\makecell[t]{" + r" \\ ".join(map(tex, lines)) + "}"

    rows = [
        " & ".join([tex(name), *(stacked(cell.lines()) for cell in cells)]) + r" \\"
        for name, cells in table.rows.items()
    ]
    heads = [stacked([part for part in column if part]) for column in table.columns]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs,makecell}",
            r"\begin{table}",
            rf"\caption{{{tex(table.caption)}}}",
            r"\begin{tabular}{l" + "c" * len(table.columns) + "}",
            r"\toprule",
            " & ".join(["", *heads]) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def tex(text: str) -> str:
    """Text -> LaTeX."""
    escaped = "".join(
        {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text
    )
    signs = {"–": "--", "−": "$-$", "<": "$<$", ">": "$>$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "∞": r"$\infty$"}
    for sign, code in signs.items():
        escaped = escaped.replace(sign, code)
    return escaped


def picture(table: Table) -> bytes:
    """The table drawn, as PNG."""
    cells = [[name, *("\n".join(cell.lines()) for cell in of_row)] for name, of_row in table.rows.items()]
    head = ["", *("\n".join(part for part in column if part) for column in table.columns)]
    widths = [max(len(line) for row in (head, *cells) for line in row[i].split("\n")) for i in range(len(head))]
    heights = [max(text.count("\n") + 1 for text in row) for row in (head, *cells)]
    figure, (ax,) = axes(1, 0.085 * sum(widths) + 0.4, 0.19 * sum(heights) + 0.5)
    ax.axis("off")
    ax.set_title(table.caption, fontsize=8, loc="left", wrap=True)
    drawn = ax.table(cells, colLabels=head, colWidths=[width / sum(widths) for width in widths], bbox=(0, 0, 1, 1))
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for (row, column), cell in drawn.get_celld().items():
        cell.set_height(heights[row] / sum(heights))
        cell.set_linewidth(0.4)
        cell.set_text_props(ha="left" if column == 0 else "center", weight="bold" if row == 0 else "normal")
    return to_png(figure)
