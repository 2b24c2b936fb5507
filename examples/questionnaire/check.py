"""The check: the rows in the database against the file, answer by answer.

It knows the respondents and the rules, and nothing of how the rows came to be. It can be
run on its own, on a database that a run with ``--database`` wrote::

    python -m examples.questionnaire.check --database sqlite:///answers.db
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from examples.questionnaire.respondents import Respondent, read_respondents
from examples.questionnaire.rows import TABLES, engine_for

__all__ = ['Row', 'check_instances', 'check_rows', 'read_rows']

Row = dict[str, Any]


def read_rows(url: str) -> dict[str, list[Row]]:
    """Return what the database holds, ``{trigger task: [row]}``."""
    with engine_for(url).connect() as connection:
        return {
            task: [dict(row._mapping) for row in connection.execute(sa.select(table))]
            for task, table in TABLES.items()
        }


def check_rows(rows: dict[str, list[Row]], respondents: list[Respondent]) -> list[str]:
    """Compare the rows with the file and return a sentence for each difference.

    Of who finished, the latest revision of each page must hold the answers of the file.
    Of who did not finish there must be nothing, and of who used an embedded application
    no browser.
    """
    by_uid: dict[str, dict[str, list[Row]]] = defaultdict(lambda: {task: [] for task in rows})
    for task, found in rows.items():
        for row in found:
            by_uid[row['uid']][task].append(row)
    problems = [f'{uid}: nobody answered under this name'
                for uid in by_uid.keys() - {respondent.uid for respondent in respondents}]
    for respondent in respondents:
        problems += _check(respondent, by_uid[respondent.uid])
    return problems


def _check(respondent: Respondent, rows: dict[str, list[Row]]) -> Iterator[str]:
    expected = {
        't_importSubject': 1,
        't_importResponses': len(respondent.revisions),
        't_importBrowserMetadata': 0 if respondent.embedded else 1,
        't_markComplete': 1,
    }
    for task, found in rows.items():
        wanted = expected[task] if respondent.finishes else 0
        if len(found) != wanted:
            yield f'{respondent.uid}: {task} wrote {len(found)} rows, not {wanted}'
    if not respondent.finishes:
        return
    yield from _compare(respondent, rows['t_importSubject'], {'device': respondent.device})
    yield from _compare(
        respondent, rows['t_importBrowserMetadata'], {'browser': respondent.browser}
    )
    yield from _compare(respondent, [_final(rows['t_importResponses'])], respondent.answers)
    sent = Counter(respondent.revisions)
    if Counter((row['page'], row['revision']) for row in rows['t_importResponses']) != sent:
        yield f'{respondent.uid}: the pages written are not those that were sent'
    subjects = {row['id'] for row in rows['t_importSubject']}
    for task in ('t_importResponses', 't_importBrowserMetadata'):
        if not {row['subject'] for row in rows[task]} <= subjects:
            yield f"{respondent.uid}: {task} wrote for another respondent's subject"


def _final(pages: list[Row]) -> Row:
    """Return the answers that count: those of each page's latest revision."""
    answers: Row = {}
    for row in sorted(pages, key=lambda row: row['revision']):
        answers.update({name: value for name, value in row.items() if value is not None})
    return answers


def _compare(respondent: Respondent, rows: Iterable[Row], truth: Row) -> Iterator[str]:
    for row in rows:
        for name, value in truth.items():
            if row.get(name) != value:
                yield f'{respondent.uid}: {name} is {row.get(name)}, and should be {value}'


def check_instances(
    rows: dict[str, list[Row]], finished: dict[str, list[tuple[str, str]]]
) -> list[str]:
    """Compare the rows with the instances that finished: each wrote exactly one.

    Args:
        finished: ``{trigger task: [(uid, instance)]}``.
    """
    problems = []
    for task, found in rows.items():
        written = Counter((row['uid'], row['instance']) for row in found)
        ended = Counter(finished.get(task, ()))
        for uid, instance in sorted(written.keys() | ended.keys()):
            counts = written[uid, instance], ended[uid, instance]
            if counts != (1, 1):
                problems.append(
                    f'{uid}: {instance} wrote {counts[0]} rows and finished {counts[1]} times'
                )
    return problems


def main() -> int:
    """Check a database and say what differs; 1 if anything does."""
    parser = argparse.ArgumentParser(description='Check the rows of a run against the file.')
    parser.add_argument('--database', required=True, metavar='URL')
    parser.add_argument('--respondents', type=int, default=944, metavar='N')
    parser.add_argument('--seed', type=int, default=1996, metavar='N')
    options = parser.parse_args()
    respondents = read_respondents(options.respondents, options.seed)
    try:
        rows = read_rows(options.database)
    except SQLAlchemyError as exc:
        parser.error(f'the database cannot be read: {exc}')
    problems = check_rows(rows, respondents)
    print('\n'.join(problems) or 'every row is as it should be')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
