"""Data sets for classification in one form.

Read ``load`` first (``load_data``): it opens a source (or the embedded ``digits``), and cuts it (``long_tail``, ``splits``);
``overview`` says in words what was taken. ``sampler`` draws each class by its share: that of its rows, or the same for all.
``transforms`` and ``image_dataset`` make batches of images, ``text`` of texts, ``batches`` of anything; ``inputs`` streams
what has no labels. ``progress`` is for loops that may take long.
"""
