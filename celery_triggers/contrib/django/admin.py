"""The admin: sessions and instances to look at, to replay, to skip and to cancel.

Rows are shown and never written: whatever changes goes through a session's trigger manager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import quote

from django.contrib import admin, messages
from django.contrib.admin.actions import delete_selected
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db import Error
from django.db.models import Count, Exists, OuterRef, Q, Subquery
from django.http import HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.text import capfirst
from django.utils.timezone import localtime

from celery_triggers.contrib.django.models import START_OF_UID, Inbox, Instance, Session
from celery_triggers.contrib.django.project import (
    chosen_storage,
    project_services,
    project_triggers,
)
from celery_triggers.contrib.django.showing import head_of, know_reasons, know_sessions, page_of
from celery_triggers.contrib.django.transaction import between
from celery_triggers.engine.transitions import RESOLVED, UNHAPPY, Status
from celery_triggers.exceptions import TriggersError
from celery_triggers.storages.relational.backend import kept, told
from celery_triggers.storages.view import moment

__all__ = ['InstanceAdmin', 'SessionAdmin']

#: How times are written: to the second, which the usual formats are not.
WHEN = 'Y-m-d H:i:s'

_UNHAPPY = [status.value for status in UNHAPPY]
_RESOLVED = [status.value for status in RESOLVED]


class _TriggersAdmin(admin.ModelAdmin):
    """What the admin of sessions and that of instances have in common."""

    list_per_page = 50
    show_full_result_count = False

    class Media:
        css = {'all': ['celery_triggers/admin.css']}

    def changelist_view(self, request: Any, extra_context: Any = None) -> Any:
        title = capfirst(self.opts.verbose_name_plural)
        return super().changelist_view(request, {'title': title, **(extra_context or {})})

    def has_add_permission(self, request: Any) -> bool:
        return False

    def has_module_permission(self, request: Any) -> bool:
        return chosen_storage() is not None and super().has_module_permission(request)

    def has_view_permission(self, request: Any, obj: Any = None) -> bool:
        return chosen_storage() is not None and super().has_view_permission(request, obj)

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        return chosen_storage() is not None and super().has_change_permission(request, obj)

    def get_queryset(self, request: Any) -> Any:
        storage = chosen_storage()
        found = self.model._default_manager.get_queryset()
        if storage is None:
            return found.none()
        return self.of_prefix(found.using(storage.alias), storage.settings.key_prefix)

    def of_prefix(self, found: Any, prefix: str) -> Any:
        """Return those of this application's sessions: others may be in the same tables."""
        raise NotImplementedError

    def change_each(
        self,
        request: Any,
        what: str,
        chosen: Iterable[tuple[Any, str]],
        change: Callable[[Any], object],
    ) -> None:
        """Change one after the other; each that is refused is a message, and others go on.

        Args:
            what: What was done, for messages: ``'replayed'``.
            chosen: Rows with their names for people.
        """
        done: list[str] = []
        for row, name in chosen:
            try:
                change(row)
            except (TriggersError, Error) as exc:
                # Django begins each message with a capital, so none begins with a name.
                self.message_user(request, f'Not {what}: {name}: {exc}', messages.ERROR)
                continue
            done.append(name)
            if row.pk is not None:
                self.log_change(request, row, f'{what.capitalize()} {name}.')
        if done:
            count = f'{len(done)} {self.opts.verbose_name_plural}' if len(done) > 1 else done[0]
            self.message_user(request, f'{what.capitalize()} {count}.', messages.SUCCESS)


class StateFilter(admin.SimpleListFilter):
    """Sessions by the state of their instances."""

    title = 'state'
    parameter_name = 'state'

    def lookups(self, request: Any, model_admin: Any) -> Any:
        return [
            ('unhappy', 'With failed or revoked instances'),
            ('unresolved', 'With unresolved instances'),
            ('resolved', 'Everything resolved'),
            ('pending', 'With firings to be applied'),
        ]

    def queryset(self, request: Any, queryset: Any) -> Any:
        instances = Instance._default_manager.filter(sid=OuterRef('sid'))
        unresolved = Exists(instances.exclude(status__in=_RESOLVED))
        conditions = {
            'unhappy': Exists(instances.filter(status__in=_UNHAPPY)),
            'unresolved': unresolved,
            'resolved': ~unresolved,
            'pending': Exists(Inbox._default_manager.filter(sid=OuterRef('sid'))),
        }
        condition = conditions.get(self.value() or '')
        return queryset if condition is None else queryset.filter(condition)


