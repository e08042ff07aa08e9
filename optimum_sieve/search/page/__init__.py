"""The HTML page of a search.

In: the summary in a work directory. Out: `search.html` with its plots (`page.write_page`, `figures`). Torch-free.
"""
