# The judge of each fold scores its battles in both orders: in one job, or in shards that are gathered. If
# students learn from a judge's hidden states, a variant of each rule (`…_states`) also writes these.
from arena_distill.config.phases.scoring import LogitsSettings


include: "inputs/logits.smk"


rule predict_logits:
    input:
        backbone=backbone,
        adapter=RUN.adapter("{judge}", "{fold}"),
        tokens=tokens,
        folds=RUN.folds,
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
    log:
        RUN.log("predict_logits/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("predict_logits/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(WHOLE, but=CAPTURED),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        settings=settings_of(LogitsSettings),
        shard=shard,
    message:
        f"Scoring battles with {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
    shell:
        "arena predict-logits --backbone {input.backbone:q} --adapter {input.adapter:q}"
        " --tokens {input.tokens:q} --folds {input.folds:q} --fold {wildcards.fold} {params.shard}"
        " --output {output.logits:q} --settings {params.settings:q}"
        f" {SCORING_OPTIONS} > {{log:q}} 2>&1"


use rule predict_logits as predict_shard with:
    output:
        logits=SHARD,
        ids=layout.ids(SHARD),
    log:
        RUN.log("predict_shard/{judge}_fold_{fold}_{shard}"),
    benchmark:
        RUN.benchmark("predict_shard/{judge}_fold_{fold}_{shard}")
    wildcard_constraints:
        judge=one_of(SHARDED, but=CAPTURED),
    message:
        f"Scoring battles with {{wildcards.judge}}, fold {{wildcards.fold}}, shard {{wildcards.shard}}{ASKS}"


rule gather_logits:
    input:
        folds=RUN.folds,
        shards=shards,
        ids=carried_ids(shards),
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
    log:
        RUN.log("gather_logits/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("gather_logits/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(SHARDED, but=CAPTURED),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(LogitsSettings),
    message:
        "Gathering the shards of {wildcards.judge}, fold {wildcards.fold}"
    shell:
        "arena gather-logits --folds {input.folds:q} --fold {wildcards.fold}"
        " --output {output.logits:q} --settings {params.settings:q} {input.shards:q} > {log:q} 2>&1"


use rule predict_logits as predict_logits_states with:
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
        states=directory(layout.states(LOGITS)),
    wildcard_constraints:
        judge=one_of(CAPTURED, but=SHARDED),


use rule predict_shard as predict_shard_states with:
    output:
        logits=SHARD,
        ids=layout.ids(SHARD),
        states=directory(layout.states(SHARD)),
    wildcard_constraints:
        judge=one_of(CAPTURED, but=WHOLE),


use rule gather_logits as gather_logits_states with:
    input:
        folds=RUN.folds,
        shards=shards,
        ids=carried_ids(shards),
        states=shard_states,
    output:
        logits=LOGITS,
        ids=layout.ids(LOGITS),
        states=directory(layout.states(LOGITS)),
    wildcard_constraints:
        judge=one_of(CAPTURED, but=WHOLE),
