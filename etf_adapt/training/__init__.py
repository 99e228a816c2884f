"""transformers' Trainer with our sampling, losses and heads.

Read ``arguments`` (over ``settings``) and ``trainer``. The trainer stands on ``stopping`` (``signals``), ``resumable``
(``checkpoints``, publishing), ``evaluating`` (evaluate, predict) and ``aligning``; ``finishing`` is what follows a run. Beside
them: ``budget`` (batch, epochs and rate of a run that names none), ``dry_run``, ``callbacks`` (around steps), ``parameters``
(what is trained, and how fast), ``soft_labels`` (mixup, CutMix, smoothing), ``collapse_monitor``, ``messages`` (printed lines).
"""
