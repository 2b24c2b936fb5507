"""The long versions of everything here: ``make chaos``.

``python -m tests.chaos --report FILE`` runs the kill points, the situations and the storms of
each broker and storage, and writes the storms' tables to a file, for the documentation.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--report', type=Path, help='where the tables go, as markdown')
    parser.add_argument('--seed', type=int, help="of the storms' random choices")
    arguments, others = parser.parse_known_args()
    os.environ['TRIGGERS_CHAOS'] = 'long'
    if arguments.seed is not None:
        os.environ['TRIGGERS_CHAOS_SEED'] = str(arguments.seed)
    if arguments.report:
        arguments.report.unlink(missing_ok=True)
        os.environ['TRIGGERS_CHAOS_REPORT'] = str(arguments.report.absolute())
    # What is printed is the report: pytest shows it although the tests pass.
    folder = str(Path(__file__).parent)
    code = int(pytest.main(['-p', 'no:cacheprovider', '-rP', '--durations=0', folder, *others]))
    if arguments.report and arguments.report.exists():
        print(arguments.report.read_text())
    return code


if __name__ == '__main__':
    sys.exit(main())
