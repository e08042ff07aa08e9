"""What the package asks of any transformers model, dense or pruned.

In: a model id, directory or loaded model. Out: the loaded model (`loading.load_model`), its kind (`kinds`), the
layers to prune (`targets.find_targets`), its blocks (`blockwise`), hooks on its layers (`hooks.Watch`), its sizes,
its fingerprint and the latency of its layers. Nothing here knows tasks, ranks or healing.
"""
