"""Fine-tune with timm's tools: layer-wise learning rates, stochastic depth, and averaged weights.

    python examples/layer_decay_and_ema.py

The trainer takes any optimizer and callback, the model any of timm's arguments. Needs no network, and takes a minute.
"""

import tempfile

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TrainerCallback

from etf_adapt import ETFTrainer, ETFTrainingArguments, ImageDataset, image_transforms, load_data
from etf_adapt.models.auto import adapt


class AveragedWeights(TrainerCallback):
    """Keep an exponential moving average of the weights, and end with it."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.average = ModelEmaV3(model, decay=decay, use_warmup=True)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Add the weights of this step to the average."""
        self.average.update(model, step=state.global_step)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Replace the last weights by the average."""
        model.load_state_dict(self.average.module.state_dict())


# Random weights; `ETFForImageClassification.from_pretrained("timm/vit_base...", ...)` loads pretrained ones.
depth = {"img_size": 64, "drop_path_rate": 0.1}  # stochastic depth, by timm's own argument
config = TimmWrapperConfig(architecture="test_vit", num_labels=10, model_args=depth)
torch.manual_seed(0)
model = adapt(TimmWrapperForImageClassification(config), 10)

data = load_data("digits", imbalance_factor=20)
sizes = {"input_size": (3, 64, 64), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
plain = image_transforms({**sizes, "crop_pct": 1.0, "crop_mode": "center"}, train=False)
train, test = ImageDataset(data.train, plain, keep=True), ImageDataset(data.test, plain, keep=True)

with tempfile.TemporaryDirectory() as output_dir:
    args = ETFTrainingArguments(
        output_dir,
        num_train_epochs=3,
        learning_rate=1e-3,
        dropout="model",  # stochastic depth is off by default, and the head then aligned every ten steps
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,  # or the best checkpoint would replace the average
    )
    average = AveragedWeights(model, decay=0.95)
    trainer = ETFTrainer(model, args, train_dataset=train, eval_dataset=test, callbacks=[average])
    trainer.optimizer = create_optimizer_v2(model.timm_model, opt="adamw", lr=args.learning_rate, layer_decay=0.75)
    for group in trainer.optimizer.param_groups:  # as timm's schedulers do at each step, and transformers' do not
        group["lr"] *= group["lr_scale"]
    rates = sorted({group["lr"] for group in trainer.optimizer.param_groups})
    print("learning rates by layer:", ", ".join(f"{rate:.2g}" for rate in rates))
    trainer.train()
    trainer.align()  # the head, on the features of the averaged weights
    print("balanced accuracy of the average:", round(trainer.evaluate()["eval_balanced_accuracy"], 3))
