"""The respondents: what they answered is real, how it arrived is made up.

The answers come from ``data/anes96.csv``. The file holds no arrival times, devices or
browsers, so these are drawn from a seed, each respondent's from a generator of their
own: the same seed gives the same events, however many respondents take part.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

__all__ = ['MADE_UP', 'PAGES', 'Event', 'Respondent', 'arrivals', 'read_respondents']

#: The pages of the questionnaire and the answers on each.
PAGES = {
    1: ('age', 'educ', 'income', 'popul'),
    2: ('TVnews',),
    3: ('selfLR', 'ClinLR', 'DoleLR', 'PID', 'vote'),
}

MADE_UP = (
    'The answers are those of 944 real respondents of the American National Election Study '
    'of 1996. Made up, from the seed {seed}: the order of arrival, devices and browsers, '
    'which pages are sent twice, which answers are changed, who never finishes and who uses '
    'an embedded application.'
)

_DATA = Path(__file__).parent / 'data' / 'anes96.csv'

#: How likely each made-up thing is.
_UNFINISHED, _EMBEDDED, _REPEATED, _CHANGED = 0.15, 0.2, 0.12, 0.1


@dataclass(frozen=True)
class Event:
    """One thing that happens to a respondent, as it is fired."""

    uid: str
    trigger: str
    kwargs: dict[str, Any]
    event_id: str
    at: float


@dataclass
class Respondent:
    """A respondent and what they do.

    Attributes:
        answers: The ten answers of the file: what the database must hold in the end.
        finishes: Whether they complete the questionnaire.
        embedded: Whether they use an embedded application rather than a browser.
        events: What is fired for them, in order, repeats included.
    """

    number: int
    answers: dict[str, int]
    device: str
    browser: str
    finishes: bool
    embedded: bool
    events: list[Event] = field(default_factory=list)

    @property
    def uid(self) -> str:
        """The uid of their session."""
        return f'respondent:{self.number}'

    @property
    def revisions(self) -> set[tuple[int, int]]:
        """The pages that they sent, ``(page, revision)``, each once."""
        return {
            (event.kwargs['page'], event.kwargs['revision'])
            for event in self.events
            if event.trigger == 'pageReceived'
        }

    @property
    def rows(self) -> int:
        """How many rows must be written for them; none before they finish."""
        return 1 + len(self.revisions) + (not self.embedded) + 1 if self.finishes else 0


def read_respondents(count: int, seed: int) -> list[Respondent]:
    """Return the first respondents of the file, with all that is made up about them."""
    with _DATA.open(newline='') as file:
        lines = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [_respondent(line.pop('respondent'), line, seed) for line in lines[:count]]


def arrivals(respondents: list[Respondent]) -> list[Event]:
    """Return the events of all respondents as they arrive, mixed with each other."""
    events = [event for respondent in respondents for event in respondent.events]
    return sorted(events, key=lambda event: (event.at, event.uid))


def _respondent(number: int, answers: dict[str, int], seed: int) -> Respondent:
    random = Random(f'{seed}:{number}')
    respondent = Respondent(
        number,
        answers,
        device=random.choice(['phone', 'tablet', 'computer']),
        browser=random.choice(['Firefox', 'Chrome', 'Safari']),
        finishes=random.random() >= _UNFINISHED,
        embedded=random.random() < _EMBEDDED,
    )
    at = random.uniform(0, 3600)
    for trigger, event_id, kwargs in _story(respondent, random):
        at += random.uniform(0.001, 300)
        respondent.events.append(Event(respondent.uid, trigger, kwargs, event_id, at))
    return respondent


def _story(
    respondent: Respondent, random: Random
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield what is fired for a respondent: trigger, event id and kwargs."""
    order = random.sample(list(PAGES), k=3 if respondent.finishes else random.randint(1, 3))
    changed = random.choice(order) if random.random() < _CHANGED else None
    # Known before the questionnaire is complete, but not necessarily at its start.
    embedded_after = random.choice(order) if respondent.embedded else None
    late = []
    yield 'firstPageReceived', 'first', {'device': respondent.device}
    for page in order:
        sent = _page(respondent, page, 0, changed_by=random if page == changed else None)
        yield sent
        if random.random() < _REPEATED:
            late.append(sent)
        if page == changed:
            late.append(_page(respondent, page, 1))
        if page == embedded_after:
            yield 'isEmbeddedApplication', 'embedded', {}
        if late and random.random() < 0.5:
            yield late.pop(0)
    if respondent.finishes:
        yield 'questionnaireComplete', 'complete', {}
    yield from late


def _page(
    respondent: Respondent, page: int, revision: int, changed_by: Random | None = None
) -> tuple[str, str, dict[str, Any]]:
    answers = {name: respondent.answers[name] for name in PAGES[page]}
    if changed_by is not None:
        # What they answer first; the file has what they answer in the end.
        answers[changed_by.choice(PAGES[page])] += 1
    kwargs = {
        'page': page, 'revision': revision, 'answers': answers, 'browser': respondent.browser,
    }
    return 'pageReceived', f'page {page}, revision {revision}', kwargs
