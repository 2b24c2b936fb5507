"""The editors' page: what waits for a decision, and the buttons to make one.

It works without JavaScript. Whoever reads a form of this page knows its token, and nobody else
can send one.
"""

import hmac
import secrets
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

from kombu.exceptions import OperationalError

from celery_triggers import Status, TaskInstance
from celery_triggers.exceptions import EventConflict, TriggersError
from examples.approval.app import app, submit

TOKEN = secrets.token_urlsafe()
STYLE = Path(__file__).with_name('style.css').read_text()


# ---------------------------------------------------------------- the articles


@dataclass
class Article:
    """An article that has come to the gate, and what became of it."""

    uid: str
    gate: TaskInstance
    state: str
    note: str
    author: str
    title: str
    text: str
    words: int


def articles():
    """Return all of them, those first that came first."""
    found = [_article(uid, app.triggers.session(uid)) for uid in app.triggers.sessions('article:')]
    return sorted(filter(None, found), key=lambda article: min(article.gate.timestamps.values()))


def _article(uid, session):
    gate = session.storage.instances.get('t_publish#0')
    if gate is None:
        return None  # it is still being prepared
    fired = session.storage.latest_kwargs
    return Article(uid, gate, *_state(gate, fired), **fired['submitted'])


def _state(gate, fired):
    match gate.status:
        case Status.UNSTARTED:
            return 'waiting', ''
        case Status.SCHEDULED | Status.RUNNING:
            return 'approved', 'being published'
        case Status.FINISHED:
            return 'published', gate.result['url']
        case Status.ABANDONED if gate.metadata['reason'] == 'deadline':
            return 'expired', 'nobody decided in time'
        case Status.ABANDONED if 'rejected' in fired:
            return 'rejected', fired['rejected']['reason']
        case _:
            return 'failed', str(gate.metadata.get('reason', ''))


def decide(uid, decision, kwargs=None):
    """Fire a decision. All have one event id, so that the first is the one that counts."""
    session = app.triggers.session(uid)
    if uid.startswith('article:') and 't_publish#0' in session.storage:
        # Unless somebody else was faster, and decided otherwise: then the page says so.
        with suppress(EventConflict):
            session.fire(decision, kwargs, event_id='decision')


# -------------------------------------------------------------------- the page


def page(told='', wanted=''):
    """Return the page.

    Args:
        told: The uid of an article to say something about.
        wanted: What somebody has just decided about it.
    """
    everything = articles()
    waiting = [article for article in everything if article.state == 'waiting']
    decided = [article for article in everything if article.state != 'waiting']
    decided = sorted(decided, key=lambda article: article.gate.last_modified, reverse=True)[:20]
    cards = ''.join(map(_card, waiting)) or NOTHING
    rows = ''.join(map(_row, decided)) or '<li class="empty">Nothing yet.</li>'
    return _document(f"""
{_message(everything, told, wanted) if told else ''}
<section aria-labelledby="waiting">
  <h2 id="waiting">Waiting for you <span class="count">{len(waiting)}</span></h2>
  {cards}
</section>
<section aria-labelledby="decided">
  <h2 id="decided">Decided</h2>
  <ul class="rows">{rows}</ul>
</section>
<section aria-labelledby="new">
  <h2 id="new">Submit an article</h2>
  {_form('submit', NEW)}
</section>""", title=f'{len(waiting)} to approve')


NOTHING = '<p class="card empty">Nothing waits for a decision.</p>'

NEW = """
<label for="author">Author</label>
<input id="author" name="author" maxlength="200" autocomplete="off" required>
<label for="title">Title</label>
<input id="title" name="title" maxlength="200" autocomplete="off" required>
<label for="text">Text</label>
<textarea id="text" name="text" rows="4" maxlength="10000" required></textarea>
<button>Submit</button>"""


def _message(everything, told, wanted):
    article = next((article for article in everything if article.uid == told), None)
    if article is None:
        text = 'Submitted. It comes here once a worker has prepared it: <a href="/">look again</a>.'
    else:
        done = {'approved': ('approved', 'published'), 'rejected': ('rejected',)}
        late = wanted in done and article.state not in done[wanted]
        text = f'“{escape(article.title)}” {"was already" if late else "is"} {article.state}.'
        if article.state == 'waiting':
            text = f'“{escape(article.title)}” waits for a decision.'
    return f'<p class="message" role="status" tabindex="-1" autofocus>{text}</p>'


