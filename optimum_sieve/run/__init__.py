"""The context of one run, and its files. Imports no stage.

In: model, tokenizer, tasks, settings. Out: `context.Run`, which holds them, the targets, the work directory
(`workdir.WorkDir`) and the times, makes cache keys and is read by every stage. `distributed` connects processes;
`signals` ends one cleanly.

Files: `files` writes files and directories atomically, under the locks of `reservation` and by the rules of `outputs`
and `contents` for what may be replaced; `checksum` notices altered files, `scratch` makes private directories and
`spool` stores tensors there.
"""
