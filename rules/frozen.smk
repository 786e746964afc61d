# Frozen judges: their backbone reads each battle once, and a linear head per fold is fitted to what it says.
from arena_distill.config.phases.deployment import MergeSettings
from arena_distill.config.phases.scoring import LogitsSettings
from arena_distill.config.phases.training import FeatureSettings, ProbeSettings


include: "inputs/frozen.smk"


rule read_features:
    input:
        backbone=backbone,
        tokens=tokens,
    output:
        features=directory(RUN.features("{judge}")),
    log:
        RUN.log("read_features/{judge}"),
    benchmark:
        RUN.benchmark("read_features/{judge}")
    wildcard_constraints:
        judge=one_of(FROZEN),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        settings=settings_of(FeatureSettings),
    message:
        f"Reading battles with the backbone of {{wildcards.judge}}{ASKS}"
    shell:
        "arena read-features --backbone {input.backbone:q} --tokens {input.tokens:q}"
        " --output {output.features:q} --settings {params.settings:q}"
        f" {SCORING_OPTIONS} > {{log:q}} 2>&1"


rule fit_probe:
    input:
        features=features,
        folds=RUN.folds,
        teacher_logits=teacher_logits,
        ids=carried_ids(teacher_logits),
    output:
        adapter=directory(RUN.adapter("{judge}", "{fold}")),
    log:
        RUN.log("fit_probe/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("fit_probe/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(FROZEN),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **FITTING,
    params:
        settings=settings_of(ProbeSettings),
        learned_from=learned_from,
    message:
        f"Fitting the head of {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
    shell:
        "arena fit-probe --features {input.features:q} --folds {input.folds:q} --fold {wildcards.fold}"
        " {params.learned_from:q} --output {output.adapter:q} --settings {params.settings:q} > {log:q} 2>&1"


rule score_probe:
    input:
        features=features,
        adapter=RUN.adapter("{judge}", "{fold}"),
        folds=RUN.folds,
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
    log:
        RUN.log("score_probe/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("score_probe/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(FROZEN),
    conda:
        "../envs/arena.yaml"
    resources:
        **FITTING,
    params:
        settings=settings_of(LogitsSettings),
    message:
        f"Scoring battles with the head of {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
    shell:
        "arena score-probe --features {input.features:q} --probe {input.adapter:q} --folds {input.folds:q}"
        " --fold {wildcards.fold} --output {output.logits:q} --settings {params.settings:q} > {log:q} 2>&1"


rule merge_probes:
    input:
        backbone=backbone,
        adapters=fold_adapters,
    output:
        model=directory(RUN.weights("{judge}", "merged")),
    log:
        RUN.log("merge_probes/{judge}"),
    benchmark:
        RUN.benchmark("merge_probes/{judge}")
    wildcard_constraints:
        judge=one_of(FROZEN),
    conda:
        "../envs/arena.yaml"
    resources:
        **FITTING,
    params:
        settings=settings_of(MergeSettings),
    message:
        f"Putting the mean head of {CONFIG.folds.n} folds on {{wildcards.judge}}{ASKS}"
    shell:
        "arena merge-probes --backbone {input.backbone:q} --output {output.model:q}"
        " --settings {params.settings:q} {input.adapters:q} > {log:q} 2>&1"
