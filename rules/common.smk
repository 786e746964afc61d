# What all rules share: the validated configuration, where files lie, how a job is started.
import functools
import json
import shlex
import signal
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.io import expand

# Found from this file: where the workflow is a module, `workflow.basedir` is another repository. There is
# none where Snakemake fetches the rules by `github(...)`: then the package has to be installed.
HERE = workflow.current_basedir
CHECKOUT = Path(HERE).parent if isinstance(HERE, os.PathLike) else None
if CHECKOUT:
    sys.path.insert(0, str(CHECKOUT / "workflow"))

from arena_distill.config import derived, run
from arena_distill.config import phases as phase
from arena_distill.config.judge import TINY, Traffic
from arena_distill.config.phases import VERSIONS
from arena_distill.errors import InputError
from arena_distill.runs import cleanup

try:
    CONFIG = run.load(config)
except InputError as error:
    raise WorkflowError(str(error))

# Judges that studies derive from the run's own are nodes of the same graph; `all` asks for none of them.
FAMILY = derived.Family(dict(CONFIG.judges))
STUDIES = derived.derive(CONFIG, config, FAMILY)
GRAPH = CONFIG.with_judges(FAMILY.judges)

R = f"{CONFIG.results}/{CONFIG.run}"
SOURCES = CONFIG.data.sources()
FOLDS = range(CONFIG.folds.n)
TRAINED = {name: judge for name, judge in GRAPH.judges.items() if not judge.external}
EXTERNAL = {name: judge.external for name, judge in GRAPH.judges.items() if judge.external}
ASKED = [name for name, external in EXTERNAL.items() if external.endpoint]
TEACHERS = [name for name, judge in TRAINED.items() if not judge.teachers]
STUDENTS = [name for name, judge in GRAPH.judges.items() if judge.teachers]
SHARDED = [name for name, judge in TRAINED.items() if judge.logits.shards > 1]
WHOLE = [name for name in TRAINED if name not in SHARDED]
WATCHED = [name for name in GRAPH.judges if GRAPH.states_of(name)]
TOKENIZERS = {name: GRAPH.tokenizer_name(name) for name in TRAINED}
BACKBONES = {GRAPH.backbone_name(name): judge.backbone for name, judge in TRAINED.items()}
DOWNLOADS = {GRAPH.download_name(b): b.download() for b in BACKBONES.values() if b.download()}
PARTS = [name for name, b in BACKBONES.items() if b.download() and name not in DOWNLOADS]
FETCHED = CONFIG.data.fetch
MODELS = ["merged", "gptq"] if CONFIG.judges[CONFIG.final].quantization else ["merged"]


def one_of(names, but=()):
    return "|".join(re.escape(name) for name in names if name not in but) or "(?!)"


def own(judges):
    """Those of the run itself, without what studies derive from them."""
    return [judge for judge in judges if judge in CONFIG.judges]


wildcard_constraints:
    judge=one_of(GRAPH.judges),
    tokenizer=one_of(set(TOKENIZERS.values())),
    backbone=one_of({**BACKBONES, **DOWNLOADS}),
    fold=r"\d+",
    shard=r"\d+",


# Slurm warns of a time limit by SIGUSR1 (slurm/config.yaml), and warns every process of the job. The
# training heeds it; this Snakemake, which started it there, must not die of it.
signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# --- how a job is started ---------------------------------------------------------------------------


def interpreter(path):
    """An interpreter of the configuration; inside a conda environment (--sdm conda) its own."""
    if "conda" in {str(method) for method in workflow.deployment_settings.deployment_method}:
        return "python"
    if path is None:
        return sys.executable
    return path if Path(path).is_absolute() else str((CHECKOUT or Path.cwd()) / path)


class shell(shell):
    """Snakemake's, for these rules alone: its own prefix is one for all modules and who uses them."""


# Jobs call `arena` in the main environment, `arena_gptq` in the one that quantises, and import
# the package from this checkout, installed or not. They take the shell's place, so that a signal to
# the job reaches them. (Snakemake formats the prefix: hence double braces.)
IMPORTS = f"export PYTHONPATH={shlex.quote(str(CHECKOUT / 'workflow'))}; " if CHECKOUT else ""
shell.prefix(
    f"set -euo pipefail; {IMPORTS}"
    f'arena() {{{{ exec {shlex.quote(interpreter(CONFIG.environments.main))} -m arena_distill "$@"; }}}}; '
    f'arena_gptq() {{{{ exec {shlex.quote(interpreter(CONFIG.environments.gptq))} -m arena_distill "$@"; }}}}; '
)


def settings_of(phase):
    """A phase's settings for a rule's params: its version and its own part of the configuration."""

    @functools.cache  # a judge's settings are the same in each of its folds and shards
    def of_judge(judge):
        return (phase.of(GRAPH, judge) if judge else phase.of(CONFIG)).model_dump_json()

    return lambda wildcards: of_judge(getattr(wildcards, "judge", None))


