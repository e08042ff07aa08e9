"""The HTML page of a pruned model, and that of several.

In: the content of `sieve_report.json` and, if asked for, examples. Out: `report.html` (`page.report_page`), the picture
of the card (`page.card_picture`) or a comparison (`compare.comparison_page`), each one file that fetches nothing.
Figures are SVG: `marks` and `plot` draw, `sizes`, `ranks` and `curves` say what. `load` finds and checks reports.
Without torch.
"""
