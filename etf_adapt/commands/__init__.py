"""What a person types: ``etf-adapt NAME``, ``python -m etf_adapt NAME``, ``accelerate launch -m etf_adapt NAME``.

Read ``finetune``, the method from flags to a finished folder; ``main`` is the table of commands. ``finetune_arguments`` are
its flags (``flags``: as people type them; ``dataclass_parser``; ``help``: their text), ``output_folder`` is where its result
goes. ``predict``, ``evaluate`` and ``publish`` take what it leaves, ``refit`` and ``extend`` change its head; ``parser`` is
theirs. Nothing heavy is imported before the arguments are checked.
"""
