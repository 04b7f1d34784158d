"""The compiled extension, loaded on first use; a failed load is remembered with its reason."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def load():
    """Return ``(extension, reason)``: the module, or None and why there is none."""
    try:
        # torch comes first: the extension links against its libraries.
        import torch  # noqa: F401

        return importlib.import_module("fused_momentum._C"), ""
    except ImportError as error:
        return None, f"the C++ extension is not there ({error}); build it with pip install"


@functools.cache
def rule_number(name: str) -> int:
    """Number of a rule in the extension's table."""
    extension, reason = load()
    if extension is None:
        raise RuntimeError(reason)
    names = [rule.name for rule in extension.rules()]
    if name not in names:
        raise RuntimeError(
            f"the built extension has no rule {name!r}, only {names}: its twin belongs in "
            "csrc/rules.h, and the extension has to be built again"
        )
    return names.index(name)
