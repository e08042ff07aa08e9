"""One row for all candidates of an example: its prompt once, then the tree of the candidates' tokens.

In: encoded examples and a model. Out: examples in the arrangement that the model takes (`arrangement`). `tree` builds
trees and divides large examples, `masks` says which token sees which, `probe` tries whether a model honours that.
"""
