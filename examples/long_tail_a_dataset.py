"""Make any labelled data set long-tailed, and count what each sampler draws from it.

    python examples/long_tail_a_dataset.py

Only the label column is read: a million images take less than a second. Needs no network.
"""

from datasets import ClassLabel, Dataset, Features, Value
from sklearn.datasets import load_digits

from etf_adapt import ClassBalancedSampler, class_counts, make_long_tailed

digits = load_digits()
features = Features({"row": Value("int64"), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
dataset = Dataset.from_dict({"row": range(len(digits.target)), "label": digits.target}, features=features)
print("all rows                ", class_counts(dataset))

# The largest class keeps all its rows, the smallest a fiftieth of them; the seed chooses which.
tailed = make_long_tailed(dataset, imbalance_factor=50, seed=0)
print("exponential, factor 50  ", class_counts(tailed))
print("step, factor 10         ", class_counts(make_long_tailed(dataset, imbalance_factor=10, profile="step")))

# One epoch of each sampler: power 0 draws rows uniformly, power 1 classes uniformly, 0.5 lies between.
for power in (0.0, 0.5, 1.0):
    sampler = ClassBalancedSampler(tailed, power=power, batch_size=32, seed=0)
    sampler.set_epoch(0)
    print(f"drawn with power {power}     ", class_counts(tailed.select(list(sampler))))
