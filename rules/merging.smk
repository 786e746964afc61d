# The folds' adapters, averaged and merged into one dense model.


rule merge_folds:
    input:
        unpack(merge_evidence),
        backbone=backbone,
        adapters=fold_adapters,
    output:
        model=directory(f"{R}/merged/{{judge}}"),
    log:
        f"{R}/logs/merge_folds/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/merge_folds/{{judge}}.tsv"
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=merging_gpus,
        gpu_model=lambda wildcards: gpu_model(wildcards) if merging_gpus(wildcards) else "",
        devices=merging_gpus,
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        batch_tokens=compute("batch_tokens"),
    params:
        settings=settings_of(phase.MergeSettings),
        evidence=as_options("folds", "tokens", "logits"),
    message:
        f"Merging {CONFIG.folds.n} folds of {{wildcards.judge}}{ASKS}"
    shell:
        "arena merge-folds --backbone {input.backbone} --output {output.model}"
        " --settings {params.settings:q} {params.evidence:q} --batch-tokens {resources.batch_tokens}"
        " --gpus {resources.devices} {input.adapters} > {log} 2>&1"
