"""What ``--help`` says of the commands that need a page of it."""

from __future__ import annotations

LEDGER_HELP = """Look into the privacy ledger that a site policy names. Nothing here is spent.

  wardround ledger show site=site.yaml                   every charge, and totals by data lineage
  wardround ledger show site=site.yaml figure=spent.svg  and epsilon over time, as a picture
  wardround ledger verify site=site.yaml                 exit code 0 when ledger and audit log hold
  wardround ledger plan site=site.yaml plan.rounds=5 plan.local_steps=4 plan.sampling_rate=0.1
                                                         the noise it needs, epsilon after it
  wardround ledger plan site=site.yaml plan.noise_multiplier=0.8
                                                         does it fit, and if not, how much of it
  wardround ledger export site=site.yaml out=statement.json
                                                         signed, for an ethics board
  wardround ledger check file=statement.json             for the board: nothing else is needed"""

AUDIT_HELP = """Audit the private training on this machine, with simulated patients. Nothing is
spent of any real budget. It writes audit.json and audit.html, and ends with code 1 when a promise
is broken or a check is blind.

  white box     400 canaries with a known gradient through the engine's own clipping, sum, noise and
                division, on the first 2 blocks of the model; six checks, for the installed engine
                and for five that are sabotaged on purpose
  whole rounds  the noise that leaves a hospital, against what its ledger was charged
  black box     random notes planted in one hospital's training, 14 steps with privacy and 14
                without: can the adapter's holder tell which?

  wardround audit                                a few minutes on two cores
  wardround audit privacy.epsilon=1 out=audit-1  another promise
  wardround audit white_box.canaries=4000 white_box.blocks=null black_box.canaries=400
                                                 proves more, takes an hour"""
