"""`report.html`: a page about a run, from its folder alone."""
