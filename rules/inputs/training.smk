# Inputs of rules/training.smk: adapters, targets and checkpoints.
TEACHERS = [name for name, judge in TRAINED.items() if not judge.teachers]
STUDENTS = [name for name, judge in GRAPH.judges.items() if judge.teachers]


def pretrained(wildcards):
    """The post-pretrained adapter of a judge; nothing if the judge is not post-pretrained."""
    owner = GRAPH.pretraining_owner(wildcards.judge)
    return RUN.pretrained(owner) if owner else []


def target_folds(wildcards):
    """The folds of a student's targets: all folds of its teachers (out of fold), or its own (in sample).

    A frozen student is chosen by votes of other folds, taught by their teachers.
    """
    judge = GRAPH.judges[wildcards.judge]
    choosing = judge.frozen and judge.targets == "unlabelled"
    folds = FOLDS if judge.targets == "out_of_fold" or choosing else [wildcards.fold]
    return [(teacher, fold) for teacher in judge.teachers for fold in folds]


def teacher_logits(wildcards):
    return [RUN.logits(teacher, fold) for teacher, fold in target_folds(wildcards)]


def teacher_states(wildcards):
    """The hidden states of the same folds, if the student's loss reads them."""
    if not GRAPH.judges[wildcards.judge].loss.states():
        return []
    return [layout.states(path) for path in teacher_logits(wildcards)]


def learned_from(wildcards, input):
    """The adapter and the targets of a training job, as options."""
    options = as_options("pretrained")(wildcards, input)
    files = input.get("teacher_logits", [])
    for (teacher, _), file in zip(target_folds(wildcards), files, strict=True):
        options += ["--teacher-logits", f"{teacher}={file}"]
    return options


def checkpoints(wildcards, output):
    """The folder of a training's checkpoints. It is no output: Snakemake deletes those of a failed job."""
    adapter = Path(output.adapter)  # this path has a module's prefix
    run = layout.Layout(str(adapter.parents[2]))
    return run.checkpoints(wildcards.judge, adapter.name)
