"""The settings. The environment may choose another place, storage, manager or broker."""

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_urlsafe

FOLDER = Path(os.environ.get('QUESTIONNAIRES_FOLDER', '.demo/django_questionnaire')).resolve()
FOLDER.mkdir(parents=True, exist_ok=True)


def _secret_key():
    """Return the key of this folder, which is made once and in nobody's repository."""
    path = FOLDER / 'secret_key'
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, 'w') as file:
            file.write(token_urlsafe(50))
    return path.read_text()


# ------------------------------------------------------------------------------------- Django

SECRET_KEY = _secret_key()
ALLOWED_HOSTS = ['127.0.0.1', 'localhost']
ROOT_URLCONF = 'examples.django_questionnaire.urls'
INSTALLED_APPS = [
    'django.contrib.admin',
    'django.contrib.auth',
    'django.contrib.contenttypes',
    'django.contrib.messages',
    'django.contrib.sessions',
    'django.contrib.staticfiles',
    'celery_triggers.contrib.django',
    'examples.django_questionnaire.questionnaires',
]
MIDDLEWARE = [
    'django.middleware.security.SecurityMiddleware',
    'django.contrib.sessions.middleware.SessionMiddleware',
    'django.middleware.common.CommonMiddleware',
    'django.middleware.csrf.CsrfViewMiddleware',
    'django.contrib.auth.middleware.AuthenticationMiddleware',
    'django.contrib.messages.middleware.MessageMiddleware',
    'django.middleware.clickjacking.XFrameOptionsMiddleware',
    'examples.django_questionnaire.questionnaires.middleware.keep_to_itself',
    'examples.django_questionnaire.questionnaires.middleware.TryAgain',
]
TEMPLATES = [
    {
        'BACKEND': 'django.template.backends.django.DjangoTemplates',
        'APP_DIRS': True,
        'OPTIONS': {
            'context_processors': [
                'django.template.context_processors.request',
                'django.contrib.auth.context_processors.auth',
                'django.contrib.messages.context_processors.messages',
            ],
        },
    }
]
DATABASES = {
    'default': {
        'ENGINE': 'django.db.backends.sqlite3',
        'NAME': FOLDER / 'questionnaires.db',
        'OPTIONS': {
            # Several processes write to this file. Each takes the lock when its transaction
            # begins, and waits for it: who reads first and then writes could not.
            'transaction_mode': 'IMMEDIATE',
            'timeout': 30,
            'init_command': 'PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL',
        },
    }
}
DEFAULT_AUTO_FIELD = 'django.db.models.BigAutoField'
STATIC_URL = 'static/'
TIME_ZONE = 'UTC'
USE_TZ = True
LOGGING = {
    'version': 1,
    'disable_existing_loggers': False,
    'handlers': {'console': {'class': 'logging.StreamHandler'}},
    'root': {'handlers': ['console'], 'level': 'WARNING'},
}

# ------------------------------------------------------------------- Celery and its triggers

#: Where sessions live: in the project's own database, or at a URL.
CELERY_TRIGGERS_STORAGE = os.environ.get('CELERY_TRIGGERS_STORAGE', 'django')
#: ``timeline`` is the example's own, in ``questionnaires/managers.py``.
CELERY_TRIGGERS_MANAGER = os.environ.get('CELERY_TRIGGERS_MANAGER', 'timeline')
CELERY_TRIGGERS_KEY_PREFIX = os.environ.get('CELERY_TRIGGERS_KEY_PREFIX', 'questionnaires')

CELERY_BROKER_URL = os.environ.get('CELERY_BROKER_URL', 'filesystem://')
CELERY_TASK_DEFAULT_QUEUE = CELERY_TRIGGERS_KEY_PREFIX
CELERY_TASK_IGNORE_RESULT = True
# A worker that dies has its tasks run again: all of them can bear that.
CELERY_TASK_ACKS_LATE = True

if CELERY_BROKER_URL == 'filesystem://':
    # No server: the messages are files.
    CELERY_BROKER_TRANSPORT = 'examples.questionnaire.broker:Transport'
    CELERY_BROKER_TRANSPORT_OPTIONS = {
        'data_folder_in': f'{FOLDER}/messages',
        'data_folder_out': f'{FOLDER}/messages',
        'control_folder': f'{FOLDER}/control',
        'store_processed': True,
        'processed_folder': f'{FOLDER}/processed',
        # How long a worker without work sleeps before it looks again, in seconds.
        'polling_interval': 0.05,
    }
    for _name in ('messages', 'control', 'processed'):
        (FOLDER / _name).mkdir(exist_ok=True)
