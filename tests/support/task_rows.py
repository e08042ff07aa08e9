"""Rows for the task files of `examples/tasks`, and the answers that they must give."""

from __future__ import annotations

from typing import Any


ENTITIES = [
    [{"text": "Lesch - Nyhan syndrome", "type": "Disease"}, {"text": "gout", "type": "Disease"}],
    [{"text": "US Latin", "type": "playlist"}],
]
# Two rows of each data set, made up, and the answers that the task file makes of them.
ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "banking77": (
        [{"text": "Where is it", "label": "card_arrival"}, {"text": "No", "label": "reverted_card_payment?"}],
        [" card arrival", " reverted card payment"],
    ),
    "gsm8k": (
        [
            {"question": "1 + 2?", "answer": "That is 1 + 2 = <<1+2=3>>3\n#### 3", "final": "3"},
            {"question": "1,000?", "answer": "#### 1,000", "final": "1000"},
        ],
        [" That is 1 + 2 = <<1+2=3>>3\n#### 3\nQuestion:", " #### 1,000\nQuestion:"],
    ),
    "medmcqa": (
        [
            {"question": "Which?", "choices": ["a", "b", "all", "all"], "answer": "B"},
            {"question": "Why?", "choices": ["w", "x", "y", "z"], "answer": "D"},
        ],
        ["b", "z"],
    ),
    "ncbi_disease_ner": (
        [{"text": "A syndrome .", "entities": ENTITIES[0]}, {"text": "Nothing .", "entities": []}],
        ["Lesch - Nyhan syndrome\ngout\n\n", "none\n\n"],
    ),
    "nq_open_oracle": (
        [
            {"question": "where is it", "context": "There.", "answers": ["there", "here"], "title": "It"},
            {"question": "when was it", "context": "In 1958.", "answers": ["1958"], "title": "Other"},
        ],
        [" there\n", " 1958\n"],
    ),
    "pubmedqa": (
        [
            {"question": "Does it?", "context": "It may.", "answer": "maybe", "pmid": "1"},
            {"question": "Did it?", "context": "No.", "answer": "no", "pmid": "2"},
        ],
        [" maybe", " no"],
    ),
    "snips": (
        [{"text": "Play it", "label": "PlayMusic", "entities": []}, {"text": "Rain?", "label": "GetWeather"}],
        [" play music", " get the weather"],
    ),
    "snips_slots": (
        [{"text": "Add it", "label": "x", "entities": ENTITIES[1] * 2}, {"text": "Go", "label": "x", "entities": []}],
        ["playlist: US Latin\nplaylist: US Latin\n\n", "none\n\n"],
    ),
    "squad_xquad_en": (
        [
            {"question": "What?", "context": "This.", "answers": ["This"], "title": "A"},
            {"question": "Who?", "context": "He.", "answers": ["He"], "title": "B"},
        ],
        [" This\n", " He\n"],
    ),
    "uci_sentences": (
        [{"text": "Good", "label": "positive", "source": "imdb"}, {"text": "Bad", "label": "negative"}],
        [" positive", " negative"],
    ),
}
