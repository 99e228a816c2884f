"""Swap the head of any timm or transformers model for a fixed simplex frame, train under it, and put the old head back.

    python examples/swap_a_head.py

The models are small and random here, so that nothing is downloaded; pretrained ones are swapped in the same way.
"""

import timm
import torch
from transformers import BertConfig, BertForSequenceClassification

from etf_adapt import dot_regression_loss, restore_head, swap_head

torch.manual_seed(0)

# 1. A timm model. Its last layer alone is replaced, by a linear layer of the same kind with as many rows as classes.
model = timm.create_model("test_vit", num_classes=1000)
images = torch.randn(4, 3, 160, 160)
before = model.eval()(images)

swap_head(model, num_classes=5)
print("timm:", model.head, "trainable" if model.head.weight.requires_grad else "fixed")
print("Gram matrix of its rows, an exact simplex:", (model.head.weight @ model.head.weight.T)[0].tolist())

# 2. The logits are the model's own. The loss does the geometry: it pulls them towards the label's simplex vertex.
labels = torch.tensor([0, 1, 2, 3])
loss = dot_regression_loss(model(images), labels)
loss.backward()
print(f"loss {loss.item():.3f}; the head has no gradient: {model.head.weight.grad is None}")

# 3. The old head comes back, bit for bit.
restore_head(model)
print("restored:", torch.equal(model(images), before))

# 4. A transformers model, in the same way; its configuration follows.
text_model = BertForSequenceClassification(
    BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37)
)
swap_head(text_model, num_classes=3, id2label={0: "no", 1: "maybe", 2: "yes"})
print("transformers:", text_model.classifier, text_model.config.id2label)
