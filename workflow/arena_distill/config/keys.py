"""The keys of a configuration, and how they are written down again.

A key is a field here or in a section; its docstring says what it means. ``config/README.md`` lists them all
and ``workflow/schemas/config.schema.json`` is generated from them.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import Field

from arena_distill.config.data import Audit, Data, Folds, Sources
from arena_distill.config.environments import Environments
from arena_distill.config.external import EndpointLimits
from arena_distill.config.judge import NOT_TRAINED, Judge, JudgeDefaults
from arena_distill.config.plan import Plan
from arena_distill.config.prediction import Card, Prediction
from arena_distill.config.section import FilePath, Name, Section
from arena_distill.config.source import SOURCES, Source
from arena_distill.config.studies import Compare, Studies
from arena_distill.verdicts import Classes


class Keys(Section):
    """The keys of the YAML's first level; ``config.run.Config`` is how they are read and checked."""

    run: Name = "default"
    """Results go to `results/<run>`."""
    results: FilePath = "results"
    """The folder of all runs."""
    classes: Classes = 3
    """3: A wins, B wins, tie; 2: a winner always, as in WSDM Cup 2025 (see `data.ties`)."""
    environments: Environments = Environments()
    """The Python interpreters of the jobs; `--sdm conda` uses envs/*.yaml instead."""
    data: Data
    """Where the battles come from."""
    folds: Folds = Folds()
    """How training battles are split into folds."""
    audit: Audit = Audit()
    """How the leak audit compares prompts."""
    defaults: JudgeDefaults = JudgeDefaults()
    """Settings of every judge; a judge overrides them."""
    judges: dict[Name, Judge] = Field(min_length=1)
    """The nodes of the graph, by name."""
    final: Name
    """The judge that is merged, quantised and submitted."""
    prediction: Prediction = Prediction()
    """How test battles are scored and averaged."""
    benchmarks: dict[Name, Sources] = {}
    """Battles whose better answer is known, by the benchmark's name: files as in `data`. The final judge's
    accuracy on them is in the report."""
    card: Card = Card()
    """What the model card of the finished judge says beside its figures."""
    compare: Compare = Compare()
    """What `snakemake compare` compares."""
    studies: Studies = Studies()
    """Learning curves, and averaging of folds that drift apart."""
    plan: Plan = Plan()
    """Assumptions about the cost of the run."""

    def described(self) -> str:
        """What was computed, not how, as YAML: every key, the defaults filled in."""
        shown = self.model_dump(mode="json", exclude=self._how())
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)

    def as_params(self) -> str:
        """What was computed, not how: JSON for ``config.run.load`` of what differs from the defaults."""
        return self.model_dump_json(exclude=self._how(), exclude_defaults=True)

    def _how(self) -> dict[str, Any]:
        """What decides no result of `all`. (And `defaults`, which are in the judges.)"""
        limits = {"endpoint": dict.fromkeys(EndpointLimits.model_fields, True)}
        trained = dict.fromkeys(("compute", *NOT_TRAINED), True)
        untold = dict.fromkeys(Judge.model_fields, True)
        kinds: dict[str, dict[str, Any]] = {
            "external": untold | {"external": limits},
            "stack": {key: True for key in untold if key != "stack"},
        }
        judges = {
            name: next(
                (told for k, told in kinds.items() if getattr(judge, k) is not None), trained
            )
            for name, judge in self.judges.items()
        }
        parts = ("environments", "compare", "studies", "plan", "defaults")
        return {**dict.fromkeys(parts, True), "judges": judges}

    def sources(self) -> dict[str, tuple[Source, ...]]:
        """Every file of battles that the configuration names, by the key that names it."""
        given = {f"data.{name}": getattr(self.data, name) for name in SOURCES}
        return given | {f"benchmarks.{name}": files for name, files in self.benchmarks.items()}
