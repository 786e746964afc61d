# Every fold's judge scores its battles, in both orders: in one job, or in shards that are gathered. Of a
# judge from whose states students learn, each of the rules has a variant that writes them too.


rule predict_logits:
    input:
        backbone=backbone,
        adapter=f"{R}/adapters/{{judge}}/fold_{{fold}}",
        tokens=tokens,
        folds=f"{R}/folds.parquet",
    output:
        logits=f"{R}/logits/{{judge}}/fold_{{fold}}.npy",
        ids=f"{R}/logits/{{judge}}/fold_{{fold}}.ids.parquet",
    log:
        f"{R}/logs/predict_logits/{{judge}}_fold_{{fold}}.log",
    benchmark:
        f"{R}/benchmarks/predict_logits/{{judge}}_fold_{{fold}}.tsv"
    wildcard_constraints:
        judge=one_of(WHOLE, but=WATCHED),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=scoring_gpus,
        gpu_model=gpu_model,
        devices=scoring_gpus,
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        batch_tokens=compute("batch_tokens"),
        attention=compute("attention"),
    params:
        settings=settings_of(phase.LogitsSettings),
        shard=shard,
    message:
        f"Scoring battles with {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
    shell:
        "arena predict-logits --backbone {input.backbone} --adapter {input.adapter}"
        " --tokens {input.tokens} --folds {input.folds} --fold {wildcards.fold} {params.shard}"
        " --output {output.logits} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} --gpus {resources.devices}"
        " --attention {resources.attention} > {log} 2>&1"


use rule predict_logits as predict_shard with:
    output:
        logits=f"{R}/shards/{{judge}}/fold_{{fold}}/{{shard}}.npy",
        ids=f"{R}/shards/{{judge}}/fold_{{fold}}/{{shard}}.ids.parquet",
    log:
        f"{R}/logs/predict_shard/{{judge}}_fold_{{fold}}_{{shard}}.log",
    benchmark:
        f"{R}/benchmarks/predict_shard/{{judge}}_fold_{{fold}}_{{shard}}.tsv"
    wildcard_constraints:
        judge=one_of(SHARDED, but=WATCHED),
    message:
        f"Scoring battles with {{wildcards.judge}}, fold {{wildcards.fold}}, shard {{wildcards.shard}}{ASKS}"


rule gather_logits:
    input:
        folds=f"{R}/folds.parquet",
        shards=shards,
    output:
        logits=f"{R}/logits/{{judge}}/fold_{{fold}}.npy",
        ids=f"{R}/logits/{{judge}}/fold_{{fold}}.ids.parquet",
    log:
        f"{R}/logs/gather_logits/{{judge}}_fold_{{fold}}.log",
    benchmark:
        f"{R}/benchmarks/gather_logits/{{judge}}_fold_{{fold}}.tsv"
    wildcard_constraints:
        judge=one_of(SHARDED, but=WATCHED),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.LogitsSettings),
    message:
        "Gathering the shards of {wildcards.judge}, fold {wildcards.fold}"
    shell:
        "arena gather-logits --folds {input.folds} --fold {wildcards.fold}"
        " --output {output.logits} --settings {params.settings:q} {input.shards} > {log} 2>&1"


use rule predict_logits as predict_logits_states with:
    output:
        logits=f"{R}/logits/{{judge}}/fold_{{fold}}.npy",
        ids=f"{R}/logits/{{judge}}/fold_{{fold}}.ids.parquet",
        states=directory(f"{R}/logits/{{judge}}/fold_{{fold}}.states"),
    wildcard_constraints:
        judge=one_of(WATCHED, but=SHARDED),


use rule predict_shard as predict_shard_states with:
    output:
        logits=f"{R}/shards/{{judge}}/fold_{{fold}}/{{shard}}.npy",
        ids=f"{R}/shards/{{judge}}/fold_{{fold}}/{{shard}}.ids.parquet",
        states=directory(f"{R}/shards/{{judge}}/fold_{{fold}}/{{shard}}.states"),
    wildcard_constraints:
        judge=one_of(WATCHED, but=WHOLE),


use rule gather_logits as gather_logits_states with:
    input:
        folds=f"{R}/folds.parquet",
        shards=shards,
        states=shard_states,
    output:
        logits=f"{R}/logits/{{judge}}/fold_{{fold}}.npy",
        ids=f"{R}/logits/{{judge}}/fold_{{fold}}.ids.parquet",
        states=directory(f"{R}/logits/{{judge}}/fold_{{fold}}.states"),
    wildcard_constraints:
        judge=one_of(WATCHED, but=WHOLE),
