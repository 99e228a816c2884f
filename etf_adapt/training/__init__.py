"""transformers' Trainer with our sampling, losses and heads.

Read ``arguments`` and ``trainer``. Beside them: ``resumable`` (stopping, resuming, publishing) over ``checkpoints`` and
``early_stopping``, ``callbacks`` (around steps), ``parameters`` (what is trained), ``soft_labels`` (mixup, CutMix, smoothing),
``evaluation`` (predictions of each row; calibration), ``collapse_monitor``, ``messages`` (printed lines), ``launch`` (threads,
processes).
"""
