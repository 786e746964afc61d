# What the run will cost. The plan asks Snakemake for this very graph, in a process of its own.
import json


rule write_plan:
    output:
        plan=RUN.plan,
    log:
        RUN.log("write_plan"),
    benchmark:
        RUN.benchmark("write_plan")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=lambda wildcards: json.dumps(config),  # as it was read: a file that stands alone
        snakefile=f"{CHECKOUT or '.'}/Snakefile",
    message:
        "Planning what the run will cost: {output.plan}"
    shell:
        "arena write-plan --output {output.plan:q} --settings {params.settings:q}"
        " --snakefile {params.snakefile:q} > {log:q} 2>&1"
