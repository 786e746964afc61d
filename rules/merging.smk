# The folds' adapters, averaged and merged into one dense model.


rule merge_folds:
    input:
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
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
    params:
        settings=settings_of(phase.MergeSettings),
    message:
        f"Merging {CONFIG.folds.n} folds of {{wildcards.judge}}"
    shell:
        "arena merge-folds --backbone {input.backbone} --output {output.model}"
        " --settings {params.settings:q} {input.adapters} > {log} 2>&1"
