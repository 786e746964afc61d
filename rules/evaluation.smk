# Every figure of the run, and the report that shows them.
