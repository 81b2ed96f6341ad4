"""The Flower ClientApp of a hospital.

Whatever happens, the coordinator receives a result that passed the gate or a refusal from a fixed
list. No exception leaves: Flower would send its text along. Every message in and out, of whatever
kind, has its line in the audit log before it is worked on or leaves. Two refusals cannot have one:
where there is no policy that names a log, and where the log itself cannot be written.
"""

from __future__ import annotations

import logging

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from adapters.adapter import Adapter
from adapters.plan import TrainingPlan
from client.privacy.audit_log import AuditLog, AuditLogError, Line
from client.refusal import Reason, Refusal, failure_site
from client.site import SiteError, policy_of
from client.training import train_round
from conf.policy import SitePolicy
from transport.wire import digest, pack_refusal, pack_result, unpack_task

log = logging.getLogger(__name__)


class HospitalApp(ClientApp):
    """Answers messages of every kind; those that are no training task are refused as malformed."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to one message; see ``client.training.train_round``."""
        try:
            policy = policy_of(context)
        except Exception as problem:
            content = pack_refusal("unknown", *_refusal(problem, "unknown"))
        else:
            content = _answer(message, policy)
        return Message(content, reply_to=message)


app = HospitalApp()


def _answer(message: Message, policy: SitePolicy) -> RecordDict:
    audit = AuditLog(policy.audit_file)
    run, number = None, None
    facts: tuple[str, ...] = ()
    try:
        asked = message.content if message.has_content() else RecordDict()
        if not isinstance(asked, RecordDict):  # Flower takes a bare record, too
            asked = RecordDict()
        task, flaw = _read(message.metadata.message_type, asked)
        if task is not None:
            run, number = task[0].run, task[0].round
        code = "TASK" if task else "MALFORMED"
        head = audit.append(Line("in", code, *digest(asked), run=run, round=number))
        if task is None:
            raise Refusal(Reason.PLAN_INVALID, flaw)
        outgoing = train_round(*task, policy, audit_head=head)
        content = pack_result(outgoing.tensors, outgoing.facts, outgoing.statistics)
        facts = (*outgoing.facts, *(["statistics"] if outgoing.statistics else []))
        code, reason = "RESULT", ""
    except Exception as problem:
        code, reason = _refusal(problem, policy.site)
        content = pack_refusal(policy.site, code, reason)
    try:
        audit.append(Line("out", code, *digest(content), reason, run, number, facts))
    except AuditLogError as problem:
        content = pack_refusal(policy.site, *_refusal(problem, policy.site))
    return content


def _read(kind: str, content: RecordDict) -> tuple[tuple[TrainingPlan, Adapter] | None, str]:
    """The task in a message, or None and what is wrong with it."""
    if kind != "train":
        return None, "not a training task"
    try:
        return unpack_task(content), ""
    except ValueError as problem:
        said = " ".join(str(problem).split()).encode("ascii", "backslashreplace").decode()
        return None, said[:200]  # in the coordinator's words, for the site's own log


def _refusal(problem: Exception, site: str) -> tuple[str, str]:
    """Code and sentence that may leave; the rest goes to the site's own log.

    The text of an unforeseen exception may quote a note, so it stays out even there.
    """
    if isinstance(problem, Refusal):
        reason = problem.reason
        log.warning("%s: refused: %s (%s)", site, reason.value, problem.detail)
    elif isinstance(problem, AuditLogError):
        reason = Reason.AUDIT_FAILED
        log.error("%s: %s", site, problem)
    elif isinstance(problem, SiteError):
        reason = Reason.INTERNAL
        log.error("%s", problem)
    else:
        reason = Reason.INTERNAL
        log.error("%s: internal error: %s", site, failure_site(problem))
    return reason.name, reason.value
