"""Try a pruned model on a page, beside the dense one: `python examples/gradio_app.py --model pruned --dense base`.

`optimum-cli sieve push --space user/name` puts the same page on the Hub.
"""

from __future__ import annotations

from optimum_sieve.publish.space_app import main


if __name__ == "__main__":
    main()
