"""Output of a run: result, directory, report, model card, Hub upload.

In: the pruned model and its scores. Out: a `SieveResult` (`result.make_result`), its directory
(`result.save_result`) with `sieve_report.json` (`report`) and the card (`card.build_card`, with the commands of
`reproduction`), and a pushed repository (`hub.push_folder`). `directory.save_directory` writes every model, those of
exports and of merged adapters too, and `saved.save_model` its weights: they are loaded again and compared.
"""
