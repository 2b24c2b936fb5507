"""The command: ``python -m examples.django_questionnaire``, a site with its workers."""

import argparse
import os
import sys
from pathlib import Path
from secrets import token_urlsafe

from examples.workers import WorkerDied, Workers

APP = 'examples.django_questionnaire'


def main():
    options = _options()
    folder = Path(options.folder).resolve()
    # Settings are read from the environment when they are first needed, here as in workers.
    os.environ['QUESTIONNAIRES_FOLDER'] = str(folder)
    try:
        password = _prepare()
        workers = Workers(APP, options.workers, folder, 'questionnaires')
        with workers.running():
            _serve(options.port, workers, password)
    except KeyboardInterrupt:
        print()
    except WorkerDied as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def _options():
    parser = argparse.ArgumentParser(
        prog='python -m examples.django_questionnaire',
        description='Serve two questionnaires, with workers that do what follows.',
    )
    parser.add_argument('--port', type=int, default=8000, help='default: 8000; 0: a free one')
    parser.add_argument(
        '--folder', default='.demo/django_questionnaire', metavar='FOLDER',
        help='where everything is kept; default: .demo/django_questionnaire',
    )
    parser.add_argument('--workers', type=int, default=1, metavar='N', help='default: 1')
    return parser.parse_args()


def _prepare():
    """Make the database, with the respondents of 1996 in it; return a password for the admin."""
    import django
    from django.core.management import call_command

    django.setup()
    from django.contrib.auth.models import User

    from examples.django_questionnaire.questionnaires.comparing import load_respondents

    call_command('migrate', verbosity=0)
    load_respondents()
    user, _ = User.objects.get_or_create(
        username='admin', defaults={'is_staff': True, 'is_superuser': True}
    )
    password = token_urlsafe(9)
    user.set_password(password)
    user.save()
    return password


def _serve(port, workers, password):
    """Serve the site on this machine until somebody ends it, or a worker ends."""
    from django.contrib.staticfiles.handlers import StaticFilesHandler
    from django.core.servers.basehttp import ThreadedWSGIServer, WSGIRequestHandler
    from django.core.wsgi import get_wsgi_application

    class Server(ThreadedWSGIServer):
        """Looks after the workers twice a second."""

        def service_actions(self):
            workers.check()

    class Handler(WSGIRequestHandler):
        """Answers without a line for each request."""

        def log_message(self, *args):
            pass

    with Server(('127.0.0.1', port), Handler) as server:
        server.set_app(StaticFilesHandler(get_wsgi_application()))
        url = f'http://127.0.0.1:{server.server_port}/'
        print(f'The site is at {url}')
        print(f'Its admin is at {url}admin/ for the user admin, password {password}', flush=True)
        server.serve_forever()


if __name__ == '__main__':
    sys.exit(main())
