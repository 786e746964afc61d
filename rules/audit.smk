# Leaks between folds and sources of battles.
from arena_distill.config.phases.battles import AuditSettings


rule audit_leaks:
    input:
        battles=RUN.battles,
        folds=RUN.folds,
    output:
        audit=RUN.audit,
        leaks=RUN.table("leaks"),
    log:
        RUN.log("audit_leaks"),
    benchmark:
        RUN.benchmark("audit_leaks")
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(AuditSettings),
    message:
        "Looking for leaks"
    shell:
        "arena audit-leaks --battles {input.battles:q} --folds {input.folds:q}"
        " --output {output.audit:q} --table {output.leaks:q}"
        " --settings {params.settings:q} > {log:q} 2>&1"
