# The final judge becomes a folder that says how it is asked, and proves it: judge.json, test vectors, card.
from arena_distill.config.phases.evaluation import BenchmarkSettings
from arena_distill.config.phases.judging import JudgeSettings, StackedJudgeSettings


include: "inputs/judging.smk"


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
    wildcard_constraints:
        judge=one_of(TRAINED),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        run="arena finish-judge --kind merged",
        settings=settings_of(JudgeSettings),
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


rule finish_stack_merged:
    input:
        members=members_models(RUN.finished),
        stack=RUN.stack("{judge}"),
        trees=trees_of,
        calibration=lambda wildcards: held_out_scores(wildcards.judge, "merged"),
        predictions=RUN.predictions("{judge}", "merged"),
        test_votes=TEST_VOTES,
    output:
        judge=directory(RUN.finished("{judge}", "merged")),
    log:
        RUN.log("finish/{judge}_merged"),
    benchmark:
        RUN.benchmark("finish/{judge}_merged")
    wildcard_constraints:
        judge=one_of(STACKS),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        run="arena finish-stack --kind merged",
        settings=settings_of(StackedJudgeSettings),
        optional=as_options("trees", "calibration", "test_votes"),
    message:
        f"Finishing {{wildcards.judge}}, merged{ASKS}"
    shell:
        "{params.run} --stack {input.stack:q} --predictions {input.predictions:q} {params.optional:q}"
        " --output {output.judge:q} --settings {params.settings:q}"
        f" {SCORING_OPTIONS} {{input.members:q}} > {{log:q}} 2>&1"


use rule finish_stack_merged as finish_stack_gptq with:
    input:
        members=members_models(RUN.finished, "gptq"),
        stack=RUN.stack("{judge}"),
        trees=trees_of,
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
        run="arena_gptq finish-stack --kind gptq",
    message:
        f"Finishing {{wildcards.judge}}, quantised{ASKS}"


rule benchmark_merged:
    input:
        judge=RUN.finished("{judge}", "merged"),
        battles=RUN.battles,
        files=benchmark_files,
    output:
        found=RUN.benchmarked("{judge}", "merged"),
    log:
        RUN.log("benchmark/{judge}_merged"),
    benchmark:
        RUN.benchmark("benchmark/{judge}_merged")
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **SCORING,
    params:
        run="arena run-benchmarks",
        settings=settings_of(BenchmarkSettings),
        files=named_benchmarks,
    message:
        f"Asking {{wildcards.judge}}, merged, the benchmarks{ASKS}"
    shell:
        "{params.run} --judge {input.judge:q} --battles {input.battles:q} --output {output.found:q}"
        f" --settings {{params.settings:q}} {SCORING_OPTIONS} {{params.files:q}} > {{log:q}} 2>&1"


use rule benchmark_merged as benchmark_gptq with:
    input:
        judge=RUN.finished("{judge}", "gptq"),
        battles=RUN.battles,
        files=benchmark_files,
    output:
        found=RUN.benchmarked("{judge}", "gptq"),
    log:
        RUN.log("benchmark/{judge}_gptq"),
    benchmark:
        RUN.benchmark("benchmark/{judge}_gptq")
    conda:
        "../envs/gptq.yaml"
    resources:
        **job_of(quantizing_gpus, "batch_tokens", "attention"),
    params:
        run="arena_gptq run-benchmarks",
    message:
        f"Asking {{wildcards.judge}}, quantised, the benchmarks{ASKS}"
