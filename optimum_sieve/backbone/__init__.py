"""Load and inspect any transformers model, dense or pruned. Knows nothing of tasks, ranks or healing.

In: a model id, directory or loaded model. Out: the loaded model (`loading.load_model`), its kind (`kinds`), the layers
to prune (`targets.find_targets`), block-by-block execution (`blockwise`), hooks on its layers (`hooks.Watch`), its
sizes, its fingerprint and the latency of its layers.
"""
