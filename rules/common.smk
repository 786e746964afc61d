# What all rules share: the validated configuration, the layout of the run, how a job starts.
import functools
import shlex
import signal
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

# The package is found from this file, because in a module `workflow.basedir` is another repository. If
# Snakemake fetches the rules by `github(...)`, the package has to be installed.
HERE = workflow.current_basedir
CHECKOUT = Path(HERE).parent if isinstance(HERE, os.PathLike) else None
if CHECKOUT:
    sys.path.insert(0, str(CHECKOUT / "workflow"))

from arena_distill import layout
from arena_distill.config import checks, derived, run
from arena_distill.config.phases.settings import VERSIONS, Settings
from arena_distill.errors import InputError

try:
    CONFIG = run.load(config, workflow.configfiles)
except InputError as error:
    raise WorkflowError(str(error))

# Judges that studies derive from those of the run are nodes of the same graph; `all` needs none of them.
FAMILY = derived.JudgeFamily(dict(CONFIG.judges))
STUDIES = derived.derive(CONFIG, config, FAMILY)
GRAPH = CONFIG.with_judges(FAMILY.judges)

RUN = layout.Layout(f"{CONFIG.results}/{CONFIG.run}")
FOLDS = range(CONFIG.folds.n)
TRAINED = {name: judge for name, judge in GRAPH.judges.items() if judge.backbone}
EXTERNAL = {name: judge.external for name, judge in GRAPH.judges.items() if judge.external}
STACKS = {name: judge.stack for name, judge in GRAPH.judges.items() if judge.stack}
FROZEN = [name for name, judge in TRAINED.items() if judge.frozen]
TOKENIZERS = {name: GRAPH.tokenizer_name(name) for name in TRAINED}
BACKBONES = {GRAPH.backbone_name(name): judge.backbone for name, judge in TRAINED.items()}
MODELS = ["merged", "gptq"] if CONFIG.is_quantized(CONFIG.final) else ["merged"]
DOWNLOADS = {GRAPH.download_name(b): b.download() for b in BACKBONES.values() if b.download()}


def one_of(names, but=()):
    return "|".join(re.escape(name) for name in names if name not in but) or "(?!)"


wildcard_constraints:
    judge=one_of(GRAPH.judges),
    tokenizer=one_of(set(TOKENIZERS.values())),
    backbone=one_of({**BACKBONES, **DOWNLOADS}),
    fold=r"\d+",
    shard=r"\d+",


# --- how a job starts -------------------------------------------------------------------------------

# Before a time limit Slurm sends SIGUSR1 (slurm/config.yaml) to every process of the job. The training
# handles it. The Snakemake inside the job must ignore it.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)


DEPLOYED_BY = {str(method) for method in workflow.deployment_settings.deployment_method}
IN_IMAGE = "apptainer" in DEPLOYED_BY and CONFIG.environments.container is not None


def interpreter(path):
    """The interpreter from the configuration, or with --sdm that of the conda environment or the image."""
    if "conda" in DEPLOYED_BY:
        return "python"
    if IN_IMAGE:
        return CONFIG.environments.in_image(path)
    if path is None:
        return sys.executable
    return path if Path(path).is_absolute() else str((CHECKOUT or Path.cwd()) / path)


class shell(shell):
    """Snakemake's `shell` with a prefix for these rules alone: Snakemake shares one among all modules."""


def runs_in(environment):
    """The start of a job's command.

    `exec` replaces the shell, so that signals reach the job. Stdin is empty: neither the terminal nor `yes |`
    can answer a question from a library.
    """
    return f'exec {shlex.quote(interpreter(environment))} -m arena_distill phase "$@" < /dev/null'


# `arena` runs in the main environment, `arena_gptq` in the one that quantises. Both import the package from
# this checkout, installed or not. (Snakemake formats the prefix: hence double braces.)
IMPORTS = f"export PYTHONPATH={shlex.quote(str(CHECKOUT / 'workflow'))}; " if CHECKOUT else ""
shell.prefix(
    f"set -euo pipefail; {IMPORTS}"
    f"arena() {{{{ {runs_in(CONFIG.environments.main)}; }}}}; "
    f"arena_gptq() {{{{ {runs_in(CONFIG.environments.gptq)}; }}}}; "
)


def slurm_comment(job):
    """The comment that the Slurm plugin gives a job."""
    named = "_wildcards_" + "_".join(job.wildcards) if job.wildcards else ""
    return f"rule_{job.rule.name}{named}"


# --- settings, inputs and resources of a job --------------------------------------------------------


def settings_of(phase):
    """The settings of a phase as a rule's params: its version and its own part of the configuration."""

    @functools.cache  # a judge's settings are the same in each of its folds and shards
    def of_judge(judge):
        return (phase.of(GRAPH, judge) if judge else phase.of(CONFIG)).as_params()

    return lambda wildcards: of_judge(getattr(wildcards, "judge", None))


def version_of(name):
    """The settings of a phase that reads no key of the configuration: only its version."""
    return lambda wildcards: Settings(version=VERSIONS[name]).as_params()


def named(names, files):
    """Files as arguments of a command, each with the name of what it is of."""
    return [f"{name}={file}" for name, file in zip(names, files, strict=True)]


def as_options(*names):
    """The named inputs that a job has, as options of its command, in a rule's params."""

    def of_job(wildcards, input):
        options = []
        for name in names:
            files = input.get(name, [])
            for file in [files] if isinstance(files, str) else files:
                options += [f"--{name.replace('_', '-')}", str(file)]
        return options

    return of_job


CARRIED = bool(workflow.storage_settings and workflow.storage_settings.default_storage_provider)


