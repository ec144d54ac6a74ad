"""Where a run reports what it does.

The trainer talks to one object, the :class:`~emu35.log.metrics.MetricLogger`. It works out the
throughput, decides which steps become a row, and hands each row, a flat mapping from name to
number, to its sinks in order::

    trainer -> MetricLogger -> Console        one live line on a terminal, plain lines in a file
                            -> MetricsFile    metrics.jsonl, the record of the run
                            -> CurvesFile     curves.html, redrawn after every validation
                            -> TensorBoard, wandb (when asked for)

``metrics.jsonl`` is the record that tools and people rely on, so it gets the care: one JSON object
a line, never NaN (``null`` instead), each training step at most once however often the run was
killed and resumed, a half-written last line repaired, rows kept back and written later when the
disk is full for a while. The other sinks are views. A view that fails says so once and is dropped;
training goes on.

Only rank 0 reports. Other ranks get a logger with the same methods that does nothing.
"""
