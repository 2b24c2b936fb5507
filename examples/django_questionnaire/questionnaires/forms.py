"""The pages of both questionnaires, each a form."""

from dataclasses import dataclass

from django import forms

NO_YES = [('no', 'No'), ('yes', 'Yes')]


class PageForm(forms.Form):
    """A page. It knows on which revision of the answers it was opened."""

    title = ''
    revision = forms.IntegerField(widget=forms.HiddenInput, initial=0, min_value=0)

    @property
    def answers(self):
        """The answers of a valid form, as they are stored and fired."""
        return {name: value for name, value in self.cleaned_data.items() if name != 'revision'}

    @classmethod
    def told(cls, answers):
        """Return ``[(question, answer)]`` in words."""
        fields = cls.base_fields
        return [
            (field.label, _in_words(field, answers.get(name)))
            for name, field in fields.items()
            if name != 'revision'
        ]


def _in_words(field, value):
    if value in (None, '', []):
        return 'no answer'
    if value is True:
        return 'Yes'
    names = {str(key): name for key, name in getattr(field, 'choices', ())}
    values = value if isinstance(value, list) else [value]
    return ', '.join(names.get(str(each), str(each)) for each in values)


def _radios(label, choices, **options):
    return forms.ChoiceField(label=label, choices=choices, widget=forms.RadioSelect, **options)


def _number_of(label, choices, **options):
    return forms.TypedChoiceField(
        label=label, choices=choices, coerce=int, widget=forms.RadioSelect, **options
    )


def _boxes(label, choices, **options):
    return forms.MultipleChoiceField(
        label=label, choices=choices, widget=forms.CheckboxSelectMultiple, **options
    )


# ---------------------------------------------------------------- the survey: three pages


class AboutYou(PageForm):
    """The first page of the survey."""

    title = 'About you'
    age = forms.IntegerField(
        label='How old are you?', min_value=16, max_value=120,
        help_text='In years. Members of the panel are at least 16.',
    )
    educ = _number_of('What is your highest education?', [
        (1, 'Eight grades or less'), (2, 'Some high school'), (3, 'High school diploma'),
        (4, 'Some college'), (5, 'Associate degree'), (6, "Bachelor's degree"),
        (7, "Master's degree or higher"),
    ])
    popul = forms.IntegerField(
        label='How many people live in your town?', min_value=0, max_value=40_000,
        help_text='In thousands: 190 for 190,000 people, 0 for the countryside.',
    )


class News(PageForm):
    """The second page of the survey."""

    title = 'The news'
    tv_news = forms.IntegerField(
        label='On how many days of a week do you watch the news on TV?', min_value=0, max_value=7,
    )


class Politics(PageForm):
    """The third page of the survey."""

    title = 'Politics'
    place = _number_of('Where do you place yourself?', [
        (1, 'Extremely liberal'), (2, 'Liberal'), (3, 'Slightly liberal'), (4, 'Moderate'),
        (5, 'Slightly conservative'), (6, 'Conservative'), (7, 'Extremely conservative'),
    ])
    party = _number_of('Which party are you nearer to?', [
        (0, 'Strongly to the Democrats'), (1, 'To the Democrats'),
        (2, 'Independent, nearer to the Democrats'), (3, 'Independent'),
        (4, 'Independent, nearer to the Republicans'), (5, 'To the Republicans'),
        (6, 'Strongly to the Republicans'),
    ])
    vote = _number_of('Whom would you have voted for in 1996?', [(0, 'Clinton'), (1, 'Dole')])


# ----------------------------------------------------------- the registration: six pages


class Contact(PageForm):
    """The first page of the registration."""

    title = 'How we reach you'
    name = forms.CharField(label='Your name', max_length=100)
    email = forms.EmailField(label='Your email address')

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fields['name'].widget.attrs['autocomplete'] = 'name'
        self.fields['email'].widget.attrs['autocomplete'] = 'email'


class Travel(PageForm):
    """The second page of the registration."""

    title = 'Your way to the town hall'
    minutes = forms.IntegerField(
        label='How long does it take you to come?', min_value=0, max_value=600,
        help_text='In minutes, one way.',
    )
    by = _radios('How would you come?', [
        ('foot', 'On foot or by bicycle'), ('transit', 'By bus or train'), ('car', 'By car'),
    ])


class Languages(PageForm):
    """The third page of the registration."""

    title = 'Languages'
    speaks = _boxes('Which of these do you speak?', [
        ('english', 'English'), ('spanish', 'Spanish'), ('chinese', 'Chinese'),
        ('asl', 'American Sign Language'),
    ])
    interpreter = _radios('Would you like an interpreter?', NO_YES)


class Experience(PageForm):
    """The fourth page of the registration: the second question depends on the first."""

    title = 'Your experience'
    before = _radios('Have you been in a panel before?', NO_YES)
    times = forms.IntegerField(
        label='How many times?', min_value=1, max_value=50, required=False,
        help_text='If you have.',
    )

    def clean(self):
        given = super().clean()
        before, times = given.get('before'), given.get('times')
        if before == 'yes' and times is None and 'times' not in self.errors:
            self.add_error('times', 'Tell us how many times, or answer “No” above.')
        elif before == 'no' and times is not None:
            self.add_error('times', 'Leave this empty, or answer “Yes” above.')
        return given


class Topics(PageForm):
    """The fifth page of the registration."""

    title = 'Topics'
    topics = _boxes('What would you like to talk about?', [
        ('news', 'Where we get our news'), ('housing', 'Housing'), ('schools', 'Schools'),
        ('streets', 'Streets and traffic'), ('parks', 'Parks'),
    ], help_text='Up to three.')

    def clean_topics(self):
        topics = self.cleaned_data['topics']
        if len(topics) > 3:
            raise forms.ValidationError(f'Choose three at most: these are {len(topics)}.')
        return topics


class Agreement(PageForm):
    """The sixth page of the registration."""

    title = 'The day, and the rules'
    day = _radios('When can you come?', [
        ('wednesday', 'Wednesday evening'), ('saturday', 'Saturday morning'),
        ('sunday', 'Sunday afternoon'),
    ])
    agrees = forms.BooleanField(
        label='I let others speak, and what is said in the panel stays there',
        error_messages={'required': 'Everybody in the panel has to agree to this.'},
    )


# ------------------------------------------------------------------------------------- both


@dataclass(frozen=True)
class Questionnaire:
    """A questionnaire: what it is called, and its pages."""

    slug: str
    title: str
    lead: str
    forms: tuple[type[PageForm], ...]

    def form(self, number):
        """Return the form of a page, from 1 on; ``None`` if there is none."""
        return self.forms[number - 1] if 1 <= number <= len(self.forms) else None


QUESTIONNAIRES = {
    found.slug: found
    for found in (
        Questionnaire(
            'survey', 'Survey', 'Three pages about you, the news and politics.',
            (AboutYou, News, Politics),
        ),
        Questionnaire(
            'registration', 'Registration', 'Six pages about how, when and why you would come.',
            (Contact, Travel, Languages, Experience, Topics, Agreement),
        ),
    )
}
