"""Online training with token credit: token rewards -> advantages -> the loss of a policy.

Pure functions of tensors. They know neither a model nor a trainer.
"""
