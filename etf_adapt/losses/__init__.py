"""Losses: pure functions ``(logits, labels) -> scalar``, torch alone.

Read ``dot_regression`` first: regression on the vertices, and on the simplex's edges to a margin (the default).
``softmax`` holds what it is compared with, ``terms`` what they share (soft labels, priors, weights, reduction),
``registry`` the losses by name.
"""
