# The final judge becomes a folder that says how it is asked, and proves it: judge.json, test vectors, card.


rule finish_merged:
    input:
        weights=RUN.weights("{judge}", "merged"),
        tokens=tokens,
        calibration=lambda wildcards: held_out_scores(wildcards.judge, "merged"),
        predictions=RUN.predictions("{judge}", "merged"),
        test_votes=TEST_VOTES,
    output:
        judge=directory(RUN.finished("{judge}", "merged")),
    log:
        RUN.log("finish/{judge}_merged"),
    benchmark:
        RUN.benchmark("finish/{judge}_merged")
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        run="arena finish-judge --kind merged",
        settings=settings_of(phase.JudgeSettings),
        optional=as_options("calibration", "test_votes"),
    message:
        f"Finishing {{wildcards.judge}}, merged{ASKS}"
    shell:
        "{params.run} --weights {input.weights:q} --tokens {input.tokens:q}"
        " --predictions {input.predictions:q} {params.optional:q}"
        " --output {output.judge:q} --settings {params.settings:q}"
        f" {SCORING_OPTIONS} > {{log:q}} 2>&1"


use rule finish_merged as finish_gptq with:
    input:
        weights=RUN.weights("{judge}", "gptq"),
        passed=RUN.drift_check("{judge}"),
        tokens=tokens,
        calibration=lambda wildcards: held_out_scores(wildcards.judge, "gptq"),
        predictions=RUN.predictions("{judge}", "gptq"),
        test_votes=TEST_VOTES,
    output:
        judge=directory(RUN.finished("{judge}", "gptq")),
    log:
        RUN.log("finish/{judge}_gptq"),
    benchmark:
        RUN.benchmark("finish/{judge}_gptq")
    conda:
        "../envs/gptq.yaml"
    resources:
        **job_of(quantizing_gpus, "batch_tokens", "attention"),
    params:
        run="arena_gptq finish-judge --kind gptq",
    message:
        f"Finishing {{wildcards.judge}}, quantised{ASKS}"
