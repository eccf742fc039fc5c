"""The trainer: stages in order, each a loop of steps. Knows nothing of encoders or packing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lclm.train.elastic import restore_moved
from lclm.train.ends import Requeue, Stop
from lclm.train.feed import Tally
from lclm.train.fit import fit_budgets
from lclm.train.lifeline import Lifeline
from lclm.train.metrics import Progress
from lclm.train.preflight import preflight
from lclm.train.processes import Processes, start_processes
from lclm.train.runs import Run, open_run
from lclm.train.saver import Saver
from lclm.train.saving import (
    STATE,
    Identity,
    State,
    check_export,
    copy_export,
    load_learned,
    newest_checkpoint,
    read_done,
    save_export,
    write_done,
)
from lclm.train.spikes import Rewind
from lclm.train.stages import merge_lora, prepare, start_model
from lclm.train.step import Stepper
from lclm.train.watch import Watcher


def train(recipe: Any, stop: Stop | None = None) -> Path:
    """Train a recipe, or go on where it stopped; returns the run's folder. Called alike in every process.

    Processes come from torchrun's environment (one without it). Raises ValueError with what, where and how to
    fix it: a changed recipe, damaged or foreign checkpoints, non-finite steps in a row, a full disk; Requeue
    when it was asked to stop (`stop`: by whom; the recipe's limits count in any case); Lost when another
    process is gone. A process that cannot even raise that is ended, with its stacks in `RUN/faults`.
    """
    stop = stop or Stop()
    processes = start_processes(recipe.engine)
    lifeline = Lifeline(processes.rank, processes.size, recipe.engine)
    with stop.at_step_ends(), lifeline, stop.at_once():
        return take_stages(recipe, replace(processes, lifeline=lifeline), stop)


def take_stages(recipe: Any, processes: Processes, stop: Stop) -> Path:
    """All stages, in order. Collective."""
    progress = Progress(main=processes.main)
    run = None
    try:
        if recipe.train.preflight:
            preflight(recipe, processes)
        run = open_run(recipe, processes, lambda asked: fit_budgets(asked, processes))
        processes.write_faults_to(run.folder.faults)
        state, start = State(), None
        for index, name in enumerate(run.recipe.stages):
            folder = run.folder.stage(index, name)
            if folder.done.is_file():
                state = read_done(folder)
                progress.say(f"stage {name} is complete")
                follows = list(run.recipe.stages)[index + 1 : index + 2]
                if not follows or not run.folder.stage(index + 1, follows[0]).done.is_file():
                    check_export(folder, folder.export, processes)
            else:
                stop_together(stop, recipe, processes)
                state = train_stage(run, index, state, start, processes, progress, stop)
            start = folder.export
        copy_export(folder, run.folder.export, processes)
        progress.say(f"the run is complete: {run.folder.export}")
        return run.folder.path
    finally:
        progress.close()
        if run is not None and run.lock is not None:
            run.lock.close()


def train_stage(
    run: Run,
    index: int,
    before: State,
    start: Path | None,
    processes: Processes,
    progress: Progress,
    stop: Stop,
) -> State:
    """Train a stage after the state `before`, going back in it where a spike of the loss asks for that."""
    rewind = None
    while True:
        state = before.next_stage()
        trainer = StageTrainer(run, index, state, start, processes, progress, stop, rewind)
        try:
            return trainer.train()
        except Rewind as asked:
            trainer.stepper.close()
            rewind = asked.with_traceback(None)
            del trainer


def stop_together(stop: Stop, recipe: Any, processes: Processes) -> None:
    """Raise Requeue on all processes if any wants to stop. Collective."""
    wishes = [reason for reason in processes.gather(stop.wanted(recipe.train)) if reason]
    if wishes:
        raise Requeue(wishes[0], together=True)


class StageTrainer:
    """One stage of a run on one process, from its start or from its newest checkpoint."""

    def __init__(
        self,
        run: Run,
        index: int,
        state: State,
        start: Path | None,
        processes: Processes,
        progress: Progress,
        stop: Stop,
        rewind: Rewind | None = None,
    ) -> None:
        self.stop, self.rewind = stop, rewind
        self.run, self.recipe, self.start = run, run.recipe, start
        self.processes, self.progress = processes, progress
        self.name = list(self.recipe.stages)[index]
        processes.at(f"the start of {self.name}", state.step, long=True)
        self.stage, self.folder = self.recipe.stages[self.name], run.folder.stage(index, self.name)
        self.last = index == len(self.recipe.stages) - 1
        self.stepper = Stepper(self.recipe, self.stage, start, processes)
        engine = self.stepper.engine
        self.identity = Identity(
            run.id, self.stepper.frozen, engine.zero, self.recipe.engine.precision, processes.size
        )
        self.state, self.resumed = state, False
        processes.at("reading a checkpoint", long=True)
        path = newest_checkpoint(self.folder, processes, progress.say)
        if path is not None:
            if self.identity.check(path):
                restore_moved(engine, path, progress.say)
            else:
                engine.load(path)
            self.state, self.resumed = State.read(path / STATE), True
            self.stepper.guard.in_a_row = self.state.in_a_row
        if rewind is not None:
            self.state.data, self.state.rewinds = rewind.data, rewind.rewinds
        self.stepper.spikes.seen = self.state.spikes
        self.stepper.feed.go_to(self.state.data)

    def train(self) -> State:
        """The loop. Returns the state at the end of the stage."""
        with Watcher(self) as watcher, self.saver_for(watcher) as self.saver:
            with self.stop.at_step_ends():
                self.take_steps(watcher)
            with self.stop.at_once():
                watcher.at_end()
                self.finish(watcher)
        return self.state

    def take_steps(self, watcher: Watcher) -> None:
        """Steps until the stage's budget or the data is used up; Requeue where a process wants to stop.

        Ends with a checkpoint in any case: nothing that follows can lose a step.
        """
        state, stepper, stop, saved = self.state, self.stepper, self.stop, self.resumed
        while self.made < 1:
            self.processes.at("data", state.step + 1)
            tally = stepper.step(
                stepper.feed.next_step(stepper.clock),
                step=state.step,
                stage_step=state.stage_step,
                progress=self.made,
                norms=watcher.line_is_due(state.stage_step + 1),
                save=watcher.save_is_wanted(),
                stop=stop.wanted(self.recipe.train, steps=1) is not None,
                unsaved=self.saver.failed,
            )
            self.saver.after_step(tally.unsaved)
            if tally.empty:
                self.progress.say(f"stage {self.name} ends early: the data's epochs are used up")
                break
            self.go_back_after(tally)
            state.add(tally)
            stop.steps += 1
            watcher.after_step(tally)
            if saved := tally.stop or watcher.save_is_due(tally):
                self.save(watcher, now=tally.stop)
            if tally.stop:
                reason = stop.wanted(self.recipe.train) or "another process was asked to stop"
                raise Requeue(f"{reason}; saved after step {state.step:,}", together=True)
        if not saved:
            self.save(watcher)
        self.saver.settle()

    @property
    def made(self) -> float:
        """The share of the stage's budget that is done."""
        if self.stage.steps is not None:
            return self.state.stage_step / self.stage.steps
        return self.state.stage_tokens / self.stage.tokens

    def go_back_after(self, tally: Tally) -> None:
        """Raise Rewind after a spike, if the stage may go back once more and has a checkpoint. Collective."""
        settings, state = self.recipe.train.spike, self.state
        if not tally.spike or state.rewinds >= settings.rewinds:
            return
        self.saver.settle()
        if self.processes.gather(bool(self.folder.candidates()))[0]:
            about = {"from_step": state.step + 1, "keys": self.stepper.guard.blamed, **tally.spike}
            raise Rewind(self.stepper.feed.state(), state.rewinds + 1, about)

    def saver_for(self, watcher: Watcher) -> Saver:
        """What writes the stage's checkpoints."""
        recipe, engine = self.recipe, self.stepper.engine
        minutes, say = recipe.engine.timeout_minutes, self.progress.say
        return Saver(engine, self.folder, self.identity, recipe.train, minutes, watcher.event, say)

    def save(self, watcher: Watcher, now: bool = False) -> None:
        """Write a training checkpoint, or begin to; `now`: it must be on the disk. Collective."""
        self.processes.at("save")
        self._complete_state(watcher)
        self.saver.save(self.state, now=now)
        watcher.saved()

    def finish(self, watcher: Watcher) -> None:
        """Write the stage's export, in the master weights' precision, and mark it as done. Collective."""
        self._complete_state(watcher)
        error, model = None, self.whole_model()
        with self.processes.alone("export"):
            if self.processes.main:
                try:
                    save_export(self.folder.export, model, self.stepper.processor)
                    write_done(self.folder, self.state)
                except ValueError as problem:
                    error = str(problem)
        self.processes.agree(error)
        self.stepper.close()

    def whole_model(self) -> Any:
        """The model as trained so far: whole, plain, fp32, on the CPU of the main process. Collective."""
        weights = self.stepper.engine.learned_weights()
        if not self.processes.main:
            return None
        model = start_model(self.recipe, self.start)
        prepare(model, self.stage, self.recipe.engine.activation_checkpointing)
        load_learned(model, weights)
        merge_lora(model)
        return model

    def _complete_state(self, watcher: Watcher) -> None:
        self.state.data = self.stepper.feed.state()
        self.state.metrics_bytes = watcher.recorder.bytes
        self.state.seconds = watcher.seconds
