"""Losses: pure functions ``(logits, labels) -> scalar`` (a value for each row on request), torch alone.

Read ``dot_regression`` first: regression on the vertices, and of the label's margin over its rivals (the default).
``softmax`` holds what it is compared with, ``terms`` what they share (soft labels, priors, weights, reduction),
``registry`` the losses by name.
"""
