"""A page on which one types a row and sees the answers of a pruned and of a dense model side by side.

`python -m optimum_sieve.publish.space_app --model pruned --dense base`. A Space holds this file as `app.py`, with a
`space.json` of the models; it needs gradio and transformers alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def make_page(pruned: Any, dense: Any = None) -> Any:
    """Make a page of gradio.

    Args:
        pruned (`SievePipeline`): Answers rows.
        dense (`SievePipeline`, *optional*): Answers them too, for comparison.
    """
    import gradio

    spec, fields = pruned.spec, list(pruned.fields)
    models = {"pruned": pruned, **({} if dense is None else {"dense": dense})}
    # Of a template that gives the whole list: one choice in each line.
    lists = spec.get("choices") if isinstance(spec.get("choices"), str) else ""

    def answer(*texts: str) -> list[Any]:
        row = {
            name: text.splitlines() if lists and name in lists else text
            for name, text in zip(fields, texts, strict=True)
        }
        return [_shown(model(row)) for model in models.values()]

    with gradio.Blocks(title=spec["name"]) as page:
        gradio.Markdown(f"# {_plain(spec['name'])}\n\n{_scores(spec)}")
        boxes = [gradio.Textbox(label=name, lines=3) for name in fields]
        button = gradio.Button("Answer", variant="primary")
        with gradio.Row():
            kind = gradio.Textbox if spec["kind"] == "generate" else gradio.Label
            shown = [kind(label=f"{name} model") for name in models]
        button.click(answer, inputs=boxes, outputs=shown, api_name="answer")
        boxes[-1].submit(answer, inputs=boxes, outputs=shown)
    return page


def _shown(answer: dict[str, Any]) -> Any:
    """Return what a label or a text box shows."""
    if "index" in answer:
        return {answer["prediction"]: answer["probabilities"][answer["index"]]}
    return answer.get("probabilities", answer["prediction"])


def _scores(spec: dict[str, Any]) -> str:
    """Return the scores of a task as a sentence."""
    results = spec.get("results", {})
    scores = [
        f"{side} {results[side]['score']:.3f} ± {results[side]['standard_error']:.3f}"
        for side in ("pruned", "tuned", "dense")
        if side in results
    ]
    if not scores:
        return ""
    return f"{_plain(str(results['metric']))} on {results['count']:,} examples: {', '.join(scores)}."


def _plain(text: str) -> str:
    """Return a text without what Markdown and HTML read as more."""
    return "".join(letter if letter.isalnum() or letter in " .,:-" else " " for letter in text)


def load(model: str, dense: str | None = None, task_name: str | None = None) -> tuple[Any, Any]:
    """Load the pipelines of a pruned model and, if it is named, of a dense one with the same task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    make: Any = pipeline
    pruned = make("sieve", model=model, task_name=task_name, trust_remote_code=True)
    if dense is None:
        return pruned, None
    task = {"format_version": 1, "tasks": [pruned.spec]}
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    return pruned, type(pruned)(model=loaded, tokenizer=tokenizer, task="sieve", task_file=task)


def main() -> None:
    """Start the page."""
    beside = Path(__file__).with_name("space.json")
    models = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=models.get("model"), required=not models, help="the pruned model")
    parser.add_argument("--dense", default=models.get("dense"), help="a dense model, for comparison")
    parser.add_argument("--task-name", default=models.get("task_name"), help="one of several tasks")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also make a public link, by gradio's servers")
    arguments = parser.parse_args()
    page = make_page(*load(arguments.model, arguments.dense, arguments.task_name))
    page.launch(server_port=arguments.port, share=arguments.share)


if __name__ == "__main__":
    main()
