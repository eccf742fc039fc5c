"""What is watched: metrics.jsonl, TensorBoard, the progress bar.

`RUN/metrics.jsonl`, written by the main process only, holds one JSON object a line. Every line has

    step         optimizer steps done since the start of the run, over all stages (skipped steps count)
    stage        the stage's name
    stage_step   steps done in this stage
    kind         "train" | "validation" | "probe" | "event"
    seconds      training seconds of the run so far (restarts included)
    source_tokens  source tokens (before compression) read so far, all ranks

and, by kind (a figure that could not be measured is left out):

    train, every `log_every` steps; rates and shares are over the steps since the last line, the rest of this step
        loss         nats per loss-bearing token, over the global batch
        loss_tokens  loss-bearing tokens of the step, all ranks
        task_loss    {task: nats per token}       task_tokens  {task: loss-bearing tokens}
        grad_norm    {component: norm before clipping, "all": norm}
        lr           {group: rate}                 groups are "<component>" or "<component>.muon"
        step_seconds, source_tokens_per_second, positions_per_second (decoder positions holding something)
        mfu          share of `train.peak_tflops`, or of the measured matrix-multiplication rate
        waste        {"positions"|"rows"|"latents": padded share of the pack's budget}
        data_wait    share of the time spent waiting for data
        overhead     share of the time spent outside the model's forward and backward passes
        memory_gib   peak memory of the main process (device memory on CUDA)
        skipped      steps skipped so far because of a non-finite loss or gradient
    validation       loss, loss_tokens, task_loss, task_tokens, on held-out data
    probe            probes: what `lclm.eval.probes.run_probes` returned
    event            event: "start" | "resume" | "stage_start" | "stage_end" | "skip" | "checkpoint" | "fit" |
                     "done", and figures of its own (skip: reason, keys; fit: factor, step_seconds; ...)

On resume the lines after the checkpoint's step are cut off, so a step appears once. TensorBoard holds the same
figures under `<kind>/<name>` and `<kind>/<name>/<key>`.
"""

from __future__ import annotations
