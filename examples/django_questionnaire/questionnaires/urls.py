"""Where the pages of the application are."""

from django.urls import path

from examples.django_questionnaire.questionnaires import views

urlpatterns = [
    path('', views.home, name='home'),
    path('applicants/<uuid:applicant_id>/', views.applicant, name='applicant'),
    path('applicants/<uuid:applicant_id>/<slug:slug>/', views.start, name='start'),
    path('questionnaires/<uuid:run_id>/', views.run, name='run'),
    path('questionnaires/<uuid:run_id>/pages/<int:number>/', views.page, name='page'),
    path('questionnaires/<uuid:run_id>/check/', views.check, name='check'),
    path('questionnaires/<uuid:run_id>/withdraw/', views.withdraw, name='withdraw'),
]
