"""The built-in base model, and everything it was made from.

Knows nothing of preference learning. `make.py` writes `model/` from nothing but a seed: the
corpus (`values.py`, `phrasings.py`, `requests.txt`, `corpus.py`), the tokenizer, the training
(`train.py`). `measure.py` prints what the result can do, `effect.py` what MIPO does to it, and
`verdicts.py` whether the evaluation's verdicts are right.
"""
