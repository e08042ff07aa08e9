"""Load, inspect, time and train any transformers model, dense or pruned. Reads no task and chooses no rank.

In: a model id, directory or loaded model. Out: the loaded model (`loading.load_model`), its kind (`kinds`), the layers
to prune (`targets.find_targets`), block-by-block execution (`blockwise`), hooks on its layers (`hooks.Watch`), its
sizes and its fingerprint. `latency` measures a run's layers by rank; `training` trains given parameters alone.
"""
