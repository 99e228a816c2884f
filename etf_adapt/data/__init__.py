"""A data set of any source in one form, its long tail, its draws and its batches.

Read ``load`` first (``load_data``); it opens a source (``sources``, ``tables``, ``digits``), finds and reads its columns
(``columns``), and cuts it (``long_tail``, ``splits``). ``sampler`` draws each class by its share: that of its rows, or the
same for all. ``transforms`` and ``image_dataset`` make batches of images, ``text`` of texts.
"""
