"""Fine-tune a pretrained model on a data set, from flags to a finished folder: ``etf-adapt finetune``.

The steps, in the order in which they happen: arguments, data, model, rows, training, calibration and report, publishing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from etf_adapt.commands.finetune_arguments import NEWEST, check_resumed, parse_training, read_arguments
from etf_adapt.commands.flags import flags_of
from etf_adapt.commands.help import help_text
from etf_adapt.commands.output_folder import claim_output_dir, resume_command
from etf_adapt.commands.publish import publish_run
from etf_adapt.errors import DataError
from etf_adapt.models.names import locate_model, model_task, resolve_model_name
from etf_adapt.results import claim, run_folder


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

    from etf_adapt.data.load import load_data
    from etf_adapt.data.overview import describe_data
    from etf_adapt.data.progress import announced, use_bars
    from etf_adapt.inference.launch import first_process_decides, give_back_memory, keep_freed_memory, set_threads
    from etf_adapt.inference.rows import prepare_rows
    from etf_adapt.models.adapters import add_adapters
    from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification
    from etf_adapt.training.dry_run import dry_run
    from etf_adapt.training.finishing import is_adjusted
    from etf_adapt.training.parameters import check_adapters
    from etf_adapt.training.trainer import ETFTrainer

    state = PartialState()
    set_threads(args.torch_threads)
    transformers.set_seed(args.seed)
    use_bars(not args.disable_tqdm)
    if args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()

    if model_args.peft is not None:
        check_adapters(location, model_args.peft, model_args.model_revision, freeze=args.freeze)
    settings = run_folder.recorded_arguments(model_args, data_args, args)
    goes_on = args.resume_from_checkpoint is not None
    if goes_on:
        check_resumed(folder, settings)

    # Data: the splits, long-tailed if asked for.
    with announced("reading the data"):
        seed = args.seed if args.data_seed is None else args.data_seed
        data = load_data(data_args.dataset, seed=seed, **data_args.load_options())
    if (known := model_task(model_args.model)) not in (None, data.task):
        raise ValueError(f"`model` (={model_args.model!r}) reads {known}s, and the data set holds {data.task}s.")
    if state.is_main_process:
        print(describe_data(data.description), flush=True)
    if args.device.type == "cpu" and data.task == "image":
        keep_freed_memory()

    # Model: the pretrained backbone under a new head; and the rows as it reads them.
    with announced("loading the model"):
        factory = ETFForImageClassification if data.task == "image" else ETFForSequenceClassification
        classes: dict[str, Any] = {"id2label": data.id2label, "class_counts": data.class_counts.tolist()}
        model = factory.from_pretrained(location, **classes, seed=args.seed, **model_args.load_options())
    # Refuses now what cannot be at the end.
    is_adjusted(model, model_args.prior_adjustment, data.class_counts, has_validation=data.validation is not None)
    with announced("preparing the rows"):
        options = {name: getattr(data_args, name) for name in ("image_size", "augment", "max_length")}
        rows = prepare_rows(model, location, data, seed=args.seed, **options)
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
        checkpoint = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() in NEWEST else checkpoint)
    except DataError:
        # A validation image that cannot be decoded costs its scores, not the training that is done.
        if not 0 < trainer.state.max_steps <= trainer.state.global_step:
            raise
    if state.is_main_process and goes_on:  # not before: a run that is refused leaves no settings
        run_folder.write_json(Path(folder, run_folder.ARGUMENTS_FILE), settings)

    give_back_memory()  # so that the peak stays that of training

    # Calibrate on validation rows, save, score what was saved, and report.
    scores = trainer.finish(
        rows.test if data_args.evaluate_test else None,
        prior_adjustment=model_args.prior_adjustment,
        dataset=data.description,
        base_model=model_args.origin_of_weights(location),
        command=run_folder.public_command(argv),
    )

    # Publish.
    is_main = state.is_main_process
    if args.push_to_hub:
        state.destroy_process_group()  # none waits for an upload
        if is_main:
            publish_run(args)
    return FinetuneResult(model, scores, folder)
