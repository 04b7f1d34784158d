"""Numbers as people read them."""


def microseconds(time: float) -> str:
    """A time with as many digits as it deserves."""
    return f"{time:,.1f}" if time < 1000 else f"{time:,.0f}"


def human(number: float) -> str:
    """Three digits and a decimal prefix."""
    for prefix in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}G"


def markdown(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["--:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def plain(title: str, heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table for the screen whose first `left` columns are text and the others numbers."""
    rows = [row + [""] * (len(heads) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(["", title, line(heads), "-" * len(line(heads)), *map(line, rows), ""])