def compute(key):
    """An operational knob of the job's judge. As a resource it reruns nothing when it changes."""

    def of_job(wildcards):
        value = getattr(GRAPH.judges[wildcards.judge].compute, key)
        return int(value) if isinstance(value, int) else str(value)  # all that a resource may be

    return of_job


def growing(key):
    """A knob of which every further attempt gets as much again: it may have been too little."""
    return lambda wildcards, attempt: attempt * compute(key)(wildcards)


# What a job asks for, for its message: `snakemake -n` shows that in the place of resources.
ASKS = " ({resources.gpu} GPUs, {resources.mem_mb} MB, {resources.disk_mb} MB of disk, {resources.runtime} min)"


def gpu_model(wildcards):
    """The cluster's name of the GPU, for a job that has one."""
    return compute("gpu_model")(wildcards) if compute("gpus")(wildcards) else ""


def checkpoints(wildcards, output):
    """Where a training's checkpoints go: Snakemake deletes the outputs of a job that fails."""
    adapter = Path(output.adapter)
    return str(adapter.parents[2] / ".checkpoints" / wildcards.judge / adapter.name)


def answers(wildcards, output):
    """Where an endpoint's answers are kept: whatever becomes of the job, they are paid for once."""
    logits = Path(output.logits)
    return str(logits.parents[2] / ".cache" / wildcards.judge)


def traffic(wildcards):
    """How an endpoint is asked, as JSON. As a resource it reruns nothing when it changes."""
    endpoint = EXTERNAL[wildcards.judge].endpoint
    return endpoint.model_dump_json(include=set(Traffic.model_fields))


def raw_configuration(wildcards):
    """The configuration as it was read, as JSON: a file that stands alone."""
    return json.dumps(config)


# --- studies ----------------------------------------------------------------------------------------


def study_settings(phase):
    return lambda wildcards: phase.of(GRAPH, STUDIES).model_dump_json()


def compared_files(wildcards):
    """What the comparison reads of every judge in it."""
    if STUDIES.problem:
        raise WorkflowError(STUDIES.problem)
    judges = list(dict.fromkeys(entry.folds for entry in STUDIES.compared))
    trained = [judge for judge in judges if judge in TRAINED]
    tested = list(dict.fromkeys(entry.judge for entry in STUDIES.compared if entry.tested))
    solution = labelled_test(wildcards)
    return [
        *expand(f"{R}/logits/{{judge}}/fold_{{fold}}.npy", judge=judges, fold=FOLDS),
        *expand(f"{R}/adapters/{{judge}}/fold_{{fold}}", judge=trained, fold=FOLDS),
        *expand(f"{R}/merged/{{judge}}", judge=tested),
        *(expand(f"{R}/logits/{{judge}}/merged_test.npy", judge=tested) if solution else []),
    ]


def curve_files(wildcards):
    """What learning curves read: every point's folds."""
    judges = [judge for points in STUDIES.curves.values() for judge in points.values()]
    folds = range(min(CONFIG.studies.curve_folds, CONFIG.folds.n))
    return [
        *expand(f"{R}/logits/{{judge}}/fold_{{fold}}.npy", judge=judges, fold=folds),
        *expand(f"{R}/adapters/{{judge}}/fold_{{fold}}", judge=judges, fold=folds),
    ]


def slurm_comment(job):
    """What the Slurm plugin calls a job."""
    named = "_wildcards_" + "_".join(job.wildcards) if job.wildcards else ""
    return f"rule_{job.rule.name}{named}"


# --- where files lie --------------------------------------------------------------------------------
#
# A module's prefix moves all that this workflow makes. What the configuration names, and what ships with
# the workflow, is `local`: it stays where it is.


def battle_files(source):
    """The files of a source: the configuration's, or the simulated arena's."""
    if CONFIG.data.arena:
        return [f"{R}/arena/{source}.csv"] if source in SOURCES else []
    return [local(file) for file in getattr(CONFIG.data, source)]


def labelled_test(wildcards):
    """What the test predictions are scored by, where the votes are known."""
    if CONFIG.data.arena:
        return [f"{R}/arena/test_solution.csv"]
    return [local(CONFIG.data.solution)] if CONFIG.data.solution else []


@functools.cache
def backbone_folder(judge):
    """A judge's backbone: a folder that is there, or one that `prepare_backbone` makes."""
    backbone = GRAPH.backbone_of(judge)
    if not backbone.is_ready_folder():
        return f"{R}/backbones/{GRAPH.backbone_name(judge)}"
    if backbone.tiny:
        return local(f"{os.path.relpath(TINY / backbone.tiny)}/config.json")
    return local(f"{backbone.path}/config.json")


def download_of(wildcards):
    """The whole model on the hub, of which a backbone is a part."""
    return f"{R}/backbones/{GRAPH.download_name(BACKBONES[wildcards.backbone])}"


def disk_of_download(wildcards, attempt):
    """A backbone is as large as the judges above it say that their jobs' files are."""
    wanted = DOWNLOADS[wildcards.backbone]
    judges = [judge for judge in TRAINED.values() if judge.backbone.download() == wanted]
    return attempt * max(judge.compute.disk_mb for judge in judges)


