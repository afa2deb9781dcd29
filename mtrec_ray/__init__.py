"""mtrec_ray: from an interaction log to an autoscaling multi-task recommender on Ray."""

__version__ = "0.1.0"
