from celery import Celery

app = Celery('shop', broker='memory://', task_cls='celery_triggers:TriggerTask')
app.conf.task_always_eager = True  # run tasks right here: no broker, no worker


@app.trigger_task(after=['paid', 'packed'], unless=['cancelled'])
def ship(context):
    print(context.uid, 'ships box', context['packed']['box'])
    return {'parcel': 'P-1'}


@app.trigger_task(after=[ship], and_every='scanned')
def track(context):
    print(context.uid, 'parcel', context['t_ship']['parcel'], 'is in', context['scanned']['place'])


app.triggers.fire('order:42', 'packed', {'box': 'A4'})
app.triggers.fire('order:42', 'scanned', {'place': 'Zwolle'})  # early: it waits for ship
app.triggers.fire('order:42', 'paid', {'amount': 99})  # runs ship, and then track
app.triggers.fire('order:42', 'scanned', {'place': 'Utrecht'})  # runs track once more
app.triggers.fire('order:7', 'packed', {'box': 'A5'})
app.triggers.fire('order:7', 'cancelled')
app.triggers.fire('order:7', 'paid', {'amount': 5})  # too late: runs nothing
print(*app.triggers.session('order:7').explain('t_ship'))
