# Arena Distill: from battles to a small judge.
#
#   snakemake --cores all             runs the whole graph of config/config.yaml
#   snakemake -n                      lists what would run, and why
#   snakemake --configfile X.yaml …   runs your configuration. A first file with `judges` is complete by
#                                     itself; one without (a recipe) overrides config/config.yaml
from snakemake.utils import min_version

min_version("9.0")


if "judges" not in config:

    configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "rules/common.smk"


if CONFIG.environments.container:

    container: CONFIG.environments.container


rule all:
    input:
        RUN.submission,
        RUN.metrics,
        RUN.report,
        [RUN.finished(CONFIG.final, model) for model in MODELS],


include: "rules/fetch.smk"
include: "rules/battles.smk"
include: "rules/audit.smk"
include: "rules/encoding.smk"
include: "rules/training.smk"
include: "rules/logits.smk"
include: "rules/external.smk"
include: "rules/stacks.smk"
include: "rules/calibration.smk"
include: "rules/merging.smk"
include: "rules/frozen.smk"
include: "rules/quantization.smk"
include: "rules/prediction.smk"
include: "rules/judging.smk"
include: "rules/evaluation.smk"
include: "rules/studies.smk"
include: "rules/planning.smk"
include: "rules/targets.smk"


from arena_distill.runs import cleanup


onstart:
    check_downloads()
    check_nodes()
    if workflow.executor_plugin.name == "slurm":
        cleanup.wait_for_orphans(map(slurm_comment, workflow.dag.needrun_jobs()))


onsuccess:
    cleanup.clean_up(Path(rules.read_battles.output.battles).parent)  # with a module's prefix
