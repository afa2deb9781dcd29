"""Tuning: a search space in YAML, trials that select on valid, the best configuration as YAML.

The space, the records and the page know no Ray; `search` is the adapter to Ray Tune, `job` is what `jobs.tune` calls.
"""
