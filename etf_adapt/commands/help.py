"""The text of ``etf-adapt finetune --help``: flags by group, each with its default; imports no framework."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from etf_adapt.commands.finetune_arguments import DataArguments, ModelArguments, OutputArguments
from etf_adapt.training.settings import TrainingSettings

# Flags of transformers whose defaults stay, of those that people type first: default, help.
STOCK_FLAGS: dict[str, tuple[Any, str]] = {
    "max_steps": (-1, "Steps to train, in place of num_train_epochs."),
    "gradient_accumulation_steps": (1, "Batches whose gradients make one step."),
    "gradient_checkpointing": (False, "Recompute activations in the backward pass, which saves memory."),
    "max_grad_norm": (1.0, "Norm that gradients are clipped to; 0 for none."),
    "bf16": (False, "Mixed precision with bfloat16."),
    "torch_compile": (False, "Compile the model."),
    "output_dir": (None, "Folder of the result; by default in out/, named after data, model and head."),
    "resume_from_checkpoint": (None, "Go on from a checkpoint: last, or its folder."),
    "push_to_hub": (False, "Publish the finished folder, in one commit."),
    "hub_model_id": (None, "Repository to publish to: user/name."),
    "hub_private_repo": (None, "Whether a new repository is private."),
}

GROUPS: dict[str, str] = {
    "data": """dataset dataset_revision image_column image_root text_column label_column imbalance_factor imbalance_profile
        class_order validation_fraction validation_before_long_tail max_train_rows image_size max_length augment mixup cutmix
        sampler train_sampling_strategy dataloader_num_workers""",
    "model": """model model_revision pretrained checkpoint_path pooling peft freeze batch_norm dropout gradient_checkpointing
        torch_compile bf16""",
    "head and loss": """head loss class_weights loss_options head_trainable head_path paper frame frame_penalty realign
        realign_steps leave_one_out final_frame prior_adjustment label_smoothing""",
    "training": """num_train_epochs max_steps learning_rate head_learning_rate per_device_train_batch_size
        gradient_accumulation_steps lr_scheduler_type warmup_steps weight_decay max_grad_norm early_stopping_patience seed
        torch_threads resume_from_checkpoint""",
    "evaluation": """eval_strategy metric_for_best_model load_best_model_at_end evaluate_test per_device_eval_batch_size
        shot_bounds min_validation_rows collapse_rows""",
    "results": """output_dir overwrite_output_dir dry_run save_strategy save_total_limit logging_strategy keep_statistics
        report_to disable_tqdm push_to_hub hub_model_id hub_private_repo""",
}
"""Flags under each heading, in the order in which a run needs them."""

OWNERS = (ModelArguments, DataArguments, OutputArguments, TrainingSettings)


def help_text(*, everything: bool = False) -> str:
    """Return the help: our own flags and the usual ones of transformers; with ``everything`` the rest of its fields."""
    known = {entry.name: (owner, entry) for owner in OWNERS for entry in fields(owner)}
    parts = [USAGE]
    for title, listed in GROUPS.items():
        parts.append(f"{title}:")
        for name in listed.split():
            if name in STOCK_FLAGS:
                parts.append(_describe(name, (), *STOCK_FLAGS[name]))
            else:
                owner, entry = known[name]
                hint = get_type_hints(owner)[name]  # a Literal, alone or beside None, or another type
                choices = next((get_args(part) for part in (hint, *get_args(hint)) if get_origin(part) is Literal), ())
                parts.append(_describe(name, choices, _default(entry), entry.metadata["help"]))
    if everything:
        from etf_adapt.training.arguments import REFUSED, ETFTrainingArguments

        parts.append("other fields of transformers' TrainingArguments:")
        left_out = {*" ".join(GROUPS.values()).split(), *REFUSED}
        for entry in fields(ETFTrainingArguments):
            if entry.init and entry.name not in left_out:
                text = " ".join(entry.metadata.get("help", "").split())
                parts.append(_describe(entry.name, (), _default(entry), text))
    return "\n".join(parts)


USAGE = """usage: etf-adapt finetune [--config FILE] [--FLAG VALUE ...]
       accelerate launch -m etf_adapt finetune ...    (several processes, mixed precision)

Fine-tune a pretrained image or text model on imbalanced classes; the result is a stock checkpoint. --config reads flags
from a YAML or JSON file, such as a finished run's arguments.json; flags of the command line win. --dry_run shows what a run
would do, and stops. Hyphens do for underscores. --help_all also lists the other fields of transformers' TrainingArguments.
"""


def _describe(name: str, choices: Iterable[Any], default: Any, text: str) -> str:
    if options := ", ".join(map(str, choices)):
        text += f" One of {options}."
    if isinstance(default, bool):
        default = str(default).lower()
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    flag = f"  --{name}" + ("" if shown is None else f" [{shown}]")
    return "\n".join([flag, *(f"      {line}" for line in textwrap.wrap(text, 94))])


def _default(entry: Field[Any]) -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default
