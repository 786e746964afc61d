# Inputs of rules/external.smk: files, limits and stored answers of external judges.
from arena_distill.config.external import EndpointLimits

ENDPOINTS = [name for name, external in EXTERNAL.items() if external.endpoint]
FILES = [name for name in EXTERNAL if name not in ENDPOINTS]


def endpoint_limits(wildcards):
    """The limits of the requests, as JSON. They are a resource: a changed resource reruns nothing."""
    endpoint = EXTERNAL[wildcards.judge].endpoint
    return endpoint.model_dump_json(include=set(EndpointLimits.model_fields))


def answers(wildcards, output):
    """The file that stores an endpoint's answers. It outlives a failed job, so no answer is paid twice."""
    logits = Path(output.logits)  # this path has a module's prefix
    return layout.Layout(str(logits.parents[2])).answers(wildcards.judge)


def logits_file(wildcards):
    """The file with an external judge's logits."""
    return existing(EXTERNAL[wildcards.judge].file)


EXTERNAL_LOGITS = RUN.external("{judge}")
