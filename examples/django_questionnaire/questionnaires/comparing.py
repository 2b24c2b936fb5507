"""How answers compare with those of the 944 respondents of 1996."""

import csv
import math
from pathlib import Path

from examples.django_questionnaire.questionnaires.forms import AboutYou, Politics
from examples.django_questionnaire.questionnaires.models import Respondent

FILE = Path(__file__).resolve().parents[2] / 'questionnaire/data/anes96.csv'

#: What is asked, and the column of the file that holds it.
COLUMNS = {
    'age': 'age', 'educ': 'educ', 'popul': 'popul', 'tv_news': 'TVnews', 'place': 'selfLR',
    'party': 'PID', 'vote': 'vote',
}

#: How much of a difference counts as one step apart.
STEPS = {'age': 10, 'educ': 1, 'tv_news': 2, 'place': 1, 'party': 1}


def load_respondents():
    """Fill the table of respondents from the file, if it is empty."""
    if Respondent.objects.exists():
        return
    with FILE.open(newline='') as file:
        Respondent.objects.bulk_create(
            Respondent(
                number=int(row['respondent']),
                **{name: int(row[column]) for name, column in COLUMNS.items()},
            )
            for row in csv.DictReader(file)
        )


def page(number, answers):
    """Return lines that compare the answers of a page of the survey."""
    return [_about_you, _news, _politics][number - 1](answers)


def _about_you(answers):
    return [
        f'{_share(age__lt=answers["age"])} were younger than you.',
        f'{_share(educ=answers["educ"])} had the same education as you.',
        f'{_share(popul__lt=answers["popul"])} lived in smaller places.',
    ]


def _news(answers):
    return [
        f'{_share(tv_news__lt=answers["tv_news"])} watched the news less often than you.',
        f'{_share(tv_news=answers["tv_news"])} watched it as often.',
    ]


def _politics(answers):
    return [
        f'{_share(place=answers["place"])} placed themselves where you do.',
        f'{_share(party=answers["party"])} were as near to a party as you.',
        f'{_share(vote=answers["vote"])} would have voted as you.',
    ]


def _share(**conditions):
    some, everybody = Respondent.objects.filter(**conditions).count(), Respondent.objects.count()
    return f'{round(100 * some / everybody)} of 100'


def nearest(answers):
    """Return lines about the respondent who answered most alike."""
    other = min(Respondent.objects.order_by('number'), key=lambda one: _distance(answers, one))
    votes = dict(Politics.base_fields['vote'].choices)
    agree = other.vote == answers['vote']
    return [
        f'Of all {Respondent.objects.count()}, number {other.number} answered most like you: '
        f'{other.age} years old, {_said(AboutYou, "educ", other)}, '
        f'{_said(Politics, "place", other)}, TV news on {other.tv_news} of 7 days.',
        f'They meant to vote for {votes[other.vote]}, {"as" if agree else "other than"} you.',
    ]


def _distance(answers, other):
    apart = [(answers[name] - getattr(other, name)) / step for name, step in STEPS.items()]
    # A village and a town differ as much as a town and a city.
    apart.append(math.log1p(answers['popul']) - math.log1p(other.popul))
    return math.hypot(*apart)


def _said(form, name, other):
    return dict(form.base_fields[name].choices)[getattr(other, name)].lower()
