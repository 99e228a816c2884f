"""transformers' Trainer with our draws, losses and heads.

Read ``arguments`` and ``trainer``. Beside them: ``resumable`` and ``checkpoints`` (stopped anywhere, resumed bit for bit),
``callbacks`` (what happens around steps), ``parameters`` (what is trained), ``publishing`` (``push_to_hub``),
``feature_cache``, ``soft_labels`` (mixup, CutMix, smoothing), ``evaluation`` (predictions of each row, and calibration),
``collapse_monitor``, ``messages`` (what a person is told), ``launch`` (threads, processes).
"""
