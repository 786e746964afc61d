# The deployed models are calibrated and scored on held-out battles, if `folds.holdout` is set.
from arena_distill.config.phases.prediction import CalibrationSettings


rule fit_calibration:
    input:
        folds=RUN.folds,
        battles=RUN.battles,
        logits=RUN.held_out_logits("{judge}", "{model}"),
        ids=carried_ids(RUN.held_out_logits("{judge}", "{model}")),
    output:
        calibration=RUN.calibration("{judge}", "{model}"),
    log:
        RUN.log("fit_calibration/{judge}_{model}"),
    benchmark:
        RUN.benchmark("fit_calibration/{judge}_{model}")
    wildcard_constraints:
        model=one_of(MODELS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    params:
        settings=settings_of(CalibrationSettings),
    message:
        "Calibrating {wildcards.judge}, {wildcards.model}, on held-out battles"
    shell:
        "arena fit-calibration --folds {input.folds:q} --battles {input.battles:q}"
        " --judge {wildcards.judge} --model {wildcards.model} --logits {input.logits:q}"
        " --output {output.calibration:q} --settings {params.settings:q} > {log:q} 2>&1"
