"""Online training with token credit: token rewards -> advantages -> the loss of a policy.

Pure functions of tensors. They know neither a model nor a trainer.
"""
BASELINES = {"group": 0, "rloo": 0, "process": 0, "tokens": 0, "none": 0}
SCALES = {"group": 0, "batch": 0, "tokens": 0, "none": 0}
at_end = ngram_units = perplexity_units = random_ngram_units = token_advantages = with_kl = None
