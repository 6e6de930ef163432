"""A run's policy as files for others: an adapter or a merged model, held against the run, with its card."""
