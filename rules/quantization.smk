# The dense model is quantised with GPTQ and has to pass a drift check.
from arena_distill.config.phases.deployment import DriftSettings, QuantizationSettings


include: "inputs/quantization.smk"


rule quantize_model:
    input:
        model=dense_model,
        tokens=tokens,
    output:
        model=directory(RUN.weights("{judge}", "gptq")),
    log:
        RUN.log("quantize_model/{judge}"),
    benchmark:
        RUN.benchmark("quantize_model/{judge}")
    conda:
        "../envs/gptq.yaml"
    threads: compute("threads")
    resources:
        **QUANTIZING,
    params:
        settings=settings_of(QuantizationSettings),
    message:
        f"Quantising {{wildcards.judge}} with GPTQ{ASKS}"
    shell:
        "arena_gptq quantize-model --model {input.model:q} --tokens {input.tokens:q}"
        " --output {output.model:q} --settings {params.settings:q}"
        f" {BATCH_OPTIONS} > {{log:q}} 2>&1"


rule check_drift:
    # A separate job: if the drift exceeds its bound, or the bound changes, the quantised model stays.
    input:
        model=RUN.weights("{judge}", "gptq"),
    output:
        passed=RUN.drift_check("{judge}"),
    log:
        RUN.log("check_drift/{judge}"),
    benchmark:
        RUN.benchmark("check_drift/{judge}")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(DriftSettings),
    message:
        "Checking the quantisation drift of {wildcards.judge}"
    shell:
        "arena check-drift --model {input.model:q} --output {output.passed:q}"
        " --settings {params.settings:q} > {log:q} 2>&1"
