# What all folds learned is averaged and merged into one dense model.
from arena_distill.config.phases.deployment import MergeSettings


include: "inputs/merging.smk"


rule merge_folds:
    input:
        unpack(merge_evidence),
        backbone=backbone,
        adapters=fold_adapters,
    output:
        model=directory(RUN.weights("{judge}", "merged")),
    log:
        RUN.log("merge_folds/{judge}"),
    benchmark:
        RUN.benchmark("merge_folds/{judge}")
    wildcard_constraints:
        judge=one_of(TRAINED, but=FROZEN),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **MERGING,
    params:
        settings=settings_of(MergeSettings),
        evidence=as_options("folds", "tokens", "logits"),
    message:
        f"Merging {CONFIG.folds.n} folds of {{wildcards.judge}}{ASKS}"
    shell:
        "arena merge-folds --backbone {input.backbone:q} --output {output.model:q}"
        " --settings {params.settings:q} {params.evidence:q}"
        f" {BATCH_OPTIONS} {{input.adapters:q}} > {{log:q}} 2>&1"
