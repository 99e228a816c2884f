"""Scores from predictions, and calibration from logits.

``shots``: accuracy by groups of classes (``ShotAccuracy``); ``collapse``: the measures NC1 to NC4 of neural collapse
(``NeuralCollapse``); ``calibration``: logit scale and prior adjustment, fitted on held-out logits.
"""
