"""Files and numbers that a run leaves; nothing here knows models.

``run_folder``: files of an output folder, and when they may be replaced; ``claim``: which run a folder belongs to;
``prediction_files``: predictions as csv or parquet; ``best_metric``: that of the best checkpoint; ``advice``: before a run;
``tables``: scores by name and as tables; ``card``: the model card, with ``card_metadata`` (its YAML), ``figures`` (its plots)
and ``card_template.md`` (its text).
"""
