# Test battles and held-out ones are scored at every length and in both orders; test scores are averaged and
# submitted.
from arena_distill.config.phases.prediction import PredictionSettings, ScoringSettings


include: "inputs/prediction.smk"


rule score_test_merged:
    input:
        model=RUN.weights("{judge}", "merged"),
        tokens=tokens,
    output:
        logits=RUN.test_logits("{judge}", "merged"),
        ids=layout.ids(RUN.test_logits("{judge}", "merged")),
    log:
        RUN.log("score_test/{judge}_merged"),
    benchmark:
        RUN.benchmark("score_test/{judge}_merged")
    wildcard_constraints:
        judge=one_of(TRAINED),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        run="arena score-test",
        settings=settings_of(ScoringSettings),
        folds=as_options("folds"),
    message:
        f"Scoring test battles with the merged {{wildcards.judge}}{ASKS}"
    shell:
        "{params.run} --model {input.model:q} --tokens {input.tokens:q} {params.folds:q}"
        " --output {output.logits:q} --settings {params.settings:q}"
        f" {SCORING_OPTIONS} > {{log:q}} 2>&1"


use rule score_test_merged as score_test_gptq with:
    input:
        model=RUN.weights("{judge}", "gptq"),
        passed=RUN.drift_check("{judge}"),
        tokens=tokens,
    output:
        logits=RUN.test_logits("{judge}", "gptq"),
        ids=layout.ids(RUN.test_logits("{judge}", "gptq")),
    log:
        RUN.log("score_test/{judge}_gptq"),
    benchmark:
        RUN.benchmark("score_test/{judge}_gptq")
    conda:
        "../envs/gptq.yaml"
    resources:
        **job_of(quantizing_gpus, "batch_tokens", "attention"),
    params:
        run="arena_gptq score-test --quantized",
    message:
        f"Scoring test battles with the quantised {{wildcards.judge}}{ASKS}"


use rule score_test_merged as score_held_out_merged with:
    input:
        model=RUN.weights("{judge}", "merged"),
        tokens=tokens,
        folds=RUN.folds,
    output:
        logits=RUN.held_out_logits("{judge}", "merged"),
        ids=layout.ids(RUN.held_out_logits("{judge}", "merged")),
    log:
        RUN.log("score_held_out/{judge}_merged"),
    benchmark:
        RUN.benchmark("score_held_out/{judge}_merged")
    message:
        f"Scoring held-out battles with the merged {{wildcards.judge}}{ASKS}"


use rule score_test_gptq as score_held_out_gptq with:
    input:
        model=RUN.weights("{judge}", "gptq"),
        passed=RUN.drift_check("{judge}"),
        tokens=tokens,
        folds=RUN.folds,
    output:
        logits=RUN.held_out_logits("{judge}", "gptq"),
        ids=layout.ids(RUN.held_out_logits("{judge}", "gptq")),
    log:
        RUN.log("score_held_out/{judge}_gptq"),
    benchmark:
        RUN.benchmark("score_held_out/{judge}_gptq")
    message:
        f"Scoring held-out battles with the quantised {{wildcards.judge}}{ASKS}"


rule predict_test:
    input:
        unpack(calibration),
        logits=RUN.test_logits("{judge}", "{model}"),
        ids=carried_ids(RUN.test_logits("{judge}", "{model}")),
    output:
        predictions=RUN.predictions("{judge}", "{model}"),
    log:
        RUN.log("predict_test/{judge}_{model}"),
    benchmark:
        RUN.benchmark("predict_test/{judge}_{model}")
    wildcard_constraints:
        model=one_of(MODELS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(PredictionSettings),
        optional=as_options("calibration", "battles"),
    message:
        "Averaging the test predictions of {wildcards.judge}, {wildcards.model}"
    shell:
        "arena predict-test --output {output.predictions:q} --settings {params.settings:q}"
        " {params.optional:q} --logits {input.logits:q} --model {wildcards.model} > {log:q} 2>&1"


rule write_submission:
    input:
        predictions=RUN.predictions(CONFIG.final, CONFIG.prediction.model),
        battles=RUN.battles,
    output:
        submission=RUN.submission,
    log:
        RUN.log("write_submission"),
    benchmark:
        RUN.benchmark("write_submission")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["submission"],
    message:
        "Writing the submission"
    shell:
        "arena write-submission --predictions {input.predictions:q} --battles {input.battles:q}"
        " --output {output.submission:q} > {log:q} 2>&1"
