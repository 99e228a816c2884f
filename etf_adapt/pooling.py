"""Text classifiers on the mean of the tokens, for encoders that were trained so; in sentence-transformers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

from etf_adapt.folders import ENTRY, HUB_OPTIONS, read_weights
from etf_adapt.state_dict import convert_state_dict, find_missing

POOLINGS = ("stock", "mean")
"""What makes one feature of a text's tokens: what the stock class has, or their mean."""

_MODULES = ("Transformer", "Pooling", "Dense")
_POOLING_FOLDER, _DENSE_FOLDER = "1_Pooling", "2_Dense"
_TINY = 1e-9


class MeanPoolingForSequenceClassification(PreTrainedModel):
    r"""A text encoder, the mean of what it makes of the tokens, and a linear layer.

    .. math:: h = \frac{\sum_t a_t\, z_t}{\sum_t a_t}, \qquad u = W h + b

    with :math:`z_t` the encoder's last hidden state at token t and :math:`a_t` its attention mask: the sentence embedding of
    Reimers and Gurevych. Stock classification classes of most encoders read the first token instead, many through a layer
    and a hyperbolic tangent that a sentence encoder was not trained with. A pooler that the encoder brings along is kept as
    it is, not trained.

    Args:
        config: The encoder's, with ``num_labels``.
        encoder: The encoder; a random one of that configuration where None.

    References:
        Reimers, Gurevych (2019). Sentence-BERT. https://arxiv.org/abs/1908.10084

    Example:
        >>> import torch
        >>> from transformers import BertConfig
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = MeanPoolingForSequenceClassification(BertConfig(**sizes, vocab_size=20, num_labels=3)).eval()
        >>> texts = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
        >>> alone = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}
        >>> torch.allclose(model(**texts).logits, model(**alone).logits, atol=1e-6)  # padding does not matter
        True
    """

    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the encoder has resolved it for both

    def __init__(self, config: PreTrainedConfig, encoder: PreTrainedModel | None = None) -> None:
        encoder = AutoModel.from_config(deepcopy(config)) if encoder is None else encoder
        if encoder.config.is_encoder_decoder:
            raise ValueError(
                f"A {encoder.config.model_type!r} model has an encoder and a decoder, of which none is read by the mean of its "
                "tokens: use pooling='stock'."
            )
        super().__init__(encoder.config)
        self.num_labels = encoder.config.num_labels
        self.encoder = encoder
        self.classifier = nn.Linear(cast(Any, encoder.config).hidden_size, cast(int, self.num_labels)).to(
            encoder.device, encoder.dtype
        )
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits (batch, num_labels) of texts (batch, tokens); the loss as well where there are labels (batch,)."""
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        named |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in named.items() if value is not None}
        states = self.encoder(**given, **{**kwargs, "return_dict": True})
        tokens = states.last_hidden_state
        mask = tokens.new_ones(tokens.shape[:2]) if attention_mask is None else attention_mask.to(tokens.dtype)
        mean = (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(_TINY)
        logits = self.classifier(mean)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=states.get("hidden_states"), attentions=states.get("attentions")
        )

    @classmethod
    def from_folder(
        cls, location: str | Path, *, config: PreTrainedConfig | None = None, **options: Any
    ) -> MeanPoolingForSequenceClassification:
        """Load an encoder, with the linear layer that lies beside it in a folder of sentence-transformers, if one does.

        Args:
            location: Folder or Hub id: an encoder of transformers or sentence-transformers (a linear layer of another's is
                not read), what ``write_sentence_folder`` left, or a training checkpoint of this class.
            config: Its configuration, if that was read before.
            options: Arguments of ``AutoModel.from_pretrained``.

        Returns:
            The model; its linear layer is random where none was saved.
        """
        if config is not None and (config.architectures or [""])[0] == cls.__name__:  # a training checkpoint
            model = cls(config)
            tensors = convert_state_dict(model, read_weights(location)).tensors
            if missing := find_missing(model, tensors):
                raise ValueError(
                    f"{location} lacks {len(missing)} tensors of its model, such as {missing[0]}: take another."
                )
            model.load_state_dict(tensors, strict=False)
            return cast(Any, model).to(options.get("dtype") or model.dtype).eval()
        settings = {} if config is None else {"config": config}
        encoder = AutoModel.from_pretrained(location, **settings, **options)
        model = cls(encoder.config, encoder)
        hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
        if (getattr(encoder.config, ENTRY, None) or {}).get("pooling") == "mean":  # we have written it
            file = cached_file(str(location), f"{_DENSE_FOLDER}/model.safetensors", **hub_options)
            dense = {name.removeprefix("linear."): tensor for name, tensor in load_file(cast(str, file)).items()}
            model.classifier.load_state_dict(dense)
        return model.eval()


def trained_pooling(location: str | Path, **options: Any) -> str | None:
    """Return the pooling that a sentence encoder was trained with, as its folder tells.

    Args:
        location: Folder or Hub id.
        options: Where on the Hub and in its cache files are.

    Returns:
        ``"mean"``, ``"cls"``, ``"max"``, ...; None where the folder is not one of sentence-transformers.
    """
    settings = _read_json(location, f"{_POOLING_FOLDER}/config.json", **options) or {}
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    named = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
    if len(modes) == 1:
        mode = modes[0].removeprefix("pooling_mode_")
        return named.get(mode, mode)
    mode = settings.get("pooling_mode")
    return mode if isinstance(mode, str) else None


def write_sentence_folder(folder: str | Path, model: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Write a model as sentence-transformers reads it: ``SentenceTransformer(folder).encode(texts)`` are its logits.

    The encoder lies at the top, where ``AutoModel`` finds it; the pooling and the linear layer in folders of their own.

    Args:
        folder: Made where it does not exist.
        model: A ``MeanPoolingForSequenceClassification`` whose head is a stock layer.
        state_dict: Its weights.
    """
    prefix = "encoder."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    model.encoder.save_pretrained(folder, state_dict=encoder, max_shard_size="1TB")
    weight, bias = (state_dict[f"classifier.{name}"].detach().cpu().contiguous() for name in ("weight", "bias"))
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    places = ("", _POOLING_FOLDER, _DENSE_FOLDER)
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, place) in enumerate(zip(_MODULES, places, strict=True))
        ],
        "sentence_bert_config.json": {"max_seq_length": _max_length(model), "do_lower_case": False},
        f"{_POOLING_FOLDER}/config.json": {
            "word_embedding_dimension": weight.shape[1],
            **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes},
        },
        f"{_DENSE_FOLDER}/config.json": {
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    }
    for name, contents in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    save_file({"linear.weight": weight, "linear.bias": bias}, Path(folder, _DENSE_FOLDER, "model.safetensors"))


def _max_length(model: Any) -> int | None:
    """Return the tokens of a text that tokenizer and positions both have room for; None where neither has a limit."""
    limits = (
        getattr(model.processor, "model_max_length", None),
        getattr(model.config, "max_position_embeddings", None),
    )
    return min((int(limit) for limit in limits if limit is not None and limit > 0), default=None)


def _read_json(location: str | Path, name: str, **options: Any) -> Any:
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(str(location), name, **quiet, **options)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
