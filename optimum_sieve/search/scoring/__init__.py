"""Score a rank pattern on examples, slice by slice, against the dense model.

In: ranks. Out: an `Outcome` after each slice (`scorer`), from the likelihood of candidates (`by_likelihood`) or from
written answers (`by_text`).
"""
