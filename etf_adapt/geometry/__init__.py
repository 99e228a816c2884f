"""Geometry of the simplex and of class means: pure functions of tensors, torch alone.

Read in this order: ``simplex`` (the vertices, and the cosines of logits with them), ``statistics`` (class counts, sums and
second moment: all that a closed form needs), ``frames`` (class vectors in closed form), ``leave_one_out`` (the same, each
row scored without itself, and the penalty chosen by it).
"""
