"""What a model takes over from the one that it was made of, besides weights: licence, its files, languages (`terms`).

In: a directory or Hub id. Out: keys for a model card, and texts by the name of their file. Does not import torch.
"""
