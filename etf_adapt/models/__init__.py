"""Models of timm, transformers and peft: the only folder that knows how these libraries lay out models and their files.

Read ``names`` (what a name stands for), ``swap`` (find, replace and restore the head of any model), ``stock_subclass`` and
``etf_model`` (what is added to the stock class), ``auto`` (``ETFForImageClassification.from_pretrained``). On disk:
``folders``, ``timm_layout``, ``weights``; ``digests``, ``weight_files``. Aside: ``pooling`` (where no stock class reads the
features well), ``adapters`` (LoRA), ``image_size``, ``positions`` (of texts), ``quantization``.
"""
