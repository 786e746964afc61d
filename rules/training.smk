# Judges are post-pretrained on UT battles, then trained per fold: teachers on votes, students on teachers.
from arena_distill.config.phases.training import PretrainingSettings, TrainingSettings


include: "inputs/training.smk"


rule pretrain_adapter:
    input:
        backbone=backbone,
        tokens=tokens,
    output:
        adapter=directory(RUN.pretrained("{judge}")),
    log:
        RUN.log("pretrain_adapter/{judge}"),
    benchmark:
        RUN.benchmark("pretrain_adapter/{judge}")
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **TRAINING,
    params:
        settings=settings_of(PretrainingSettings),
        checkpoints=checkpoints,
    message:
        f"Post-pretraining {{wildcards.judge}} on UT battles{ASKS}"
    shell:
        "arena pretrain-adapter --backbone {input.backbone:q} --tokens {input.tokens:q}"
        " --output {output.adapter:q} --settings {params.settings:q}"
        " --checkpoints {params.checkpoints:q}"
        f" {TRAINING_OPTIONS} > {{log:q}} 2>&1"


rule train_teacher:
    input:
        backbone=backbone,
        pretrained=pretrained,
        tokens=tokens,
        folds=RUN.folds,
    output:
        adapter=directory(RUN.adapter("{judge}", "{fold}")),
    log:
        RUN.log("train_teacher/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("train_teacher/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(TEACHERS, but=FROZEN),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        **TRAINING,
    params:
        settings=settings_of(TrainingSettings),
        checkpoints=checkpoints,
        learned_from=learned_from,
    message:
        f"Training teacher {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
    shell:
        "arena train-fold --backbone {input.backbone:q} {params.learned_from:q}"
        " --tokens {input.tokens:q} --folds {input.folds:q} --fold {wildcards.fold}"
        " --output {output.adapter:q} --settings {params.settings:q}"
        " --checkpoints {params.checkpoints:q}"
        f" {TRAINING_OPTIONS} > {{log:q}} 2>&1"


use rule train_teacher as distill_student with:
    input:
        backbone=backbone,
        pretrained=pretrained,
        tokens=tokens,
        folds=RUN.folds,
        teacher_logits=teacher_logits,
        ids=carried_ids(teacher_logits),
        teacher_states=teacher_states,
    output:
        adapter=directory(RUN.adapter("{judge}", "{fold}")),
    log:
        RUN.log("distill_student/{judge}_fold_{fold}"),
    benchmark:
        RUN.benchmark("distill_student/{judge}_fold_{fold}")
    wildcard_constraints:
        judge=one_of(STUDENTS, but=FROZEN),
    message:
        f"Distilling student {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
