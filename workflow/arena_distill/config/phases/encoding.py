"""Settings of the phases that prepare backbones and tokenise battles."""

from __future__ import annotations

from arena_distill.config.backbone import Backbone
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.config.run import Config


class BackboneSettings(Settings):
    """What is made an ordinary folder."""

    backbone: Backbone

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneSettings:
        return cls(version=VERSIONS["backbone"], backbone=backbone)


class TokensSettings(Settings):
    """What a judge's tokenizer tokenises."""

    names: bool = False
    """The models' names too: some judge with the same tokenizer reads them."""

    @classmethod
    def of(cls, config: Config, judge: str) -> TokensSettings:
        readers = [name for name, node in config.judges.items() if node.encoding.privileged]
        same = (config.tokenizer_name(name) == config.tokenizer_name(judge) for name in readers)
        return cls(version=VERSIONS["tokens"], names=any(same))
