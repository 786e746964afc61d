"""Arena Distill: distil big preference judges into a small one you can deploy."""

__version__ = "0.1.0"
