# Backbones become ordinary model folders; battles become token ids, once per tokenizer.
include: "inputs/encoding.smk"


rule download_backbone:
    # A local rule, because it needs the network, which a cluster's nodes may not have.
    output:
        directory(RUN.backbone("{backbone}")),
    log:
        RUN.log("download_backbone/{backbone}"),
    benchmark:
        RUN.benchmark("download_backbone/{backbone}")
    wildcard_constraints:
        backbone=one_of(DOWNLOADS),
    localrule: True
    conda:
        "../envs/arena.yaml"
    resources:
        download=1,
        disk_mb=disk_of_download,
    params:
        settings=backbone_settings(DOWNLOADS),
    message:
        "Downloading backbone {wildcards.backbone} ({resources.disk_mb} MB of disk)"
    shell:
        "arena prepare-backbone --output {output:q} --settings {params.settings:q}"
        " > {log:q} 2>&1"


rule prepare_backbone:
    input:
        prepared_from,
    output:
        directory(RUN.backbone("{backbone}")),
    log:
        RUN.log("prepare_backbone/{backbone}"),
    benchmark:
        RUN.benchmark("prepare_backbone/{backbone}")
    wildcard_constraints:
        backbone=one_of(BACKBONES, but=(*DOWNLOADS, *PARTS)),
    conda:
        "../envs/arena.yaml"
    params:
        settings=backbone_settings(BACKBONES),
    message:
        "Preparing backbone {wildcards.backbone}"
    shell:
        "arena prepare-backbone {input:q} --output {output:q} --settings {params.settings:q}"
        " > {log:q} 2>&1"


use rule prepare_backbone as cut_download with:
    input:
        download_of,
    log:
        RUN.log("cut_download/{backbone}"),
    benchmark:
        RUN.benchmark("cut_download/{backbone}")
    wildcard_constraints:
        backbone=one_of(PARTS),


rule tokenize_battles:
    input:
        battles=RUN.battles,
        backbone=tokenizer,
    output:
        tokens=RUN.tokens("{tokenizer}"),
    log:
        RUN.log("tokenize_battles/{tokenizer}"),
    benchmark:
        RUN.benchmark("tokenize_battles/{tokenizer}")
    conda:
        "../envs/arena.yaml"
    params:
        settings=tokens_settings,
    message:
        "Tokenising battles with {wildcards.tokenizer}"
    shell:
        "arena tokenize-battles --battles {input.battles:q} --backbone {input.backbone:q}"
        " --output {output.tokens:q} --settings {params.settings:q} > {log:q} 2>&1"
