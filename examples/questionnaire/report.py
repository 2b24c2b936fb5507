"""What a run prints: its progress, and the tables at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from celery_triggers import Status
from examples.questionnaire.check import Row
from examples.questionnaire.respondents import Respondent

if TYPE_CHECKING:
    from examples.questionnaire.run import Counts

__all__ = ['print_problems', 'print_report', 'progress_bars']

#: Statuses that have a column even if no instance has them.
_ALWAYS = (Status.UNSTARTED, Status.ABANDONED, Status.FINISHED, Status.FAILED)

#: How many differences are listed.
_MOST_PROBLEMS = 20


@contextmanager
def progress_bars(
    console: Console, respondents: list[Respondent]
) -> Iterator[Callable[[int, int], None]]:
    """Show two bars; yield what moves them: events fired and rows written so far."""
    progress = Progress(
        TextColumn('{task.description:<14}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        events = progress.add_task('events fired', total=sum(len(r.events) for r in respondents))
        rows = progress.add_task('rows written', total=sum(r.rows for r in respondents))

        def move(fired: int, written: int) -> None:
            progress.update(events, completed=fired)
            progress.update(rows, completed=written)

        yield move


def print_report(
    console: Console,
    counts: Counts,
    rows: dict[str, list[Row]],
    respondents: list[Respondent],
) -> None:
    """Print what arrived, what became of it, and how long it took."""
    console.print(_arrived(counts, rows, respondents))
    console.print(_instances(counts, rows))


def _arrived(
    counts: Counts, rows: dict[str, list[Row]], respondents: list[Respondent]
) -> Table:
    table = Table('', '', box=box.SIMPLE, show_header=False)
    table.columns[1].justify = 'right'
    finish = sum(r.finishes for r in respondents)
    facts = {
        'respondents': len(respondents),
        '  who finish': finish,
        '  who do not': len(respondents) - finish,
        '  with an embedded application': sum(r.embedded for r in respondents),
        'events fired': counts.events,
        'pages received': counts.pages,
        '  repeated, counted once': counts.repeated,
        'rows written': sum(len(found) for found in rows.values()),
    }
    for name, number in facts.items():
        table.add_row(name, str(number))
    for name, seconds in counts.seconds.items():
        table.add_row(f'seconds, {name}', f'{seconds:.1f}')
    return table


def _instances(counts: Counts, rows: dict[str, list[Row]]) -> Table:
    seen = {status for statuses in counts.statuses.values() for status in statuses}
    statuses = [status for status in Status if status in seen or status in _ALWAYS]
    table = Table('trigger task', *(status.value for status in statuses), 'rows', box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = 'right'
    for task in rows:
        numbers = [counts.statuses[task][status] for status in statuses]
        table.add_row(task, *map(str, [*numbers, len(rows[task])]))
    return table


def print_problems(console: Console, problems: list[str]) -> None:
    """Print the outcome of the check."""
    if not problems:
        console.print(
            'check: every row is as the file and the rules say, and every instance wrote one',
            style='green',
        )
        return
    console.print(f'check: {len(problems)} differences', style='bold red')
    for problem in problems[:_MOST_PROBLEMS]:
        console.print(f'  {problem}', markup=False, highlight=False)
    if len(problems) > _MOST_PROBLEMS:
        console.print(f'  and {len(problems) - _MOST_PROBLEMS} more')
