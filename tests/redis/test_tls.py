"""TLS: certificates are checked unless somebody says otherwise."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_triggers.exceptions import StorageNotConfigured, StorageUnavailable
from celery_triggers.testing.media import Medium
from tests.parts.redis_servers import Cluster, Secured, Sentinels, start_tls
from tests.parts.servers import nothing_may_be_missing
from tests.redis.support import EACH


@pytest.fixture(scope='module')
def secured() -> Secured:
    try:
        return start_tls()
    except AssertionError as exc:
        if nothing_may_be_missing() or 'TLS' not in str(exc):
            raise
        pytest.skip('this redis-server was built without TLS')


def medium_at(url: str, **options: Any) -> Medium:
    return Medium(
        'redis', url, prefix=f'test-{secrets.token_hex(6)}',
        settings={'triggers_storage_options': options},
    )


def test_a_certificate_of_a_known_authority(secured: Secured):
    in_query = medium_at(f'{secured.url}?ssl_ca_certs={secured.authority}')
    assert in_query.manager(EACH).fire('a').released == ['t_each#0']
    in_options = medium_at(secured.url, ssl_ca_certs=secured.authority)
    assert in_options.manager(EACH).fire('a').released == ['t_each#0']
    assert in_options.uids() == ['order:1']


def test_the_option_alone_asks_for_tls(secured: Secured):
    url = secured.url.replace('rediss', 'redis')
    medium = medium_at(url, ssl=True, ssl_ca_certs=secured.authority)
    assert medium.manager(EACH).fire('a').released == ['t_each#0']


@pytest.mark.parametrize('spelling', ['none', 'CERT_NONE'])
def test_a_certificate_that_nobody_checks(secured: Secured, spelling: str):
    medium = medium_at(f'{secured.url}?ssl_cert_reqs={spelling}')
    assert medium.manager(EACH).fire('a').released == ['t_each#0']


def test_an_unknown_authority_is_refused(secured: Secured):
    with pytest.raises(StorageUnavailable, match='certificate verify failed') as caught:
        medium_at(secured.url).manager(EACH).fire('a')
    assert not caught.value.outcome_unknown


def test_another_host_than_the_certificate_names_is_refused(secured: Secured):
    url = secured.url.replace('localhost', '127.0.0.1')
    # The default of redis-py, from 6 on.
    medium = medium_at(url, ssl_ca_certs=secured.authority, ssl_check_hostname=True)
    with pytest.raises(StorageUnavailable, match='certificate verify failed'):
        medium.manager(EACH).fire('a')
    medium = medium_at(url, ssl_ca_certs=secured.authority, ssl_check_hostname=False)
    assert medium.manager(EACH).fire('a').released == ['t_each#0']


def test_a_cluster_with_tls(secured: Secured):
    with Cluster(nodes=1, certificate=secured.certificate) as cluster:
        url = cluster.url.replace('redis+', 'rediss+')
        # The nodes name each other by their addresses, the certificate does not.
        medium = medium_at(url, ssl_ca_certs=secured.authority, ssl_check_hostname=False)
        assert medium.manager(EACH).fire('a').released == ['t_each#0']
        with pytest.raises(StorageUnavailable, match='certificate verify failed'):
            medium_at(url).manager(EACH).fire('a')


def test_sentinels_and_a_master_with_tls(secured: Secured):
    with Sentinels(1, certificate=secured.certificate) as sentinels:
        url = sentinels.url.replace('redis+', 'rediss+')
        medium = medium_at(url, ssl_ca_certs=secured.authority, ssl_check_hostname=False)
        assert medium.manager(EACH).fire('a').released == ['t_each#0']
        with pytest.raises(StorageUnavailable, match='not every Sentinel answers'):
            medium_at(url).manager(EACH).fire('a')


def test_without_tls_nothing_is_said(secured: Secured):
    with pytest.raises(StorageUnavailable):
        medium_at(secured.url.replace('rediss', 'redis')).manager(EACH).fire('a')


def test_the_certificate_of_celery_serves(secured: Secured):
    app = Celery('shop', broker=secured.url, task_cls='celery_triggers:TriggerTask')
    app.conf.update(
        broker_use_ssl={'ssl_ca_certs': secured.authority},
        triggers_key_prefix=f'test-{secrets.token_hex(6)}', triggers_unheard='ignore',
    )
    assert app.triggers.fire('order:1', 'a').released == []
    assert list(app.triggers.sessions()) == ['order:1']


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(StorageNotConfigured, match='ssl_ca_certs: there is no file'):
        medium_at('rediss://localhost', ssl_ca_certs=str(tmp_path / 'ca.pem')).backend()
