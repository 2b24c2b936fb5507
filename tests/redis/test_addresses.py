"""What URLs and options mean, and what wrong ones are told."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import redis

from celery_triggers.exceptions import StorageNotConfigured
from celery_triggers.settings import Settings
from celery_triggers.storages.redis.address import Address
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Server


def arguments(url: str, **options: Any) -> dict[str, Any]:
    """Return what a connection is told."""
    address = Address.of(url, options)
    client = address.client() if not address.hosts else address.node(address.hosts[0])
    found: dict[str, Any] = dict(client.connection_pool.connection_kwargs)
    return found


def master(url: str, **options: Any) -> tuple[Any, Any]:
    """Return the pool of the master's connections and who knows the master."""
    pool: Any = Address.of(url, options).client().connection_pool
    return pool, pool.sentinel_manager


SENTINELS = {
    'one': ('redis+sentinel://s1/shop', [('s1', 26379)]),
    'several': ('redis+sentinel://s1:1,s2,[::1]:3/shop', [('s1', 1), ('s2', 26379), ('::1', 3)]),
    "Celery's scheme": ('sentinel://s1:1/shop', [('s1', 1)]),
    "Celery's list": ('sentinel://s1:1;sentinel://s2:2', [('s1', 1), ('s2', 2)]),
    'with an end': ('sentinel://s1:1;sentinel://s2:2;', [('s1', 1), ('s2', 2)]),
}


@pytest.mark.parametrize('form', SENTINELS)
def test_sentinels_and_the_master_that_they_watch(form: str):
    url, hosts = SENTINELS[form]
    pool, sentinel = master(url, **({} if 'shop' in url else {'master_name': 'shop'}))
    asked = [one.connection_pool.connection_kwargs for one in sentinel.sentinels]
    assert [(one['host'], one['port']) for one in asked] == hosts
    assert pool.service_name == 'shop'
    assert pool.connection_kwargs['socket_timeout'] == asked[0]['socket_timeout'] == 5.0
    assert pool.connection_kwargs['retry']._retries == 0
    assert asked[0]['retry']._retries == 0


@pytest.mark.parametrize(
    'url',
    [
        'redis+sentinel://me:se%20cret@s1,s2/shop/4',
        'sentinel://me:se%20cret@s1,s2/shop?db=4',
        'sentinel://me:se%20cret@s1;sentinel://me:se%20cret@s2/4',
    ],
)
def test_user_password_and_database_are_of_redis_not_of_its_sentinels(url: str):
    pool, sentinel = master(url, master_name='shop')
    known = pool.connection_kwargs
    assert (known['username'], known['password'], known['db']) == ('me', 'se cret', 4)
    asked = sentinel.sentinels[0].connection_pool.connection_kwargs
    assert not asked.get('password')
    assert asked['db'] == 0


def test_sentinels_that_want_a_password_and_company():
    _, sentinel = master('redis+sentinel://s1/shop?sentinel_username=me&sentinel_password=x')
    asked = sentinel.sentinels[0].connection_pool.connection_kwargs
    assert (asked['username'], asked['password']) == ('me', 'x')
    options = {'sentinel_kwargs': {'password': 'y'}, 'min_other_sentinels': 2}
    _, sentinel = master('sentinel://s1/shop', **options)
    assert sentinel.sentinels[0].connection_pool.connection_kwargs['password'] == 'y'
    assert sentinel.min_other_sentinels == 2


TLS = [
    ('rediss://h?ssl_cert_reqs=none', {}),
    ('rediss://h?ssl_cert_reqs=CERT_NONE', {}),
    ('rediss://h', {'ssl_cert_reqs': 'CERT_NONE'}),
    ('redis://h', {'ssl': True, 'ssl_cert_reqs': ssl.CERT_NONE}),
    ('rediss+cluster://h?ssl_cert_reqs=none', {}),
    ('redis+cluster://h', {'ssl': True, 'ssl_cert_reqs': 'none'}),
]


@pytest.mark.parametrize(('url', 'options'), TLS)
def test_tls(url: str, options: dict[str, Any]):
    address = Address.of(url, options)
    client = address.client() if not address.hosts else address.node(address.hosts[0])
    pool = client.connection_pool
    assert issubclass(pool.connection_class, redis.SSLConnection)
    assert pool.connection_kwargs['ssl_cert_reqs'] in ('none', ssl.CERT_NONE)


