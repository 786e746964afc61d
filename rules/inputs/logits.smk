# Inputs of rules/logits.smk: shards and hidden states of a fold.
SHARDED = [name for name, judge in TRAINED.items() if judge.logits.shards > 1]
WHOLE = [name for name in TRAINED if name not in (*SHARDED, *FROZEN)]
CAPTURED = [name for name in GRAPH.judges if GRAPH.states_of(name)]


def shards(wildcards):
    """The shards of a fold's logits."""
    count = GRAPH.judges[wildcards.judge].logits.shards
    return [RUN.shard(wildcards.judge, wildcards.fold, number) for number in range(count)]


def shard_states(wildcards):
    """The hidden states of these parts."""
    return [layout.states(path) for path in shards(wildcards)]


def shard(wildcards):
    """The shard of a scoring job, as options."""
    if not hasattr(wildcards, "shard"):
        return ""
    count = GRAPH.judges[wildcards.judge].logits.shards
    return f"--shard {wildcards.shard} --shards {count}"


LOGITS, SHARD = RUN.logits("{judge}", "{fold}"), RUN.shard("{judge}", "{fold}", "{shard}")
