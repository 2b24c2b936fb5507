"""The command: ``python -m examples.questionnaire``."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence

from kombu.exceptions import OperationalError
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from celery_triggers.exceptions import TriggersError
from examples.questionnaire import report
from examples.questionnaire.check import check_instances, check_rows, read_rows
from examples.questionnaire.places import Places
from examples.questionnaire.respondents import MADE_UP, read_respondents
from examples.questionnaire.rows import create_tables
from examples.workers import WorkerDied


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; 0 if every row is as it should be, else 1."""
    options = _options(arguments)
    folder = tempfile.mkdtemp(prefix='questionnaire-')
    try:
        return _run(options, folder)
    except KeyboardInterrupt:
        print('stopped; the workers have ended')
        return 130
    except (
        ModuleNotFoundError, OperationalError, SQLAlchemyError, TriggersError, WorkerDied,
    ) as exc:
        print(f'the run failed: {type(exc).__name__}: {exc}', file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m examples.questionnaire',
        description='Import real questionnaires page by page, with nothing installed but Python.',
    )
    parser.add_argument('--storage', metavar='URL', help='where sessions live; default: a file')
    parser.add_argument('--broker', metavar='URL', help="Celery's broker; default: files")
    parser.add_argument('--database', metavar='URL', help='where rows go; default: a file')
    parser.add_argument('--respondents', type=_respondents, default=944, metavar='N')
    parser.add_argument('--workers', type=_positive, default=2, metavar='N')
    parser.add_argument('--seed', type=int, default=1996, metavar='N')
    parser.add_argument(
        '--keep', action='store_true', help='leave the sessions and files for you to look at'
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError('it must be at least 1')
    return number


def _respondents(text: str) -> int:
    number = _positive(text)
    if number > 944:
        raise argparse.ArgumentTypeError('the file has 944 respondents')
    return number


def _run(options: argparse.Namespace, folder: str) -> int:
    console = Console(highlight=False)
    places = Places.within(
        folder, options.storage, options.broker, options.database,
        name=f'questionnaire-{secrets.token_hex(4)}',
    )
    places.make_folders()
    create_tables(places.database)
    # The application reads its places from the environment when it is imported, in this
    # process as in the workers.
    os.environ.update(places.to_environ())
    from examples.questionnaire.run import forget, reach_servers, run

    reach_servers()
    console.print(MADE_UP.format(seed=options.seed) + '\n')
    respondents = read_respondents(options.respondents, options.seed)
    try:
        with report.progress_bars(console, respondents) as watch:
            counts = run(places, respondents, options.workers, watch)
        rows = read_rows(places.database)
        problems = check_rows(rows, respondents) + check_instances(rows, counts.finished)
        report.print_report(console, counts, rows, respondents)
        report.print_problems(console, problems)
    finally:
        if options.keep:
            console.print(f'kept: {places.folder}, sessions at {places.storage} under the key '
                          f'prefix {places.name}, rows at {places.database}', soft_wrap=True)
        else:
            forget(places)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
