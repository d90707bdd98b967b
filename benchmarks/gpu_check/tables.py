"""The table at the end of a run, and Markdown for the pages. No torch here."""

from collections.abc import Iterator, Sequence

from benchmarks.gpu_check.records import Report, Result, Row

_HEADS = ("check", "verdict", "found", "expected", "seconds")


def one_result(result: Result) -> str:
    """Return the line that is printed as soon as a check is over."""
    return f"{result.name:<3} {result.verdict:<8} {result.title} ({result.seconds:.0f} s): {result.value}"


def text_table(report: Report) -> str:
    """Return the table at the end: columns of equal width, the number of failures last."""
    cells = [list(_HEADS), *(_cells(result) for result in report.results)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    counts = {verdict: sum(r.verdict == verdict for r in report.results) for verdict in ("PASS", "NUMBER", "NOT RUN")}
    total = f"{report.num_failures} failed, {counts['PASS']} passed, {counts['NUMBER']} only measured"
    return "\n".join([*lines, f"{total}, {counts['NOT RUN']} not run"])


def markdown(report: Report) -> str:
    """Return the report as Markdown: the table of checks, then the table of each that has one."""
    lines = [f"{report.machine}, {report.date}; `python -m benchmarks.gpu_check`.", ""]
    lines += _markdown_table([dict(zip(_HEADS, _cells(result), strict=True)) for result in report.results])
    for result in report.results:
        if result.rows:
            lines += ["", f"**{result.name}: {result.title}** ({result.value})", "", *_markdown_table(result.rows)]
    return "\n".join(lines)


def _cells(result: Result) -> list[str]:
    name = f"{result.name} {result.title}"
    return [name, result.verdict, result.value, result.expected, f"{result.seconds:.0f}"]


def _markdown_table(rows: Sequence[Row]) -> Iterator[str]:
    heads = list(rows[0]) if rows else list(_HEADS)
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        yield "| " + " | ".join(row[head].replace("|", "\\|") for head in heads) + " |"
