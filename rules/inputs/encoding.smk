# Inputs of rules/encoding.smk: backbones, tokenizers and tokens of judges.
from arena_distill.config.phases.encoding import BackboneSettings, TokensSettings

PARTS = [name for name, b in BACKBONES.items() if b.download() and name not in DOWNLOADS]


@functools.cache
def backbone_folder(judge):
    """A judge's backbone: an existing folder, or one that `prepare_backbone` makes."""
    backbone = GRAPH.backbone_of(judge)
    if not backbone.is_ready_folder():
        return RUN.backbone(GRAPH.backbone_name(judge))
    described = backbone.described_by()
    check(described)
    return local(os.path.relpath(described) if backbone.tiny else described)


def backbone_settings(backbones):
    """The settings of a job that makes one of the named `backbones`."""
    return lambda wildcards: BackboneSettings.of(backbones[wildcards.backbone]).as_params()


def prepared_from(wildcards):
    """A check that the source files exist. Only a tiny model, which may be another one in another version of
    the package, is an input too: nothing else rebuilds a backbone.
    """
    backbone = BACKBONES[wildcards.backbone]
    for _, path in checks.backbone_files(backbone):
        check(path)
    return local(os.path.relpath(backbone.described_by())) if backbone.tiny else []


def backbone(wildcards):
    return backbone_folder(wildcards.judge)


def owner(wildcards):
    """The first judge with a tokenizer."""
    return next(judge for judge, name in TOKENIZERS.items() if name == wildcards.tokenizer)


def tokenizer(wildcards):
    return backbone_folder(owner(wildcards))


def tokens_settings(wildcards):
    return TokensSettings.of(GRAPH, owner(wildcards)).as_params()


def tokens(wildcards):
    if wildcards.judge not in TOKENIZERS:
        raise WorkflowError(
            f"{wildcards.judge} has no model of its own: ask for a judge with a backbone; `merged` and "
            "`quantized` finish those of the final judge"
        )
    return RUN.tokens(TOKENIZERS[wildcards.judge])


def download_of(wildcards):
    """The whole downloaded model, of which a backbone is a part."""
    return RUN.backbone(GRAPH.download_name(BACKBONES[wildcards.backbone]))


def disk_of_download(wildcards, attempt):
    """Disk for a download: attempt times the largest `compute.disk_mb` of the judges on this backbone."""
    wanted = DOWNLOADS[wildcards.backbone]
    judges = [judge for judge in TRAINED.values() if judge.backbone.download() == wanted]
    return attempt * max(judge.compute.disk_mb for judge in judges)
