"""Geometry of the simplex and of class means: pure functions of tensors, torch alone.

Read in this order: ``simplex`` (the vertices, and the cosines of logits with them), ``statistics`` (class counts, sums and
second moment), ``frames`` (class vectors in closed form from these), ``leave_one_out`` (the same closed form without one
example at a time, and the penalty chosen by it).
"""
