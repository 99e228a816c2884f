"""Fine-tune a pretrained model on a data set, from flags to a finished folder: ``etf-adapt finetune``.

The steps, in the order in which they happen: arguments, data, model, rows, training, calibration and report, publishing.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from etf_adapt.commands.finetune_arguments import (
    DataArguments,
    ModelArguments,
    check_resumed,
    parse_training,
    read_arguments,
)
from etf_adapt.commands.flags import flags_of
from etf_adapt.commands.help import help_text
from etf_adapt.commands.output_folder import claim_output_dir, resume_command, resume_value
from etf_adapt.errors import DataError
from etf_adapt.models.names import locate_model, model_task, resolve_model_name
from etf_adapt.results import claim, run_folder

if TYPE_CHECKING:
    from etf_adapt.data.load import ClassificationData
    from etf_adapt.training.arguments import ETFTrainingArguments

ETF_SCALE = 16.0  # of the logits of an ETF head under a cross-entropy: unscaled they reach about one


@dataclass(frozen=True)
class FinetuneResult:
    """What a run of ``finetune`` leaves."""

    model: Any = field(repr=False)  # the calibrated model, with its head as an ordinary layer
    scores: dict[str, Any]  # what `all_results.json` holds: `eval_<score>` and `test_<score>` of the saved model
    folder: str


def main(argv: Sequence[str]) -> None:
    """Run the command on its flags."""
    names = {word.replace("-", "_") for word in argv}
    if names & {"_h", "__help", "__help_all"}:
        print(help_text(everything="__help_all" in names))
    else:
        _run(argv)
        from accelerate import PartialState

        PartialState().destroy_process_group()


def finetune(
    model: str = "micro", dataset: str = "digits", *, output_dir: str | None = None, **settings: Any
) -> FinetuneResult | None:
    """Fine-tune a pretrained model on a data set, as ``etf-adapt finetune`` does, and return what it leaves.

    Under ``accelerate launch`` or ``torchrun`` each process calls it.

    Args:
        model: Short name, Hub id, timm name or folder.
        dataset: "digits", a Hub id, a file or a folder; see ``load_data``.
        output_dir: Folder of the result; by default below ``out``, named after data, model and head.
        settings: Any other flag of ``etf-adapt finetune --help`` by its name, and any field of ``ETFTrainingArguments``.

    Returns:
        The calibrated model, its scores, and the folder that holds it with its card; None of a dry run.

    Raises:
        ValueError: A setting, the data or the model break a rule; nothing was trained.

    Example:
        >>> from tempfile import mkdtemp
        >>> result = finetune(output_dir=mkdtemp(), max_steps=1, max_train_rows=60)  # doctest: +ELLIPSIS
        data: ...
        >>> 0 <= result.scores["test_balanced_accuracy"] <= 1
        True
    """
    given = {"model": model, "dataset": dataset, "output_dir": output_dir}
    return _run(flags_of({**given, **settings}))


@claim.released()
def _run(argv: Sequence[str]) -> FinetuneResult | None:
    # Wrong arguments end the run before the imports that take seconds, and before any data are prepared.
    model_args, data_args, output_args, training_flags = read_arguments(argv)
    location = resolve_model_name(model_args.model)
    if model_args.is_pretrained or not location.startswith("timm/"):
        location = locate_model(location, model_args.model_revision)
    args = parse_training(training_flags)
    folder = str(args.output_dir)

    import datasets
    import transformers
    from accelerate.state import PartialState

    from etf_adapt.data.overview import describe_data
    from etf_adapt.data.progress import announced, use_bars
    from etf_adapt.inference.launch import first_process_decides, keep_freed_memory, set_threads
    from etf_adapt.inference.rows import prepare_rows
    from etf_adapt.models.adapters import add_adapters
    from etf_adapt.training.dry_run import dry_run
    from etf_adapt.training.finishing import is_adjusted
    from etf_adapt.training.trainer import ETFTrainer

    state = PartialState()
    set_threads(args.torch_threads)
    transformers.set_seed(args.seed)
    use_bars(not args.disable_tqdm)
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

    if model_args.peft is not None and args.freeze == "backbone":
        raise ValueError("`freeze` (='backbone') would fix the adapters of `peft`: leave out one of the two.")
    if model_args.peft is not None:
        check_adapters(location, model_args.peft, model_args.model_revision)
    settings = run_folder.recorded_arguments(model_args, data_args, args)
    goes_on = args.resume_from_checkpoint is not None
    if goes_on:
        check_resumed(folder, settings)

    # Data: the splits, long-tailed if asked for.
    with announced("reading the data"):
        data = open_data(data_args, seed=args.seed if args.data_seed is None else args.data_seed)
    if state.is_main_process:
        print(describe_data(data.description), flush=True)
    if args.device.type == "cpu" and data.task == "image":
        keep_freed_memory()

    # Model: the pretrained backbone under a new head; and the rows as it reads them.
    with announced("loading the model"):
        model = load_model(location, model_args, data, seed=args.seed)
    # Refuses now what cannot be at the end.
    is_adjusted(model, model_args.prior_adjustment, has_validation=data.validation is not None)
    with announced("preparing the rows"):
        rows = prepare_rows(
            model,
            location,
            data,
            image_size=data_args.image_size,
            augment=data_args.augment,
            max_length=data_args.max_length,
            seed=args.seed,
        )
    if model_args.peft is not None:
        add_adapters(model, model_args.peft, seed=args.seed)
    if data.validation is None:
        args.eval_strategy, args.load_best_model_at_end = "no", False

    # Train. From here on the output folder is ours.
    nowhere = TemporaryDirectory() if output_args.dry_run else None
    claimed = {"is_named": output_args.is_named, "resume": goes_on, "overwrite": output_args.overwrite_output_dir}
    claim_folder = partial(claim_output_dir, folder, **claimed)
    args.output_dir = folder = nowhere.name if nowhere else first_process_decides(claim_folder)
    settings = run_folder.recorded_arguments(model_args, data_args, args)
    if state.is_main_process and not goes_on:
        run_folder.write_json(Path(folder, run_folder.ARGUMENTS_FILE), settings)
    state.wait_for_everyone()
    trainer = ETFTrainer(
        model,
        args,
        train_dataset=rows.train,
        alignment_dataset=rows.alignment,
        eval_dataset=rows.validation,
        data_collator=rows.collator,
        processing_class=rows.processor if hasattr(rows.processor, "save_pretrained") else None,
        labels=data.train["label"],
    )
    if output_args.dry_run:
        print("\n".join(dry_run(trainer, data)))
        return None
    trainer.resume_command = resume_command(argv, folder)
    try:
        trainer.train(resume_from_checkpoint=resume_value(args.resume_from_checkpoint))
    except DataError:
        # A validation image that cannot be decoded costs its scores, not the training that is done.
        if not 0 < trainer.state.max_steps <= trainer.state.global_step:
            raise
    if state.is_main_process and goes_on:  # not before: a run that is refused leaves no settings
        run_folder.write_json(Path(folder, run_folder.ARGUMENTS_FILE), settings)

    # Calibrate on validation rows, save, score what was saved, and report.
    scores = trainer.finish(
        rows.test if data_args.evaluate_test else None,
        prior_adjustment=model_args.prior_adjustment,
        dataset=data.description,
        base_model=name_base(model_args, location),
        command=run_folder.public_command(argv),
    )

    # Publish.
    is_main = state.is_main_process
    if args.push_to_hub:
        state.destroy_process_group()  # none waits for an upload
        if is_main:
            publish_run(args)
    return FinetuneResult(model, scores, folder)


def open_data(data_args: DataArguments, *, seed: int) -> ClassificationData:
    """Load the data set; make it long-tailed if asked for."""
    from etf_adapt.data.load import load_data

    return load_data(
        data_args.dataset,
        revision=data_args.dataset_revision,
        image_root=data_args.image_root,
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


def check_adapters(location: str, peft: str, revision: str | None = None) -> None:
    """Refuse adapters that a model cannot take, by its layers without their weights; before any data are read."""
    import torch

    from etf_adapt.models.adapters import add_adapters
    from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification

    for factory in (ETFForImageClassification, ETFForSequenceClassification):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all is told when the model is loaded
            try:
                model = factory.from_pretrained(location, num_labels=2, pretrained=False, revision=revision)
            except Exception:  # a model of the other task
                continue
            add_adapters(model, peft)


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
    options = {"class_weights": "balanced"} if model_args.class_weights == "balanced" else {}
    options |= json.loads(model_args.loss_options or "{}")
    if options:
        loss = {**(loss or DEFAULT_LOSSES[model_args.head]), **options}
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
        revision=model_args.model_revision,
    )


def name_base(model_args: ModelArguments, location: str) -> str | None:
    """Return the origin of the weights for the card, where the model's own configuration does not tell it."""
    if model_args.is_pretrained:
        return None if Path(location).is_dir() else location
    origin = "random weights" if model_args.checkpoint_path is None else "a file of weights"
    return f"{run_folder.public_value(model_args.model)} from {origin}"


def publish_run(args: ETFTrainingArguments) -> None:
    """Publish the finished folder; exit code 3 where it cannot be."""
    from etf_adapt.data.progress import announced
    from etf_adapt.hub.publish import publish
    from etf_adapt.hub.send import HubError

    options: dict[str, Any] = {"private": args.hub_private_repo, "revision": args.hub_revision}
    try:
        with announced("publishing"):
            print(f"published: {publish(str(args.output_dir), str(args.hub_model_id), **options)}")
    except HubError as error:
        print(f"trained and saved, but not published: {error}", file=sys.stderr)
        raise SystemExit(3) from error
