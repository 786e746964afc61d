# Inputs of rules/quantization.smk: the merged model.
def dense_model(wildcards):
    """The model to quantise, for which the second environment has to be there."""
    check(CONFIG.environments.gptq)
    return RUN.weights(wildcards.judge, "merged")