@pytest.mark.parametrize(
    ('url', 'options', 'of_sentinels'),
    [
        ('rediss+sentinel://s/shop?ssl_cert_reqs=none', {}, True),
        ('rediss+sentinel://s/shop?ssl_cert_reqs=none', {'sentinel_kwargs': {'ssl': False}}, False),
        # As with Celery, whose broker_use_ssl is of Redis alone.
        ('sentinel://s/shop', {'ssl': True, 'ssl_cert_reqs': 'none'}, False),
    ],
)
def test_tls_behind_sentinels(url: str, options: dict[str, Any], of_sentinels: bool):
    pool, sentinel = master(url, **options)
    assert issubclass(pool.connection_class, redis.SSLConnection)
    assert pool.connection_kwargs['ssl_cert_reqs'] == 'none'
    kind = sentinel.sentinels[0].connection_pool.connection_class
    assert issubclass(kind, redis.SSLConnection) is of_sentinels


def test_a_cluster_is_found_by_some_of_its_nodes():
    address = Address.of('redis+cluster://me:secret@n1:7000,n2,[::1]:7/0?socket_timeout=3', {})
    assert address.hosts == (('n1', 7000), ('n2', 6379), ('::1', 7))
    known = address.node(('10.0.0.1', 7000)).connection_pool.connection_kwargs
    assert (known['host'], known['port']) == ('10.0.0.1', 7000)
    assert (known['username'], known['password']) == ('me', 'secret')
    assert known['socket_timeout'] == 3.0


WRONG = {
    'redis+sentinal://h/shop': r'begins with one of redis://.*rediss\+cluster://',
    'sentinel://h': 'names no master.*master_name',
    'sentinel:///shop': "'' is no host",
    'sentinel://h/shop/first': "'first' is no number of a database",
    'redis+cluster://h/1': 'database 0 alone',
    'redis+cluster://h?db=1': 'database 0 alone',
    'redis+cluster://h:port': "'port'",
    'redis+cluster://h,': "'' is no host",
    'redis+cluster://h?sokcet_timeout=1': 'sokcet_timeout',
    'sentinel://h/shop?sokcet_timeout=1': 'sokcet_timeout',
    'redis://h/0?sokcet_timeout=1': 'sokcet_timeout',
    'redis://h/0?socket_timeout=soon': 'socket_timeout',
    'rediss://h?ssl_cert_reqs=perhaps': 'perhaps',
    'rediss://h?ssl_ca_certs=missing.pem': "ssl_ca_certs: there is no file 'missing.pem'",
}


@pytest.mark.parametrize('url', WRONG)
def test_a_wrong_url_is_told_what_is_wrong(url: str):
    with pytest.raises(StorageNotConfigured, match=WRONG[url]):
        Medium('redis', url).backend()


@pytest.mark.parametrize(
    'options',
    [{'wait_replicas': 'two'}, {'sentinel_kwargs': {'passwort': 'x'}}, {'ssl_keyfile': 'no.pem'}],
)
def test_wrong_options_are_told_by_name(options: dict[str, Any]):
    application = Medium('redis').application(triggers_storage_options=options)
    with pytest.raises(StorageNotConfigured, match=next(iter(options))):
        Medium('redis', 'rediss+sentinel://h/shop').backend(application=application)


@pytest.mark.parametrize(('url', 'said'), [
    ('redis://h/abc', "'abc' is no number"),
    ('rediss://me:p@h:1/1/2', "'1/2' is no number"),
    ('redis://h/0?wait_replicas=1', 'wait_replicas stands in triggers_storage_options'),
    ('redis+cluster://h?wait_timeout=1', 'wait_timeout stands in triggers_storage_options'),
    ('redis://h/0?master_name=m', 'master_name is for Sentinels alone'),
])
def test_what_would_be_misunderstood_is_refused(url: str, said: str):
    with pytest.raises(StorageNotConfigured, match=said):
        Medium('redis', url).backend()


@pytest.mark.parametrize('url', [
    'unix:///run/redis.sock?db=3', 'unix://me:p@/run/redis.sock?db=3',
    'redis+socket:///run/redis.sock?virtual_host=3',
])
def test_a_socket(url: str):
    assert settings(triggers_storage=url).storage_location() == ('redis', url)
    arguments = Address.of(url, {}).client().connection_pool.connection_kwargs
    assert (arguments['path'], arguments['db']) == ('/run/redis.sock', 3)


def test_a_socket_of_the_broker_is_where_sessions_are():
    url = 'redis+socket:///run/redis.sock'
    assert settings(broker_url=url).storage_location() == ('redis', url)


