# The cost of the run. The planner starts another Snakemake process to get the graph of this run.
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
        settings=lambda wildcards: json.dumps(config),  # as read: complete by itself
        snakefile=f"{CHECKOUT or '.'}/Snakefile",
    message:
        "Planning the cost of the run: {output.plan}"
    shell:
        "arena write-plan --output {output.plan:q} --settings {params.settings:q}"
        " --snakefile {params.snakefile:q} > {log:q} 2>&1"
