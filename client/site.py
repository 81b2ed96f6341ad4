"""Which hospital is this? The answer comes from the site's own machine, never from a message."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context
from yaml.error import MarkedYAMLError

from conf.load import ConfigError, validate
from conf.policy import SitePolicy

SITE = "WARDROUND_SITE"  # path of the site policy (deployment)
SITES = "WARDROUND_SITES"  # folder of site policies, taken in name order (simulation)


class SiteError(ValueError):
    """The site policy is absent or invalid; one line that says where and what."""


class _RepeatedKey(MarkedYAMLError):
    """A key that is set twice: which of the two the hospital means is not for us to guess."""


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader takes the last of two equal keys; a policy must not be read that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below: no such key can be
            if key.value in seen:
                raise _RepeatedKey(problem="a key is set twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_policy(path: Path) -> SitePolicy:
    """The validated policy in a YAML file.

    Raises SiteError naming the file, the key and what is allowed.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        return validate(raw, SitePolicy)
    except FileNotFoundError:
        raise SiteError(f"{path}: no such site policy") from None
    except (OSError, UnicodeDecodeError):
        raise SiteError(f"{path}: not a readable file of UTF-8 text") from None
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = problem.problem if isinstance(problem, _RepeatedKey) else "not valid YAML"
        raise SiteError(f"{path}{line}: {what}") from None
    except ConfigError as problem:
        raise SiteError(f"{path}: {problem}") from None


def policy_of(context: Context) -> SitePolicy:
    """The policy of the site that this Flower context stands for. Raises SiteError."""
    if SITE in os.environ:
        return read_policy(Path(os.environ[SITE]))
    if SITES in os.environ:
        files = sorted(Path(os.environ[SITES]).glob("*.yaml"))
        index = int(context.node_config["partition-id"])
        if index < len(files):
            return read_policy(files[index])
    raise SiteError(f"no site policy: set {SITE} to the path of one")
