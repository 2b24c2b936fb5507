"""What is around every page."""

from django.shortcuts import render
from django.utils.cache import add_never_cache_headers

from celery_triggers.exceptions import StorageUnavailable


def keep_to_itself(get_response):
    """Forbid pages to load anything from elsewhere, and browsers to keep what was answered.

    So the button "back" asks for the page anew, and shows what is saved by now.
    """

    def middleware(request):
        response = get_response(request)
        response['Content-Security-Policy'] = (
            "default-src 'self'; object-src 'none'; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'"
        )
        add_never_cache_headers(response)
        return response

    return middleware


class TryAgain:
    """Say so where the storage of sessions does not answer: a second try is harmless."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        return self.get_response(request)

    def process_exception(self, request, exception):
        if isinstance(exception, StorageUnavailable):
            return render(request, 'questionnaires/unavailable.html', status=503)
        return None
