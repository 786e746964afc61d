# Targets to request by name; `all` is in the Snakefile.
include: "inputs/targets.smk"


rule folds:
    input:
        RUN.folds,


rule teachers:
    input:
        RUN.counts,
        [RUN.adapter(judge, fold) for judge in own(TEACHERS) for fold in FOLDS],


rule logits:
    input:
        RUN.counts,
        [RUN.logits(judge, fold) for judge in CONFIG.scored() for fold in FOLDS],


rule students:
    input:
        RUN.counts,
        [RUN.adapter(judge, fold) for judge in own(STUDENTS) for fold in FOLDS],


rule merged:
    input:
        RUN.counts,
        [RUN.finished(judge, "merged") for judge in {*CONFIG.deployed(), CONFIG.final}],


rule quantized:
    input:
        RUN.counts,
        [
            RUN.finished(judge, "gptq")
            for judge in {*CONFIG.deployed(), CONFIG.final}
            if CONFIG.is_quantized(judge)
        ],


rule submission:
    input:
        RUN.submission,


rule report:
    input:
        RUN.report,


rule compare:
    input:
        RUN.study("compare", "report.html"),


rule curves:
    input:
        RUN.study("curves", "curves.svg"),


rule averaging:
    input:
        RUN.study("averaging", "averaging.svg"),


rule plan:
    input:
        RUN.plan,