def _card(article):
    uid, title = escape(article.uid), escape(article.title)
    yes = f'<button class="yes">Approve<span class="unseen"> “{title}”</span></button>'
    no = f"""
      <label for="reason-{uid}">Reason<span class="unseen"> to reject “{title}”</span> (optional)
      </label>
      <input id="reason-{uid}" name="reason" maxlength="200" autocomplete="off">
      <button class="no">Reject<span class="unseen"> “{title}”</span></button>"""
    return f"""
<article class="card">
  <h3>{title}</h3>
  <p class="facts">By {escape(article.author)}, {_count(article.words, 'word')}.
    Decide before {_time(article.gate.deadline)}.</p>
  <p class="text">{escape(article.text)}</p>
  <div class="actions">{_form('approve', yes, uid)}{_form('reject', no, uid)}</div>
</article>"""


def _row(article):
    note = f': {escape(article.note)}' if article.note else ''
    return f"""
<li><strong>{escape(article.title)}</strong> <span class="facts">by {escape(article.author)}</span>
  <span class="state {article.state}">{article.state.capitalize()}{note}</span></li>"""


def _form(action, fields, uid=''):
    hidden = f'<input type="hidden" name="token" value="{TOKEN}">'
    if uid:
        hidden += f'<input type="hidden" name="uid" value="{uid}">'
    return f'<form method="post" action="/{action}" class="{action}">{hidden}{fields}</form>'


def _count(number, word):
    return f'{number} {word}' if number == 1 else f'{number} {word}s'


def _time(at):
    return f'<time datetime="{at.isoformat()}">{at.day} {at:%B %Y, %H:%M} UTC</time>'


def _document(main, title):
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Articles</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>Articles</h1></header>
<main>{main}</main>
</body>
</html>"""


HEADERS = {
    'Content-Type': 'text/html; charset=utf-8',
    'Cache-Control': 'no-store',
    'Content-Security-Policy': (
        "default-src 'none'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        f"style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'"
    ),
}


# ------------------------------------------------------------------ the server


class Handler(BaseHTTPRequestHandler):
    """Answers a browser on this very machine."""

    def do_GET(self):
        url = urlsplit(self.path)
        given = {name: values[0] for name, values in parse_qs(url.query).items()}
        if not self._is_here():
            self._refuse(403, 'This page has another address.')
        elif url.path != '/':
            self._refuse(404, 'There is nothing here.')
        else:
            self._attempt(
                lambda: self._answer(200, page(given.get('told', ''), given.get('wanted', '')))
            )

    def do_POST(self):
        length = self.headers.get('Content-Length', '')
        if not length.isdecimal() or int(length) > 100_000:
            self._refuse(413, 'That is too much.')
            return
        body = self.rfile.read(int(length)).decode(errors='replace')
        form = {name: values[0].strip() for name, values in parse_qs(body).items()}
        if not self._is_here() or not _knows_token(form):
            self._refuse(403, 'This form is not of this page, or the page has started anew.')
        else:
            self._attempt(lambda: self._do(form))

    def _do(self, form):
        uid = form.get('uid', '')
        match self.path:
            case '/approve' if uid:
                decide(uid, 'approved')
                self._see(told=uid, wanted='approved')
            case '/reject' if uid:
                decide(uid, 'rejected', {'reason': form.get('reason', 'no reason was given')})
                self._see(told=uid, wanted='rejected')
            case '/submit' if {'author', 'title', 'text'} <= form.keys():
                uid, _ = submit(form['author'], form['title'], form['text'])
                self._see(told=uid)
            case _:
                self._refuse(400, 'Something is missing.')

    def _attempt(self, do):
        try:
            do()
        except (TriggersError, OperationalError):
            self.log_message('refused: the storage or the broker does not answer')
            self._refuse(503, 'The server behind this page does not answer. Try again.')

    def _is_here(self):
        """Tell whether the browser asked for this address, not for a name that leads here."""
        port = self.server.server_address[1]
        return self.headers.get('Host') in (f'127.0.0.1:{port}', f'localhost:{port}')

    def _see(self, **query):
        self.send_response(303)
        self.send_header('Location', f'/?{urlencode(query)}')
        self.send_header('Content-Length', '0')
        self.end_headers()

    def _refuse(self, status, text):
        message = f'<p class="message">{text} <a href="/">Back to the articles</a></p>'
        self._answer(status, _document(message, title='Sorry'))

    def _answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        for name, value in {**HEADERS, 'Content-Length': str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _knows_token(form):
    return hmac.compare_digest(form.get('token', '').encode(), TOKEN.encode())
