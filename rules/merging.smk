# The folds' adapters, averaged and merged into one dense model.


rule merge_folds:
    input:
        backbone=backbone,
        adapters=fold_adapters,
        tokens=tokens,
    output:
        model=directory(f"{R}/merged/{{judge}}"),
    params:
        settings=settings("merge"),
    threads: compute("threads")
    resources:
        mem_mb=compute("mem_mb"),
        runtime=compute("runtime"),
    log:
        f"{R}/logs/merge_folds/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/merge_folds/{{judge}}.tsv"
    message:
        "Merging {CONFIG.folds.n} folds of {wildcards.judge}"
    conda:
        "../envs/arena.yaml"
    shell:
        "{ARENA} merge-folds --backbone {input.backbone} --output {output.model}"
        " --settings {params.settings:q} {input.adapters} > {log} 2>&1"
