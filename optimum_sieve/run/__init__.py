"""The context of one run, and its files. Imports nothing of the other stages.

In: model, tokenizer, tasks, settings. Out: `context.Run`, which every stage reads: it holds them, the targets, the
work directory (`workdir.WorkDir`) and the times. `distributed` joins processes; `files` writes files and directories
whole or not at all.
"""
