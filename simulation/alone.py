"""What each hospital would have reached alone, with the same steps and the same budget.

A hospital's first round is the same alone or federated, since all start from the same adapter; so
its path continues from what it sent then. The privacy it would have spent is kept in a ledger of
its own, beside the real one, which this must not touch: it never happened.
"""

from __future__ import annotations

from collections.abc import Callable

from adapters.adapter import Adapter
from adapters.plan import plan_round
from client.privacy.ledger import Ledger
from client.training import train_round
from conf.policy import SitePolicy
from conf.schema import RunSettings
from server.run_folder import RunFolder
from simulation.sites import Site
from transport.wire import unpack_upload


def train_alone(
    settings: RunSettings, folder: RunFolder, site: Site, on_step: Callable[[int, int], None]
) -> Adapter:
    """The adapter of one hospital that never merges; made once, then read from the run folder.

    Raises Refusal as ``client.training.train_round`` does.
    """
    saved = folder.path / "adapters" / "alone" / site.name
    if (saved / "adapter_model.safetensors").exists():
        return Adapter.load(saved)
    adapter = Adapter.load(folder.adapter_folder(1, site.name))
    fingerprint = (folder.path / "base_model.txt").read_text().strip()
    policy = _with_own_ledger(site.policy, folder)
    rounds, steps = settings.federation.rounds, settings.federation.local_steps
    for number in range(2, rounds + 1):
        plan = plan_round(settings, folder.name, number, fingerprint)
        done = (number - 2) * steps

        def report(step: int, done: int = done) -> None:
            on_step(done + step, (rounds - 1) * steps)

        outgoing = train_round(plan, adapter, policy, report)
        adapter = plan.joined(adapter, unpack_upload(outgoing.tensors, adapter, plan))
    return Adapter.load(adapter.save(saved))


def _with_own_ledger(policy: SitePolicy, folder: RunFolder) -> SitePolicy:
    """The same policy with a fresh ledger that holds the first round's charges only."""
    own = folder.path / "ledger" / "alone" / policy.ledger.name
    for file in own.parent.glob(own.name + "*"):  # an interrupted attempt, with its journal
        file.unlink()
    alone = policy.model_copy(update={"ledger": own})
    if policy.privacy.required:
        with Ledger.of(policy) as real:
            first = real.history(folder.name, round=1)
        with Ledger.of(alone) as ledger:
            charge = ledger.reserve(first, task="as federated", run=folder.name, round=1)
            ledger.commit(charge, b"")
    return alone
