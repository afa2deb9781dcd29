"""Domain pre-training: a language model goes on learning on the run's own texts. Only trainer.py knows Ray."""
