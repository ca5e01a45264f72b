"""What an instance answers to messages that change nothing here."""

from aegaeon.clocks import brought_there
from aegaeon.errors import Draining, Forgotten, RecordTooLarge
from aegaeon.explanations import Explain, Explained
from aegaeon.instance.outbox import Outbox
from aegaeon.scheduler.base import Scheduler
from aegaeon.types import Declined, InstanceId, RequestFailed, Submit, Transfer

MAX_EXPLAINED = 200  # decisions in one answer, which tokens may have to wait for


def explain(message: Explain, me: InstanceId, scheduler: Scheduler, outbox: Outbox) -> None:
    """Tell of decisions, as many of the last ones as go into one record."""
    told = scheduler.recent(message.request, message.model, min(message.limit, MAX_EXPLAINED))
    told = brought_there(told, message.ahead_s)
    while True:
        try:
            outbox.post(message.reply_to, Explained(message.ticket, me, told))
            return
        except RecordTooLarge:
            told = told[(len(told) + 1) // 2 :]


def send_on(message: Submit | Transfer, me: InstanceId, outbox: Outbox) -> None:
    """Tell who sent a request that its model lives on other nodes by now."""
    request = message.request
    told = request.id, request.attempt
    why = f"{request.model} has left the node of {me}; ask where it is now"
    if isinstance(message, Submit):
        outbox.post(request.reply_to, RequestFailed(*told, Forgotten.code, why, me))
    else:
        outbox.post(message.sender, Declined(*told, me, Draining.code, why))
