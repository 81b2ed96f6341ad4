"""The model card of a release: what was adapted, on what, and what is promised about privacy.

A card never claims more than the facts it is given: with privacy on, every hospital's epsilon and
delta must be known or there is no card; with privacy off, the card says so in bold. Counts of
patients and notes appear only where a hospital made them public. The licence is the base model's
and is not restated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from conf.schema import TrainedFactors

CARD_NAME = "README.md"  # the file name that model hubs show


@dataclass(frozen=True)
class HospitalFacts:
    """One hospital of a release; ``patients`` and ``notes`` only where they are public."""

    name: str
    epsilon: float | None
    delta: float | None
    patients: int | None = None
    notes: int | None = None


@dataclass(frozen=True)
class PrivacyFacts:
    """The mechanism behind the hospitals' epsilons."""

    unit: str  # patient or note
    epsilon_budget: float
    accountant: str  # with its version
    clip_norm: float
    sampling_rate: float


@dataclass(frozen=True)
class AlignmentFacts:
    """What the merged adapter was aligned on."""

    data: str
    sft_steps: int
    dpo_steps: int


@dataclass(frozen=True)
class Score:
    """One row of the evaluation table; None where a stage was not measured."""

    data: str  # such as: held-out notes, north
    measure: str  # such as: perplexity (lower is better)
    base: float | None
    merged: float | None
    aligned: float | None = None


_TRAINED: dict[TrainedFactors, str] = {
    "B": "factor B, with a shared and frozen A",
    "A": "factor A, with a shared and frozen B",
    "alternate": "factors B and A in turn, the other one shared and frozen",
    "both": "both factors",
    "core": "a small core between two frozen factors",
}


@dataclass(frozen=True)
class ReleaseFacts:
    """Everything a model card states. ``privacy`` is None when privacy was off.

    Raises
    ------
    ValueError
        When privacy was on and a hospital's epsilon or delta is missing.
    """

    name: str
    created: str  # ISO 8601
    base_model: str
    base_fingerprint: str
    base_remark: str
    strategy: str
    rounds: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    trained: TrainedFactors
    hospitals: tuple[HospitalFacts, ...]
    privacy: PrivacyFacts | None
    alignment: AlignmentFacts | None = None
    evaluation: tuple[Score, ...] = ()
    simulated: bool = False  # every hospital and patient is simulated
    pooled: bool = False  # the notes were brought together: a reference, not a federation
    statistics: str | None = None  # what hospitals sent beside adapters, for the merge
    layers: tuple[int, ...] = ()  # of the base model; () stands for all
    versions: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for hospital in self.hospitals:
            known = hospital.epsilon is not None and hospital.delta is not None
            if self.privacy is not None and not known:
                raise ValueError(
                    f"release {self.name}: hospital {hospital.name} has no recorded epsilon and "
                    "delta, so its privacy cannot be stated; read them from its ledger"
                )


def round_up(value: float) -> str:
    """A privacy loss with two decimals, never below what was spent: 7.941 gives 7.95."""
    if not math.isfinite(value):
        return "∞"
    return f"{math.ceil(value * 100 - 1e-7) / 100:.2f}".rstrip("0").rstrip(".")


def _plain(text: object) -> str:
    """``text`` as one line that cannot break a Markdown table or open a tag."""
    line = " ".join(str(text).split())
    for mark in "\\`*_[]|":
        line = line.replace(mark, f"\\{mark}")
    return line.replace("&", "&amp;").replace("<", "&lt;")


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _front_matter(facts: ReleaseFacts) -> str:
    tags = ["lora", "federated-learning", "clinical"]
    if facts.privacy is not None:
        tags.append("differential-privacy")
    return yaml.safe_dump(
        {
            "base_model": facts.base_model,
            "base_model_relation": "adapter",
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": tags,
        },
        sort_keys=False,
        allow_unicode=True,
    )


def _columns(scores: Sequence[Score]) -> list[str]:
    """The stages that any row was measured at."""
    return [
        stage
        for stage in ("base", "merged", "aligned")
        if any(getattr(score, stage) is not None for score in scores)
    ]


def write_model_card(folder: Path, facts: ReleaseFacts) -> Path:
    """Write the model card into a release folder, over any card that PEFT put there.

    Parameters
    ----------
    folder
        The PEFT adapter folder; it must exist.
    facts
        What the card states.

    Returns
    -------
    The path of the card.
    """
    environment = Environment(
        loader=PackageLoader("server"),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown; every text goes through ``plain``
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "up": round_up, "score": _score, "literal": repr}
    body = environment.get_template("model_card.md.jinja").render(
        facts=facts,
        front_matter=_front_matter(facts),
        columns=_columns(facts.evaluation),
        trained=_TRAINED[facts.trained],
    )
    path = folder / CARD_NAME
    path.write_text(body, encoding="utf-8")
    return path
