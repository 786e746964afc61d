# Every fold's judge scores its battles, in both orders.


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
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=compute("gpus"),
        mem_mb=compute("mem_mb"),
        runtime=compute("runtime"),
        batch_tokens=compute("batch_tokens"),
    params:
        settings=settings_of(phase.LogitsSettings),
    message:
        "Scoring battles with {wildcards.judge}, fold {wildcards.fold}"
    shell:
        "arena predict-logits --backbone {input.backbone} --adapter {input.adapter}"
        " --tokens {input.tokens} --folds {input.folds} --fold {wildcards.fold}"
        " --output {output.logits} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} > {log} 2>&1"
