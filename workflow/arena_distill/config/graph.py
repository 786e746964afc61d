"""The judges as a graph, and what follows from it for each of them."""

from __future__ import annotations

import graphlib
import hashlib
import itertools
from functools import cached_property
from typing import Any, get_args

from arena_distill.config.backbone import Backbone
from arena_distill.config.head import Head
from arena_distill.config.judge import Judge
from arena_distill.config.keys import Keys
from arena_distill.config.training import State
from arena_distill.config.vocabulary import Calibration
from arena_distill.errors import InputError
from arena_distill.verdicts import Ties


class Graph(Keys):
    """What rules and phases ask of a configuration: its judges' order, parts, students, names."""

    def ties(self) -> Ties:
        """What a tie is in this run."""
        return "class" if self.classes == 3 else self.data.ties

    def head_of(self, judge: str) -> Head:
        """A judge's head, which has the classes of the run."""
        return Head(**self.judges[judge].head.model_dump(), classes=self.classes)

    def ordered(self) -> list[str]:
        """Judges' names, every teacher before its students, every member before its stack."""
        graph = {name: judge.sources() for name, judge in self.judges.items()}
        return list(graphlib.TopologicalSorter(graph).static_order())

    def students_of(self, teacher: str) -> list[str]:
        """The judges that learn from its logits, alone or in stacks."""
        found = [name for name, judge in self.judges.items() if teacher in judge.teachers]
        stacks = [
            name for name, node in self.judges.items() if node.stack and teacher in node.sources()
        ]
        more = (self.students_of(stack) for stack in stacks)
        return list(dict.fromkeys(itertools.chain(found, *more)))

    def scored(self) -> list[str]:
        """The judges that say something of battles with votes."""
        return [name for name, judge in self.judges.items() if not judge.without_votes()]

    def trained_parts(self, judge: str) -> list[str]:
        """The judges that predict for it: itself, or the members of a stack, all the way down."""
        stack = self.judges[judge].stack
        if stack is None:
            return [judge]
        return list(dict.fromkeys(itertools.chain(*map(self.trained_parts, stack.judges))))

    def deployed(self) -> list[str]:
        """The judges that are merged and quantised: the final one, or all that it combines."""
        return self.trained_parts(self.final)

    def is_privileged(self, judge: str) -> bool:
        """Whether a judge, or a part of a stack, reads the models' names."""
        return any(self.judges[part].encoding.privileged for part in self.trained_parts(judge))

    def is_quantized(self, judge: str) -> bool:
        """Whether there is a quantised model of a judge, or of a part of a stack."""
        return any(self.judges[part].quantization is not None for part in self.trained_parts(judge))

    def is_optimistic(self, judge: str) -> bool:
        """Whether a judge's score out of fold is better than the judge.

        A student's targets out of fold come from teachers which were trained on the votes that it is
        then scored by (see ``training.targets``), and what it learns is handed on to its own students.
        """
        node = self.judges[judge]
        if node.stack:
            return any(map(self.is_optimistic, node.stack.judges))
        return any(
            self.is_optimistic(teacher)
            or (node.targets == "out_of_fold" and self.judges[teacher].external is None)
            for teacher in node.teachers
        )

    def fold_calibration(self, judge: str) -> Calibration:
        """What studies calibrate the folds' models by: none is fitted to an optimistic score."""
        if self.is_optimistic(judge):
            return "none"
        asked = self.prediction.calibration
        return "temperature" if asked == "auto" else asked

    def backbone_of(self, judge: str) -> Backbone:
        """A judge's backbone.

        Raises:
            InputError: it is external or a stack, and has none.
        """
        backbone = self.judges[judge].backbone
        if backbone is None:
            raise InputError(f"judges.{judge} has no backbone: nothing is trained")
        return backbone

    def learns_unlabelled(self, judge: str) -> bool:
        """Whether a judge learns battles without votes: there are some, and it wants them."""
        return "unlabelled" in self.data.sources() and self.judges[judge].learns_pseudo_labels()

    def states_of(self, teacher: str) -> tuple[State, ...]:
        """What its students compare with it beside logits."""
        wanted = [self.judges[name].loss.states() for name in self.students_of(teacher)]
        return tuple(s for s in get_args(State) if any(s in states for states in wanted))

    def backbone_name(self, judge: str) -> str:
        """The name of a judge's backbone: readable, one per distinct backbone of this configuration."""
        return self._unique_name(self.backbone_of(judge))

    def download_name(self, backbone: Backbone) -> str | None:
        """The name of what a backbone is made of, where that comes from the hub."""
        source = backbone.download()
        return self._unique_name(source) if source else None

    def tokenizer_name(self, judge: str) -> str:
        """The name of a judge's tokenizer: judges that share one share `tokens/<name>`."""
        return self._unique_name(self.backbone_of(judge).whole())

    def pretraining_owner(self, judge: str) -> str | None:
        """The judge whose post-pretrained adapter `judge` starts from; None without post-pretraining.

        Judges that would train the very same adapter share it: the first of them in the configuration
        owns it. So an ablation (same backbone, another loss) costs no second post-pretraining.
        """
        node = self.judges[judge]
        if not node.backbone or node.pretraining is None or "ut" not in self.data.sources():
            return None
        return self._pretraining_owners[self.judges[judge].before_folds()]

    def features_owner(self, judge: str) -> str:
        """The first judge that reads the same of the same backbone: its features are shared."""
        wanted = _reading(self.judges[judge])
        return next(name for name, node in self.judges.items() if _reading(node) == wanted)

    def _unique_name(self, backbone: Backbone) -> str:
        stem, described = backbone.stem(), backbone.as_params()
        if self._backbones[stem] == {described}:
            return stem
        digest = hashlib.sha256(described.encode()).hexdigest()
        return f"{stem}-{digest[:6]}"

    # Rules ask for one judge after another: what an answer takes of all judges is gathered once.

    @cached_property
    def _backbones(self) -> dict[str, set[str]]:
        """All backbones, as they are and whole, as JSON, by the stem of their name."""
        found: dict[str, set[str]] = {}
        given = [judge.backbone for judge in self.judges.values() if judge.backbone]
        downloads = filter(None, (backbone.download() for backbone in given))
        for backbone in (*given, *(backbone.whole() for backbone in given), *downloads):
            found.setdefault(backbone.stem(), set()).add(backbone.as_params())
        return found

    @cached_property
    def _pretraining_owners(self) -> dict[tuple[Any, ...], str]:
        """The first judge of each kind, by what decides its post-pretrained adapter."""
        owners: dict[tuple[Any, ...], str] = {}
        for name, judge in self.judges.items():
            if judge.backbone:
                owners.setdefault(judge.before_folds(), name)
        return owners


def _reading(judge: Judge) -> tuple[Any, ...]:
    """What decides a frozen judge's features."""
    return judge.frozen, judge.backbone, judge.encoding, judge.precision
