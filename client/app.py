"""The Flower ClientApp of a hospital.

Whatever happens, the coordinator receives a result that passed the gate or a refusal from a fixed
list. No exception leaves: Flower would send its text along.
"""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.refusal import Reason, Refusal, failure_site
from client.site import SiteError, policy_of
from client.training import train_round
from transport.wire import pack_refusal, pack_result, unpack_task

log = logging.getLogger(__name__)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training; see ``client.training.train_round``."""
    site = "unknown"
    try:
        policy = policy_of(context)
        site = policy.site
        try:
            plan, received = unpack_task(message.content)
        except ValueError as problem:
            raise Refusal(Reason.PLAN_INVALID, type(problem).__name__) from None
        outgoing = train_round(plan, received, policy)
        return Message(pack_result(outgoing.tensors, outgoing.facts), reply_to=message)
    except Refusal as refusal:
        log.warning("%s: refused: %s (%s)", site, refusal.reason.value, refusal.detail)
        reason = refusal.reason
    except SiteError as problem:
        log.error("%s", problem)
        reason = Reason.INTERNAL
    except Exception as problem:
        # The text of an unforeseen exception may quote a note, even in the local log.
        log.error("%s: internal error: %s", site, failure_site(problem))
        reason = Reason.INTERNAL
    return Message(pack_refusal(site, reason.name, reason.value), reply_to=message)
