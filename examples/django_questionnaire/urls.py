"""Where the pages are."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path('', include('examples.django_questionnaire.questionnaires.urls')),
    path('admin/', admin.site.urls),
]
