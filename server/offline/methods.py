"""Names and parameters of mergekit's methods, and what they are called here.

Every strategy of ``strategies/`` goes by its own name too, with its own parameters; where a name is
known to both (``ties``), mergekit's defaults hold and both spellings of a parameter are understood.
Where ours computes something else than mergekit 0.1.5, ``differs`` says so, and so does the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from conf.load import ConfigError
from strategies.registry import require_usable, strategies

Space = Literal["weights", "differences", "either"]


@dataclass(frozen=True)
class Method:
    """One method as a recipe names it.

    ``strategy`` and ``fixed``: ours, and the parameters of ours that the name implies.
    ``defaults``: mergekit's, where ours differ, by our key. ``keys``: mergekit's key -> ours.
    ``only``: keys of mergekit that have just one value here, and why.
    ``normalize``: mergekit's default for dividing by the weights; None where they always sum to 1.
    ``on``: of whole models, their weights themselves, their differences from the base model, or
    differences if a base model is given and else weights.
    ``linear``: a plain weighted sum, so that a weight may be negative.
    ``needs_density``: mergekit's default, 1, would do nothing.
    """

    strategy: str
    on: Space = "differences"
    normalize: bool | None = None
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    keys: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    only: Mapping[str, tuple[Any, str]] = field(default_factory=lambda: MappingProxyType({}))
    linear: bool = False
    needs_density: bool = False
    differs: str = ""


_EITHER = ("karcher", "norm_weighted", "median", "trimmed_mean", "krum")
_LAMBDA = {"lambda": "strength"}
_NO_RESCALE = {"rescale": (False, "entries that are kept are kept as they are")}
_RESCALE = {"rescale": (True, "what is kept is always divided by its probability")}
_DARE = "what is kept is divided by its probability (the paper's rule), not by a ratio of L1 norms"
_BREADCRUMBS = "entries are ranked within each row (the paper's rule), not within the tensor"
_TIES = "the number of entries kept is rounded, not cut; of equal ones at the limit all are kept"


def _dropping(strategy: str, elect: bool, normalize: bool, **more: Any) -> Method:
    della = strategy == "della"
    return Method(
        strategy,
        normalize=normalize,
        fixed={"elect": elect},
        defaults={"window": 0.15} if della else {},
        keys={**_LAMBDA, "epsilon": "window"} if della else _LAMBDA,
        only=_RESCALE,
        needs_density=True,
        differs=_DARE,
    )


def _breadcrumbs(elect: bool) -> Method:
    return Method(
        "breadcrumbs",
        normalize=False,
        fixed={"elect": elect},
        keys={**_LAMBDA, "gamma": "outliers"},
        only=_NO_RESCALE,
        needs_density=True,
        differs=_BREADCRUMBS,
    )


MERGEKIT: Mapping[str, Method] = {
    "linear": Method("product_mean", on="weights", normalize=True, linear=True),
    "slerp": Method("slerp", on="weights"),
    "nuslerp": Method(
        "slerp",
        on="either",
        only={
            "nuslerp_row_wise": (False, "tensors are interpolated whole"),
            "nuslerp_flatten": (True, "tensors are interpolated whole"),
        },
        differs="beyond a cosine of 0.9995 the arc is taken as a line",
    ),
    "multislerp": Method(
        "norm_weighted",
        on="either",
        only={"normalize_weights": (True, "weights always sum to one")},
        differs="directions that cancel give the plain mean instead of an error",
    ),
    "karcher": Method(
        "karcher",
        on="either",
        keys={"max_iter": "steps", "tol": "tolerance"},
        differs="50 steps and a tolerance of 1e-9 by default instead of 10 and 1e-5; weights are "
        "allowed; with base_model it is the mean of differences from it",
    ),
    "task_arithmetic": Method(
        "task_arithmetic",
        normalize=False,
        keys=_LAMBDA,
        linear=True,
    ),
    "ties": Method(
        "ties",
        normalize=True,
        defaults={"scope": "layer"},
        keys=_LAMBDA,
        only=_NO_RESCALE,
        needs_density=True,
        differs=_TIES,
    ),
    "dare_linear": _dropping("dare", elect=False, normalize=False),
    "dare_ties": _dropping("dare", elect=True, normalize=False),
    "della": _dropping("della", elect=True, normalize=True),
    "della_linear": _dropping("della", elect=False, normalize=False),
    "breadcrumbs": _breadcrumbs(elect=False),
    "breadcrumbs_ties": _breadcrumbs(elect=True),
    "model_stock": Method(
        "model_stock",
        only={"filter_wise": (False, "tensors are compared whole")},
        differs="small differences keep their angle, which mergekit loses below a norm of 1e-3; "
        "opposed ones give the base model; one model comes out as it is",
    ),
}
_ELSEWHERE = {  # methods of mergekit that are not here
    "passthrough": "it merges nothing",
    "sce": "ties is nearest to it",
    "ram": "task_arithmetic is nearest to it",
    "ramplus_tl": "task_arithmetic is nearest to it",
    "nearswap": "slerp is nearest to it",
    "arcee_fusion": "ties is nearest to it",
}
_OURS = {  # what others call methods that are here, without case, "-" and "_"
    **dict.fromkeys(("flora", "fedex", "fedexlora", "cat"), "product_mean"),
    **dict.fromkeys(("flexlora", "svd"), "product_mean (with parameters.rank)"),
    "fedit": "fedavg",
    "ffalora": "ffa",
    "multikrum": "krum (parameters.chosen says how many)",
    "corespace": "core_ties",
    "tsv": "tsv_m",
    "isoc": "iso_c",
    "normclipping": "norm_bound",
}


def method(name: str) -> Method:
    """The method of that name, mergekit's or ours. Raises ConfigError naming those there are."""
    require_usable(MERGEKIT[name].strategy if name in MERGEKIT else name, f"merge_method={name}")
    if name in MERGEKIT:
        return MERGEKIT[name]
    if name in strategies():
        if name == "product_mean":
            return Method(name, on="weights", linear=True)
        return Method(name, on="either" if name in _EITHER else "differences")
    declared = {name: kind.declared for name, kind in strategies().items()}
    ours = {name for name, what in declared.items() if not (what.statistics or what.noise)}
    known = ", ".join(sorted({*MERGEKIT, *ours}))
    here = _OURS.get(re.sub("[-_]", "", name.lower()))
    if here is not None:
        raise ConfigError(f"merge_method={name}: is {here} here; choose one of {known}")
    hint = f" is not supported ({_ELSEWHERE[name]})" if name in _ELSEWHERE else ""
    raise ConfigError(f"merge_method={name}{hint}: choose one of {known}")
