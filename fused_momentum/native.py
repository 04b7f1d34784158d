"""The compiled extension, loaded on first use; a failed load is remembered with its reason."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

BUILD = "pip install --no-build-isolation"


@functools.cache
def load():
    """Return ``(extension, reason)``: the module, or None and why there is none."""
    try:
        # torch comes first: the extension links against its libraries.
        import torch

        extension = importlib.import_module("fused_momentum._C")
    except ImportError as error:
        # Started in a checkout, Python finds the sources before what is installed.
        root = Path(__file__).parents[1]
        if (root / "csrc").is_dir():
            here = f"; {root} has only the sources: build there with {BUILD} -e ."
        else:
            here = f"; build it with {BUILD}"
        return None, f"the C++ extension is not there ({error}){here}"
    built, running = map(_release, (extension.TORCH_VERSION, torch.__version__))
    if built != running:
        # It looks into torch's tensors, and these are others in every release.
        return None, (
            f"the C++ extension was built for torch {built}, and this is torch {running}; build it "
            f"again with {BUILD}"
        )
    return extension, ""


def _release(version: str) -> str:
    return re.match(r"\d+\.\d+\.\d+", version)[0]


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
