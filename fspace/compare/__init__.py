"""Which method serves my data better? Metrics, distances between posteriors as functions, studies and their report."""
