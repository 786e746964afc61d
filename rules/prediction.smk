# The test battles: scored at every length and in both orders, averaged, submitted.


rule score_test_merged:
    input:
        model=f"{R}/merged/{{judge}}",
        tokens=tokens,
    output:
        logits=f"{R}/logits/{{judge}}/merged_test.npy",
        ids=f"{R}/logits/{{judge}}/merged_test.ids.parquet",
    params:
        settings=settings("scoring"),
    threads: compute("threads")
    resources:
        gpu=compute("gpus"),
        mem_mb=compute("mem_mb"),
        runtime=compute("runtime"),
        batch_tokens=compute("batch_tokens"),
    log:
        f"{R}/logs/score_test/{{judge}}_merged.log",
    benchmark:
        f"{R}/benchmarks/score_test/{{judge}}_merged.tsv"
    message:
        "Scoring test battles with the merged {wildcards.judge}"
    conda:
        "../envs/arena.yaml"
    shell:
        "{ARENA} score-test --model {input.model} --tokens {input.tokens}"
        " --output {output.logits} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} > {log} 2>&1"


rule score_test_gptq:
    input:
        model=f"{R}/gptq/{{judge}}",
        passed=f"{R}/checks/{{judge}}_drift.json",
        tokens=tokens,
    output:
        logits=f"{R}/logits/{{judge}}/gptq_test.npy",
        ids=f"{R}/logits/{{judge}}/gptq_test.ids.parquet",
    params:
        settings=settings("scoring"),
    threads: compute("threads")
    resources:
        gpu=compute("gpus"),
        mem_mb=compute("mem_mb"),
        runtime=compute("runtime"),
        batch_tokens=compute("batch_tokens"),
    log:
        f"{R}/logs/score_test/{{judge}}_gptq.log",
    benchmark:
        f"{R}/benchmarks/score_test/{{judge}}_gptq.tsv"
    message:
        "Scoring test battles with the quantised {wildcards.judge}"
    conda:
        "../envs/gptq.yaml"
    shell:
        "{ARENA_GPTQ} score-test --quantized --model {input.model} --tokens {input.tokens}"
        " --output {output.logits} --settings {params.settings:q}"
        " --batch-tokens {resources.batch_tokens} > {log} 2>&1"


rule predict_test:
    input:
        logits=expand(f"{R}/logits/{{{{judge}}}}/{{model}}_test.npy", model=MODELS),
    output:
        predictions=f"{R}/predictions/{{judge}}/test.parquet",
    params:
        settings=settings("prediction"),
    log:
        f"{R}/logs/predict_test/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/predict_test/{{judge}}.tsv"
    message:
        "Averaging the test predictions of {wildcards.judge}"
    conda:
        "../envs/arena.yaml"
    shell:
        "{ARENA} predict-test --output {output.predictions} --settings {params.settings:q}"
        " {input.logits} > {log} 2>&1"


rule write_submission:
    input:
        predictions=f"{R}/predictions/{CONFIG.final}/test.parquet",
        battles=f"{R}/battles.parquet",
    output:
        submission=f"{R}/submission.csv",
    params:
        version=VERSIONS["submission"],
    log:
        f"{R}/logs/write_submission.log",
    benchmark:
        f"{R}/benchmarks/write_submission.tsv"
    message:
        "Writing the submission"
    conda:
        "../envs/arena.yaml"
    shell:
        "{ARENA} write-submission --predictions {input.predictions} --battles {input.battles}"
        " --output {output.submission} > {log} 2>&1"
