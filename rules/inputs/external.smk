# Inputs of rules/external.smk: external judges: their files, limits and kept answers.
from arena_distill.config.external import EndpointLimits

ENDPOINTS = [name for name, external in EXTERNAL.items() if external.endpoint]
FILES = [name for name in EXTERNAL if name not in ENDPOINTS]


def endpoint_limits(wildcards):
    """The limits of the requests, as JSON. As a resource it reruns nothing when it changes."""
    endpoint = EXTERNAL[wildcards.judge].endpoint
    return endpoint.model_dump_json(include=set(EndpointLimits.model_fields))


def answers(wildcards, output):
    """Where an endpoint's answers are kept: whatever happens to the job, they are paid for once."""
    logits = Path(output.logits)  # with a module's prefix
    return layout.Layout(str(logits.parents[2])).answers(wildcards.judge)


def logits_file(wildcards):
    """The file with an external judge's logits."""
    return existing(EXTERNAL[wildcards.judge].file)


EXTERNAL_LOGITS = RUN.external("{judge}")
