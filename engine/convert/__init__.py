"""Checkpoints of other projects to ours and back, strictly; `etude.convert` holds a file a family.

A family's file (`dit.py`, `mmdit.py`, ...) states one table per layout: which of their tensors is
which of ours. `layout.py` applies a table in either direction and says what does not fit.
"""
