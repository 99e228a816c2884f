"""Classification heads, in any ``nn.Module``.

Read ``layers`` (fixed, linear, cosine and published heads; folding into a plain ``nn.Linear``), ``in_model`` (find the heads of
a model, read their features), ``alignment`` (``align_head``: set them in closed form from one pass over the training rows),
``seen_rows`` (set them again from what training reads of the rows, and without one row), and ``training_logits`` (hooks that
note what is read, and leave each training row out).
"""
