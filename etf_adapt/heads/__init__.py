"""Classification heads, in any ``nn.Module``.

Read ``layers`` (fixed, linear, cosine and published heads; folding into a plain ``nn.Linear``), ``in_model`` (find the heads of
a model, read their features), ``alignment`` (``align_head``: set them in closed form from one pass over the training rows),
and ``training_logits`` (score each training row by the head that would have been set without it).
"""
