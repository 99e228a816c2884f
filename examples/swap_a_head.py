"""Swap the head of any timm or transformers model for a fixed simplex frame, train under it, and put the old head back.

    python examples/swap_a_head.py

The models are small and random, so that nothing is downloaded; pretrained ones work the same way.
"""

import timm
import torch
from transformers import BertConfig, BertForSequenceClassification

from etf_adapt import dot_regression_loss, restore_head, swap_head

torch.manual_seed(0)

# 1. A timm model. Only its last layer is replaced, by a linear layer with one fixed vector for each class.
model = timm.create_model("test_vit", num_classes=1000)
images = torch.randn(4, 3, 160, 160)
before = model.eval()(images)

swap_head(model, num_classes=5)
print("timm:", model.head, "trainable" if model.head.weight.requires_grad else "fixed")
print("Gram matrix of its class vectors, an exact simplex:", (model.head.weight @ model.head.weight.T)[0].tolist())

# 2. The loss pulls the model's logits towards the simplex vertex of the label.
labels = torch.tensor([0, 1, 2, 3])
loss = dot_regression_loss(model(images), labels)
loss.backward()
print(f"loss {loss.item():.3f}; the head has no gradient: {model.head.weight.grad is None}")

# 3. Put the old head back, bit for bit.
restore_head(model)
print("restored:", torch.equal(model(images), before))

# 4. The same for a transformers model; its configuration is changed too.
text_model = BertForSequenceClassification(
    BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37)
)
swap_head(text_model, num_classes=3, id2label={0: "no", 1: "maybe", 2: "yes"})
print("transformers:", text_model.classifier, text_model.config.id2label)
