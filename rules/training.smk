# Judges learn: adapters after UT battles, then per fold from votes (teachers) or teachers (students).


rule pretrain_adapter:
    input:
        backbone=backbone,
        tokens=tokens,
        battles=f"{R}/battles.parquet",
    output:
        adapter=directory(f"{R}/adapters/{{judge}}/pretrained"),
    log:
        f"{R}/logs/pretrain_adapter/{{judge}}.log",
    benchmark:
        f"{R}/benchmarks/pretrain_adapter/{{judge}}.tsv"
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=compute("gpus"),
        gpu_model=gpu_model,
        devices=compute("gpus"),
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        micro_batch_size=compute("micro_batch_size"),
        gradient_checkpointing=compute("gradient_checkpointing"),
        fsdp=compute("fsdp"),
        checkpoint_minutes=compute("checkpoint_minutes"),
        attention=compute("attention"),
    params:
        settings=settings_of(phase.PretrainingSettings),
        checkpoints=checkpoints,
    message:
        f"Post-pretraining {{wildcards.judge}} on UT battles{ASKS}"
    shell:
        "arena pretrain-adapter --backbone {input.backbone} --tokens {input.tokens}"
        " --battles {input.battles} --output {output.adapter} --settings {params.settings:q}"
        " --micro-batch-size {resources.micro_batch_size}"
        " --gradient-checkpointing {resources.gradient_checkpointing}"
        " --gpus {resources.devices} --fsdp {resources.fsdp} --checkpoints {params.checkpoints:q}"
        " --checkpoint-minutes {resources.checkpoint_minutes} --attention {resources.attention} > {log} 2>&1"


rule train_teacher:
    input:
        backbone=backbone,
        pretrained=pretrained,
        tokens=tokens,
        folds=f"{R}/folds.parquet",
    output:
        adapter=directory(f"{R}/adapters/{{judge}}/fold_{{fold}}"),
    log:
        f"{R}/logs/train_teacher/{{judge}}_fold_{{fold}}.log",
    benchmark:
        f"{R}/benchmarks/train_teacher/{{judge}}_fold_{{fold}}.tsv"
    wildcard_constraints:
        judge=one_of(TEACHERS),
    conda:
        "../envs/arena.yaml"
    threads: compute("threads")
    resources:
        gpu=compute("gpus"),
        gpu_model=gpu_model,
        devices=compute("gpus"),
        mem_mb=growing("mem_mb"),
        disk_mb=growing("disk_mb"),
        runtime=growing("runtime"),
        micro_batch_size=compute("micro_batch_size"),
        gradient_checkpointing=compute("gradient_checkpointing"),
        fsdp=compute("fsdp"),
        checkpoint_minutes=compute("checkpoint_minutes"),
        attention=compute("attention"),
    params:
        settings=settings_of(phase.TrainingSettings),
        checkpoints=checkpoints,
        pretrained=lambda wildcards, input: (
            ["--pretrained", input.pretrained] if input.pretrained else []
        ),
        teacher_logits=lambda wildcards, input: input.get("teacher_logits", []),
    message:
        f"Training teacher {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
    shell:
        "arena train-fold --backbone {input.backbone} {params.pretrained:q}"
        " --tokens {input.tokens} --folds {input.folds} --fold {wildcards.fold}"
        " --output {output.adapter} --settings {params.settings:q}"
        " --micro-batch-size {resources.micro_batch_size}"
        " --gradient-checkpointing {resources.gradient_checkpointing}"
        " --gpus {resources.devices} --fsdp {resources.fsdp} --checkpoints {params.checkpoints:q}"
        " --checkpoint-minutes {resources.checkpoint_minutes} --attention {resources.attention}"
        " {params.teacher_logits:q} > {log} 2>&1"


use rule train_teacher as distill_student with:
    input:
        backbone=backbone,
        pretrained=pretrained,
        tokens=tokens,
        folds=f"{R}/folds.parquet",
        teacher_logits=teacher_logits,
        teacher_states=teacher_states,
    output:
        adapter=directory(f"{R}/adapters/{{judge}}/fold_{{fold}}"),
    log:
        f"{R}/logs/distill_student/{{judge}}_fold_{{fold}}.log",
    benchmark:
        f"{R}/benchmarks/distill_student/{{judge}}_fold_{{fold}}.tsv"
    wildcard_constraints:
        judge=one_of(STUDENTS),
    message:
        f"Distilling student {{wildcards.judge}}, fold {{wildcards.fold}}{ASKS}"
