# The test battles: scored at every length and in both orders, averaged, submitted.


rule score_test_merged:
    input:
        model=f"{R}/merged/{{judge}}",
        tokens=tokens,
    output:
        logits=f"{R}/logits/{{judge}}/merged_test.npy",
        ids=f"{R}/logits/{{judge}}/merged_test.ids.parquet",
    log:
        f"{R}/logs/score_test/{{judge}}_merged.log",
    benchmark:
        f"{R}/benchmarks/score_test/{{judge}}_merged.tsv"
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=scoring_gpus,
        gpu_model=gpu_model,
        devices=scoring_gpus,
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        batch_tokens=compute("batch_tokens"),
        attention=compute("attention"),
    params:
        settings=settings_of(phase.ScoringSettings),
    message:
        f"Scoring test battles with the merged {{wildcards.judge}}{ASKS}"
    shell:
        "arena score-test --model {input.model} --tokens {input.tokens}"
        " --output {output.logits} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} --gpus {resources.devices}"
        " --attention {resources.attention} > {log} 2>&1"


rule score_test_gptq:
    input:
        model=f"{R}/gptq/{{judge}}",
        passed=f"{R}/checks/{{judge}}_drift.json",
        tokens=tokens,
    output:
        logits=f"{R}/logits/{{judge}}/gptq_test.npy",
        ids=f"{R}/logits/{{judge}}/gptq_test.ids.parquet",
    log:
        f"{R}/logs/score_test/{{judge}}_gptq.log",
    benchmark:
        f"{R}/benchmarks/score_test/{{judge}}_gptq.tsv"
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
        attention=compute("attention"),
    params:
        settings=settings_of(phase.ScoringSettings),
    message:
        f"Scoring test battles with the quantised {{wildcards.judge}}{ASKS}"
    shell:
        "arena_gptq score-test --quantized --model {input.model} --tokens {input.tokens}"
        " --output {output.logits} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} --gpus {resources.devices}"
        " --attention {resources.attention} > {log} 2>&1"


rule predict_test:
    input:
        unpack(calibration),
        logits=expand(f"{R}/logits/{{{{judge}}}}/{{model}}_test.npy", model=MODELS),
    output:
        predictions=f"{R}/predictions/{{judge}}/test.parquet",
    log:
        f"{R}/logs/predict_test/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/predict_test/{{judge}}.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(phase.PredictionSettings),
        optional=options_of("calibration", "battles"),
    message:
        "Averaging the test predictions of {wildcards.judge}"
    shell:
        "arena predict-test --output {output.predictions} --settings {params.settings:q}"
        " {params.optional:q} {input.logits} > {log} 2>&1"


rule write_submission:
    input:
        predictions=f"{R}/predictions/{CONFIG.final}/test.parquet",
        battles=f"{R}/battles.parquet",
    output:
        submission=f"{R}/submission.csv",
    log:
        f"{R}/logs/write_submission.log",
    benchmark:
        f"{R}/benchmarks/write_submission.tsv"
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["submission"],
    message:
        "Writing the submission"
    shell:
        "arena write-submission --predictions {input.predictions} --battles {input.battles}"
        " --output {output.submission} > {log} 2>&1"