def carried_ids(logits):
    """The ids of logits, as inputs, where a storage carries the files of a job: elsewhere they lie beside.

    `logits` is what the rule's input of this name is.
    """

    def of_job(wildcards):
        given = logits(wildcards) if callable(logits) else logits
        files = [given] if isinstance(given, str) else given
        return [layout.ids(file.format(**wildcards)) for file in files if CARRIED]

    return of_job


@functools.cache
def findings():
    """Everything that will fail; files that a rule makes, here or in an outer workflow, are not checked."""
    made = lambda path: any(rule.is_producer(path) for rule in workflow.rules)
    # What an image has is seen by no check from outside.
    return checks.findings(CONFIG, made, (lambda path: "python") if IN_IMAGE else interpreter)


def check(path):
    """Refuse a path of the configuration with which a job would fail, even if an earlier run left the outputs.

    Only runs and dry runs check this: a plan and `--report` need no inputs, and for a job on another node
    Snakemake itself checks them. This function exits: Snakemake would treat an exception as a job that cannot
    run, and would accept an existing output.
    """
    if workflow.is_main_process and workflow.executor_plugin:
        if any(finding.path == path for finding in findings()):
            sys.exit("\n".join(finding.line for finding in findings()))


def existing(path):
    """A path of the configuration, as an input that was checked."""
    check(path)
    return local(path)


def models_of(wildcards):
    """The judges with a model of their own that a job runs: its judge, or all that a stack combines."""
    return [GRAPH.judges[name] for name in GRAPH.trained_parts(wildcards.judge)]


def compute(knob, together=max):
    """A `compute` key of the job's judge, for use as a resource: a changed resource reruns nothing.

    Of a stack, the keys of its members `together`.
    """

    def of_job(wildcards):
        values = [getattr(judge.compute, knob) for judge in models_of(wildcards)]
        # The types of a resource.
        return together(map(int, values)) if isinstance(values[0], int) else str(values[0])

    return of_job


def scoring_gpus(wildcards):
    """A scoring job is one process. Its number of GPUs does not depend on that of training."""
    return max(judge.scoring_gpus() for judge in models_of(wildcards))


def merging_gpus(wildcards):
    """Merging is arithmetic on the CPU; only greedy merging scores candidates, on the GPUs of scoring."""
    greedy = GRAPH.judges[wildcards.judge].merge.weights == "greedy"
    return scoring_gpus(wildcards) if greedy else 0


def quantizing_gpus(wildcards):
    """GPTQ needs one GPU: it works block by block, and the quantised model is small."""
    return min(compute("gpus")(wildcards), 1)


def job_of(gpus, *knobs):
    """The resources of a job that runs a judge. Memory, disk and time are multiplied by the attempt."""

    def growing(knob):
        return lambda wildcards, attempt: attempt * compute(knob, sum)(wildcards)

    return {
        "gpu": gpus,
        "gpu_model": lambda wildcards: compute("gpu_model")(wildcards) if gpus(wildcards) else "",
        "devices": gpus,
        **{knob: growing(knob) for knob in ("mem_mb", "disk_mb", "runtime")},
        **{knob: compute(knob) for knob in knobs},
    }


def options_of(*knobs):
    """The same keys as options of the job's command."""
    knobs = {"gpus": "devices"} | {knob.replace("_", "-"): knob for knob in knobs}
    return " ".join(f"--{option} {{resources.{knob}}}" for option, knob in knobs.items())


def training_nodes():
    """The resources of a training on several nodes: Slurm gives each as many GPUs.

    `mpi` has the job's command run beside Slurm's steps: it makes its own, with a task on each node.
    """

    def if_several(value):
        def of_job(wildcards):
            knobs = GRAPH.judges[wildcards.judge].compute
            return value(knobs) if knobs.nodes > 1 else None  # None: not a resource of this job

        return of_job

    return {
        "nodes": compute("nodes"),
        "mpi": if_several(lambda knobs: "srun"),
        "tasks": if_several(lambda knobs: knobs.nodes),
        "tasks_per_gpu": if_several(lambda knobs: 0),
        "gres": if_several(
            lambda knobs: ":".join(
                filter(None, ("gpu", knobs.gpu_model, str(knobs.gpus // knobs.nodes)))
            )
        ),
    }


def check_nodes():
    """Refuse trainings on several nodes before anything runs, if nothing here can start a process on each."""
    from arena_distill.runtime.launch import in_slurm

    if workflow.executor_plugin.name != "local" or in_slurm():
        return
    for job in workflow.dag.needrun_jobs():
        if job.resources.get("nodes", 1) > 1:
            sys.exit(
                f"config: judges.{job.wildcards.judge}.compute.nodes: {job.resources.nodes}: only Slurm starts "
                "a job on several nodes: snakemake --profile slurm, or set it to 1"
            )


LAUNCH = (
    *("micro_batch_size", "gradient_checkpointing", "fsdp", "checkpoint_minutes", "attention"),
    "report_to",
)
TRAINING = job_of(compute("gpus"), *LAUNCH) | training_nodes()
TRAINING_OPTIONS = options_of(*LAUNCH, "nodes")
SCORING = job_of(scoring_gpus, "batch_tokens", "attention")
SCORING_OPTIONS = options_of("batch_tokens", "attention")
MERGING, QUANTIZING = (job_of(gpus, "batch_tokens") for gpus in (merging_gpus, quantizing_gpus))
BATCH_OPTIONS = options_of("batch_tokens")

# The resources of a job as part of its message: `snakemake -n` prints the message in place of resources.
ASKS = " ({resources.gpu} GPUs, {resources.mem_mb} MB, {resources.disk_mb} MB of disk, {resources.runtime} min)"
