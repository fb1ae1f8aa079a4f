"""Runs the training loop: `train`, from the first step or a checkpoint to the last step."""

from collections.abc import Mapping
from pathlib import Path

from expert_parallel.model.transformer import LanguageModel
from expert_parallel.parallel.mesh import ParallelMesh
from expert_parallel.runtime.process import Runtime
from expert_parallel.training.config import Config
from expert_parallel.training.failures import forget_failure, refuse_to_repeat, stop_not_finite
from expert_parallel.training.generate import generate_texts, open_prompt_tokenizer
from expert_parallel.training.health import HealthMonitor
from expert_parallel.training.health_advice import health_sentence
from expert_parallel.training.metrics import ThroughputTimer, format_progress_line, memory_metrics, step_metrics
from expert_parallel.training.out_of_memory import explain_out_of_memory
from expert_parallel.training.resume import StopSignal
from expert_parallel.training.run import set_up_run
from expert_parallel.training.run_lock import own_run_folder
from expert_parallel.training.start import STARTS, OpenStart
from expert_parallel.training.step import train_step


def train(
    config: Config, runtime: Runtime, stop: StopSignal | None = None, starts: Mapping[str, OpenStart] = STARTS
) -> bool:
    """Trains to `training.steps`, resuming from the newest checkpoint of `run.folder` if there is one.

    starts: how each kind of `checkpoint.start_from` is opened; `hf` is in `expert_parallel.START_KINDS`. Returns False
    if a signal stopped it earlier, else True.
    """
    with explain_out_of_memory(config, runtime), own_run_folder(Path(config.run.folder), runtime):
        return _train(config, runtime, stop or StopSignal(), starts)


def _train(config: Config, runtime: Runtime, stop: StopSignal, starts: Mapping[str, OpenStart]) -> bool:
    """Trains in a run folder that this run owns; see `train`."""
    refuse_to_repeat(config, runtime)
    run, training = set_up_run(config, runtime, starts), config.training
    announced = forget_failure(config, runtime)
    tokens_per_step = training.global_batch * training.sequence_length
    first_step = run.resume(announced)
    if first_step >= training.steps:
        run.print_rank_0(f"{nothing_left(first_step, training.steps)}; results are in {run.folder}")
        return True
    writer = runtime.run_on_all_ranks(lambda: run.open_metrics(first_step) if runtime.rank == 0 else None)
    if first_step == 0:
        metrics = run.evaluate(0)
        if writer is not None:
            writer.write(0, 0, metrics)

    clock = ThroughputTimer(tokens_per_step)
    health = HealthMonitor(config.run.health, config.model, training.schedule.warmup_steps)
    with run.open_saver() as saver:
        for step in range(first_step, training.steps):
            batches = run.batches(step)
            replay = run.open_replay(step, batches)
            report = train_step(
                run.model, run.engine, batches, training, run.mesh, step=step, seed=config.seed, replay=replay
            )
            run.save_replay(step, batches, replay)
            done = step + 1
            is_last, is_stopped = done == training.steps, stop.any_rank()
            metrics = step_metrics(report, "train")
            if not report.is_finite:
                stop_not_finite(config, runtime, report, run.model, run.engine, batches, run.mesh, step, replay)
            clock.count_step()
            if done % config.run.log_every == 0 or is_last:
                metrics |= clock.read() | memory_metrics(runtime.device)
                run.print_rank_0(format_progress_line(done, training.steps, metrics))
            for events in health.observe(done, metrics):
                run.print_rank_0(f"health: step {done}: {health_sentence(events, config)}")
            with clock.paused():
                if done % config.evaluation.every == 0 or is_last:
                    metrics |= run.evaluate(done)
                # Before the checkpoint: a resumed run drops later metrics, but could not restore missing ones.
                if writer is not None:
                    writer.write(done, done * tokens_per_step, metrics)
                if done % config.checkpoint.every == 0 or is_last or is_stopped:
                    saver.save(done, is_last=is_last or is_stopped)
            if is_stopped:
                break

        if writer is not None:
            writer.close()
        if config.run.sample is not None and done == training.steps:
            run.print_rank_0(f"\n--- sample {'-' * 69}\n{generate_sample(run.config, run.model, run.mesh)}\n{'-' * 80}")
    if done < training.steps:
        run.print_rank_0(f"stopped on SIGUSR1 after step {done}; the same command resumes the run")
        return False
    run.print_rank_0(f"done: {training.steps} steps; metrics, checkpoints and the resolved config are in {run.folder}")
    return True


def nothing_left(done: int, steps: int) -> str:
    """Returns a sentence about a run that has done all its steps, or more than `training.steps` now says."""
    if done > steps:
        return f"this run has done {done} steps and training.steps is {steps}: nothing is left to do"
    return f"this run is finished: {done} of {steps} steps are done"


def generate_sample(config: Config, model: LanguageModel, mesh: ParallelMesh) -> str:
    """Generates the text that `run.sample` asks for."""
    sample = config.run.sample
    assert sample is not None
    tokenizer = open_prompt_tokenizer(config)
    prompts = [sample.prompt]
    (text,) = generate_texts(
        config, model, tokenizer, prompts, num_tokens=sample.length, sampling=sample, seed=config.seed, mesh=mesh
    )
    return text
