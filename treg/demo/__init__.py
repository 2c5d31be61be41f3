"""A small world with known truth and a tiny chat model of it, on which token rewards can be
checked.
"""
