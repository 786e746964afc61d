# Inputs of rules/stacks.smk: the members of stacks.
def members(wildcards):
    return STACKS[wildcards.judge].judges


def surface_of(wildcards):
    """The trees' predictions, if they are a member."""
    return RUN.surface if STACKS[wildcards.judge].surface else []


def battles_of_trees(wildcards):
    """The battles that a fold's trees learn and predict."""
    return RUN.battles if STACKS[wildcards.judge].surface else []


def trees_of(wildcards):
    """The trees themselves, if they are a member."""
    return RUN.trees if STACKS[wildcards.judge].surface else []


def members_folds(wildcards):
    return [RUN.logits(member, fold) for member in members(wildcards) for fold in FOLDS]


def members_fold(wildcards):
    return [RUN.logits(member, wildcards.fold) for member in members(wildcards)]


def by_member(wildcards, input):
    """The logits of every fold, each with the name of its judge."""
    return named([member for member in members(wildcards) for _ in FOLDS], input.logits)


def members_models(logits, model=None):
    """The members' final scores, or folders, of quantised models where there are some and these are asked for.

    `model` is merged or gptq; by default the wildcard of this name.
    """

    def files(wildcards):
        quantized = (model or wildcards.get("model")) == "gptq"
        return [
            logits(member, "gptq" if quantized and CONFIG.is_quantized(member) else "merged")
            for member in members(wildcards)
        ]

    return files
