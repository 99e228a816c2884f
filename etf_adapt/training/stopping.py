"""The part of our Trainer that stops in time: it holds its folder, polls for signals, and ends a step that was left open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer

from etf_adapt.data.batches import met_by
from etf_adapt.inference.launch import first_process_decides
from etf_adapt.results.claim import claim, released
from etf_adapt.training.checkpoints import find_last_complete_checkpoint, read_run_of, resolve_checkpoint
from etf_adapt.training.signals import RandomStates, Stopped, StopSignals


class StoppableTrainer(Trainer):
    """Let one run at a time write to a folder, and end it by a signal without loss; the stock class loses up to an epoch."""

    model: PreTrainedModel

    resume_command = "trainer.train(resume_from_checkpoint=True)"
    """What a person types to go on, printed where a signal ended the run."""

    # What follows on the weights as they are: "step" for all that comes at the end of a step (alignment, evaluation, saving),
    # "epoch" for what comes at the end of an epoch, None for the next step. Where a signal comes in between, the pass over data
    # is left; the checkpoint notes it, and resuming begins there.
    _next: str | None = None
    _next_of_save: str | None = None  # the same after what is under way
    _next_of_checkpoint: str | None = None
    _checkpoint: str | None = None
    _saved_step: int | None = None  # None where a stop has nothing to save: before the first step, and after the last
    _is_saved = False  # whether the step that ends was saved
    _steps_in_epoch = 1
    _train_sampler: Any
    _trial: Any = None  # of a search for settings
    _random: RandomStates | None = None
    _signals: StopSignals | None = None

    @property
    def run_dir(self) -> str:
        """The folder of this run: ``output_dir``, or one below it in a search for settings."""
        return str(self._get_output_dir(self._trial))

    @contextmanager
    def running(self, resume: str | bool | None, trial: Any = None) -> Iterator[Path | None]:
        """Hold the output folder and watch for signals; give the checkpoint to resume from."""
        self._trial = trial
        self._saved_step = self._next_of_checkpoint = self._random = None
        with released():
            checkpoint = first_process_decides(partial(self._claim, self.run_dir, resume))
            with StopSignals() as self._signals:
                try:
                    yield checkpoint
                    if first_process_decides(self._is_saved_here):
                        self.poll()  # for what came after the last step
                except Stopped as stop:
                    self._save_and_tell(stop)
                    raise
                finally:
                    self._signals = None

    def _is_saved_here(self) -> bool:
        last = find_last_complete_checkpoint(self.run_dir)
        return last is not None and last.name == f"checkpoint-{self.state.global_step}"

    def _claim(self, folder: str, resume: str | bool | None) -> Path | None:
        checkpoint = resolve_checkpoint(folder, resume, tell=self.print)
        claim(folder, resume=bool(resume), run=read_run_of(checkpoint))
        return checkpoint if resume else resolve_checkpoint(folder, None)  # another run may have been faster

    def _save_and_tell(self, stop: Stopped) -> None:
        step, folder, self.is_in_train = self.state.global_step, self.run_dir, False
        if self._saved_step is not None and step != self._saved_step:
            self._next_of_save = self._next
            self._save_checkpoint(self.model, self._trial)
        last = find_last_complete_checkpoint(folder)
        kept = f"{last.name} holds it" if last else "nothing was done that had to be saved"
        self.print(f"stopped by {stop.signal_name} after step {step}: {kept}. To go on:\n{self.resume_command}")
        self.accelerator.wait_for_everyone()  # the end of one process is a signal to the others

    def poll(self, *, leaves: bool = False) -> None:
        """Leave a pass over data where a signal came, or where a process ``leaves`` it because it cannot read its rows."""
        if self._signals is not None:
            self._signals.poll(leaves=leaves)

    @contextmanager
    def _polled(self, batches: int) -> Iterator[None]:
        """Poll before each of the first ``batches`` forward passes: as many as every process has."""
        left = iter(range(batches))

        def poll(*_: Any, leaves: bool = False) -> None:
            if next(left, None) is not None:
                self.poll(leaves=leaves)

        hook = self.model.register_forward_pre_hook(poll)
        try:
            with met_by(partial(poll, leaves=True)):
                yield
        finally:
            hook.remove()

    def print(self, *lines: str) -> None:
        """Print lines on the first process."""
        if self.is_world_process_zero():
            tqdm.write("\n".join(lines))

    def _run_epoch(self, **loop: Any) -> None:  # type: ignore[override]  # transformers names all of its arguments
        if self._saved_step is None:
            resumed = loop["resume_from_checkpoint"]
            is_here = resumed is None or Path(resumed).parent.resolve() == Path(self.run_dir).resolve()
            self._saved_step = self.state.global_step if is_here else -1
        self._finish_step(loop["resume_from_checkpoint"], loop)
        if not self.control.should_training_stop:
            # After a stop in mid-epoch `accelerate.skip_first_batches` wraps the sampler so deep, with two processes, that the
            # loader's `set_epoch` no longer reaches it, and the epoch is resumed with the first epoch's rows (accelerate 1.15).
            self._train_sampler.set_epoch(loop["epoch"])
            self._next = "step"
            super()._run_epoch(**loop)

    def _finish_step(self, checkpoint: str | None, loop: Mapping[str, Any]) -> None:
        """Do what the step of a checkpoint had left to do when it was written."""
        self._next, self._next_of_checkpoint = self._next_of_checkpoint, None
        if self._next is None:
            return
        self._load_rng_state(checkpoint)
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        arguments = {"tr_loss": self._tr_loss, "grad_norm": None} | {name: loop.get(name) for name in names}
        for stage in ("step", "epoch"):
            if self._next == stage:
                self.control.should_log = self.control.should_evaluate = self.control.should_save = False
                event = self.callback_handler.on_step_end if stage == "step" else self.callback_handler.on_epoch_end
                self.control = event(self.args, self.state, self.control)
                self._maybe_log_save_evaluate(**arguments)
        self._random = RandomStates()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random is None:
            super()._load_rng_state(checkpoint)
        else:  # what was left of the step has drawn numbers since
            self._random.restore()
            self._random = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        is_last = self.control.should_training_stop or self.state.global_step % self._steps_in_epoch == 0
        after = "epoch" if self._next == "step" and is_last else None
        random = RandomStates() if self.control.should_evaluate else None
        self._next_of_save, self._is_saved = after, False
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Stopped:
            if random is not None:
                random.restore()
            raise
        if self.state.best_global_step == self.state.global_step and not self._is_saved:
            # The best that can be loaded stays the best: a checkpoint of this step, by a signal, is none of the run's own.
            best = self.state.best_model_checkpoint
            self.state.best_global_step = int(best.rpartition("-")[2]) if best else None
        self._next = after
        self.poll()
        self._next = after or "step"
