# Battles and folds → what leaks from one into another.


rule audit_leaks:
    input:
        battles=f"{R}/battles.parquet",
        folds=f"{R}/folds.parquet",
    output:
        audit=f"{R}/audit.json",
        leaks=f"{R}/tables/leaks.csv",
    log:
        f"{R}/logs/audit_leaks.log",
    benchmark:
        f"{R}/benchmarks/audit_leaks.tsv"
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.AuditSettings),
    message:
        "Looking for leaks"
    shell:
        "arena audit-leaks --battles {input.battles} --folds {input.folds}"
        " --output {output.audit} --table {output.leaks}"
        " --settings {params.settings:q} > {log} 2>&1"
