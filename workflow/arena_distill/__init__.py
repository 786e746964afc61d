"""Arena Distill: distil big preference judges into a small one you can deploy.

What a library user imports is offered here and loaded on demand, so that importing the package is cheap.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "config.run",
    "InputError": "errors",
    "Judge": "judging.judge",
    "Layout": "layout",
    "load": "config.run",
    "read_battles": "battles.reading",
}
"""Public name → its module."""

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
