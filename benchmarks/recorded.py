"""The figures that pages record, and how far from them a measurement is that rebuilds them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent / "README.md"
TRIALS = Path(__file__).parent / "real_trials.md"


def read_rows(page: Path, heading: str) -> list[dict[str, str]]:
    """The rows of all tables below a heading of a page, {column as measurements spell it: cell}.

    Raises a ValueError if the page has no such heading, or no table below it.
    """
    text = page.read_text(encoding="utf-8")
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
    tables = re.findall(r"(?:^\|.*\|\n)+", section[1], flags=re.M) if section else []
    if not tables:
        raise ValueError(f'{page}: no table below a heading "{heading}".')
    rows = []
    for table in tables:
        head, _, *lines = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines())
        rows += [dict(zip(map(column, head), line, strict=True)) for line in lines]
    return rows


def differences(
    rows: Sequence[dict[str, Any]], recorded: Sequence[dict[str, Any]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Measured minus recorded: of each row that is recorded with equal `keys`, each figure that both have.

    Of cells with several numbers, such as intervals, the first one counts; 5 % is 0.05.
    """
    known = {tuple(_value(row.get(key, "")) for key in keys): row for row in recorded}
    result = []
    for row in rows:
        row = {column(name): value for name, value in row.items()}
        if before := known.get(tuple(_value(row.get(key, "")) for key in keys)):
            pairs = {n: (_value(row[n]), _value(before[n])) for n in row.keys() & before.keys() - set(keys)}
            apart = {n: pairs[n][0] - pairs[n][1] for n in row if n in pairs and all(_is_number(v) for v in pairs[n])}
            result.append({**{key: row[key] for key in keys if key in row}, **apart})
    return result


def column(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def _value(cell: Any) -> float | str:
    """The number that a cell begins with, or its text."""
    if _is_number(cell):
        return float(cell)
    number = re.match(r"[*+]*(-?(?:\d+\.?\d*|\.\d+))(?=$|[^\w.]) ?(%?)", str(cell))
    return float(number[1]) / (100 if number[2] else 1) if number else str(cell)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
