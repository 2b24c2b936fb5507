"""The pages. Each POST does one step and then redirects, so that a reload repeats nothing."""

from uuid import uuid4

from django import forms
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from examples.django_questionnaire.questionnaires import looking, steps
from examples.django_questionnaire.questionnaires.forms import QUESTIONNAIRES
from examples.django_questionnaire.questionnaires.models import Applicant, Run

get_or_post = require_http_methods(['GET', 'POST'])


class ApplicantForm(forms.Form):
    """Begins an application: the id is made when the form is shown, not when it comes back."""

    id = forms.UUIDField(widget=forms.HiddenInput)


class SendForm(forms.Form):
    """Sends a questionnaire, in the version that was looked at."""

    version = forms.IntegerField(widget=forms.HiddenInput)


@get_or_post
def home(request):
    form = ApplicantForm(request.POST or None, initial={'id': uuid4()})
    if request.method == 'POST' and form.is_valid():
        found = steps.become_applicant(form.cleaned_data['id'])
        request.session['applicant'] = str(found.id)
        return redirect('applicant', found.id)
    known = Applicant.objects.filter(id=request.session.get('applicant')).first()
    return render(request, 'questionnaires/home.html', {'form': form, 'known': known})


@require_GET
def applicant(request, applicant_id):
    found = get_object_or_404(Applicant, id=applicant_id)
    return render(request, 'questionnaires/applicant.html', looking.at_applicant(found))


@require_POST
def start(request, applicant_id, slug):
    found = get_object_or_404(Applicant, id=applicant_id)
    if slug not in QUESTIONNAIRES:
        return redirect('applicant', found.id)
    run = steps.start(found, QUESTIONNAIRES[slug])
    return _go_on(run)


@get_or_post
def page(request, run_id, number):
    run = get_object_or_404(Run, id=run_id)
    form_class = run.shape.form(number)
    missing = run.first_missing
    if run.withdrawn_at or form_class is None:
        return redirect('run', run.id)
    if request.method == 'GET' and missing is not None and missing < number:
        return redirect('page', run.id, missing)
    saved = run.pages.filter(number=number).first()
    if request.method == 'GET':
        initial = {**saved.answers, 'revision': saved.revision} if saved else None
        return _show_page(request, run, number, form_class(initial=initial))
    form = form_class(request.POST)
    if not form.is_valid():
        return _show_page(request, run, number, form)
    try:
        steps.save_page(run.id, number, form.answers, form.cleaned_data['revision'])
    except steps.ChangedMeanwhile:
        return _show_conflict(request, run, number)
    except steps.Withdrawn:
        return redirect('run', run.id)
    if run.first_missing is None:
        return redirect('check', run.id)
    return redirect('page', run.id, number + 1)


@get_or_post
def check(request, run_id):
    run = get_object_or_404(Run, id=run_id)
    if run.withdrawn_at or run.first_missing is not None:
        return _go_on(run)
    form = SendForm(request.POST or None, initial={'version': run.version})
    changed = False
    if request.method == 'POST' and form.is_valid():
        try:
            steps.send(run.id, form.cleaned_data['version'])
        except steps.ChangedMeanwhile:
            changed = True
            form = SendForm(initial={'version': run.version})
        except (steps.PageMissing, steps.Withdrawn):
            return _go_on(run)
        else:
            return redirect('run', run.id)
    pages = [
        (page.number, run.shape.form(page.number), run.shape.form(page.number).told(page.answers))
        for page in run.pages.all()
    ]
    return render(request, 'questionnaires/check.html', {
        'run': run, 'form': form, 'pages': pages, 'changed': changed,
    })


@get_or_post
def withdraw(request, run_id):
    run = get_object_or_404(Run, id=run_id)
    if request.method == 'POST':
        steps.withdraw(run.id)
        return redirect('run', run.id)
    return render(request, 'questionnaires/withdraw.html', {'run': run})


@require_GET
def run(request, run_id):
    found = get_object_or_404(Run, id=run_id)
    return render(request, 'questionnaires/run.html', looking.at_run(found))


def _go_on(run):
    """Redirect to where there is something to do for the person."""
    if run.withdrawn_at:
        return redirect('run', run.id)
    missing = run.first_missing
    return redirect('check', run.id) if missing is None else redirect('page', run.id, missing)


def _show_page(request, run, number, form, saved=None):
    return render(request, 'questionnaires/page.html', {
        'run': run, 'number': number, 'form': form, 'saved': saved,
        'count': len(run.shape.forms),
    })


def _show_conflict(request, run, number):
    """Show what was saved in another tab, and what this one has sent, to be sent again."""
    saved = run.pages.get(number=number)
    data = request.POST.copy()
    data['revision'] = saved.revision
    form = run.shape.form(number)(data)
    form.add_error(None, 'This page was saved with other answers since you opened it.')
    return _show_page(request, run, number, form, saved=type(form).told(saved.answers))
