"""The one exception that users see: it says what is wrong, where, and what to do."""


class ExportError(Exception):
    """A model, checkpoint, setting or machine that cannot be exported as asked. Nothing was published."""


class StartError(ExportError):
    """What one machine found before the ranks could speak to one another: the first rank of that machine tells it."""


def report(problems: list[str]) -> None:
    """Raise one `ExportError` that lists every problem; return when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise ExportError(problems[0])
    shown = [f"  - {problem}" for problem in problems[:20]]
    if len(problems) > len(shown):
        shown.append(f"  ... and {len(problems) - len(shown)} more")
    raise ExportError("\n".join([f"{len(problems)} problems:", *shown]))
