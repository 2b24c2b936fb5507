"""Directives whose content comes from the code, so that a page cannot disagree with it.

``{transitions}`` is the table of an instance's life, from
``celery_triggers.engine.transitions``; ``{setting} <name>`` describes a setting, with its
default from ``celery_triggers.settings``. What the code has and no page describes is a
warning, and so an error of the build.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.domains.std import ConfigurationValue
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from celery_triggers.engine.transitions import BY_HAND, TRANSITIONS, Event, Status
from celery_triggers.settings import DEFAULTS

logger = logging.getLogger(__name__)

#: What happens, and what is fired then, in words that the table cannot hold.
MEANINGS = {
    Event.RELEASE: ('its condition holds', ''),
    Event.ABANDON: (
        'unless holds, its trigger task was removed, or the session was cancelled',
        '<task>:abandoned',
    ),
    Event.EXPIRE: ('reserved for deadlines, which this version does not have', ''),
    Event.REVOKE: ('its Celery task is revoked, or a person revokes it', '<task>:revoked'),
    Event.CLAIM: ('a delivery claims the attempt, just before the code starts', ''),
    Event.RETRY: ('Celery retries it; the attempt grows by one', ''),
    Event.REQUEUE: (
        'its code raises Reject(requeue=True), or its worker is lost or shut down cold and it '
        'is to run again; the attempt stays',
        '',
    ),
    Event.FINISH: ('it returns', '<task>, with the result'),
    Event.FAIL: (
        'it raises, times out, is not registered, expires, is rejected, cannot be dispatched, '
        'its worker is lost, no worker takes its message, or a loop is stopped (which fires '
        'nothing)',
        '<task>:failed',
    ),
    Event.SKIP: (
        'its code raises self.skip() or Ignore, or a person skips what failed or was revoked',
        '<task>, if a person skips it with cascade=True',
    ),
    Event.REPLAY: (
        'its code raises self.replay(), its worker is lost and it has replay_lost, or a person '
        'replays what failed or was revoked; '
        'a new instance is released',
        '',
    ),
    Event.LATE_SUCCESS: (
        'its success arrives after its worker was given up (worker lost, time limit)',
        '<task>, with the result',
    ),
}


def transition_rows() -> list[tuple[str, str, str, str]]:
    """Return the table: from, what happens, to, what is fired then."""
    rows = []
    for event, steps in TRANSITIONS.items():
        meaning, fires = MEANINGS[event]
        for to in dict.fromkeys(steps.values()):
            sources = [status.value for status in Status if steps.get(status) is to]
            rows.append((', '.join(sources), meaning, to.value, fires))
    return rows


def by_hand_rows() -> list[tuple[str, str]]:
    """Return what ``update_instance_status`` may set: the status, and from which ones."""
    return [
        (status.value, ', '.join(s.value for s in Status if s in BY_HAND[status]))
        for status in Status
        if status in BY_HAND
    ]


def _table(header: list[str], rows: list[tuple[str, ...]], literal: set[int]) -> nodes.table:
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    head, body = nodes.thead(), nodes.tbody()
    for section, content in ((head, [header]), (body, rows)):
        for cells in content:
            row = nodes.row()
            for column, text in enumerate(cells):
                code = section is body and column in literal and text
                row += nodes.entry('', nodes.paragraph('', '', *_cell(text, bool(code))))
            section += row
    group += [head, body]
    return nodes.table('', group)


def _cell(text: str, code: bool) -> list[nodes.Node]:
    if not code:
        return [nodes.Text(text)]
    parts: list[nodes.Node] = []
    for word in text.split(', '):
        if parts:
            parts.append(nodes.Text(', '))
        name = word.startswith('<') or ' ' not in word
        parts.append(nodes.literal(word, word) if name else nodes.Text(word))
    return parts


class Transitions(SphinxDirective):
    """The life of an instance, as a table."""

    def run(self) -> list[nodes.Node]:
        header = ['from', 'what happens', 'to', 'then fires']
        return [_table(header, transition_rows(), {0, 2, 3})]


class ByHand(SphinxDirective):
    """What a person may set, as a table."""

    def run(self) -> list[nodes.Node]:
        return [_table(['status to set', 'on an instance that is'], by_hand_rows(), {0, 1})]


class Setting(ConfigurationValue):
    """One setting; its default comes from the code."""

    def run(self) -> list[nodes.Node]:
        self.name = 'std:confval'  # what it is described as
        name = self.arguments[0]
        if name in DEFAULTS:
            self.options['default'] = f'``{DEFAULTS[name]!r}``'
        else:
            logger.warning('there is no setting %s', name, location=self.get_location())
        described = self.env.__dict__.setdefault('described_settings', {})
        described[name] = self.env.docname
        return super().run()


def check_settings(_app, env) -> list[str]:
    for name in DEFAULTS.keys() - env.__dict__.get('described_settings', {}):
        logger.warning('no page describes the setting %s', name)
    return []


def setup(app) -> dict[str, object]:
    app.add_directive('transitions', Transitions)
    app.add_directive('by-hand', ByHand)
    app.add_directive('setting', Setting)
    app.connect('env-updated', check_settings)
    return {'version': '1', 'parallel_read_safe': False}
