"""The genetic search for a rank of every matrix.

In: a run and its factor bases. Out: the ranks of the smallest model confirmed within the tolerance.
`stage.run_search` sets it up and `loop.lead` runs it: `breeding` proposes candidates of a `genome.SearchSpace`,
`correction` adapts the predicted losses, `scoring` scores candidates on growing slices, `ranking` compares them,
`study` stores them in Optuna, `confirm` tests the winner on unseen examples; `summary` and `page` describe the result.
"""
