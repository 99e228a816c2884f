"""Train a network with a fixed simplex head in a plain Accelerate loop, without transformers.

    python examples/plain_accelerate_loop.py
    accelerate launch --num_processes 2 examples/plain_accelerate_loop.py

Three lines differ from a usual loop: the head, the loss, the sampler. Needs no network, and takes seconds.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from etf_adapt import ClassBalancedSampler, ETFHead, class_counts, dot_regression_loss
from etf_adapt.data.long_tail import long_tailed_indices

EPOCHS, BATCH_SIZE = 20, 32  # rows per process

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)

# Data: the even rows of the handwritten digits made long-tailed, the odd ones to test.
images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images / 16.0, dtype=torch.float32)  # (rows, 64)
targets = torch.tensor(labels)
rows = long_tailed_indices(labels[::2], imbalance_factor=30)
train = TensorDataset(pixels[::2][rows], targets[::2][rows])
test = TensorDataset(pixels[1::2], targets[1::2])
accelerator.print("training rows a class:", class_counts(train.tensors[1]))

# The sampler draws the same rows for any number of processes, so it takes the batch size of all processes.
global_batch = BATCH_SIZE * accelerator.num_processes
sampler = ClassBalancedSampler(train.tensors[1], power=0.5, batch_size=global_batch, seed=0)  # instead of shuffle=True
train_loader = DataLoader(train, batch_size=BATCH_SIZE, sampler=sampler)
test_loader = DataLoader(test, batch_size=256)

model = nn.Sequential(
    nn.Linear(64, 128),
    nn.GELU(),
    nn.Linear(128, 64),
    ETFHead(64, 10, generator=torch.Generator().manual_seed(0)),  # instead of nn.Linear(64, 10)
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)  # the head has none
model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)

for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    model.train()
    for inputs, classes in train_loader:
        loss = dot_regression_loss(model(inputs), classes)  # instead of cross_entropy
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

model.eval()
hits, rows_of_class = torch.zeros(10), torch.zeros(10)
for inputs, classes in test_loader:
    with torch.no_grad():
        predictions = model(inputs).argmax(dim=-1)  # the largest logit is the nearest vertex
    predictions, classes = accelerator.gather_for_metrics((predictions, classes))
    rows_of_class += torch.bincount(classes.cpu(), minlength=10)
    hits += torch.bincount(classes[predictions == classes].cpu(), minlength=10)
recall = hits / rows_of_class
accelerator.print(
    f"balanced accuracy {100 * recall.mean():.1f} %, three rarest classes {100 * recall[-3:].mean():.1f} %"
)
