"""Fine-tune a pretrained image or text model on unevenly filled classes; the result is a stock checkpoint.

    accelerate launch recipes/finetune.py                                    # micro on digits: nothing to download, a minute
    accelerate launch recipes/finetune.py --model vit_base --head etf        # any timm or transformers model
    accelerate launch recipes/finetune.py --model vit_base --dataset path/to/images --imbalance_factor 100
    accelerate launch recipes/finetune.py --model path/to/all-MiniLM-L6-v2 --dataset path/to/csv_folder
    accelerate launch recipes/finetune.py --model resnet50 --checkpoint_path weights.safetensors  # as timm leaves them
    accelerate launch recipes/finetune.py --head linear --loss cross_entropy # what to compare with
    accelerate launch recipes/finetune.py --paper                            # the method as it was published
    accelerate launch recipes/finetune.py settings.yaml --seed 1             # flags from a file; those after it win
    accelerate launch recipes/finetune.py --push_to_hub --hub_model_id me/digits --hub_private_repo

All flags: python recipes/finetune.py --help. They are those of finetune_arguments.py, etf_adapt/training/arguments.py and
transformers' TrainingArguments. Exit codes: 2 a wrong argument or file, 1 a failed run, 3 a finished run that could not be
published (the last line is the command that publishes it); `accelerate launch` turns each into 1. Errors are one line;
ETF_ADAPT_TRACEBACK=1 shows the traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from finetune_arguments import DataArguments, ModelArguments, OutputArguments, parse_training, read_arguments

from etf_adapt import errors
from etf_adapt.models.names import locate_model, model_task, resolve_model_name
from etf_adapt.results import run_folder, tables

if TYPE_CHECKING:
    from etf_adapt.data.load import ClassificationData
    from etf_adapt.training.arguments import ETFTrainingArguments
    from etf_adapt.training.evaluation import RowPredictions
    from etf_adapt.training.trainer import ETFTrainer

ETF_SCALE = 16.0  # of the logits of an ETF head under a cross-entropy: unscaled they reach about one
READ_AGAIN = ("alignment", "validation")  # splits whose decoded images are kept: read each epoch, never augmented
NEWEST = ("last", "latest", "auto", "true", "yes")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe on command-line arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with errors.one_line_errors():
        # Wrong arguments end the run before the imports that take seconds, and before any data are prepared.
        model_args, data_args, output_args, training_argv = read_arguments(argv)
        location = resolve_model_name(model_args.model)
        is_complete = model_args.pretrained and model_args.checkpoint_path is None
        if is_complete or not location.startswith("timm/"):
            location = locate_model(location)
        finetune(model_args, data_args, output_args, parse_training(training_argv), location, argv)


def finetune(
    model_args: ModelArguments,
    data_args: DataArguments,
    output_args: OutputArguments,
    args: ETFTrainingArguments,
    location: str,
    argv: Sequence[str],
) -> None:
    """Prepare data and model, train, calibrate, save, score what was saved, and report."""
    import datasets
    from accelerate.state import PartialState
    from finetune_report import leave_report

    from etf_adapt.models.adapters import add_adapters, merge_adapters
    from etf_adapt.training.evaluation import calibrate
    from etf_adapt.training.launch import keep_freed_memory, set_threads
    from etf_adapt.training.trainer import ETFTrainer

    state = PartialState()
    set_threads(args.torch_threads)
    transformers.set_seed(args.seed)
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if model_args.peft is not None and args.freeze == "backbone":
        raise ValueError("`freeze` (='backbone') would fix the adapters of `peft`: leave out one of the two.")

    # Data: the splits, long-tailed if asked for.
    data = open_data(data_args, seed=args.seed if args.data_seed is None else args.data_seed)
    if args.device.type == "cpu" and data.task == "image":
        keep_freed_memory()

    # Model: the pretrained backbone under a new head; and the splits as it reads them.
    model = load_model(location, model_args, data, seed=args.seed)
    adjusts = is_adjusted(model, model_args.prior_adjustment, has_validation=data.validation is not None)
    rows, collator, processor = prepare_rows(location, model, data, data_args, seed=args.seed)
    if model_args.peft is not None:
        add_adapters(model, model_args.peft, seed=args.seed)

    # Train. From here on the output folder is ours.
    if data.validation is None:
        args.eval_strategy, args.load_best_model_at_end = "no", False
    if state.is_main_process:
        arguments = run_folder.public_arguments(model_args, data_args, args)
        claim_output_dir(args.output_dir, arguments, overwrite=output_args.overwrite_output_dir)
    state.wait_for_everyone()
    repo_id, args.push_to_hub = args.hub_model_id if args.push_to_hub else None, False  # once, when all is written
    trainer = ETFTrainer(
        model,
        args,
        train_dataset=rows["train"],
        alignment_dataset=rows["alignment"],
        eval_dataset=rows["validation"],
        data_collator=collator,
        processing_class=processor if hasattr(processor, "save_pretrained") else None,
        labels=data.train["label"],
    )
    outcome = trainer.train(resume_from_checkpoint=resume_value(args.resume_from_checkpoint))
    merge_adapters(model)
    trained = model.etf_settings  # calibration makes any head an ordinary layer

    # Calibrate on validation rows.
    if rows["validation"] is not None:
        # That of training may have been kept with its workers.
        held_out = trainer.get_test_dataloader(rows["validation"])
        factor, strength = calibrate(model, held_out, trainer.class_counts if adjusts else None)
        if state.is_main_process:
            adjustment = f" - {strength:.3g} log(class frequency)" if adjusts else ""
            print(f"calibrated: logits x {factor:.4g}{adjustment}")

    # Save, and score what was saved.
    trainer.save_model(args.output_dir)
    state.wait_for_everyone()
    splits = ["validation", *(["test"] if data_args.evaluate_test else [])]
    scored = {split: score_saved(trainer, rows[split], data.task) for split in splits if rows[split] is not None}

    # Report, and publish.
    if state.is_main_process:
        leave_report(trainer, outcome.metrics, scored, trained, data, model_args, location, repo_id, argv)
    is_main = state.is_main_process
    state.wait_for_everyone()  # none leaves while another still works
    state.destroy_process_group()  # none waits for an upload
    failure = publish_run(args, repo_id) if is_main and repo_id is not None else None
    if failure is not None:
        print(f"trained and saved, but not published: {failure}", file=sys.stderr)
        raise SystemExit(3)


def open_data(data_args: DataArguments, *, seed: int) -> ClassificationData:
    """Load the data set; make it long-tailed if asked for."""
    from etf_adapt.data.load import load_data

    return load_data(
        data_args.dataset,
        revision=data_args.dataset_revision,
        image_column=data_args.image_column,
        text_column=data_args.text_column,
        label_column=data_args.label_column,
        imbalance_factor=data_args.imbalance_factor,
        imbalance_profile=data_args.imbalance_profile,
        class_order=data_args.class_order,
        validation_fraction=data_args.validation_fraction,
        validation_before_long_tail=data_args.validation_before_long_tail,
        max_train_rows=data_args.max_train_rows,
        seed=seed,
    )


def load_model(location: str, model_args: ModelArguments, data: ClassificationData, *, seed: int) -> Any:
    """Load the pretrained model with a new head and its loss."""
    from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification
    from etf_adapt.models.etf_model import DEFAULT_LOSSES

    known = model_task(model_args.model)
    if known is not None and known != data.task:
        raise ValueError(f"`model` (={model_args.model!r}) reads {known}s, and the data set holds {data.task}s.")
    factory = ETFForImageClassification if data.task == "image" else ETFForSequenceClassification
    name = model_args.loss or {"cosine": "logit_adjusted"}.get(model_args.head)
    loss: dict[str, Any] | None = {"name": name} if name else None  # None is the head's own
    if loss is not None and "dot_regression" not in loss["name"] and model_args.head == "etf":
        loss["scale"] = ETF_SCALE
    if model_args.loss_options is not None:
        loss = {**(loss or DEFAULT_LOSSES[model_args.head]), **json.loads(model_args.loss_options)}
    return factory.from_pretrained(
        location,
        num_labels=len(data.label_names),
        id2label=data.id2label,
        head=model_args.head,
        trainable=True if model_args.head_trainable else None,
        head_path=model_args.head_path,
        pooling=model_args.pooling,
        pretrained=model_args.pretrained,
        checkpoint_path=model_args.checkpoint_path,
        loss=loss,
        class_counts=data.class_counts.tolist(),
        seed=seed,
    )


def is_adjusted(model: Any, choice: str, *, has_validation: bool) -> bool:
    """Return whether the prior is adjusted for after training; auto: for ETF heads that allow it."""
    if choice == "auto":
        return bool(has_validation and model.etf_settings["head"]["kind"] == "etf" and model.is_adjustable)
    if choice == "fit":
        model.require_adjustable()
        if not has_validation:
            raise ValueError(f"`prior_adjustment` (={choice!r}) is fitted on validation rows: give some.")
    return choice == "fit"


def prepare_rows(
    location: str, model: Any, data: ClassificationData, data_args: DataArguments, *, seed: int
) -> tuple[dict[str, Any], Any, Any]:
    """Return the splits as the model reads them, the collator and the processor (tokenizer or image processor)."""
    from accelerate.state import PartialState

    from etf_adapt.data.image_dataset import ImageCollator, ImageDataset
    from etf_adapt.data.text import DEFAULT_MAX_LENGTH, TextCollator, tokenize
    from etf_adapt.data.transforms import image_transforms
    from etf_adapt.models.folders import load_processor
    from etf_adapt.models.image_size import set_image_size
    from etf_adapt.models.positions import max_positions

    processor = load_processor(location, data.task) if model.processor is None else model.processor
    splits = {"train": data.train, "alignment": data.train, "validation": data.validation, "test": data.test}
    if data.task == "image":
        size = data_args.image_size
        if size is not None:
            set_image_size(model, processor, size)
        plain = image_transforms(processor, train=False, image_size=size)
        augmented = image_transforms(
            processor, train=True, image_size=size, augment=data_args.augment, allow_flip=data.allow_flip
        )
        rows: dict[str, Any] = dict.fromkeys(splits)
        for name, split in splits.items():
            if split is not None:
                transform = augmented if name == "train" else plain
                rows[name] = ImageDataset(split, transform, seed=seed, keep=name in READ_AGAIN)
        return rows, ImageCollator(), processor
    positions = max_positions(model)
    if data_args.max_length is not None and positions is not None and data_args.max_length > positions:
        raise ValueError(f"`max_length` (={data_args.max_length}) must be at most {positions}: the model has no more.")
    length = data_args.max_length or min(filter(None, (processor.model_max_length, positions, DEFAULT_MAX_LENGTH)))
    with PartialState().main_process_first():  # the others read what it leaves in the cache
        rows = {name: None if split is None else tokenize(split, processor, length) for name, split in splits.items()}
    return rows, TextCollator(processor), processor


def claim_output_dir(folder: str, arguments: dict[str, Any], *, overwrite: bool) -> None:
    """Mark the output folder as this run's; remove an earlier run from it if asked for."""
    from etf_adapt.training.checkpoints import remove_checkpoints

    if overwrite:
        remove_checkpoints(folder)
        run_folder.remove_run_files(folder)
    run_folder.write_json(Path(folder, run_folder.ARGUMENTS_FILE), arguments)


