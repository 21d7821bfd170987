"""The built-in base model, and everything it was made from.

Knows nothing of preference learning. `make.py` writes `model/` from nothing but a seed: the
corpus (`values.py`, `phrasings.py`, `requests.py`, `corpus.py`), the tokenizer, the training
(`train.py`). `measure.py` prints what the result can do.
"""
