"""What a run leaves behind: result, report, model card, Hub upload.

In: the pruned model and its scores. Out: a `SieveResult` (`result.make_result`), `sieve_report.json` (`report`), the
card (`card.build_card`), and a pushed repository (`hub.push_folder`).
"""