def score_saved(trainer: ETFTrainer, rows: Any, task: str) -> tuple[dict[str, float | None], RowPredictions]:
    """Score the saved folder as its users load it: without this library."""
    from etf_adapt.training.evaluation import load_stock, predict_rows, score_rows

    args, counts = trainer.args, trainer.class_counts
    offsets = trainer.accelerator.unwrap_model(trainer.model).etf_settings["prior_adjustment"]
    model = load_stock(args.output_dir, task).to(args.device)
    predicted = predict_rows(model, trainer.get_test_dataloader(rows), num_rows=len(rows), offsets=offsets)
    scores = score_rows(predicted, counts, args.shot_bounds)
    before = score_rows(replace(predicted, predictions=predicted.unadjusted), counts, args.shot_bounds)
    return scores | {f"{name}_unadjusted": before[name] for name in tables.UNADJUSTED}, predicted


def publish_run(args: ETFTrainingArguments, repo_id: str) -> str | None:
    """Publish the finished folder; return the error, if any."""
    from etf_adapt.hub.publish import publish
    from etf_adapt.hub.send import HubError

    try:
        url = publish(str(args.output_dir), repo_id, private=args.hub_private_repo, revision=args.hub_revision)
        print(f"published: {url}")
    except HubError as error:
        return str(error)
    return None


def resume_value(flag: str | None) -> str | bool | None:
    """Return what ``Trainer.train`` takes: True for the newest checkpoint, a folder, or None."""
    return True if flag is not None and flag.lower() in NEWEST else flag


if __name__ == "__main__":
    main()
