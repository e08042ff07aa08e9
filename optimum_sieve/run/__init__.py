"""The context of one run, and its files. Imports no stage.

In: model, tokenizer, tasks, settings. Out: `context.Run`, which holds them, the targets, the work directory
(`workdir.WorkDir`) and the times, makes cache keys and is read by every stage. `distributed` connects processes;
`files` writes files and directories atomically, `checksum` notices altered ones, `scratch` makes private directories and
`spool` stores tensors there.
"""
