"""The version of every phase.

A phase's version is part of its rule's ``params``. Raise it when the *meaning* of the phase's output
changes (a fixed bug, another formula): the next run rebuilds that phase and everything after it.
Editing a docstring, a log line or the layout of a rule changes no version, so it retrains nothing.
"""

VERSIONS = {
    "simulate": 1,
    "fetch": 1,
    "battles": 1,
    "folds": 1,
    "audit": 1,
    "backbone": 1,
    "tokens": 3,
    "pretraining": 3,
    "training": 3,
    "distillation": 4,
    "logits": 1,
    "asking": 1,
    "judged": 1,
    "merging": 2,
    "soups": 1,
    "quantization": 1,
    "drift": 1,
    "scoring": 1,
    "calibration": 2,
    "prediction": 1,
    "submission": 1,
    "evaluation": 3,
    "comparison": 3,
    "curves": 1,
    "drift_study": 1,
    "report": 3,
}
