# All figures of the run, and the report.
from arena_distill.config.phases.evaluation import EvaluationSettings


include: "inputs/evaluation.smk"


REPORTED = {  # file of `render_report` → caption
    "log_loss.svg": "log_loss.rst",
    "reliability.svg": "reliability.rst",
    "reliability_folds.svg": "reliability_folds.rst",
    "variants.svg": "variants.rst",
    "cascade.svg": "cascade.rst",
    "judges.csv": "judges.rst",
    "calibration.csv": "calibration.rst",
    "position.csv": "position.rst",
    "variants.csv": "variants_table.rst",
    "slices.csv": "slices.rst",
    "ranking.csv": "ranking.rst",
    "folds.csv": "folds.rst",
    "benchmarks.csv": "benchmarks.rst",
    "audit.csv": "audit.rst",
    "rejected.csv": "rejected.rst",
}


rule write_config:
    output:
        config=RUN.config,
    log:
        RUN.log("write_config"),
    benchmark:
        RUN.benchmark("write_config")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=lambda wildcards: CONFIG.as_params(),  # in a plain string, {} would be wildcards
    message:
        "Writing the configuration: {output.config}"
    shell:
        "arena write-config --output {output.config:q} --settings {params.settings:q} > {log:q} 2>&1"


rule predict_surface:
    input:
        folds=RUN.folds,
        battles=RUN.battles,
    output:
        surface=RUN.surface,
        trees=RUN.trees,
    log:
        RUN.log("predict_surface"),
    benchmark:
        RUN.benchmark("predict_surface")
    conda:
        "../envs/arena.yaml"
    params:
        settings=version_of("surface"),
    message:
        "Predicting battles by trees over their surface"
    shell:
        "arena predict-surface --folds {input.folds:q} --battles {input.battles:q}"
        " --output {output.surface:q} --trees {output.trees:q} --settings {params.settings:q}"
        " > {log:q} 2>&1"


rule evaluate:
    input:
        counts=RUN.counts,
        folds=RUN.folds,
        battles=RUN.battles,
        surface=RUN.surface,
        rejected=RUN.rejected,
        logits=SCORED_LOGITS,
        ids=carried_ids([*SCORED_LOGITS, RUN.test_logits(CONFIG.final, CONFIG.prediction.model)]),
        predictions=[RUN.predictions(CONFIG.final, model) for model in MODELS],
        test_logits=RUN.test_logits(CONFIG.final, CONFIG.prediction.model),
        test_votes=TEST_VOTES,
        benchmarked=RUN.benchmarked(CONFIG.final, CONFIG.prediction.model) if BENCHMARKED else [],
        quantized=(
            RUN.weights(CONFIG.final, "gptq")
            if "gptq" in MODELS and CONFIG.final in TRAINED
            else []
        ),
        truth=TRUTH,
        audit=RUN.audit,
        calibrations=[
            RUN.calibration(CONFIG.final, model) for model in MODELS if CONFIG.folds.holdout
        ],
        stacks=[RUN.stack(judge) for judge in STACKS if judge in CONFIG.judges],
    output:
        # Snakemake would delete the last figures before the job, and a failed job leave none.
        metrics=update(RUN.metrics),
        judges=update(RUN.table("judges")),
        variants=update(RUN.table("variants")),
        cascade=update(RUN.table("cascade")),
        slices=update(RUN.table("slices")),
        ranking=update(RUN.table("ranking")),
        contradicted=update(RUN.contradicted),
    log:
        RUN.log("evaluate"),
    benchmark:
        RUN.benchmark("evaluate")
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(EvaluationSettings),
        tables=lambda wildcards, output: os.path.dirname(output.judges),
        files=as_options(
            "predictions",
            "test_votes",
            "quantized",
            "truth",
            "audit",
            "calibrations",
            "stacks",
            "benchmarked",
        ),
        logits=judged_folds,
    message:
        "Evaluating judges, variants and quantisation"
    shell:
        "arena evaluate --folds {input.folds:q} --battles {input.battles:q} --surface {input.surface:q}"
        " --rejected {input.rejected:q}"
        " --test-logits {input.test_logits:q} --output {output.metrics:q} --tables {params.tables:q}"
        " --settings {params.settings:q} {params.files:q} {params.logits:q} > {log:q} 2>&1"


rule render_report:
    input:
        metrics=RUN.metrics,
        config=RUN.config,
    output:
        page=report(RUN.report, caption="../workflow/report/report.rst", category="Report"),
        parts=[
            report(
                RUN.report_part(name),
                caption=f"../workflow/report/{caption}",
                category="Figures" if name.endswith(".svg") else "Tables",
            )
            for name, caption in REPORTED.items()
        ],
    log:
        RUN.log("render_report"),
    benchmark:
        RUN.benchmark("render_report")
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        version=VERSIONS["report"],
        parts=lambda wildcards, output: os.path.dirname(output.parts[0]),
    message:
        "Writing the report: {output.page}"
    shell:
        "arena render-report --metrics {input.metrics:q} --config {input.config:q}"
        " --output {output.page:q} --parts {params.parts:q} > {log:q} 2>&1"
