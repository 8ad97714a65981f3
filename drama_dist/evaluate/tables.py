"""Tables of figures as text: aligned for the terminal, or in Markdown. What stands in them is the callers' affair."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Lines of cells, the first of them headings, as a table; its first column is flush left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    head, *rest = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    if markdown:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rest])
    return "\n".join("  ".join(line).rstrip() for line in [head, ["-" * width for width in widths], *rest])


def shown_p(p: float) -> str:
    """A p-value as tables have it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
