# Inputs of rules/frozen.smk: features, which judges that read the same share.
FITTING = job_of(lambda wildcards: 0)


def features(wildcards):
    return RUN.features(GRAPH.features_owner(wildcards.judge))
