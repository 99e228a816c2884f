"""Geometry of the simplex and of class means: pure functions of tensors, torch alone.

Read in this order: ``simplex`` (the vertices, and the cosines between them and centred logits), ``statistics`` (class counts,
sums and second moment), ``closed_form`` (class vectors from these, by frame: whitened, means, random),
``leave_one_out`` (the same closed form without one example at a time, by which the penalty is chosen).
"""
