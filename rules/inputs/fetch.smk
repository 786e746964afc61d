# Inputs of rules/fetch.smk: files to fetch.
FETCHED = {
    str(Path(source.path)): source
    for sources in CONFIG.sources().values()
    for source in sources
    if source.is_remote
}


def check_downloads():
    """Report all files and models that this run needs and cannot fetch, before the first job."""
    needed = [job.wildcards for job in workflow.dag.needrun_jobs() if job.resources.get("download")]
    if needed:
        from arena_distill.battles import fetching

        origins = [FETCHED[w.file] for w in needed if w.get("file")]
        backbones = [DOWNLOADS[w.backbone] for w in needed if w.get("backbone")]
        try:
            fetching.check_access(origins, backbones)
        except InputError as error:
            raise WorkflowError(str(error))
