"""Adapters of PEFT as the model to prune: found by their files (`files`), merged into their base model (`merging`).

In: a directory or Hub id with an adapter_config.json in place of a model, or a `PeftModel`. Out: a plain model.
"""
