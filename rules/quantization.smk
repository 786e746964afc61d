# The dense model in GPTQ, and the gate it has to pass.


rule quantize_model:
    input:
        model=f"{R}/merged/{{judge}}",
        tokens=tokens,
        battles=f"{R}/battles.parquet",
    output:
        model=directory(f"{R}/gptq/{{judge}}"),
    log:
        f"{R}/logs/quantize_model/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/quantize_model/{{judge}}.tsv"
    conda:
        "../envs/gptq.yaml"
    threads: compute("threads")
    resources:
        gpu=quantizing_gpus,
        gpu_model=gpu_model,
        devices=quantizing_gpus,
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        batch_tokens=compute("batch_tokens"),
    params:
        settings=settings_of(phase.QuantizationSettings),
    message:
        f"Quantising {{wildcards.judge}} with GPTQ{ASKS}"
    shell:
        "arena_gptq quantize-model --model {input.model} --tokens {input.tokens}"
        " --battles {input.battles} --output {output.model} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} --gpus {resources.devices} > {log} 2>&1"


rule check_drift:
    # A job of its own: exceeding the bound, or moving it, never costs the quantised model.
    input:
        model=f"{R}/gptq/{{judge}}",
    output:
        passed=f"{R}/checks/{{judge}}_drift.json",
    log:
        f"{R}/logs/check_drift/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/check_drift/{{judge}}.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.DriftSettings),
    message:
        "Checking what quantisation changed in {wildcards.judge}"
    shell:
        "arena check-drift --model {input.model} --output {output.passed}"
        " --settings {params.settings:q} > {log} 2>&1"