def check_downloads():
    """Before anything is spent: can be fetched what this run needs and has not?"""
    needed = [job.wildcards for job in workflow.dag.needrun_jobs() if job.resources.get("download")]
    if needed:
        from arena_distill.battles import fetching

        origins = [FETCHED[w.file] for w in needed if w.get("file")]
        backbones = [DOWNLOADS[w.backbone] for w in needed if w.get("backbone")]
        try:
            fetching.check_access(origins, backbones)
        except InputError as error:
            raise WorkflowError(str(error))


def backbone(wildcards):
    return backbone_folder(wildcards.judge)


def tokenizer(wildcards):
    owners = (judge for judge, name in TOKENIZERS.items() if name == wildcards.tokenizer)
    return backbone_folder(next(owners))


def tokens(wildcards):
    return f"{R}/tokens/{TOKENIZERS[wildcards.judge]}/battles.parquet"


def judged(wildcards):
    """The file in which an external judge's logits come."""
    return local(EXTERNAL[wildcards.judge].file)


def pretrained(wildcards):
    """The post-pretrained adapter a judge starts from; nothing where it starts from its backbone."""
    owner = GRAPH.pretraining_owner(wildcards.judge)
    return f"{R}/adapters/{owner}/pretrained" if owner else []


def options_of(*names):
    """A parameter: `--name file` for each of these inputs that there is."""
    return lambda wildcards, input: [
        word for name in names if input.get(name) for word in (f"--{name}", str(input.get(name)))
    ]


def calibration(wildcards):
    """What the test predictions of a judge are calibrated by, where they are to be."""
    if CONFIG.prediction.calibration == "none":
        return {}
    return {
        "calibration": f"{R}/calibration/{wildcards.judge}.json",
        "battles": f"{R}/battles.parquet",
    }


def folds_of(judge):
    """The judge whose folds are merged: a study's may differ from another in how they are merged alone."""
    return judge if judge in CONFIG.judges else FAMILY.trained_as(judge)


def fold_adapters(wildcards):
    return [f"{R}/adapters/{folds_of(wildcards.judge)}/fold_{fold}" for fold in FOLDS]


def fold_logits(wildcards):
    return [f"{R}/logits/{folds_of(wildcards.judge)}/fold_{fold}.npy" for fold in FOLDS]


def merge_evidence(wildcards):
    """What decides how much each fold counts in the merged model, by option."""
    weights = GRAPH.judges[wildcards.judge].merge.weights
    if weights == "validation":
        return {"folds": f"{R}/folds.parquet", "logits": fold_logits(wildcards)}
    if weights == "greedy":
        return {"folds": f"{R}/folds.parquet", "tokens": tokens(wildcards)}
    return {}


def scoring_gpus(wildcards):
    """A scoring job is one process: it takes what its judge needs, however many train it."""
    return GRAPH.judges[wildcards.judge].scoring_gpus()


def merging_gpus(wildcards):
    """Merging is arithmetic on the host, unless candidates are scored to choose among them."""
    greedy = GRAPH.judges[wildcards.judge].merge.weights == "greedy"
    return scoring_gpus(wildcards) if greedy else 0


def quantizing_gpus(wildcards):
    """GPTQ goes through a model block by block, and what it leaves is small: one GPU."""
    return min(compute("gpus")(wildcards), 1)


def as_options(*names):
    """The named inputs of a job that it has, as options of its command."""

    def files(given):
        return [given] if isinstance(given, str) else given

    def of_job(wildcards, input):
        return [
            part
            for name in names
            for file in files(input.get(name, []))
            for part in (f"--{name}", str(file))
        ]

    return of_job


def shards(wildcards):
    """The parts of a fold's logits."""
    folder = f"{R}/shards/{wildcards.judge}/fold_{wildcards.fold}"
    return [f"{folder}/{n}.npy" for n in range(GRAPH.judges[wildcards.judge].logits.shards)]


def shard_states(wildcards):
    """What lies beside the parts, where students ask for it."""
    return [path.removesuffix(".npy") + ".states" for path in shards(wildcards)]


def shard(wildcards):
    """Which part a scoring job does, as options."""
    if not hasattr(wildcards, "shard"):
        return ""
    n = GRAPH.judges[wildcards.judge].logits.shards
    return f"--shard {wildcards.shard} --shards {n}"


def teacher_logits(wildcards):
    """A student's targets: every fold of its teachers (out of fold), or its own fold (in sample)."""
    judge = GRAPH.judges[wildcards.judge]
    folds = FOLDS if judge.targets == "out_of_fold" else [wildcards.fold]
    return [f"{R}/logits/{teacher}/fold_{fold}.npy" for teacher in judge.teachers for fold in folds]


def teacher_states(wildcards):
    """What lies beside them, where the student's loss reads it."""
    if not GRAPH.judges[wildcards.judge].loss.states():
        return []
    return [path.removesuffix(".npy") + ".states" for path in teacher_logits(wildcards)]