class StatusFilter(admin.SimpleListFilter):
    """Instances by status."""

    title = 'status'
    parameter_name = 'status'

    def lookups(self, request: Any, model_admin: Any) -> Any:
        return [
            ('unhappy', 'Failed or revoked'),
            *((status.value, status.value.capitalize()) for status in Status),
        ]

    def queryset(self, request: Any, queryset: Any) -> Any:
        if self.value() is None:
            return queryset
        wanted = _UNHAPPY if self.value() == 'unhappy' else [self.value()]
        return queryset.filter(status__in=wanted)


@admin.register(Session)
class SessionAdmin(_TriggersAdmin):
    """Sessions: how they stand, and everything of one on its page."""

    list_display = ['uid', 'state', 'unresolved', 'failed', 'firings', 'manager', 'last_change']
    list_filter = [StateFilter]
    search_fields = ['start']
    search_help_text = 'The beginning of a uid.'
    ordering = ['start']
    sortable_by = ()
    actions = ['cancel', 'delete_selected']

    def of_prefix(self, found: Any, prefix: str) -> Any:
        unhappy = Instance._default_manager.filter(sid=OuterRef('sid'), status__in=_UNHAPPY)
        counted = unhappy.order_by().values('sid').annotate(count=Count('pk')).values('count')
        return found.filter(prefix=prefix).annotate(unhappy=Subquery(counted))

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> Any:
        start = kept(search_term)
        if len(start) > START_OF_UID:
            queryset = queryset.filter(uid__startswith=start)
        return queryset.filter(**between(start, queryset.db)), False

    # ------------------------------------------------------------------ the list

    @admin.display(description='State')
    def state(self, session: Session) -> Any:
        head = head_of(session)
        word = 'open' if head.unresolved else 'resolved'
        if session.unhappy:
            word = 'failed'
        elif head.cancelled is not None:
            word = 'cancelled'
        return _badge(word)

    @admin.display(description='Unresolved')
    def unresolved(self, session: Session) -> int:
        return head_of(session).unresolved

    @admin.display(description='Failed')
    def failed(self, session: Session) -> int:
        return session.unhappy or 0

    @admin.display(description='Firings')
    def firings(self, session: Session) -> int:
        return head_of(session).firings

    @admin.display(description='Manager')
    def manager(self, session: Session) -> str:
        return head_of(session).manager

    @admin.display(description='Last change')
    def last_change(self, session: Session) -> Any:
        return _when(head_of(session).clock)

    # ------------------------------------------------------------------- actions

    @admin.action(description='Cancel selected sessions', permissions=['change'])
    def cancel(self, request: Any, queryset: Any) -> None:
        reason = f'by {request.user.get_username()}'
        self.change_each(
            request, 'cancelled', _named(queryset), lambda row: _manager(row).cancel(reason)
        )

    @admin.action(description='Delete selected sessions', permissions=['delete'])
    def delete_selected(self, request: Any, queryset: Any) -> Any:
        if not request.POST.get('post'):
            # Django's page asks first.
            return delete_selected(self, request, queryset)
        self._delete(request, queryset)
        return None

    def _delete(self, request: Any, sessions: Iterable[Session]) -> None:
        self.change_each(
            request, 'deleted', _named(sessions),
            lambda row: project_triggers().delete(told(row.uid)),
        )

    def delete_view(self, request: Any, object_id: str, extra_context: Any = None) -> Any:
        if request.method != 'POST':
            return super().delete_view(request, object_id, extra_context)
        # Not as Django does it, in a transaction: the ends of gates are told before.
        session = self.get_object(request, unquote(object_id))
        if session is None:
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)
        if not self.has_delete_permission(request, session):
            raise PermissionDenied
        self._delete(request, [session])
        return HttpResponseRedirect(reverse('admin:celery_triggers_session_changelist'))

    # --------------------------------------------------------- one session's page

    def change_view(
        self, request: Any, object_id: str, form_url: str = '', extra_context: Any = None
    ) -> Any:
        session = self.get_object(request, unquote(object_id))
        if session is None:
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)
        if not self.has_view_or_change_permission(request, session):
            raise PermissionDenied
        if request.method == 'POST':
            return self._act(request, session)
        context = {
            **self.admin_site.each_context(request),
            'title': told(session.uid), 'subtitle': None, 'opts': self.opts,
            'original': session, 'media': self.media, 'session': session,
            'when': WHEN, 'may_change': self.has_change_permission(request, session),
            'may_delete': self.has_delete_permission(request, session),
            'pending': Inbox._default_manager.using(session._state.db).filter(sid=session.sid),
            **(extra_context or {}),
        }
        try:
            context['page'] = page_of(_manager(session))
        except (TriggersError, Error) as exc:
            self.message_user(request, str(exc), messages.ERROR)
        return TemplateResponse(request, 'admin/celery_triggers/session.html', context)

    def _act(self, request: Any, session: Session) -> Any:
        """Do what a button of the page says; then show the page again."""
        if not self.has_change_permission(request, session):
            raise PermissionDenied
        what, name = request.POST.get('what'), request.POST.get('instance', '')
        if what == 'cancel':
            self.cancel(request, [session])
        elif what in _CHANGES:
            done, change = _CHANGES[what]
            self.change_each(
                request, done, [(session, name)], lambda row: change(_manager(row), name)
            )
        return HttpResponseRedirect(request.get_full_path())


