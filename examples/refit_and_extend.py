"""Make an encoder a classifier in one pass, then give it two new classes from five images each, without the old images.

    python examples/refit_and_extend.py

In place of `micro` goes any classifier that somebody trained; without `new_labels` its own head is set anew. Needs no network.
"""

from pathlib import Path
from tempfile import mkdtemp

from PIL import Image
from sklearn.datasets import load_digits

from etf_adapt import evaluate, extend, refit

place = Path(mkdtemp())
seen = dict.fromkeys(range(10), 0)
for picture, digit in zip(*load_digits(return_X_y=True), strict=True):
    seen[digit] += 1
    part = "test" if seen[digit] > 100 else "old/train" if digit < 8 else "new/train" if seen[digit] <= 5 else "unused"
    file = place / part / f"digit {digit}" / f"{seen[digit]}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.reshape(8, 8) * 15.9).astype("uint8")).resize((32, 32)).save(file)

made = refit("micro", str(place / "old"), new_labels=True, output=place / "eight")
print(*made.describe(), sep="\n")

grown = extend(place / "eight", str(place / "new"), output=place / "ten")  # a stock folder, as the first one
print(*grown.describe(), sep="\n")

scores = evaluate(place / "ten", str(place / "test")).scores
print(f"ten digits, two of them from five images: balanced accuracy {100 * scores['balanced_accuracy']:.1f}")
assert grown.new_classes == ["digit 8", "digit 9"] and scores["balanced_accuracy"] > 0.8
