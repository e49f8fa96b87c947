"""Arrays in, arrays out: Linen modules, checkpoint layouts and processors. Nothing here knows a dataset, a task or a
label.

Public: ``registry.architecture`` (config.json -> module), ``weights.load_params`` / ``save_checkpoint``,
``processor.load_processor``, ``batch.Batch`` and the modules themselves.
"""
