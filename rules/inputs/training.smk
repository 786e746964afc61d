# Inputs of rules/training.smk: what a judge learns from, and where its checkpoints go.
TEACHERS = [name for name, judge in TRAINED.items() if not judge.teachers]
STUDENTS = [name for name, judge in GRAPH.judges.items() if judge.teachers]


def pretrained(wildcards):
    """The post-pretrained adapter a judge starts from; nothing where it starts from its backbone."""
    owner = GRAPH.pretraining_owner(wildcards.judge)
    return RUN.pretrained(owner) if owner else []


def target_folds(wildcards):
    """A student's targets: every fold of its teachers (out of fold), or its own fold (in sample)."""
    judge = GRAPH.judges[wildcards.judge]
    folds = FOLDS if judge.targets == "out_of_fold" else [wildcards.fold]
    return [(teacher, fold) for teacher in judge.teachers for fold in folds]


def teacher_logits(wildcards):
    return [RUN.logits(teacher, fold) for teacher, fold in target_folds(wildcards)]


def teacher_states(wildcards):
    """The hidden states beside them, where the student's loss reads them."""
    if not GRAPH.judges[wildcards.judge].loss.states():
        return []
    return [layout.states(path) for path in teacher_logits(wildcards)]


def learned_from(wildcards, input):
    """The adapter and the targets that a job starts from, as options."""
    options = as_options("pretrained")(wildcards, input)
    files = input.get("teacher_logits", [])
    for (teacher, _), file in zip(target_folds(wildcards), files, strict=True):
        options += ["--teacher-logits", f"{teacher}={file}"]
    return options


def checkpoints(wildcards, output):
    """Where a training's checkpoints go: Snakemake deletes the outputs of a job that fails."""
    adapter = Path(output.adapter)  # with a module's prefix
    run = layout.Layout(str(adapter.parents[2]))
    return run.checkpoints(wildcards.judge, adapter.name)