@admin.register(Instance)
class InstanceAdmin(_TriggersAdmin):
    """Instances of all sessions: what has failed, and why."""

    list_display = ['shown_name', 'of_session', 'shown_status', 'reason', 'last_change']
    list_display_links = None
    list_filter = [StatusFilter]
    search_fields = ['name']
    search_help_text = 'The beginning of the uid of a session, or of the name of an instance.'
    ordering = ['-pk']
    sortable_by = ()
    actions = ['replay', 'skip', 'skip_with_cascade']

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        return False

    def of_prefix(self, found: Any, prefix: str) -> Any:
        own = Session._default_manager.filter(sid=OuterRef('sid'), prefix=prefix)
        return found.filter(Exists(own))

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> Any:
        start = kept(search_term)
        if not start:
            return queryset, False
        sessions = Session._default_manager.filter(**between(start, queryset.db)).values('sid')
        return queryset.filter(Q(sid__in=sessions) | Q(name__startswith=start)), False

    def get_changelist_instance(self, request: Any) -> Any:
        changes = super().get_changelist_instance(request)
        know_reasons(project_services(), changes.result_list)
        return changes

    # ------------------------------------------------------------------ the list

    @admin.display(description='Instance')
    def shown_name(self, instance: Instance) -> Any:
        return format_html('<a href="{}">{}</a>', _place(instance), told(instance.name))

    @admin.display(description='Session')
    def of_session(self, instance: Instance) -> str:
        return told(instance.session.uid) if instance.session else '-'

    @admin.display(description='Status')
    def shown_status(self, instance: Instance) -> Any:
        return _badge(instance.status)

    @admin.display(description='Reason')
    def reason(self, instance: Instance) -> str:
        return str(getattr(instance, 'reason', ''))[:300] or '-'

    @admin.display(description='Last change')
    def last_change(self, instance: Instance) -> Any:
        return _when(max(instance.changed, instance.claimed))

    def change_view(
        self, request: Any, object_id: str, form_url: str = '', extra_context: Any = None
    ) -> Any:
        """Lead to the instance on its session's page."""
        instance = self.get_object(request, unquote(object_id))
        if instance is None:
            return self._get_obj_does_not_exist_redirect(request, self.opts, object_id)
        return HttpResponseRedirect(_place(instance))

    # ------------------------------------------------------------------- actions

    @admin.action(description='Replay selected instances', permissions=['change'])
    def replay(self, request: Any, queryset: Any) -> None:
        self._change(request, queryset, 'replay')

    @admin.action(description='Skip selected instances', permissions=['change'])
    def skip(self, request: Any, queryset: Any) -> None:
        self._change(request, queryset, 'skip')

    @admin.action(
        description='Skip selected instances and fire their names', permissions=['change']
    )
    def skip_with_cascade(self, request: Any, queryset: Any) -> None:
        self._change(request, queryset, 'cascade')

    def _change(self, request: Any, queryset: Any, what: str) -> None:
        done, change = _CHANGES[what]
        chosen = know_sessions(queryset.order_by('pk'))
        named = [(row, f'{told(row.name)} of {told(row.session.uid)}') for row in chosen]
        self.change_each(
            request, done, named, lambda row: change(_manager(row.session), told(row.name))
        )


#: What a person can do with an instance: what was done then, and how.
_CHANGES: dict[str, tuple[str, Callable[[Any, str], object]]] = {
    'replay': ('replayed', lambda manager, name: manager.replay_failed_instance(name)),
    'skip': ('skipped', lambda manager, name: manager.skip_failed_instance(name)),
    'cascade': (
        'skipped', lambda manager, name: manager.skip_failed_instance(name, cascade=True)
    ),
}


def _manager(session: Session) -> Any:
    return project_triggers().session(told(session.uid))


def _named(sessions: Iterable[Session]) -> Sequence[tuple[Session, str]]:
    return [(session, told(session.uid)) for session in sessions]


def _badge(word: str) -> Any:
    return format_html('<span class="triggers-status triggers-{}">{}</span>', word, word)


def _when(milliseconds: int) -> str:
    """Return a time to the second, in the project's time zone."""
    return date_format(localtime(moment(milliseconds)), WHEN) if milliseconds else '-'


def _place(instance: Instance) -> str:
    page = reverse('admin:celery_triggers_session_change', args=[instance.sid])
    return f'{page}#{quote(told(instance.name))}'