SECRETS = [
    'redis://me:secret@h/0?foo=1',
    'redis://h/0?password=secret&foo=1',
    'redis+cluster://me:secret@h1,h2?foo=1',
    'sentinel://:secret@h1;sentinel://:secret@h2/0',
    'sentinel://h1/shop?foo=1&sentinel_password=secret',
    'rediss://h/0?ssl_password=secret&foo=1',
]


@pytest.mark.parametrize('url', SECRETS)
def test_no_error_tells_a_password(url: str):
    with pytest.raises(StorageNotConfigured) as caught:
        Medium('redis', url).backend()
    assert 'secret' not in str(caught.value)


@pytest.mark.parametrize('url', ['sentinel://:secret@h1;sentinel://:secret@h2/0'])
def test_no_place_tells_a_password(url: str):
    application = Medium('redis').application(triggers_storage_options={'master_name': 'm'})
    place = Medium('redis', url).backend(application=application).place
    assert place == 'sentinel://h1;sentinel://h2/0'


# ---------------------------------------------------------------- what Celery has

BROKER = 'sentinel://:secret@s1:26379;sentinel://:secret@s2:26379'


def settings(**values: Any) -> Settings:
    return Settings(lambda name, default=None: values.get(name, default), lambda: 1)


def test_the_storage_is_taken_from_a_broker_behind_sentinels():
    found = settings(
        broker_url=BROKER,
        broker_transport_options={
            'master_name': 'shop', 'sentinel_kwargs': {'password': 'x'}, 'visibility_timeout': 9,
        },
        triggers_storage_options={'socket_timeout': 1},
    )
    expected = {
        'master_name': 'shop', 'sentinel_kwargs': {'password': 'x'}, 'socket_timeout': 1,
    }
    assert found.storage_location() == ('redis', BROKER)
    assert found.storage_options == found.frozen().storage_options == expected
    pool, sentinel = master(BROKER, **found.storage_options)
    assert (pool.service_name, len(sentinel.sentinels)) == ('shop', 2)


def test_the_result_backend_comes_first_with_options_of_its_own():
    found = settings(
        broker_url='sentinel://b', broker_transport_options={'master_name': 'broker'},
        result_backend='sentinel://r', result_backend_transport_options={'master_name': 'results'},
    )
    assert found.storage_location() == ('redis', 'sentinel://r')
    assert found.storage_options == {'master_name': 'results'}


def test_a_storage_at_the_broker_needs_not_repeat_the_options():
    known = {'broker_url': BROKER, 'broker_transport_options': {'master_name': 'shop'}}
    assert settings(triggers_storage=BROKER, **known).storage_options == {'master_name': 'shop'}
    assert settings(triggers_storage='sentinel://other/m', **known).storage_options == {}
    own = settings(
        triggers_storage=BROKER, triggers_storage_options={'master_name': 'own'}, **known
    )
    assert own.storage_options == {'master_name': 'own'}


@pytest.mark.parametrize(
    ('setting', 'url', 'tls'),
    [
        ('broker_use_ssl', 'broker_url', {'ssl_cert_reqs': ssl.CERT_NONE}),
        ('redis_backend_use_ssl', 'result_backend', {'ssl_cert_reqs': 'CERT_NONE'}),
        ('broker_use_ssl', 'broker_url', True),
    ],
)
def test_tls_as_celery_has_it(setting: str, url: str, tls: Any):
    found = settings(**{url: 'redis://h/0', setting: tls})
    assert found.storage_options == {'ssl': True, **(tls if isinstance(tls, dict) else {})}
    address = Address.of('redis://h/0', found.storage_options)
    assert issubclass(address.client().connection_pool.connection_class, redis.SSLConnection)


def test_other_storages_are_told_nothing_of_it():
    found = settings(result_backend='db+sqlite:///x', broker_use_ssl=True, broker_url='redis://h')
    assert found.storage_location()[0] == 'sql'
    assert found.storage_options == {}


def test_sessions_behind_a_socket(tmp_path: Path):
    server = Server(f'unixsocket {tmp_path}/s')
    try:
        medium = Medium('redis', f'unix://{tmp_path}/s?db=3', prefix='socket')
        assert medium.manager({'t_x': {'after': ['a'], 'run': 'x'}}).fire('a').released == ['t_x#0']
        assert medium.uids() == ['order:1']
    finally:
        server.stop()
