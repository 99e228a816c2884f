"""Files and numbers that a run leaves; nothing here knows models.

``run_folder``: the files of an output folder, and what may be written there; ``tables``: scores by name and as tables for
a terminal; ``card``: the model card, with ``card_metadata`` (its head for the Hub), ``figures`` (its plots) and
``card_template.md`` (its text).
"""
